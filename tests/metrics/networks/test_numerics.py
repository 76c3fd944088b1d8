"""Precision of torch's networks on a GPU; torch's switches exist on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from metrics.networks.numerics import backend_name, convolutions, uses_tf32

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


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions_follow_and_the_switch_is_put_back(before: bool, tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = before
    with convolutions(tf32):
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is before
    with pytest.raises(KeyError), convolutions(not before):
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is before
