"""Weights packed for a CPU's products: the numbers of the plain ones, up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import METHODS, DiT
from models.slices import SliceableLinear
from runtime.config import InputError
from runtime.execution import Execution, ExecutionSettings, Executor, resolve_execution
from runtime.packed_weights import can_pack
from tests.models.random_networks import distance, inputs, network, tiny

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


def predictions(model: DiT, predict: Any, count: int) -> Tensor:
    """Of `count` samples, which is as many ways to multiply."""
    x, _, _ = inputs(model.backbone, count, 1)
    with torch.no_grad():
        return predict(x, torch.tensor([500]), torch.tensor([3, 1, 10]), model.plan(500), index=torch.arange(count) % 3)


def plain(model: DiT) -> Any:
    return lambda x, t, y, plan, index: model(x, t, y, plan, index=index)


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("method", METHODS)
def test_packed_weights_are_the_same_products(method: str, count: int) -> None:
    model = network(method, tiny())
    packed = Executor(copy.deepcopy(model), Execution(CPU, packed_weights=True))
    expected = predictions(model, plain(model), count)
    assert distance(predictions(model, packed, count), expected) < 1e-5
    layers = [layer for layer in packed.network.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        multiplied = layer.slice((0,)) if isinstance(layer, SliceableLinear) else layer
        assert multiplied.weight.is_mkldnn
    assert packed.network.mean_macs() == model.mean_macs()
    layers[-1].bias.data += 1e-3  # planted
    assert distance(predictions(model, packed, count), expected) > 1e-5


@pytest.mark.parametrize("chosen", [{"precision": "bf16"}, {"compile": "default"}])
def test_packing_that_cannot_be_is_refused(chosen: dict[str, Any]) -> None:
    assert not resolve_execution(ExecutionSettings(**chosen), CPU).packed_weights
    with pytest.raises(InputError, match="--pack-weights is for a CPU"):
        resolve_execution(ExecutionSettings(**chosen, pack_weights=True), CPU)
