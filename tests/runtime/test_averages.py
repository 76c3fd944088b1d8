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
