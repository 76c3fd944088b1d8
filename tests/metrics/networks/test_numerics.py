"""Precision of torch's networks on a GPU; torch's switches exist on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from metrics.networks.numerics import backend_name, float32_products, room_for_batch, room_for_weights, uses_tf32
from runtime.config import InputError

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_switch_for_products_decides() -> None:
    for convolutions_too in (False, True):
        torch.backends.cudnn.allow_tf32 = convolutions_too
        torch.backends.cuda.matmul.allow_tf32 = False
        assert (backend_name(uses_tf32(GPU)), backend_name(uses_tf32(CPU))) == ("PyTorch float32", "PyTorch float32")
        torch.backends.cuda.matmul.allow_tf32 = True
        assert (backend_name(uses_tf32(GPU)), backend_name(uses_tf32(CPU))) == ("PyTorch TF32", "PyTorch float32")


@pytest.mark.parametrize("before", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_follow_and_the_switches_are_put_back(before: tuple[bool, bool], tf32: bool) -> None:
    def switched() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    with float32_products(tf32):
        assert switched() == (tf32, tf32)
    assert switched() == before
    with pytest.raises(KeyError), float32_products(not tf32):
        raise KeyError
    assert switched() == before


def test_a_gpu_that_is_full_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"for 64 pictures at once; lower --batch-size \(it is 64\)\."), room_for_batch(64):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(InputError, match="for the feature network; end what else runs on it"), room_for_weights():
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="another"), room_for_weights(), room_for_batch(64):
        raise RuntimeError("another")
