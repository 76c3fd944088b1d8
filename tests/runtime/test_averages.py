"""Losses between two log lines are means over the steps that count."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from small_runs import alone

from runtime.averages import LossAverages


def test_a_step_that_is_not_finite_is_in_no_mean() -> None:
    with alone():
        averages = LossAverages([range(500), range(500, 1000)], Accelerator(cpu=True))
        for low, high in ((1.0, 5.0), (float("nan"), 2.0), (2.0, 6.0)):
            for interval, loss in enumerate((low, high)):
                averages.add({"loss": torch.tensor(loss), "mse": torch.tensor(loss / 2)}, interval, 1 / 2)
            averages.end_step(torch.tensor(low == low))
        # Known bad: three steps divided by, 14 / 6.
        assert averages.take() == {"loss": 3.5, "mse": 1.75, "loss_at_t/0-499": 1.5, "loss_at_t/500-999": 5.5}
        averages.add({"loss": torch.tensor(float("inf"))}, 0, 1.0)
        averages.end_step(torch.tensor(False))
        assert averages.take() == {}


def test_a_name_that_comes_and_goes_is_averaged_over_its_own_steps() -> None:
    with alone():
        averages = LossAverages([range(1000)], Accelerator(cpu=True))
        for loss, more in ((1.0, {"complete/loss": 4.0}), (3.0, {"complete/loss": float("nan")}), (5.0, {}), (6.0, {})):
            averages.add({"loss": torch.tensor(loss), **{name: torch.tensor(one) for name, one in more.items()}}, 0, 1.0)
            averages.end_step(torch.tensor(loss != 3.0))
        # Known bad: 4 / 3 steps; and the step that was not finite counted in.
        assert averages.take() == {"loss": 4.0, "complete/loss": 4.0}
        averages.add({"loss": torch.tensor(2.0)}, 0, 1.0)
        averages.end_step(torch.tensor(True))
        assert averages.take() == {"loss": 2.0}
        averages.add({"loss": torch.tensor(2.0), "late": torch.tensor(1.0)}, 0, 1.0)
        averages.end_step(torch.tensor(False))
        averages.add({"loss": torch.tensor(7.0)}, 0, 1.0)
        averages.end_step(torch.tensor(True))
        assert averages.take() == {"loss": 7.0}  # no 0 / 0 of what only a step had that does not count


def test_a_number_for_each_layer_keeps_its_place() -> None:
    with alone():
        averages = LossAverages([range(1000)], Accelerator(cpu=True))
        for micro in (1.0, 3.0):
            averages.add({"loss": torch.tensor(micro), "layers/kept": torch.tensor([micro, 0.0])}, 0, 1 / 2)
        averages.end_step(torch.tensor(True))
        taken = averages.take()
        assert taken == {"loss": 2.0, "layers/kept/00": 2.0, "layers/kept/01": 0.0}
        assert next(iter(taken)) == "loss"
