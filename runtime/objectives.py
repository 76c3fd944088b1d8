"""What a run is trained for, by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from diffusion.flow import FlowObjective
from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule, Timesteps
from runtime.seeding import Keys
from runtime.settings import TrainingSettings


class Objective(Protocol):
    """What is noised and predicted, and the loss of a prediction."""

    def noised(self, x0: Tensor, keys: Keys, timesteps: Timesteps) -> Any:
        """Draws timesteps within `timesteps`, and noise: an object with `x_t` (N, C, H, W), `t` (N,) that `losses` takes."""

    def losses(self, output: Tensor, noised: Any) -> Mapping[str, Tensor]:
        """Losses per sample, each (N,): "loss" is the total, the others are its parts."""

    def timestep_at(self, share: float) -> int:
        """The timestep, 0 .. 999, below or in which `share` of all draws lie."""


def make_objective(settings: TrainingSettings) -> Objective:
    """The objective of settings that `with_objective` completed."""
    if settings.objective == "flow":
        assert settings.flow_times is not None
        return FlowObjective(settings.flow_times, settings.timestep_strata)
    return EpsilonObjective(
        NoiseSchedule.linear(), settings.min_snr_gamma, bool(settings.learn_sigma), settings.timestep_strata
    )
