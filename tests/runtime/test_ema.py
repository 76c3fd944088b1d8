"""The averaged network follows the textbook formula and shares nothing with the trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from models import checkpoint_blocks, create_model
from runtime.ema import ExponentialMovingAverage
from tests.models.random_networks import network, tiny
from tests.models.random_networks import one_thread as one_thread

Model = TypeVar("Model", bound=nn.Module)

SMALL = tiny("DiT-16x2x2/4")


def moved(model: Model, seed: int) -> Model:
    """The network after an optimizer step of sorts: every trainable weight anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def textbook_error(average_of: Callable[[nn.Module], ExponentialMovingAverage], decay: Callable[[int], float]) -> float:
    """Largest difference from the float64 recursion over 20 steps of random weights."""
    model = network("dense", SMALL)
    average = average_of(model)
    expected = [parameter.detach().double().clone() for parameter in model.parameters()]
    for step in range(20):
        average.update(moved(model, step), step)
        weights = [parameter.detach().double() for parameter in model.parameters()]
        expected = [decay(step) * old + (1 - decay(step)) * new for old, new in zip(expected, weights, strict=True)]
    ours = [parameter.double() for parameter in average.network.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999, 1.0])
def test_average_is_the_textbook_recursion(decay: float) -> None:
    assert textbook_error(lambda model: ExponentialMovingAverage(model, decay, warmup=False), lambda step: decay) < 1e-5


def test_warm_up_follows_its_formula() -> None:
    def decay(step: int) -> float:
        return min(0.6, (1 + step) / (10 + step))

    assert textbook_error(lambda model: ExponentialMovingAverage(model, 0.6, warmup=True), decay) < 1e-5
    # Known bad: without the warm-up, or counted from 1.
    assert textbook_error(lambda model: ExponentialMovingAverage(model, 0.6, warmup=False), decay) > 1e-3
    assert textbook_error(lambda model: ExponentialMovingAverage(model, 0.6, warmup=True), lambda step: decay(step + 1)) > 1e-3


def test_decay_of_a_step() -> None:
    average = ExponentialMovingAverage(nn.Linear(2, 2), 0.9999, warmup=True)
    assert [average.decay_at(step) for step in (0, 1, 90)] == pytest.approx([0.1, 2 / 11, 0.91])
    assert average.decay_at(10**6) == 0.9999
    assert ExponentialMovingAverage(nn.Linear(2, 2), 0.9999, warmup=False).decay_at(0) == 0.9999


def test_it_is_a_copy_without_gradients_in_evaluation_mode() -> None:
    model = network("sparsedit", tiny("DiT-16x8x2/4")).train()
    average = ExponentialMovingAverage(model, 0.9, warmup=False)
    assert type(average.network) is type(model)
    assert not average.network.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    before = copy.deepcopy(average.network.state_dict())
    moved(model, 9)
    assert all(torch.equal(value, before[key]) for key, value in average.network.state_dict().items())


def test_an_update_changes_the_average_alone() -> None:
    model = network("dense", SMALL)
    average = ExponentialMovingAverage(create_model("dense", SMALL), 0.5, warmup=False)
    before: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    average.update(model, 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(average.network.state_dict()["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def test_a_position_table_stays_bit_for_bit() -> None:
    model = network("dense", SMALL)
    average = ExponentialMovingAverage(model, 0.9999, warmup=True)
    for step in range(30):
        average.update(moved(model, step), step)
    assert torch.equal(average.network.pos_embed, model.pos_embed)


def test_the_average_of_half_precision_weights_is_float32() -> None:
    average = ExponentialMovingAverage(network("dense", SMALL).bfloat16(), 0.9, warmup=False)
    assert all(parameter.dtype == torch.float32 for parameter in average.network.parameters())


def test_an_average_of_a_checkpointed_network_is_its_own() -> None:
    model = network("dense", SMALL)
    checkpoint_blocks(model)
    average = ExponentialMovingAverage(model, 0.9, warmup=False)
    before = average.network(torch.ones(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1]))
    moved(model, 4)
    assert torch.equal(average.network(torch.ones(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1])), before)
