"""What only a CUDA device can show of DyDiT: one wait a block, and the masked numbers. `make gpu-test`, or `pytest -m gpu`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from models.dydit import MASKED
from runtime.distributed import set_numerics
from runtime.execution import Execution, Executor
from tests.models.random_networks import distance, inputs, network, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """What tests before this one leave to the process."""
    set_numerics(tf32=False)
    torch.compiler.reset()
    with torch.no_grad():
        yield


@contextmanager
def waits() -> Iterator[list[Any]]:
    """Each wait of the host for the device, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronizing(seen: list[Any]) -> int:
    return sum("synchroniz" in str(warning.message) for warning in seen)


def step(model: Any, count: int = 4) -> tuple[Any, ...]:
    x, _, _ = inputs(model.backbone, count)
    labels, index = torch.tensor([3, 1, 10], device=CUDA), torch.arange(count, device=CUDA) * 2 % 3
    return x.to(CUDA), torch.tensor([500], device=CUDA), labels, model.plan(500), index


@pytest.mark.parametrize("compiled", ["none", "default"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_once_a_block(precision: str, compiled: str) -> None:
    model: Any = network("dydit", tiny()).to(CUDA)
    executor = Executor(model, Execution(CUDA, precision, compiled, cuda_graphs=True))
    assert not executor.execution.cuda_graphs
    arguments = step(model)
    executor(*arguments)  # cuts the slices, and compiles
    with waits() as seen:
        executor(*arguments)
    assert synchronizing(seen) == len(model.blocks)
    with waits() as seen:
        executor(*arguments)[0, 0, 0, 0].item()  # planted
    assert synchronizing(seen) == len(model.blocks) + 1


@pytest.mark.parametrize("compiled", ["none", "default"])
def test_gathered_is_masked(compiled: str) -> None:
    model: Any = network("dydit", tiny()).to(CUDA)
    x, t, y, plan, index = step(model)
    masked = model(x, t.expand(len(x)), y[index], MASKED)
    assert distance(Executor(model, Execution(CUDA, compile=compiled))(x, t, y, plan, index), masked) < 1e-5
