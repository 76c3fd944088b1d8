"""Noise schedules: DDPM's linear betas and their respacing onto fewer steps.

Two numbers name a step. Its *index* counts the kept steps, 0 (cleanest) .. len(schedule) - 1, and selects from the tables.
Its *timestep* is the place in the original schedule, 0 .. 999, and is what the network receives. Without respacing they
are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.config import InputError

TIMESTEPS = 1000
"""Steps of the schedule that DiT is trained with."""


def plan_timestep(timestep: float) -> int:
    """The original timestep, 0 .. 999, that says what a step computes: a flow's timestep is any number from 0 to 1000."""
    return min(int(timestep), TIMESTEPS - 1)


class Timesteps(NamedTuple):
    """start, start + 1, .. stop - 1, as `range`, in tensors: a compiled graph then holds for any of them."""

    start: Tensor  # () int64
    stop: Tensor  # () int64


def linear_betas(steps: int = TIMESTEPS) -> np.ndarray:
    """DDPM's variances of the forward steps, 1e-4 .. 0.02 (Ho et al. 2020, section 4). -> (steps,) float64"""
    return np.linspace(1e-4, 0.02, steps, dtype=np.float64)


def respaced_timesteps(spec: str | Sequence[int], steps: int = TIMESTEPS) -> list[int]:
    """The timesteps that a respacing keeps of 0 .. steps - 1, ascending.

    `spec`: "250" = 250 steps spread evenly, both ends included (Nichol & Dhariwal 2021, section 4); "10,15,20" or
    [10, 15, 20] = the range cut into equal sections that keep that many each, the noisiest section last; "ddim25" = 25
    steps, a whole number apart, from 0 (Song et al. 2021). InputError for anything else.
    """
    text = spec if isinstance(spec, str) else ",".join(map(str, spec))
    if match := re.fullmatch(r"ddim([0-9]+)", text.strip()):
        return _strided(int(match[1]), steps)
    if not re.fullmatch(r"[0-9]+(\s*,\s*[0-9]+)*", text.strip()):
        raise InputError(
            f"Sampling steps {text!r} are not understood: give a number such as 250, a list such as 10,15,20, or ddim25."
        )
    return _sections([int(count) for count in text.split(",")], steps)


def _strided(count: int, steps: int) -> list[int]:
    # Several strides may keep as many; the smallest is the published choice, so it is written last.
    possible = {len(range(0, steps, stride)): stride for stride in range(steps, 0, -1)}
    if count not in possible:
        nearest = min(possible, key=lambda other: abs(other - count))
        raise InputError(f"No whole-number stride keeps {count} of {steps} steps; the nearest that one does is ddim{nearest}.")
    return list(range(0, steps, possible[count]))


def _sections(counts: list[int], steps: int) -> list[int]:
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            where = "" if len(counts) == 1 else f" in section {section + 1} of {len(counts)}"
            raise InputError(f"{count} sampling steps{where} cannot be kept: give a number from 1 to {size}.")
        stride = (size - 1) / max(count - 1, 1)
        # A running sum, as published code has it: its rounding decides which way a half goes when `count` is odd.
        places = np.cumsum([0.0] + [stride] * (count - 1))
        timesteps += [start + int(place) for place in np.round(places)]
        start += size
    return timesteps


@dataclass(frozen=True)
class Tables:
    """One number per step of a schedule: (steps,) float32 tensors on one device. Indexed by `at`."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    x0_from_x_t: Tensor
    x0_from_epsilon: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_x_t: Tensor
    posterior_log_variance_clipped: Tensor
    log_betas: Tensor
    fixed_log_variance: Tensor
    snr: Tensor
    mean_error: Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving noise schedule (DDPM, equations 2, 4, 7): float64 tables, computed once, never written to.

    With a = alphas_cumprod, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) epsilon, and
    x_0 = x0_from_x_t * x_t - x0_from_epsilon * epsilon.
    The posterior q(x_{t-1} | x_t, x_0) has mean posterior_mean_x0 * x_0 + posterior_mean_x_t * x_t.
    """

    betas: np.ndarray  # (steps,) float64
    timesteps: tuple[int, ...]  # the original timestep of each step, ascending
    alphas_cumprod: np.ndarray = field(init=False)
    alphas_cumprod_previous: np.ndarray = field(init=False)  # 1 before the first step
    sqrt_alphas_cumprod: np.ndarray = field(init=False)
    sqrt_one_minus_alphas_cumprod: np.ndarray = field(init=False)
    x0_from_x_t: np.ndarray = field(init=False)
    x0_from_epsilon: np.ndarray = field(init=False)
    posterior_mean_x0: np.ndarray = field(init=False)
    posterior_mean_x_t: np.ndarray = field(init=False)
    posterior_variance: np.ndarray = field(init=False)
    posterior_log_variance_clipped: np.ndarray = field(init=False)  # step 0 has variance 0 and takes step 1's
    log_betas: np.ndarray = field(init=False)
    fixed_log_variance: np.ndarray = field(init=False)  # of a network without variance channels
    snr: np.ndarray = field(init=False)
    mean_error: np.ndarray = field(init=False)  # posterior standard deviations that an epsilon error of 1 moves the mean
    _on_device: dict[torch.device, Tables] = field(init=False, default_factory=dict, repr=False)
    _respaced: dict[tuple[int, ...], NoiseSchedule] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.betas) != len(self.timesteps) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise InputError(f"A schedule of {len(self.timesteps)} timesteps needs as many betas, each between 0 and 1.")
        betas = np.asarray(self.betas, dtype=np.float64)
        alphas_cumprod = np.cumprod(1.0 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        # One step alone has no neighbour to take its variance from; beta is the only other choice.
        first = variance[1] if len(betas) > 1 else betas[0]
        clipped = np.append(first, variance[1:])
        tables = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_previous": previous,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
            "x0_from_x_t": 1.0 / np.sqrt(alphas_cumprod),
            "x0_from_epsilon": np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod),
            "posterior_mean_x0": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
            "posterior_mean_x_t": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(clipped),
            "log_betas": np.log(betas),
            "fixed_log_variance": np.log(np.append(first, betas[1:])),
            "snr": alphas_cumprod / (1.0 - alphas_cumprod),
        }
        tables["mean_error"] = tables["posterior_mean_x0"] * tables["x0_from_epsilon"] / np.sqrt(clipped)
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    @cache
    def linear(cls, steps: int = TIMESTEPS) -> NoiseSchedule:
        """The schedule that DiT is trained with; the same object each time, so that its tables go to a device once."""
        return cls(linear_betas(steps), tuple(range(steps)))

    def respaced(self, spec: str | Sequence[int]) -> NoiseSchedule:
        """This schedule with only the steps that `spec` (see `respaced_timesteps`) keeps; the same object for the same steps.

        The betas follow from the kept alphas_cumprod, so that x_t at a kept step has the distribution it had before.
        """
        kept = tuple(respaced_timesteps(spec, len(self)))
        if kept not in self._respaced:
            alphas_cumprod = self.alphas_cumprod[list(kept)]
            betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
            self._respaced[kept] = NoiseSchedule(betas, tuple(self.timesteps[index] for index in kept))
        return self._respaced[kept]

    def tables(self, device: torch.device) -> Tables:
        """The float32 tables on `device`; copied there on the first call only, later calls touch no memory."""
        return _tables(self, device)


# A compiled caller takes the tables as constants instead of tracing their construction into its graph.
@torch.compiler.assume_constant_result
def _tables(schedule: NoiseSchedule, device: torch.device) -> Tables:
    if device not in schedule._on_device:
        # Born while sampling, the tables would otherwise be inference tensors, which training may not use.
        with torch.inference_mode(False):
            copies = {f.name: torch.from_numpy(getattr(schedule, f.name).astype(np.float32)).to(device) for f in fields(Tables)}
        schedule._on_device[device] = Tables(**copies)
    return schedule._on_device[device]


def at(table: Tensor, index: Tensor | int, like: Tensor) -> Tensor:
    """Each sample's entry. table (steps,), index (N,) int64, like (N, ...) -> (N, 1, ..., 1) that broadcasts with `like`

    An index that all share is an int: its entry, (), is a view of the table, and nothing is copied to the device.
    """
    if isinstance(index, int):
        return table[index]
    return table[index].reshape(-1, *[1] * (like.ndim - 1))
