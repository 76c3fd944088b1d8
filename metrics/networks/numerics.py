"""How torch's networks compute: float32, or TF32 where torch's switch for matrix products says so; within the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.config import InputError


def uses_tf32(device: torch.device) -> bool:
    """Whether matrix products on `device` may drop to TF32 (10 bits of mantissa) now; off unless someone asked for it."""
    return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


def backend_name(tf32: bool) -> str:
    """What stands with the numbers."""
    return "PyTorch TF32" if tf32 else "PyTorch float32"


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Within it, convolutions and matrix products use TF32 where `tf32`, float32 otherwise.

    cuDNN's own switch allows TF32 unless told otherwise, and either may have been moved since the network was named.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def room_for_weights() -> Iterator[None]:
    """Raises InputError where the GPU runs out of memory within it, before there is a batch that could be smaller."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError("the GPU has too little free memory for the feature network; end what else runs on it.") from None


@contextmanager
def room_for_batch(count: int) -> Iterator[None]:
    """Raises InputError where the GPU runs out of memory within it, while it works on `count` pictures."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(f"the GPU has too little free memory for {count} pictures at once; "
                         f"lower --batch-size (it is {count}).") from None  # fmt: skip
