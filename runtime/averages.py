"""Losses between two log lines: their means over steps, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class LossAverages:
    """Sums of losses over finite steps, by name, and of the total by interval of timesteps. Only `take` reads the device.

    A name that only some steps have is averaged over those.
    """

    def __init__(self, intervals: Sequence[range], accelerator: Accelerator) -> None:
        self.intervals, self.accelerator = intervals, accelerator
        self._empty()
        self._begin_step()

    def add(self, parts: Mapping[str, Tensor], interval: int, share: float) -> None:
        """Losses of a micro-batch, `share` of the step's, each () or (K,).

        They are copied: a CUDA graph may write over its outputs.
        """
        for name, value in parts.items():
            self._step[name] = self._step.get(name, 0.0) + value.float() * share
        if len(self.intervals) > 1:
            self._step_by_interval[0, interval] += parts["loss"]
            self._step_by_interval[1, interval] += 1

    def end_step(self, finite: Tensor) -> None:
        """Counts the step in, or leaves it out where its gradients were not `finite` () bool."""
        self._steps += finite
        for name, value in self._step.items():
            total, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.where(finite, 0.0), steps + finite
        if len(self.intervals) > 1:
            self._by_interval += self._step_by_interval.where(finite, 0.0)
        self._begin_step()

    def take(self) -> dict[str, float]:
        """The means since the last call, "loss" first; empty where no step was finite. (K,) comes as NAME/00, NAME/01 ...

        Where there are several intervals, "loss_at_t/FIRST-LAST" is the mean of those that some process drew. The processes
        draw different ones, so sums and counts are added before dividing.
        """
        values: dict[str, float] = {}
        steps = int(self._steps)  # the same on every process, as all skip the same steps
        if steps:
            means = self.accelerator.reduce(torch.cat([self._mean(name) for name in self._names()]), reduction="mean")
            labels = [label for name in self._names() for label in self._labels(name)]
            averages = dict(zip(labels, means.tolist(), strict=True))
            values = {"loss": averages.pop("loss"), **averages}
        if steps and len(self.intervals) > 1:
            sums, counts = self.accelerator.reduce(self._by_interval, reduction="sum").tolist()
            for timesteps, total, count in zip(self.intervals, sums, counts, strict=True):
                if count:
                    values[f"loss_at_t/{timesteps.start}-{timesteps.stop - 1}"] = total / count
        self._empty()
        return values

    def _names(self) -> list[str]:
        """What some finite step had."""
        return [name for name in sorted(self._sums) if self._sums[name][1] > 0]

    def _mean(self, name: str) -> Tensor:
        """-> (K,), or (1,) for a scalar"""
        total, steps = self._sums[name]
        return torch.atleast_1d(total / steps)

    def _labels(self, name: str) -> list[str]:
        total, _ = self._sums[name]
        return [name] if total.ndim == 0 else [f"{name}/{place:02d}" for place in range(len(total))]

    def _empty(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        self._by_interval = torch.zeros(2, len(self.intervals), device=self.accelerator.device)  # sums of losses; how many

    def _begin_step(self) -> None:
        self._step: dict[str, Tensor] = {}
        if len(self.intervals) > 1:  # where there is one, no step pays for it
            self._step_by_interval = torch.zeros_like(self._by_interval)  # (2, intervals)
