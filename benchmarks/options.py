"""The options that measurements share, and how `--quick` shrinks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from models import METHODS, Backbone, DiT, method_class
from models.backbone import ObjectiveName
from runtime.config import InputError, checked_values, from_mapping, option, to_mapping
from runtime.networks import blueprint, published_objective, published_time_scale
from runtime.sampling import MOST_AT_ONCE

PIXELS_PER_LATENT = 8
NOT_MEASURED = ("output", "quick")
"""Settings that do not decide what is measured."""
DENSE = next(iter(METHODS))


@dataclass(frozen=True)
class CommonSettings:
    rounds: int = option(5, "measured rounds, after one of warm-up; in a round all run in turn")
    quick: bool = option(False, "smaller in whatever is not given, to end within five minutes on two CPU cores")
    output: str = option("runs/benchmarks", "folder for the result, MEASUREMENT.json, and its chart, MEASUREMENT.png")


@dataclass(frozen=True)
class DeviceSettings(CommonSettings):
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "what computes; auto: a GPU where there is one")


@dataclass(frozen=True)
class NetworkSettings(CommonSettings):
    model: str = option("DiT-XL/2", "backbone, as train.py --model")
    method: str = option("sparsedit", f"compared with the dense network: {', '.join(METHODS)}")
    density: str | None = option(None, "its sparse tokens, as train.py --density; none: the method's default")
    options: str | None = option(
        None, "its other options, as train.py has them: KEY=VALUE, several with spaces between, quoted"
    )
    objective: ObjectiveName | None = option(
        None, "what the networks predict, as train.py --objective; none: as published for the method"
    )
    image_size: int = option(512, "picture side; latents are 4 x SIDE/8 x SIDE/8")
    latent: tuple[int, int, int] | None = option(
        None, "size of the latents in place of --image-size, for other codecs", words=("C", "H", "W")
    )
    num_classes: int = option(1000, "number of classes")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W). InputError for sizes that are none."""
        if self.latent is not None:
            return self.latent
        if self.image_size < 1 or self.image_size % PIXELS_PER_LATENT:
            raise InputError(f"--image-size is {self.image_size}; it must be a multiple of {PIXELS_PER_LATENT}.")
        side = self.image_size // PIXELS_PER_LATENT
        return 4, side, side

    def blueprints(self) -> tuple[DiT, DiT]:
        """The dense network and the method's, without storage, both under one objective. InputError where they cannot be."""
        backbone = self.backbone()
        return blueprint(DENSE, backbone, {}), blueprint(self.method, backbone, self.method_options())

    def backbone(self) -> Backbone:
        """That of all networks. InputError for sizes that are none."""
        channels, height, width = self.latent_shape
        method_class(self.method)
        objective = self.objective or published_objective(self.model, self.method)
        return Backbone.named(
            self.model,
            (height, width),
            channels,
            self.num_classes,
            objective=objective,
            time_scale=published_time_scale(self.model, self.method),
        )

    def method_options(self) -> dict[str, Any]:
        """Those of --density and --options. InputError where the method does not have them."""
        kind = method_class(self.method).options_type
        if self.density is not None and "density" not in {field.name for field in fields(kind)}:
            raise InputError(f"--density: --method {self.method} has none; leave the flag out, or give another method.")
        density = [] if self.density is None else [("density", self.density)]
        return options_in(self.method, self.options, "--options", density)


def options_in(method: str, text: str | None, flag: str, before: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The method's options in the text KEY=VALUE KEY=VALUE of `flag`, after those `before`. InputError for what it has not."""
    pairs = [word.partition("=") for word in (text or "").split()]
    if any(not (key and equals and value) for key, equals, value in pairs):
        raise InputError(f"{flag} {text!r} is not KEY=VALUE; write for example {flag} 'flops_target=0.7'.")
    given = [*before, *((key, value) for key, _, value in pairs)]
    if twice := sorted({key for key, _ in given if [key for key, _ in given].count(key) > 1}):
        raise InputError(f"{flag}: {twice[0]} is given twice; keep one of the two.")
    return checked_values(method_class(method).options_type, dict(given), f"{flag} of --method {method}")


Settings = TypeVar("Settings", bound=CommonSettings)


def settings_of(cls: type[Settings], given: Mapping[str, Any], quick: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings of a command line, and what `--quick` changed, in words. What was given explicitly stays."""
    settings = from_mapping(cls, given, "command line")
    reduced = {name: value for name, value in quick.items() if settings.quick and name not in given}
    lines = [f"{name.replace('_', ' ')} {value} in place of {was(getattr(settings, name))}" for name, value in reduced.items()]
    settings = replace(settings, **reduced)
    most = getattr(settings, "batch_size", None) or 0
    if most > MOST_AT_ONCE:
        raise InputError(f"--batch-size is {most}; it must be at most {MOST_AT_ONCE}.")
    for name, value in to_mapping(settings).items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "timestep" and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    return settings, lines


def was(value: Any) -> str:
    """A default in words."""
    return "the default" if value is None else str(value)


def recorded(settings: CommonSettings, **resolved: Any) -> dict[str, Any]:
    """The settings that decide what is measured, fit for JSON; `resolved` is what they came to on this machine."""
    kept = {name: value for name, value in to_mapping(settings).items() if name not in NOT_MEASURED}
    return {**kept, **resolved}
