"""Random numbers as a pure function of (seed, purpose, step, sample index).

No stream is ever advanced: what sample i draws at step s does not depend on the rank, the batch it shares, what was drawn
before, or whether the run was resumed. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), written in torch integer operations so that it runs on the device that needs the numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WITHOUT_FLOAT64 = {"mps"}
"""Kinds of device that have no float64: their draws are made on the CPU and copied."""


def exact_type(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no other."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


@dataclass(frozen=True)
class Keys:
    """Names the draws of a batch: one seed, one step, one index per sample (its place in the global batch or sample set)."""

    seed: int
    step: int | Tensor  # a tensor () int64 where a compiled graph must not depend on the number
    index: Tensor  # (N,) int64, each in [0, 2**32)

    def on(self, device: torch.device) -> Keys:
        """The same keys with their tensors on `device`."""
        step = self.step.to(device) if isinstance(self.step, Tensor) else self.step
        return replace(self, step=step, index=self.index.to(device))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit counter words (int64 tensors that broadcast) -> four 32-bit random words (int64 tensors)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # An int64 product wraps, yet its low 64 bits are right: the mask recovers the unsigned high word.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def uniform(keys: Keys, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Independent uniform numbers in (0, 1). -> (N, *shape) float32 on the device of `keys.index`."""
    # 23 bits and a half are exact in float32: the half keeps both ends open, where a 24th bit would round up to 1.
    words = _words(keys, purpose, math.prod(shape))  # (N, count)
    return _shaped(words, shape, lambda w: ((w >> 9).double() + 0.5) * 2.0**-23).float().to(keys.index.device)


def normal(keys: Keys, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Independent standard normal numbers (Box-Muller). -> (N, *shape) float32 on the device of `keys.index`."""
    count = math.prod(shape)
    words = (_words(keys, purpose, count + count % 2).double() + 0.5) * 2.0**-32  # (N, even)
    # float64, so that the last bit of a device's logarithm cannot change the float32 that comes out.
    radius, angle = torch.sqrt(-2.0 * torch.log(words[:, 0::2])), 2.0 * math.pi * words[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)  # (N, even / 2, 2)
    return pairs.flatten(1)[:, :count].float().reshape(len(keys.index), *shape).to(keys.index.device)


def integers(keys: Keys, purpose: str, high: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Independent integers, uniform on [0, high), high <= 2**31. -> (N, *shape) int64 on the device of `keys.index`.

    `high` may be a tensor () int64, where a compiled graph must not depend on the number.
    """
    words = _words(keys, purpose, math.prod(shape))  # (N, count)
    bound = high.to(words.device) if isinstance(high, Tensor) else high
    return _shaped(words, shape, lambda w: (w * bound) >> 32).to(keys.index.device)


def permutation(seed: int, purpose: str, epoch: int, size: int) -> np.ndarray:
    """A random order of 0 .. size - 1 named by (seed, purpose, epoch). -> (size,) int64"""
    low, high = key_words(seed, purpose)
    # An array of its type: numpy turns a list with a number above 2**63 into float64, which drops the key's last bits.
    key = np.array([low | high << 32, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


def key_words(seed: int, purpose: str) -> tuple[int, int]:
    """The generator's key, two 32-bit words. A compiler cannot look into the hash: it must take the result as a constant."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(keys: Keys, purpose: str, count: int) -> Tensor:
    """`count` random 32-bit words for every sample. -> (N, count) int64; on the CPU where the keys' device has no float64"""
    if keys.index.device.type in _WITHOUT_FLOAT64:
        keys = keys.on(torch.device("cpu"))
    index = keys.index.reshape(-1, 1)  # (N, 1)
    block = torch.arange((count + 3) // 4, device=index.device).reshape(1, -1)  # (1, ceil(count / 4))
    step = torch.zeros_like(index) + keys.step  # (N, 1)
    words = philox((block, index, step, torch.zeros_like(step)), key_words(keys.seed, purpose))
    return torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)[:, :count]  # (N, count)


def _shaped(words: Tensor, shape: tuple[int, ...], convert) -> Tensor:
    return convert(words).reshape(len(words), *shape)
