"""Numbers of the device that the host reads late, so that it never waits for the step it has just begun."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class LaggedReads:
    """Small tensors that come to the host `lag` calls after they were put in: with 1, step s - 1's when step s is under way.

    The lag is a fixed number of steps, not whatever has arrived: all processes read the same step's at the same step.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: Tensor) -> list[tuple[int, list[float]]]:
        """Begins to copy `values` (K,) of `step`, and returns (step, values) of those that are due, oldest first."""
        if values.is_cuda:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            copy.copy_(values, non_blocking=True)
            arrived: torch.cuda.Event | None = torch.cuda.current_stream(values.device).record_event()
        else:
            copy, arrived = values.clone(), None
        self._waiting.append((step, copy, arrived))
        return self._read(self.lag)

    def settle(self) -> list[tuple[int, list[float]]]:
        """Waits for all that was put in, and returns it."""
        return self._read(0)

    def _read(self, remaining: int) -> list[tuple[int, list[float]]]:
        due = []
        while len(self._waiting) > remaining:
            step, copy, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            due.append((step, on_host(copy)))
        return due


def on_host(copy: Tensor) -> list[float]:
    """The numbers of a copy that has arrived."""
    return copy.tolist()
