"""Classifier-free guidance (Ho & Salimans 2022), as DiT's published figures use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.samplers import Denoise
from runtime.config import InputError

# Plans are opaque here: what a network computes at one timestep. They are compared with `==`.
Predict = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # x (N, C, H, W), t (N,), y (N,), plan -> (N, C or 2C, H, W)
Plans = Callable[[int], tuple[Any, Any]]  # original timestep -> (conditional plan, unconditional plan)


def combine(conditional: Tensor, unconditional: Tensor, scale: float, epsilon_channels: int, channels: int | None) -> Tensor:
    """u + scale (c - u) on the first `channels` epsilon channels (None = all); the rest stays the conditional output's own.

    conditional, unconditional (N, C or 2C, H, W), epsilon_channels = C -> (N, C or 2C, H, W) float32.
    Variance channels are never guided, whatever `channels` says.
    """
    guided = epsilon_channels if channels is None else min(channels, epsilon_channels)
    conditional, unconditional = conditional.float(), unconditional.float()
    c, u = conditional[:, :guided], unconditional[:, :guided]  # (N, guided, H, W)
    return torch.cat((u + scale * (c - u), conditional[:, guided:]), dim=1)


def classifier_free_guidance(
    predict: Predict, labels: Tensor, null_class: int, scale: float, channels: int | None = 3, plans: Plans | None = None
) -> Denoise:
    """A denoiser for the samplers: `predict` for the classes `labels` (N,), guided away from `null_class`.

    `scale` 1 is no guidance and makes no unconditional pass. `channels` = 3 is DiT's published protocol (the fourth latent
    channel is left alone by the code behind the paper's figures), None guides all. Both halves run as one batch of 2N
    where `plans` gives them equal plans, otherwise as two calls of N; without `plans` the plan is None.
    """
    if channels is not None and channels < 1:
        raise InputError(f"Guidance must act on at least 1 channel, not {channels}; for no guidance set its scale to 1.")
    null = torch.full_like(labels, null_class)  # (N,)
    both = torch.cat((labels, null))  # (2N,)

    def denoise(x: Tensor, timestep: int) -> Tensor:
        plan, null_plan = (None, None) if plans is None else plans(timestep)
        t = torch.full_like(both, timestep)  # (2N,)
        count = len(labels)
        if scale == 1.0:
            return predict(x, t[:count], labels, plan)
        if plan == null_plan:
            conditional, unconditional = predict(torch.cat((x, x)), t, both, plan).chunk(2)
        else:
            conditional = predict(x, t[:count], labels, plan)
            unconditional = predict(x, t[:count], null, null_plan)
        return combine(conditional, unconditional, scale, x.shape[1], channels)

    return denoise
