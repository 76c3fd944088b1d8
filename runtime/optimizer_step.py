"""What follows the gradients of a training step: the norm, the optimizer, the average. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from runtime.ema import ExponentialMovingAverage
from runtime.settings import TrainingSettings


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW in one kernel, which also can be told on the device to do nothing."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Outcome(NamedTuple):
    """What became of a step, on the device."""

    norm: Tensor  # () of the gradients, before they were clipped
    finite: Tensor  # () bool
    large: Tensor  # () bool: finite, and above the norm from which on updates are left out


def update(
    network: nn.Module,
    optimizer: Any,
    ema: ExponentialMovingAverage,
    settings: TrainingSettings,
    step: int,
    accelerator: Accelerator,
) -> Outcome:
    """Applies the accumulated gradients, unless they are not finite or too large, and moves the average.

    `optimizer` is what accelerate made of `make_optimizer`'s; it may train more than the `network`, which is averaged. A step
    that is left out leaves weights and moments as they are; for the average it is a step on which the weights stood still.
    """
    accelerator.unscale_gradients(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = [parameter for parameter in trained if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # Gradients are reduced over the processes, so all of them decide alike.
    finite = torch.isfinite(norm)
    most = math.inf if settings.skip_gradient_norm is None else settings.skip_gradient_norm
    large = finite & (norm > most)
    if settings.gradient_clip is not None:
        clip_grads_with_norm_(parameters, settings.gradient_clip, norm)
    # Where this says 1 the kernel leaves everything as it is: torch's gradient scaler tells it so. Through the scaler's own
    # `step` it would judge each gradient alone, not their norm.
    adamw = optimizer.optimizer
    adamw.found_inf = (~finite | large).float()
    adamw.step()
    del adamw.found_inf
    if accelerator.scaler is not None:
        accelerator.scaler.update()
    optimizer.zero_grad()
    ema.update(network, step)
    return Outcome(norm, finite, large)


def learning_rate(settings: TrainingSettings, step: int, last_step: int) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then constant or a half cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, last_step - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
