"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


class ExponentialMovingAverage(Generic[Network]):
    """A float32 copy of a network that follows it: average = decay * average + (1 - decay) * weight.

    With `warmup` the decay of step s is min(decay, (1 + s) / (10 + s)), so that a short run's average is not dominated by
    the initial weights.
    """

    def __init__(self, network: Network, decay: float, warmup: bool) -> None:
        self.network: Network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self._averages = list(self.network.parameters())

    def decay_at(self, step: int) -> float:
        """The decay of optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards `network`, after optimizer step `step`."""
        weights = [parameter.detach() for parameter in network.parameters()]
        get_ema_multi_avg_fn(self.decay_at(step))(self._averages, weights, None)
