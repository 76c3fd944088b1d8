"""How pictures are sampled: guidance, sampler, steps; the timesteps that these meet, and what a picture costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

from diffusion.guidance import GUIDANCE, Interval
from diffusion.samplers import PUBLISHED, SAMPLERS, Sampler, SamplerName
from diffusion.schedule import plan_timestep
from models import DiT
from runtime.config import InputError, option

Settings = TypeVar("Settings", bound="SamplingSettings")


@dataclass(frozen=True)
class SamplingSettings:
    cfg_scale: float = option(1.5, "guidance scale; 1: none. 1.5 for scores, 4.0 for pictures")
    guidance: Literal["classifier-free", "path-drop"] = option(
        "classifier-free",
        "what the unconditional half computes: a whole pass, or the cheap path of a method that has one (sprint)",
    )
    guidance_channels: Literal["3", "all"] | None = option(
        None, "channels that guidance acts on; none: as published, 3 of networks trained under ddpm, all under flow"
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        "guide only the steps whose timestep / 1000, the flow time, is LOW to HIGH, 0 clean and 1 noise; the others save the "
        "unconditional half; none: all",
        words=("LOW", "HIGH"),
    )
    sampler: SamplerName | None = option(
        None,
        "of networks trained under ddpm: ddpm, ancestral sampling, or ddim with eta 0; under flow: euler or heun (two "
        "passes a step) along the ODE, or euler-maruyama along the SDE; none: as published, ddpm and euler-maruyama",
    )
    num_sampling_steps: str = option(
        "250",
        "sampling steps: 250; under ddpm also a list such as 10,15,20, or ddim25, which is a spacing alone: add --sampler ddim "
        "for its steps",
    )

    def under(self: Settings, objective: str) -> Settings:
        """The settings with sampler and guided channels for networks trained under `objective`. InputError for a sampler that
        is of the other.
        """
        sampler = self.sampler or PUBLISHED[objective]
        if SAMPLERS[sampler].objective != objective:
            fitting = ", ".join(name for name, one in SAMPLERS.items() if one.objective == objective)
            raise InputError(f"--sampler {sampler} is not for networks trained under {objective}; choose from {fitting}.")
        channels = self.guidance_channels or ("3" if objective == "ddpm" else "all")
        return replace(self, sampler=sampler, guidance_channels=channels)


def guided_channels(settings: SamplingSettings) -> int | None:
    """How many channels guidance acts on; None: all."""
    return None if settings.guidance_channels in (None, "all") else int(settings.guidance_channels)


def fitting_sampler(network: DiT, settings: SamplingSettings) -> Sampler:
    """The sampler for what the network was trained under. InputError for one that does not fit."""
    name = settings.under(network.backbone.objective).sampler
    assert name is not None
    return SAMPLERS[name]


def asked_timesteps(network: DiT, settings: SamplingSettings) -> list[float]:
    """The timesteps at which the sampler asks the network, 0 .. 1000, in order. InputError for what are no steps."""
    return fitting_sampler(network, settings).timesteps(settings.num_sampling_steps)


def sampled_timesteps(network: DiT, settings: SamplingSettings) -> list[int]:
    """The original timesteps, 0 .. 999, whose plans a sampling runs, in order. InputError for what are no steps.

    Under flow the network is given the exact time, and its plan, as DyDiT's widths, is that of the timestep at or below.
    """
    return [plan_timestep(timestep) for timestep in asked_timesteps(network, settings)]


class SamplingCost(NamedTuple):
    """What one picture costs."""

    scale: float  # of guidance
    steps: int  # those of a sampler that asks twice a step count twice: guidance is decided anew
    guided_steps: int
    passes: int  # of the network: one a step, and another where it is guided
    macs: int  # multiply-accumulates of all passes
    at_most: bool  # whether passes leave out what they find they can, which nobody knows before
    calls: int  # how often the sampler asks in one of its steps

    def __str__(self) -> str:
        where = "all" if self.guided_steps == self.steps else f"{self.guided_steps} of"
        steps = f"{self.steps} steps"
        if self.calls > 1:
            steps = f"{self.steps} calls of {self.steps // self.calls} steps"
        guidance = f"guidance {self.scale:g} at {where} {steps}" if self.guided_steps else "no guidance"
        most = "at most " if self.at_most else ""
        return f"{guidance}: {self.passes} network passes and {most}{self.macs / 1e12:.4g} TMACs per picture"


def sampling_cost(network: DiT, settings: SamplingSettings) -> SamplingCost:
    """What a picture costs under `settings`, each step under its own plans."""
    timesteps, interval = asked_timesteps(network, settings), Interval.of(settings.guidance_interval)
    calls = fitting_sampler(network, settings).calls
    guided = [t for t in timesteps if settings.cfg_scale != 1.0 and interval.holds(t)]
    halves = GUIDANCE[settings.guidance](network)
    plans = Counter(halves(plan_timestep(t))[0] for t in timesteps) + Counter(halves(plan_timestep(t))[1] for t in guided)
    macs = sum(count * network.macs(plan) for plan, count in plans.items())
    return SamplingCost(settings.cfg_scale, len(timesteps), len(guided), plans.total(), macs, network.work is not None, calls)
