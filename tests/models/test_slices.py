"""Slices of Linears: the masked product's numbers, kept while the weights are what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.slices import MOST_SLICES, Slice, SliceableLinear, linear
from runtime.ema import ExponentialMovingAverage
from tests.models.random_networks import randomized

SETS = [(0,), (0, 2), (1, 3), (0, 1, 2, 3)]


def layer_of(along: Any, parts: int = 1) -> Any:
    outputs, inputs = (24, 16) if along == "outputs" else (16, 24)
    return randomized(SliceableLinear(inputs, outputs, 4, along, parts))


def mask(active: tuple[int, ...], size: int) -> Tensor:
    """(size,), 1 in the groups that are on"""
    return torch.tensor([float(group in active) for group in range(4)]).repeat_interleave(size)


@pytest.mark.parametrize("active", SETS)
@pytest.mark.parametrize("parts", [1, 3])
def test_outputs_of_a_slice_are_those_of_the_whole(active: tuple[int, ...], parts: int) -> None:
    layer, x = layer_of("outputs", parts), torch.randn(5, 16)
    there = mask(active, 24 // 4 // parts).repeat(parts).bool()
    torch.testing.assert_close(linear(x, layer.slice(active)), layer(x)[:, there])


@pytest.mark.parametrize("active", SETS)
def test_inputs_of_a_slice_are_those_that_count(active: tuple[int, ...]) -> None:
    layer, x = layer_of("inputs"), torch.randn(5, 24)
    there = mask(active, 6)
    torch.testing.assert_close(linear(x[:, there.bool()], layer.slice(active)), layer(x * there))


def test_the_multiply_accumulates_of_a_slice_are_its_weights() -> None:
    for layer in (layer_of("outputs", 3), layer_of("inputs")):
        for active in SETS:
            assert layer.macs(len(active), 7) == 7 * layer.slice(active).weight.numel()


# Kept ----------------------------------------------------------------------------------------------------------------


def test_a_slice_is_cut_once_and_the_least_recently_used_goes() -> None:
    layer = layer_of("outputs")
    sets = [(first, second) for first in range(4) for second in range(first + 1, 4)]
    first = layer.slice(sets[0])
    for active in sets[1:MOST_SLICES]:
        layer.slice(active)
    assert layer.slice(sets[0]) is first
    layer.slice(sets[MOST_SLICES])  # sets[1] goes
    assert len(layer._slices) == MOST_SLICES
    assert layer.slice(sets[0]) is first
    for active in sets[1:]:
        layer.slice(active)
    assert layer.slice(sets[0]) is not first


def in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def bias_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.bias.add_(1)


def state_dict(layer: Any) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def assigned_state_dict(layer: Any) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)


def another_parameter(layer: Any) -> None:
    """Twice: the second may lie where the one before the first lay."""
    for _ in range(2):
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 2


def another_type(layer: Any) -> None:
    layer.double()


def rounded_and_back(layer: Any) -> None:
    """The memory of the first weight is free meanwhile, and the last may come to lie there."""
    layer.half().float()


def optimizer_step(layer: Any, fused: bool = False) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused).step()


def fused_optimizer_step(layer: Any) -> None:
    """It writes past the version counters."""
    versions = [parameter._version for parameter in layer.parameters()]
    optimizer_step(layer, fused=True)
    assert versions == [parameter._version for parameter in layer.parameters()]


CHANGES = [in_place, bias_in_place, state_dict, assigned_state_dict, another_parameter, other_data, another_type,
           rounded_and_back,            optimizer_step, fused_optimizer_step]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: Callable[[Any], None]) -> None:
    layer = layer_of("outputs")
    before = layer.slice((0, 2))
    assert layer.slice((0, 2)) is before
    change(layer)
    after = layer.slice((0, 2))
    there = mask((0, 2), 6).bool()
    assert torch.equal(after.weight, layer.weight[there])
    assert torch.equal(after.bias, layer.bias[there])
    assert after is not before


def test_an_averaged_network_s_slices_follow_the_average() -> None:
    layer = layer_of("inputs")
    average = ExponentialMovingAverage(layer, 0.9, warmup=False)
    kept: Any = average.network
    before = kept.slice((0, 1)).weight
    in_place(layer)
    average.update(layer, 0)
    assert torch.equal(kept.slice((0, 1)).weight, kept.weight[:, :12])
    assert not torch.equal(kept.slice((0, 1)).weight, before)


def test_a_copy_cuts_its_own() -> None:
    layer = layer_of("outputs")
    before = layer.slice((0, 2))
    copied = copy.deepcopy(layer)
    in_place(copied)
    assert torch.equal(copied.slice((0, 2)).weight, 2 * before.weight)
    assert layer.slice((0, 2)) is before


def test_the_execution_lays_slices_out_again() -> None:
    layer = layer_of("outputs")
    plain = layer.slice((0, 2))
    layer.lay_out = lambda part: Slice(part.weight + 1, part.bias)
    assert torch.equal(layer.slice((0, 2)).weight, plain.weight + 1)
    layer.lay_out = None
    assert torch.equal(layer.slice((0, 2)).weight, plain.weight)


def test_a_slice_computes_no_gradient() -> None:
    assert not any(part.requires_grad for active in SETS for part in layer_of("outputs").slice(active))


def test_what_is_forgotten_is_cut_again() -> None:
    layer = layer_of("outputs")
    kept = layer.slice((0, 2))
    layer.forget()
    again = layer.slice((0, 2))
    assert again is not kept
    assert torch.equal(again.weight, kept.weight)
