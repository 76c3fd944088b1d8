"""One update: what leaves the weights alone, and what says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import WithScaler, alone
from torch import Tensor, nn

from runtime.ema import ExponentialMovingAverage
from runtime.optimizer_step import Outcome, make_optimizer, update
from runtime.settings import TrainingSettings


@dataclass
class Parts:
    """What an update works on."""

    network: nn.Linear
    optimizer: Any
    ema: ExponentialMovingAverage
    accelerator: Accelerator
    settings: TrainingSettings

    def step(self, size: float, number: int) -> Outcome:
        """An update with a gradient of the norm `size`."""
        loss = (self.network.weight * direction()).sum() * size
        self.accelerator.backward(loss)
        return update(self.network, self.optimizer, self.ema, self.settings, number, self.accelerator)

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.optimizer.state_dict()["state"].get(0, {})
        return {"weight": self.network.weight.detach().clone(), **{name: value.clone() for name, value in moments.items()}}


def direction() -> Tensor:
    """Of length 1."""
    values = torch.linspace(-1, 2, 8).view(2, 4)
    return values / values.norm()


@contextmanager
def parts(make: Any = Accelerator, **chosen: Any) -> Iterator[Parts]:
    with alone():
        torch.manual_seed(0)
        network, accelerator = nn.Linear(4, 2, bias=False), make(cpu=True)
        settings = TrainingSettings(**chosen)
        optimizer = accelerator.prepare(make_optimizer(list(network.parameters()), settings))
        yield Parts(network, optimizer, ExponentialMovingAverage(network, 0.5, False), accelerator, settings)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [Accelerator, WithScaler])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_above_the_limit_leaves_weights_and_moments(make: Any, clip: float | None) -> None:
    """The limit is of the norm before clipping. Without one the same gradient moves everything."""
    for limit in (2.0, None):
        with parts(make, skip_gradient_norm=limit, gradient_clip=clip) as made:
            small = made.step(1.9, 0)
            before = made.state()
            large = made.step(2.1, 1)
            assert float(large.norm) == pytest.approx(2.1)
            assert (bool(small.large), bool(large.large)) == (False, limit is not None)
            assert bool(small.finite)
            assert bool(large.finite)
            assert same(before, made.state()) == (limit is not None)
            assert float(made.state()["step"]) == (1.0 if limit else 2.0)


def test_the_average_moves_on_as_if_weights_stood_still() -> None:
    with parts(skip_gradient_norm=2.0) as made:
        made.step(1.0, 0)
        average = made.ema.network.weight.clone()
        made.step(3.0, 1)
        torch.testing.assert_close(made.ema.network.weight, (average + made.network.weight) / 2)


def test_what_is_not_finite_is_not_too_large() -> None:
    with parts(skip_gradient_norm=2.0) as made:
        made.step(1.0, 0)
        before = made.state()
        for size in (float("inf"), float("nan")):
            outcome = made.step(size, 1)
            assert (bool(outcome.finite), bool(outcome.large)) == (False, False)
        assert same(before, made.state())


def test_a_large_gradient_is_no_overflow_for_the_scaler() -> None:
    """It would halve its scale; its growth goes on."""
    with parts(WithScaler, skip_gradient_norm=2.0) as made:
        assert isinstance(made.accelerator, WithScaler)
        scaler = made.accelerator.scaler
        scale = scaler.get_scale()
        for number in range(3):
            assert scaler.get_scale() == scale
            assert bool(made.step(5.0, number).large)
        assert scaler.get_scale() == 2 * scale
        made.step(float("inf"), 3)
        assert scaler.get_scale() == scale


def test_what_is_left_out_goes_into_no_later_step() -> None:
    with parts(skip_gradient_norm=2.0) as made:
        made.step(5.0, 0)
        assert made.network.weight.grad is None
        made.step(1.0, 1)
        after = made.state()["weight"]
    with parts() as fresh:
        fresh.step(1.0, 0)
        torch.testing.assert_close(fresh.state()["weight"], after)
