"""Flow matching on the linear path (SiT, arXiv 2401.08740; SPRINT, arXiv 2510.21986): times, loss, samplers.

x_t = (1 - t) x_0 + t e runs from data at t = 0 to noise at t = 1; a network predicts its velocity v = e - x_0. Elsewhere time
is a timestep, 1000 t: plans, guidance intervals and networks are the same as under DDPM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion.denoising import Callback, Denoise, StepNoise
from diffusion.schedule import TIMESTEPS, Timesteps, plan_timestep
from runtime.config import InputError
from runtime.seeding import Keys, exact_type, normal, uniform

LAST_NOISY_TIMESTEP = 40
"""Where Euler-Maruyama's noisy steps end; the rest of the way is one step."""
MOST_STEPS = 100_000

Times = Literal["uniform", "logit-normal"]


class Noised(NamedTuple):
    """A training batch: what the network sees, and what its prediction is scored against."""

    x_t: Tensor  # (N, C, H, W) float32
    t: Tensor  # (N,) float32, timesteps: 1000 times the flow time
    velocity: Tensor  # (N, C, H, W) float32


def interpolate(x0: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """The linear path. x0, noise (N, C, H, W), time (N,) in [0, 1] -> (N, C, H, W) float32"""
    time = time.float().reshape(-1, *[1] * (x0.ndim - 1))  # (N, 1, 1, 1)
    return (1 - time) * x0.float() + time * noise.float()


def share_below(times: Times, time: Tensor) -> Tensor:
    """The share of training's times that are smaller. time (...) in [0, 1] -> (...)"""
    return time if times == "uniform" else torch.special.ndtr(torch.logit(time))


def time_at(times: Times, share: Tensor) -> Tensor:
    """The time of which `share` (...) of training's times are smaller: the inverse of `share_below`. -> (...)

    logit-normal: the sigmoid of a standard normal number.
    """
    return share if times == "uniform" else torch.sigmoid(torch.special.ndtri(share))


class FlowObjective:
    """The mean squared error of the velocity, at times that are uniform or logit-normal.

    `strata`: the times are cut into so many parts of equal probability, and the sample at place i of the batch draws from part
    i mod `strata`.
    """

    def __init__(self, times: Times, strata: int = 1) -> None:
        self.times: Times = times
        self.strata = strata

    def noised(self, x0: Tensor, keys: Keys, timesteps: range | Timesteps | None = None) -> Noised:
        """Draws times, within `timesteps` / 1000 (None: everywhere), and noise for a training batch x0 (N, C, H, W).

        What each sample draws is a function of its key and of `timesteps`.
        """
        drawn = range(TIMESTEPS) if timesteps is None else timesteps
        exact = exact_type(x0.device)
        bounds = torch.stack([torch.as_tensor(bound, device=x0.device) for bound in (drawn.start, drawn.stop)])  # (2,)
        first, last = share_below(self.times, bounds.to(exact) / TIMESTEPS)  # () each
        within = (keys.index % self.strata + uniform(keys, "time").to(exact)) / self.strata  # (N,)
        time = time_at(self.times, first + (last - first) * within)  # (N,)
        noise = normal(keys, "noise", tuple(x0.shape[1:]))  # (N, C, H, W)
        return Noised(interpolate(x0, time, noise), (TIMESTEPS * time).float(), noise - x0.float())

    def losses(self, output: Tensor, noised: Noised) -> dict[str, Tensor]:
        """output (N, C, H, W) -> "loss", (N,)"""
        if output.shape != noised.velocity.shape:
            raise ValueError(f"a velocity of shape {tuple(noised.velocity.shape)} is asked for, not {tuple(output.shape)}")
        return {"loss": (output.float() - noised.velocity).square().flatten(1).mean(1)}

    def timestep_at(self, share: float) -> int:
        """The timestep, 0 .. 999, in which the time lies of which `share` of the draws are smaller."""
        return plan_timestep(TIMESTEPS * float(time_at(self.times, torch.tensor(share, dtype=torch.float64))))


# Samplers ------------------------------------------------------------------------------------------------------------


def step_count(steps: str) -> int:
    """The number in `--num-sampling-steps`. InputError for what is none."""
    if not re.fullmatch(r"[0-9]+", steps.strip()) or not 1 <= int(steps) <= MOST_STEPS:
        raise InputError(f"Sampling steps {steps!r} are not understood: under flow give a number from 1 to {MOST_STEPS:,}.")
    return int(steps)


def even_ends(steps: int) -> list[float]:
    """The ends of `steps` equal steps, as timesteps: 1000, ..., 0."""
    return [TIMESTEPS * (steps - step) / steps for step in range(steps + 1)]


def noisy_ends(steps: int) -> list[float]:
    """The ends of Euler-Maruyama's steps, as timesteps: evenly from 1000 to 40, and then 0."""
    way = TIMESTEPS - LAST_NOISY_TIMESTEP
    return [*(TIMESTEPS - way * step / max(1, steps - 1) for step in range(steps)), 0.0]


def euler_timesteps(steps: str) -> list[float]:
    """The timesteps at which `euler` asks the network."""
    return even_ends(step_count(steps))[:-1]


def heun_timesteps(steps: str) -> list[float]:
    """The timesteps at which `heun` asks the network, twice a step."""
    return [timestep for step in pairwise(even_ends(step_count(steps))) for timestep in step]


def euler_maruyama_timesteps(steps: str) -> list[float]:
    """The timesteps at which `euler_maruyama` asks the network."""
    return noisy_ends(step_count(steps))[:-1]


def asking(denoise: Denoise) -> Callable[[Tensor, float], Tensor]:
    """The velocity at (x, timestep): the network sees float32, and its answer is as exact as x."""
    return lambda x, timestep: denoise(x.float(), timestep).to(x.dtype)


@torch.no_grad()
def euler(denoise: Denoise, noise: Tensor, steps: int, callback: Callback | None = None) -> Tensor:
    """The probability flow by Euler's method, of order 1. noise (N, C, H, W) -> latents (N, C, H, W) float64"""
    x, velocity = noise.to(exact_type(noise.device)), asking(denoise)
    for step, (start, end) in enumerate(pairwise(even_ends(steps))):
        v, time = velocity(x, start), start / TIMESTEPS
        x0 = x - time * v
        x = x + (end / TIMESTEPS - time) * v
        if callback is not None:
            callback(step, x, x0)
    return x


@torch.no_grad()
def heun(denoise: Denoise, noise: Tensor, steps: int, callback: Callback | None = None) -> Tensor:
    """The probability flow by Heun's method, of order 2, which asks twice a step. noise, latents (N, C, H, W) float64"""
    x, velocity = noise.to(exact_type(noise.device)), asking(denoise)
    for step, (start, end) in enumerate(pairwise(even_ends(steps))):
        v, time, length = velocity(x, start), start / TIMESTEPS, (end - start) / TIMESTEPS
        x0 = x - time * v
        x = x + length / 2 * (v + velocity(x + length * v, end))
        if callback is not None:
            callback(step, x, x0)
    return x


@torch.no_grad()
def euler_maruyama(
    denoise: Denoise, noise: Tensor, steps: int, step_noise: StepNoise, callback: Callback | None = None
) -> Tensor:
    """The reverse SDE with diffusion 2 t, whose marginals are the path's. noise (N, C, H, W) -> latents (N, C, H, W) float64

    `step_noise` is asked once per step but the last, which follows the drift alone.
    """
    x, velocity = noise.to(exact_type(noise.device)), asking(denoise)
    for step, (start, end) in enumerate(pairwise(noisy_ends(steps))):
        v, time, length = velocity(x, start), start / TIMESTEPS, (end - start) / TIMESTEPS
        x0, score = x - time * v, (-(1 - time) * v - x) / time  # the denominator is t^2 + (1 - t) t
        x = x + length * (v - time * score)
        if end > 0:
            x = x + math.sqrt(2 * time * -length) * step_noise(step).to(x.dtype)
        if callback is not None:
            callback(step, x, x0)
    return x
