"""In which precision torch's networks compute: float32, or TF32 where torch's switch for matrix products says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def uses_tf32(device: torch.device) -> bool:
    """Whether matrix products on `device` may drop to TF32 (10 bits of mantissa) now; off unless someone asked for it."""
    return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


def backend_name(tf32: bool) -> str:
    """What stands with the numbers."""
    return "PyTorch TF32" if tf32 else "PyTorch float32"


@contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    """Convolutions in the precision of matrix products: cuDNN's own switch allows TF32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
