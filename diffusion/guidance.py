"""Guidance at all steps or in an interval of them: classifier-free (Ho & Salimans 2022), as DiT's published figures use it, and
path-drop (SPRINT, arXiv 2510.21986), whose unconditional half leaves out most of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.denoising import Denoise
from diffusion.schedule import TIMESTEPS, plan_timestep
from runtime.config import InputError

# x (N, C, H, W); t (1,), the timestep of all; y (R,), the different labels; plan; index (N,): sample i has label y[index[i]],
# or None where it has y[i] -> (N, C or 2C, H, W). Plans are opaque here: what a network computes at one timestep. They are
# compared with `==`.
Predict = Callable[[Tensor, Tensor, Tensor, Any, Tensor | None], Tensor]
Plans = Callable[[int], tuple[Any, Any]]  # original timestep -> (conditional plan, unconditional plan)


class Planner(Protocol):
    """What a network says of its passes at an original timestep, 0 .. 999."""

    def plan(self, t: int) -> Any:
        """Its pass."""

    def guidance_plans(self, t: int) -> tuple[Any, Any]:
        """Those of the conditional and the unconditional half."""

    def cheap_plan(self, t: int) -> Any | None:
        """A pass that leaves out most of the network; None where there is none."""


def classifier_free(network: Planner) -> Plans:
    """Both halves as the network has them."""
    return network.guidance_plans


def path_drop(network: Planner) -> Plans:
    """The unconditional half by the network's cheap path (SPRINT, section 3.4). InputError where it has none."""
    if network.cheap_plan(0) is None:
        raise InputError(
            "--guidance path-drop needs a network with a cheap path, and this method has none; leave the flag out."
        )
    return lambda t: (network.plan(t), network.cheap_plan(t))


GUIDANCE: dict[str, Callable[[Planner], Plans]] = {"classifier-free": classifier_free, "path-drop": path_drop}
"""What the halves of guidance compute, by name."""


class Interval(NamedTuple):
    """Where guidance acts (Kynkäänniemi et al. 2024): low <= t <= high, with t the timestep / 1000, 0 clean and 1 noise."""

    low: float
    high: float

    @classmethod
    def of(cls, bounds: Sequence[float] | None) -> Interval:
        """The interval with these bounds; everywhere for None. InputError unless 0 <= low <= high <= 1."""
        low, high = (0.0, 1.0) if bounds is None else bounds
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"--guidance-interval is {low} {high}; give LOW HIGH with 0 <= LOW <= HIGH <= 1, the part of the "
                "timesteps, from clean (0) to noise (1), in which guidance acts."
            )
        return cls(low, high)

    def holds(self, timestep: float) -> bool:
        """Whether the timestep, 0 .. 1000, lies in the interval."""
        return self.low <= timestep / TIMESTEPS <= self.high


class LabelRows(NamedTuple):
    """The labels of a batch, each different one once where that is fewer."""

    rows: Tensor  # (R,) int64
    row_of: Tensor | None  # (N,) int64, each sample's row; None: sample i has row i


def combine(conditional: Tensor, unconditional: Tensor, scale: float, epsilon_channels: int, channels: int | None) -> Tensor:
    """u + scale (c - u) on the first `channels` epsilon channels (None = all); the rest stays the conditional output's own.

    conditional, unconditional (N, C or 2C, H, W), epsilon_channels = C -> (N, C or 2C, H, W) float32.
    Variance channels are never guided, whatever `channels` says.
    """
    guided = epsilon_channels if channels is None else min(channels, epsilon_channels)
    conditional, unconditional = conditional.float(), unconditional.float()
    c, u = conditional[:, :guided], unconditional[:, :guided]  # (N, guided, H, W)
    return torch.cat((u + scale * (c - u), conditional[:, guided:]), dim=1)


def check_guidance(scale: float, channels: int | None) -> None:
    """InputError for what no guidance can be."""
    if not math.isfinite(scale):
        raise InputError(f"--cfg-scale is {scale}; it must be finite.")
    if channels is not None and channels < 1:
        raise InputError(f"Guidance must act on at least 1 channel, not {channels}; for no guidance set its scale to 1.")


def label_rows(labels: Tensor, null_class: int) -> tuple[LabelRows, LabelRows, LabelRows]:
    """The labels (N,) alone, with as many null classes after them, and the null classes alone."""
    null = torch.full_like(labels, null_class)  # (N,)
    nowhere = torch.zeros_like(labels)  # (N,), each the first row
    if len(labels) > null_class:  # fewer classes than samples: the rows are the classes
        rows = torch.arange(null_class + 1, device=labels.device)
        return LabelRows(rows, labels), LabelRows(rows, torch.cat((labels, null))), LabelRows(null[:1], nowhere)
    places = torch.arange(len(labels), device=labels.device)
    with_null = LabelRows(torch.cat((labels, null[:1])), torch.cat((places, nowhere + len(labels))))
    return LabelRows(labels, None), with_null, LabelRows(null[:1], nowhere)


def guided(
    predict: Predict,
    labels: Tensor,
    null_class: int,
    scale: float,
    channels: int | None = 3,
    plans: Plans | None = None,
    interval: Interval | None = None,
) -> Denoise:
    """A denoiser for the samplers: `predict` for the classes `labels` (N,), guided away from `null_class`.

    `scale` 1 is no guidance and makes no unconditional pass, nor does a step outside `interval` (None: everywhere).
    `channels` = 3 is DiT's published protocol (the fourth latent channel is left alone by the code behind the paper's
    figures), None guides all. `plans` is what an entry of GUIDANCE makes of the network. Both halves run as one batch of 2N
    where it gives them equal plans, otherwise as two calls of N; without `plans` the plan is None. Labels are classes
    0 .. null_class - 1.
    """
    check_guidance(scale, channels)
    interval = interval or Interval.of(None)
    alone, both, null = label_rows(labels, null_class)

    def denoise(x: Tensor, timestep: float) -> Tensor:
        plan, null_plan = (None, None) if plans is None else plans(plan_timestep(timestep))
        t = torch.full((1,), timestep, device=labels.device)
        if scale == 1.0 or not interval.holds(timestep):
            return predict(x, t, alone.rows, plan, alone.row_of)
        if plan == null_plan:
            conditional, unconditional = predict(torch.cat((x, x)), t, both.rows, plan, both.row_of).chunk(2)
        else:
            conditional = predict(x, t, alone.rows, plan, alone.row_of)
            unconditional = predict(x, t, null.rows, null_plan, null.row_of)
        return combine(conditional, unconditional, scale, x.shape[1], channels)

    return denoise
