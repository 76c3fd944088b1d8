"""The sizes of a DiT, whatever method runs on it, and what it predicts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from models.token_density import TIMESTEPS
from runtime.config import InputError, nearest

SIZES = {"T": (48, 8, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth, heads. T is the debug size, for tests."""

SIT = "SiT-"
"""What names of SiT's backbones (Ma et al. 2024) begin with: DiT's, which are given the flow time itself."""

BACKBONES = [
    f"{kind}{name}"
    for kind in ("DiT-", SIT)
    for name in ("T/2", *(f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)))
]

ObjectiveName = Literal["ddpm", "flow"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)

TIME_SCALES = 1e-3, 1e6
"""Beyond these the time embedding tells no times apart."""


@dataclass(frozen=True)
class Backbone:
    """The sizes of a DiT, whatever method runs on it, what it predicts, and what it is given as time."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    latent_size: tuple[int, int]  # height, width
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    label_drop: float = 0.1
    objective: ObjectiveName = "ddpm"
    """What it predicts: "ddpm", the noise, or "flow", the velocity."""
    time_scale: float = TIMESTEPS
    """What the timestep embedder is given at full noise: 1000 as DiT's, 1 where it is given the flow time itself."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.objective not in OBJECTIVES:
            raise InputError(f"--objective {self.objective!r} is not known{nearest(self.objective, OBJECTIVES)}")
        if self.objective == "flow" and self.learn_sigma:
            raise InputError("--objective flow predicts no variance; give --no-learn-sigma, or leave --learn-sigma out.")
        least, most = TIME_SCALES
        if not least <= self.time_scale <= most:
            raise InputError(f"--time-scale is {self.time_scale:g}; it must be {least:g} to {most:,.0f}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise InputError(f"hidden size {self.hidden_size} must be a multiple of 4 and of the {self.num_heads} heads.")
        if min(self.latent_size) < 1 or any(side % self.patch_size for side in self.latent_size):
            height, width = self.latent_size
            raise InputError(
                f"a latent of {height} x {width} cannot be cut into patches of {self.patch_size}; choose another "
                "--image-size or a --model with another patch size."
            )

    @classmethod
    def named(
        cls,
        name: str,
        latent_size: tuple[int, int],
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool | None = None,
        label_drop: float = 0.1,
        objective: ObjectiveName | None = None,
        time_scale: float | None = None,
    ) -> Backbone:
        """A published size ("DiT-XL/2") or one in numbers: "DiT-96x8x4/1" is width 96, depth 8, 4 heads, patch 1.

        SiT-... is the same under flow, given the flow time itself. None: as published for the name; DiT learns its variance.
        """
        objective = objective or default_objective(name)
        check_objective(name, objective)
        if time_scale is None:
            time_scale = default_time_scale(name)
        learn_sigma = objective == "ddpm" if learn_sigma is None else learn_sigma
        numbers = re.fullmatch(r"[DS]iT-(\d+)x(\d+)x(\d+)/(\d+)", name)
        if name in BACKBONES:
            size, _, patch = name.removeprefix("DiT-").removeprefix(SIT).partition("/")
            sizes = (*SIZES[size], int(patch))
        elif numbers:
            width, depth, heads, patch_size = map(int, numbers.groups())
            sizes = (width, depth, heads, patch_size)
        else:
            hint = nearest(name, BACKBONES).rstrip(".")
            raise InputError(f"--model {name!r} is not known{hint} (or in numbers: DiT-WIDTHxDEPTHxHEADS/PATCH).")
        return cls(
            *sizes,
            latent_size=latent_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            label_drop=label_drop,
            objective=objective,
            time_scale=time_scale,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the full token map."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        """Noise channels, then, with learned sigma, as many variance channels."""
        return self.in_channels * (2 if self.learn_sigma else 1)


def default_objective(model: str) -> ObjectiveName:
    """What published networks of a name were trained under."""
    return "flow" if model.startswith(SIT) else "ddpm"


def default_time_scale(model: str) -> float:
    """What published networks of a name are given at full noise."""
    return 1.0 if model.startswith(SIT) else TIMESTEPS


def check_objective(model: str, objective: str) -> None:
    """InputError for a backbone that is of the other objective."""
    if objective == "ddpm" and model.startswith(SIT):
        other = model.replace(SIT, "DiT-")
        raise InputError(f"--model {model} is a backbone of --objective flow; for ddpm give --model {other}.")
