"""The machine's own limit: what a large square matrix product reaches on it, at each precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter

import torch

from benchmarks.devices import synchronise
from runtime.distributed import set_numerics

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions whose ceiling is measured. fp8 has none: its products need scales, and there is no plain one to compare with."""
SIDES = {"cpu": 2048}
LARGEST, TRIES = 8192, 5


def ceilings(device: torch.device, precisions: Iterable[str], before: Mapping[str, float] | None = None) -> dict[str, float]:
    """TFLOP/s of the fastest of several products, for each different one of `precisions` that has a ceiling.

    Measured before the contestants and again after them, the higher one counts: a busy moment must not lower the machine.
    """
    earlier = before or {}
    return {name: max(matmul_ceiling(device, name), earlier.get(name, 0.0)) for name in sorted(set(precisions) & set(TYPES))}


@torch.inference_mode()
def matmul_ceiling(device: torch.device, precision: str) -> float:
    """TFLOP/s of the fastest of five square matrix products: 8192 a side on a GPU, 2048 on a CPU. A MAC is two operations."""
    side = SIDES.get(device.type, LARGEST)
    set_numerics(precision != "fp32")
    first, second = (torch.randn(side, side, device=device).to(TYPES[precision]) for _ in range(2))
    torch.mm(first, second)
    seconds = []
    for _ in range(TRIES):
        synchronise(device)
        started = perf_counter()
        torch.mm(first, second)
        synchronise(device)
        seconds.append(perf_counter() - started)
    return 2 * side**3 / min(seconds) / 1e12
