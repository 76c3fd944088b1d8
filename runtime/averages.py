"""Losses between two log lines: their means over steps, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class LossAverages:
    """Sums of losses over finite steps, by name, and of the total by interval of timesteps. Only `take` reads the device."""

    def __init__(self, intervals: Sequence[range], accelerator: Accelerator) -> None:
        self.intervals, self.accelerator = intervals, accelerator
        self._empty()
        self._begin_step()

    def add(self, parts: Mapping[str, Tensor], interval: int, share: float) -> None:
        """The losses of a micro-batch, `share` of the step's. They are copied: a CUDA graph may write over its outputs."""
        for name, value in parts.items():
            self._step[name] = self._step.get(name, 0.0) + value.float() * share
        if len(self.intervals) > 1:
            self._step_by_interval[0, interval] += parts["loss"]
            self._step_by_interval[1, interval] += 1

    def end_step(self, finite: Tensor) -> None:
        """Counts the step in, or leaves it out where its gradients were not `finite` () bool."""
        self._steps += finite
        for name, value in self._step.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.where(finite, 0.0)
        if len(self.intervals) > 1:
            self._by_interval += self._step_by_interval.where(finite, 0.0)
        self._begin_step()

    def take(self) -> dict[str, float]:
        """The means since the last call, "loss" first; empty where no step was finite.

        Where there are several intervals, "loss_at_t/FIRST-LAST" is the mean of those that some process drew. The processes
        draw different ones, so sums and counts are added before dividing.
        """
        values: dict[str, float] = {}
        steps = int(self._steps)  # the same on every process, as all skip the same steps
        if steps:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name] / steps for name in names])
            means = self.accelerator.reduce(means, reduction="mean")
            averages = dict(zip(names, means.tolist(), strict=True))
            values = {"loss": averages.pop("loss"), **averages}
        if steps and len(self.intervals) > 1:
            sums, counts = self.accelerator.reduce(self._by_interval, reduction="sum").tolist()
            for timesteps, total, count in zip(self.intervals, sums, counts, strict=True):
                if count:
                    values[f"loss_at_t/{timesteps.start}-{timesteps.stop - 1}"] = total / count
        self._empty()
        return values

    def _empty(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        self._by_interval = torch.zeros(2, len(self.intervals), device=self.accelerator.device)  # sums of losses; how many

    def _begin_step(self) -> None:
        self._step: dict[str, Tensor] = {}
        if len(self.intervals) > 1:  # where there is one, no step pays for it
            self._step_by_interval = torch.zeros_like(self._by_interval)  # (2, intervals)
