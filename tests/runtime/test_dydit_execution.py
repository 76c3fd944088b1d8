"""DyDiT compiled, in bf16, and what of an execution a pass of varying sizes cannot have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from counted_graphs import Graphs, counted_graphs
from torch import Tensor

from models import Plan, create_model, dynamic_block
from models.dynamic_block import places_on
from runtime import execution
from runtime.config import InputError
from runtime.execution import Execution, Executor
from runtime.sampling import SamplingSettings, sample_latents
from tests.models.random_networks import distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread

CPU = torch.device("cpu")
MOST_GRAPHS = 6
"""Attention and MLP, with a number of heads and tokens that is left open; torch makes one of each for a single one."""


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    with counted_graphs(monkeypatch) as made:
        yield made


def step(model: Any, timestep: int, count: int = 4) -> tuple[Tensor, Tensor, Tensor, Plan, Tensor]:
    x, _, _ = inputs(model.backbone, count)
    return x, torch.tensor([timestep]), torch.tensor([3, 1, 10]), model.plan(timestep), torch.arange(count) * 2 % 3


def compiled(timesteps: range) -> Any:
    """A network that ran compiled at `timesteps`, each time with the plain network's numbers."""
    model: Any = network("dydit", tiny("DiT-48x3x4/2"))
    executor = Executor(copy.deepcopy(model), Execution(CPU, compile="default"))
    for timestep in timesteps:
        arguments = step(model, timestep)
        assert distance(executor(*arguments), model(*arguments[:4], index=arguments[4])) < 1e-5
    return model


def test_no_width_and_no_number_of_tokens_makes_a_graph_of_its_own(graphs: Graphs) -> None:
    model = compiled(range(0, 1000, 20))
    assert len({model.plan(t).selection for t in range(0, 1000, 20)}) > 10
    assert graphs.made <= MOST_GRAPHS
    fed = int((model.work.kept["tokens"] > 0).sum())  # a layer without tokens runs no MLP
    assert graphs.ran == 50 * 3 + fed


@pytest.mark.parametrize("size", ["width", "tokens"])
def test_a_size_that_is_a_constant_is_caught(size: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    if size == "width":
        monkeypatch.setattr(dynamic_block, "any_width", lambda part: part)
    else:
        monkeypatch.setattr(dynamic_block, "any_length", lambda choose: choose)
    compiled(range(0, 1000, 100))
    assert graphs.made > MOST_GRAPHS


def test_the_compiler_keeps_the_numbers() -> None:
    torch._dynamo.reset()
    model: Any = network("dydit", tiny("DiT-16x1x2/2"))
    executor = Executor(copy.deepcopy(model), Execution(CPU, compile="default"))
    arguments = step(model, 500)
    assert distance(executor(*arguments), model(*arguments[:4], index=arguments[4])) < 1e-5
    torch._dynamo.reset()


def test_the_host_waits_once_a_block() -> None:
    """`select` alone asks the device for a number."""
    model: Any = network("dydit", tiny())
    calls = []
    for layer, block in enumerate(model.blocks):
        block.select = lambda logits, layer=layer: calls.append(layer) or places_on(logits)
    arguments = step(model, 500)
    model(*arguments[:4], index=arguments[4])
    assert calls == list(range(8))


def test_nothing_else_of_sampling_reads_a_value() -> None:
    """The whole loop on the meta device, whose tensors have none, with places that are given."""
    with torch.device("meta"):
        model: Any = create_model("dydit", tiny()).eval()
    for block in model.blocks:
        block.select = lambda logits: torch.empty(5, dtype=torch.long, device="meta")
    settings = SamplingSettings(4.0, guidance_interval=(0.2, 0.7), num_sampling_steps="4")
    index, meta = torch.empty(3, dtype=torch.long, device="meta"), torch.device("meta")
    assert sample_latents(model, settings, index, index, 0, meta, Executor(model, Execution(meta))).is_meta
    assert model.work.rates("tokens")[:, 999].tolist() == pytest.approx([5 / (3 * 64)] * 8)
    model.blocks[3].select = places_on
    with pytest.raises(RuntimeError):
        sample_latents(model, settings, index, index, 0, meta, Executor(model, Execution(meta)))


def test_bf16_decides_widths_as_float32_does() -> None:
    model: Any = network("dydit", tiny())
    executor = Executor(copy.deepcopy(model), Execution(CPU, "bf16"))
    halved: Any = executor.network
    assert [halved.plan(t).selection for t in range(1000)] == [model.plan(t).selection for t in range(1000)]
    arguments = step(model, 500)
    exact, ours = model(*arguments[:4], index=arguments[4]), executor(*arguments)
    assert 1e-4 < float((ours - exact).norm() / exact.norm()) < 0.05
    assert halved.blocks[0].attn.qkv.slice((0, 1)).weight.dtype == torch.bfloat16
    tokens = abs(halved.work.rates("tokens")[:, 500] - model.work.rates("tokens")[:, 500])
    assert tokens.max() < 0.05


def test_packed_slices_are_cut_once_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in a row that share a selection multiply by the same packed weights."""
    if not execution.can_pack():
        pytest.skip("this torch has no oneDNN")
    model: Any = network("dydit", tiny())
    executor = Executor(model, Execution(CPU, packed_weights=True))
    executor(*step(model, 500))
    heads, channels = model.plan(500).selection[0]
    before = model.blocks[0].slices(heads, channels)
    executor(*step(model, 500))
    assert all(now is was for now, was in zip(model.blocks[0].slices(heads, channels), before, strict=True))
    assert before.qkv.weight.is_mkldnn


def test_graphs_are_not_recorded_and_fp8_is_refused() -> None:
    model = network("dydit", tiny())
    meta = torch.device("cpu")
    assert not Executor(model, Execution(meta, cuda_graphs=True)).execution.cuda_graphs
    with pytest.raises(InputError, match=r"^--precision fp8 multiplies by whole weights, .*; choose bf16\.$"):
        Executor(model, replace(Execution(meta), precision="fp8"))
