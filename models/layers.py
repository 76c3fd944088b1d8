"""The parts every method is built from: embedders, attention, feed-forward, modulation, the DiT block, the final layer.

Parameter names are DiT's (Peebles & Xie 2023, arXiv 2212.09748), so its checkpoints load without renaming. `macs` beside a
forward counts its multiply-accumulates for one image; the two are kept equal by `tests/models/test_macs.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
"""Length of the sinusoidal timestep embedding."""


@dataclass(frozen=True)
class Plan:
    """What one denoising step computes. `signature` is static and hashable (it keys a compiled graph); `tensors` are data.

    `selection` says which parts of the weights the step runs, as far as no graph depends on it: plans that differ in it are
    different. `timestep` is the one the plan was made for; plans of several timesteps may be equal.
    """

    signature: tuple[Any, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    selection: tuple[Any, ...] = ()
    timestep: int = field(default=0, compare=False)


class Condition(NamedTuple):
    """The conditioning vectors of a batch, each different one once.

    In a guided step all samples share the timestep, and one half of them the null class: what follows from the vectors alone,
    every block's modulation, is computed for the different ones and handed out.
    """

    rows: Tensor  # (R, D)
    row_of: Tensor | None = None  # (N,) int64, each sample's row; None: sample i has row i
    timestep: Tensor | None = None  # (N, D), or (1, D) for all samples: the embedded timestep alone

    def spread(self, values: Tensor) -> Tensor:
        """What was computed from the rows, (R, ...), for each sample: (N, ...)"""
        return values if self.row_of is None else values[self.row_of]


class Float32Linear(nn.Linear):
    """A Linear that mixed precision leaves in float32: where digits that half precision has not decide what comes out.

    On a GPU whose float32 products are TF32, as in published runs, it multiplies so, with three bits more than bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class PatchEmbedder(nn.Module):
    """Latent -> one token per patch: a convolution whose stride is its kernel, computed as a product of flattened patches."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution would lay tokens out channel by channel, and every norm up to the next attention would pay for it.
        weight = self.proj.weight.flatten(1)  # (D, C p p)
        patches = cut_into_patches(x, self.proj.kernel_size[0])  # (N, T, C p p)
        # At low noise the prediction is a small difference of large numbers: they must not be rounded on the way in.
        with without_autocast(x):
            return F.linear(patches.to(weight.dtype), weight, self.proj.bias)  # (N, T, D)

    def macs(self, tokens: int) -> int:
        return linear_macs(self.proj, tokens)


class FlatPatchEmbedder(nn.Module):
    """Latent -> one token per patch: a Linear on the patch's pixels."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Float32Linear(in_channels * patch_size**2, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(cut_into_patches(x, self.patch_size))  # (N, C, H, W) -> (N, T, D)

    def macs(self, tokens: int) -> int:
        return linear_macs(self.proj, tokens)


class TimestepEmbedder(nn.Module):
    """Diffusion timestep -> vector: sinusoids of 128 frequencies, then a two-layer perceptron."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # Neighbouring timesteps differ in digits that half precision has not.
        self.mlp = nn.Sequential(Float32Linear(FREQUENCIES, hidden_size), nn.SiLU(), Float32Linear(hidden_size, hidden_size))

    @staticmethod
    def sinusoids(t: Tensor) -> Tensor:
        """t (N,), any number type -> (N, 256) float32: cosines, then sines, of t / 10000^(k / 128)."""
        angles = t[:, None].float() * timestep_frequencies(t.device)  # (N, 128)
        return torch.cat((angles.cos(), angles.sin()), dim=1)  # (N, 256)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t))  # (N,) -> (N, D)

    def macs(self) -> int:
        return linear_macs(self.mlp[0]) + linear_macs(self.mlp[2])


def timestep_frequencies(device: torch.device | None = None) -> Tensor:
    """-> (128,) float32"""
    half = FREQUENCIES // 2
    return torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=device))


class LabelEmbedder(nn.Module):
    """Class label -> vector. Row `num_classes` is the null class, which guidance and label drop use."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """y (N,) int64; drop (N,) bool or None: where true, the null class takes the label's place -> (N, D)"""
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))


class Attention(nn.Module):
    """Multi-head self-attention, joint projection of queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)  # each (N, heads, T, D / heads)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (N, T, D)

    def macs(self, tokens: int) -> int:
        width = self.proj.in_features
        return tokens * 4 * width**2 + 2 * tokens**2 * width


class CrossAttention(nn.Module):
    """Multi-head attention with queries from one token set and keys and values from another."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        (q,) = split_heads(self.q(queries), 1, self.num_heads)  # (N, heads, Q, D / heads)
        k, v = split_heads(self.kv(keys), 2, self.num_heads)  # each (N, heads, K, D / heads)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (N, Q, D)

    def macs(self, queries: int, keys: int) -> int:
        width = self.proj.in_features
        return 2 * (queries + keys) * width**2 + 2 * queries * keys * width


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))  # (N, T, D)

    def macs(self, tokens: int) -> int:
        return linear_macs(self.fc1, tokens) + linear_macs(self.fc2, tokens)


class ModulatedBlock(nn.Module, ABC):
    """The adaLN-Zero frame of DiT section 3.2: shift, scale and gate around attention and around the feed-forward part.

    Every block has the signature `block(tokens, context, modulation)`: the token stream (N, T, D), what is not the token
    stream, and this block's (N, 6 D) from `modulation`. A method's block says in `forward` what attends to what.
    """

    def __init__(self, attention: nn.Module, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def compile_with(self, compiled: Callable[[Any], Any]) -> None:
        """From now on runs what `compiled` makes of its forward."""
        self.forward = compiled(self.forward)

    def modulation(self, condition: Condition) -> Tensor:
        """Two shifts, scales and gates, (N, 6 D) float32: 1 + scale must not be rounded to half precision."""
        return at_least_float32(condition.spread(self.adaLN_modulation(condition.rows)))

    def feed_forward(self, tokens: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """tokens + gate * MLP(modulated tokens): (N, T, D); shift, scale, gate (N, 1, D)"""
        return torch.addcmul(tokens, gate, self.mlp(modulate(self.norm2(tokens), shift, scale)))  # (N, T, D)

    @abstractmethod
    def macs(self, tokens: int, full: int) -> int:
        """For one image whose token stream holds `tokens` of the `full` map's tokens when the block begins."""

    def modulation_macs(self) -> int:
        return linear_macs(self.adaLN_modulation[1])


class Block(ModulatedBlock):
    """The plain DiT block: self-attention over whatever tokens it is given."""

    attn: Attention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(Attention(hidden_size, num_heads), hidden_size, mlp_ratio)

    def forward(self, tokens: Tensor, context: Any, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, *feed_forward = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        tokens = torch.addcmul(tokens, gate1, self.attn(modulate(self.norm1(tokens), shift1, scale1)))  # (N, T, D)
        return self.feed_forward(tokens, *feed_forward)  # (N, T, D)

    def macs(self, tokens: int, full: int) -> int:
        return self.attn.macs(tokens) + self.mlp.macs(tokens) + self.modulation_macs()


class FinalLayer(nn.Module):
    """Modulated norm, then one Linear from a token to its patch of output channels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = Float32Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, condition: Condition) -> Tensor:
        modulation = at_least_float32(condition.spread(self.adaLN_modulation(condition.rows)))  # (N, 2 D)
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=2)  # each (N, 1, D)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))  # (N, T, p p C)

    def macs(self, tokens: int) -> int:
        return linear_macs(self.linear, tokens) + linear_macs(self.adaLN_modulation[1])


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """A context in which mixed precision is off on the device of `like` (the meta device knows none)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def linear_macs(layer: nn.Module, positions: int = 1) -> int:
    """Multiply-accumulates of a Linear or a stride-is-kernel convolution at `positions` output places."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return positions * layer.weight.numel()


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens (N, T, D), shift and scale (N, 1, D) -> (N, T, D)"""
    return torch.addcmul(shift, tokens, 1 + scale)


def cut_into_patches(x: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C p p), the pixels of a patch channel by channel, rows before columns"""
    cells = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (N, C, rows, p, columns, p)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, T, C p p)


def split_heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(N, T, parts * D) -> `parts` tensors (N, heads, T, D / heads)"""
    return projected.unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(tokens: Tensor) -> Tensor:
    """(N, heads, T, D / heads) -> (N, T, D)"""
    return tokens.transpose(1, 2).flatten(2)


def position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine table, (1, rows * columns, D) float32.

    The first half of the channels encodes the column, the second the row (the order of the released weights); each half is
    sines, then cosines, of position / 10000^(k / (D / 4)). The width must be a multiple of 4.
    """
    k = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1).double() * 10000.0**-k  # (T, D / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)  # (1, T, D)
