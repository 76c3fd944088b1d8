"""Samplers: pure functions from noise to latents over an already guided denoiser. They know timesteps, not methods.

Nothing here reads a tensor back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.denoising import Callback, Denoise, StepNoise
from diffusion.flow import (
    euler,
    euler_maruyama,
    euler_maruyama_timesteps,
    euler_timesteps,
    heun,
    heun_timesteps,
    step_count,
)
from diffusion.gaussian import predicted_moments, predicted_x0, split_output
from diffusion.schedule import NoiseSchedule, respaced_timesteps
from runtime.config import InputError


@torch.no_grad()
def ddpm(
    denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, step_noise: StepNoise, callback: Callback | None = None
) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2). noise (N, C, H, W) -> latents (N, C, H, W) float32

    `step_noise` is asked once per step but the last, to which no noise is added.
    """
    x = noise.float()
    for step, index in enumerate(reversed(range(len(schedule)))):
        output = denoise(x, schedule.timesteps[index])
        moments = predicted_moments(schedule, output, x, index)
        x = moments.mean
        if index > 0:
            x = x + torch.exp(0.5 * moments.log_variance) * step_noise(step)
        if callback is not None:
            callback(step, x, moments.x0)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16). noise (N, C, H, W) -> latents (N, C, H, W) float32

    eta 0 adds no noise and never asks for any; eta 1 is ancestral sampling with the posterior's variance.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"DDIM's eta must be between 0 (no noise) and 1, not {eta}.")
    if eta and step_noise is None:
        raise InputError(f"DDIM with eta {eta} adds noise at each step: give step_noise, or set eta to 0.")
    x = noise.float()
    for step, index in enumerate(reversed(range(len(schedule)))):
        epsilon, _ = split_output(denoise(x, schedule.timesteps[index]), x.shape[1])
        x0 = predicted_x0(schedule, epsilon, x, index)
        previous = float(schedule.alphas_cumprod_previous[index])
        variance = eta**2 * float(schedule.posterior_variance[index])
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - variance) * epsilon
        if variance > 0 and step_noise is not None:
            x = x + math.sqrt(variance) * step_noise(step)
        if callback is not None:
            callback(step, x, x0)
    return x


class Run(Protocol):
    """A sampler as its entry in SAMPLERS runs it; `steps` is the text of `--num-sampling-steps`."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, steps: str, step_noise: StepNoise, callback: Callback | None = None
    ) -> Tensor: ...


class Sampler(NamedTuple):
    """What is to be known of a sampler by its name."""

    objective: str  # "ddpm" or "flow": what its networks were trained under
    timesteps: Callable[[str], list[float]]  # those at which it asks the network, in order; InputError for what are no steps
    run: Run
    calls: int = 1  # how often it asks in a step


def ancestral_timesteps(steps: str) -> list[float]:
    """The timesteps at which `ddpm` and `ddim` ask the network."""
    return list(reversed(respaced_timesteps(steps)))


def respaced(steps: str) -> NoiseSchedule:
    """DiT's schedule with only the steps that `steps` keeps."""
    return NoiseSchedule.linear().respaced(steps)


SamplerName = Literal["ddpm", "ddim", "euler", "heun", "euler-maruyama"]
"""The names in SAMPLERS."""

SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler(
        "ddpm",
        ancestral_timesteps,
        lambda denoise, noise, steps, step_noise, callback=None: ddpm(denoise, noise, respaced(steps), step_noise, callback),
    ),
    "ddim": Sampler(
        "ddpm",
        ancestral_timesteps,
        lambda denoise, noise, steps, step_noise, callback=None: ddim(denoise, noise, respaced(steps), callback=callback),
    ),
    "euler": Sampler(
        "flow",
        euler_timesteps,
        lambda denoise, noise, steps, step_noise, callback=None: euler(denoise, noise, step_count(steps), callback),
    ),
    "heun": Sampler(
        "flow",
        heun_timesteps,
        lambda denoise, noise, steps, step_noise, callback=None: heun(denoise, noise, step_count(steps), callback),
        calls=2,
    ),
    "euler-maruyama": Sampler(
        "flow",
        euler_maruyama_timesteps,
        lambda denoise, noise, steps, step_noise, callback=None: euler_maruyama(
            denoise, noise, step_count(steps), step_noise, callback
        ),
    ),
}
"""Every sampler by name."""

PUBLISHED: dict[str, SamplerName] = {"ddpm": "ddpm", "flow": "euler-maruyama"}
"""The sampler of each objective's published scores."""
