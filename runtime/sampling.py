"""From a checkpoint to pictures: which network, which draws, which protocol. Shared by sample.py, sample_ddp.py and grids.

Label, start noise and each step's noise of picture i are functions of (seed, i) alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.latents import CodecSpec, resolve_codec
from diffusion.guidance import GUIDANCE, Interval, Predict, check_guidance, guided
from diffusion.samplers import SAMPLERS
from models import Backbone, DiT
from models.backbone import ObjectiveName
from models.token_density import TIMESTEPS
from runtime.checkpoint import Weights, checkpoints, read_weights
from runtime.config import InputError, option
from runtime.density_report import density_lines
from runtime.execution import ExecutionSettings
from runtime.networks import (
    as_ours,
    build_with,
    canonical,
    described,
    fit_weights,
    method_name,
    recognized,
    summary,
    with_density,
)
from runtime.sampling_settings import SamplingSettings, guided_channels, sampled_timesteps, sampling_cost
from runtime.seeding import Keys, integers, normal

MOST_AT_ONCE = 65_536
"""Pictures in a batch; no device holds more."""

LATENT_FACTOR = 8
"""Pixels per latent of the autoencoders that released checkpoints, which do not say, were trained with."""


@dataclass(frozen=True)
class CheckpointSettings(ExecutionSettings, SamplingSettings):
    """What sample.py and sample_ddp.py both ask: which network, decoded how, drawn from which seed."""

    method: str | None = option(None, "method of the run that is looked for; none: any")
    model: str | None = option(None, "backbone; needed for released weights, otherwise the checkpoint knows")
    image_size: int | None = option(None, "picture side; needed for released weights, otherwise the checkpoint knows")
    objective: ObjectiveName | None = option(
        None, "what released weights were trained under, where it is not as published; otherwise the checkpoint knows"
    )
    time_scale: float | None = option(
        None, "what released weights embed as time, as train.py --time-scale, where it is not as published"
    )
    ckpt: str | None = option(None, "checkpoint: ours, released, or a diffusers folder; none: the newest run that matches")
    results_dir: str = option("results", "where runs are looked for when --ckpt is not given")
    weights: Literal["ema", "raw"] = option("ema", "averaged or raw weights")
    density: str | None = option(
        None,
        "sample under another token density than trained with, as train.py --density; none: the checkpoint's, or the default",
    )
    num_classes: int | None = option(None, "checked against the checkpoint, which knows")
    vae: str | None = option(None, "decoder: ema, mse, taesd, pixels or a folder; none: the checkpoint's, or ema")
    seed: int = option(0, "names every draw: the same seed gives the same pictures", flags=("--global-seed",))


@dataclass(frozen=True)
class Checkpoint:
    """A network to sample from, and what is known of where it comes from. `network` is a blueprint until `build`."""

    network: DiT
    weights: Weights
    path: str
    model: str
    image_size: int
    codec: Mapping[str, Any] | None  # the codec's facts, where the checkpoint has them
    classes: Sequence[str] | None
    step: int | None
    kind: str  # "ema" or "raw"; "released" where the file does not say
    trained_density: str | None = None  # None where the file does not say, or the method has none
    asked_density: str | None = None  # --density as given, except where it is what the file says

    def under_density(self, density: str) -> Checkpoint:
        """The same weights under a token density, unchanged where they were trained with the same tokens at every timestep.

        InputError where the method has none or the map has fewer tokens. No weight's shape depends on a density.
        """
        other, there = with_density(self.network, density), self.network
        if self.trained_density is not None and all(other.plan(t) == there.plan(t) for t in range(TIMESTEPS)):
            return self
        return replace(self, network=other, asked_density=density)

    @property
    def density_note(self) -> str | None:
        """One sentence where the network is sampled under another token density than trained with, or nobody knows."""
        sampled = self.network.density
        if sampled is None:
            return None
        if self.trained_density is None:
            chosen = "(the default); give --density if it was another" if self.asked_density is None else "(--density)"
            return f"These weights do not say under which token density they were trained; sampled under {sampled} {chosen}."
        if self.asked_density is None:
            return None
        return f"Sampled under token density {sampled}, trained with {self.trained_density}."

    def build(self) -> Checkpoint:
        """The same with its weights in a network on the CPU."""
        network, loading = build_with(self.network, self.weights)
        for line in (*loading.notes, *loading.warnings):
            print(f"{self.path}: {line}", flush=True)
        origin_alone = replace(self.weights, state={})  # the tensors are in the network now
        return replace(self, network=network.eval().requires_grad_(False), weights=origin_alone)

    @property
    def objective_note(self) -> str | None:
        """One sentence where the weights are taken as DiT's without being quite such."""
        backbone = self.network.backbone
        if self.kind != "released" or backbone.objective != "ddpm" or backbone.learn_sigma:
            return None
        return ("These weights predict no variance and do not say what they were trained under; taken as ddpm's. If it was "
                "flow, give --objective flow, for a SiT its --model SiT-...")  # fmt: skip

    @property
    def objective(self) -> str:
        """What the network was trained under."""
        return self.network.backbone.objective

    def lines(self, settings: SamplingSettings) -> list[str]:
        """What is printed before sampling: origin, network, density, and what a picture costs under `settings`."""
        notes = [note for note in (self.density_note, self.objective_note) if note is not None]
        return [
            self.weights.origin,
            summary(self.network, self.model),
            *density_lines(self.network, self.model, sampled_timesteps(self.network, settings)),
            *notes,
            cost_line(self.network, settings),
        ]

    def check_codec(self, spec: CodecSpec) -> None:
        """InputError unless the codec decodes this network's latents to pictures of its size."""
        backbone = self.network.backbone
        made, taken = (backbone.in_channels, *backbone.latent_size), spec.latent_shape(self.image_size)
        if made != taken:
            raise InputError(
                f"codec {spec.name} decodes latents of {' x '.join(map(str, taken))} to pictures of {self.image_size}, and the "
                f"network makes {' x '.join(map(str, made))}; give the --vae it was trained with."
            )


def cost_line(network: DiT, settings: SamplingSettings) -> str:
    """What a picture costs, and by which sampler and guidance."""
    cost, sampler = sampling_cost(network, settings), settings.under(network.backbone.objective).sampler
    guidance = f", {settings.guidance} guidance" if cost.guided_steps else ""
    return f"{cost} ({sampler}{guidance})"


def open_checkpoint(settings: CheckpointSettings, path: str) -> tuple[Checkpoint, CodecSpec]:
    """The blueprint of the network at `path`, and its decoder, checked against each other and the flags.

    InputError where they do not fit; nothing large has been made by then.
    """
    check_guidance(settings.cfg_scale, guided_channels(settings))
    Interval.of(settings.guidance_interval)
    asked_codec = resolve_codec(settings.vae) if settings.vae else None
    factor = asked_codec.factor if asked_codec else LATENT_FACTOR
    checkpoint = read_checkpoint(path, settings.model, settings.image_size, settings.weights == "ema", factor,
                                 settings.objective, settings.time_scale)  # fmt: skip
    sampled_timesteps(checkpoint.network, settings)
    GUIDANCE[settings.guidance](checkpoint.network)
    method = method_name(checkpoint.network)
    if settings.method not in (None, method):
        raise InputError(
            f"{path} holds a network of --method {method}, not {settings.method}; leave the flag out or correct it."
        )
    if settings.density is not None:
        checkpoint = checkpoint.under_density(settings.density)
    if settings.weights == "raw" and checkpoint.kind != "raw":
        raise InputError(f"{path} holds {checkpoint.kind} weights alone, no raw ones; leave out --weights raw.")
    spec = asked_codec or (CodecSpec(**checkpoint.codec) if checkpoint.codec else resolve_codec("ema"))
    checkpoint.check_codec(spec)
    there = checkpoint.network.backbone.num_classes
    if settings.num_classes not in (None, there):
        raise InputError(f"{path} has {there} classes, not --num-classes {settings.num_classes}; leave the flag out.")
    return checkpoint, spec


def density_text(network: DiT) -> str | None:
    """The network's token density in the words of --density; None where its method has none."""
    return None if network.density is None else str(network.density)


def choose_checkpoint(settings: CheckpointSettings) -> str:
    """--ckpt, or the newest checkpoint of a run under --results-dir that matches model and size (where they are given).

    InputError says what is missing.
    """
    if settings.ckpt:
        return settings.ckpt
    found = []
    for config in Path(settings.results_dir).glob("*/config.json"):
        saved = checkpoints(config.parent)
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            model, image_size = content["network"]["model"], content["data"]["image_size"]
            method = content["network"]["method"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run of ours
        fits = settings.model in (None, model) and settings.method in (None, method)
        if saved and fits and settings.image_size in (None, image_size):
            found.append(saved[-1])
    if not found:
        wanted = f"{settings.method or 'any method'}, {settings.model or 'any model'} at size {settings.image_size or 'any'}"
        raise InputError(f"no --ckpt is given and {settings.results_dir} holds no run of {wanted}; train one with train.py, "
                         "or give --ckpt (or another --results-dir).")  # fmt: skip
    return str(max(found, key=lambda path: path.stat().st_mtime))


def read_checkpoint(
    path: str,
    model: str | None,
    image_size: int | None,
    averaged: bool = True,
    factor: int = LATENT_FACTOR,
    objective: ObjectiveName | None = None,
    time_scale: float | None = None,
) -> Checkpoint:
    """Facts and weights of a checkpoint: of ours from its header, of a released one from its keys, `model` and size.

    `factor` is that of a released one's autoencoder, picture side / latent side; `objective` and `time_scale` are what it was
    trained under, None: as published.
    Raises InputError when flags and checkpoint contradict each other.
    """
    weights = read_weights(path, averaged)
    header = weights.header
    if header is None:
        model = model or "DiT-XL/2"
        weights = as_ours(weights, model, time_scale)
        side = latent_side(weights)
        if side is None and image_size is None:
            raise InputError(f"{path} does not say its picture size; give --image-size.")
        there = image_size if side is None else side * factor
        if image_size not in (None, there):
            raise InputError(f"{path} holds a network for --image-size {there} (latents 1/{factor} as wide), not {image_size}; "
                             "correct the flag, or give the --vae it was trained with.")  # fmt: skip
        image_size = int(there or 0)
        if image_size % factor:
            raise InputError(f"--image-size {image_size} is not divisible by {factor}.")
        plan = recognized(weights, model, (image_size // factor,) * 2, objective, time_scale)
        fit_weights(weights, plan)
        return Checkpoint(plan, weights, path, model, image_size, None, None, None, "released")
    try:
        return _from_header(path, weights, model, image_size, averaged, objective, time_scale)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: the checkpoint's header is damaged; copy the file again.") from None


def _from_header(
    path: str,
    weights: Weights,
    model: str | None,
    image_size: int | None,
    averaged: bool,
    objective: ObjectiveName | None,
    time_scale: float | None,
) -> Checkpoint:
    header = weights.header or {}
    description, data = header["network"], header["data"]
    try:
        network = described(description)
    except InputError as error:
        raise InputError(f"{path}: the checkpoint's header describes no network ({error}); copy the file again.") from None
    asked_and_there = (
        ("model", model, description["model"]),
        ("image-size", image_size, data["image_size"]),
        ("objective", objective, network.backbone.objective),
        ("time-scale", time_scale, network.backbone.time_scale),
    )
    for name, asked, there in asked_and_there:
        if asked is not None and asked != there:
            raise InputError(f"{path} holds a network for --{name} {there}, not {asked}; leave the flag out or correct it.")
    kind = header.get("weights") or ("ema" if averaged else "raw")
    return Checkpoint(network, weights, path, description["model"], data["image_size"], data["codec"],
                      data["classes"], header["step"], kind, density_text(network))  # fmt: skip


def latent_side(weights: Weights) -> int | None:
    """Side of the square latents that a checkpoint's position table and patch size tell; None where it has no table."""
    state = canonical(weights)
    if "pos_embed" not in state or "x_embedder.proj.weight" not in state:
        return None
    return math.isqrt(state["pos_embed"].shape[1]) * state["x_embedder.proj.weight"].shape[2]


def load_checkpoint(path: str, model: str | None, image_size: int | None, averaged: bool = True) -> Checkpoint:
    """As `read_checkpoint`, with the network built."""
    return read_checkpoint(path, model, image_size, averaged).build()


def draw_labels(mode: str, num_classes: int, seed: int, index: Tensor) -> Tensor:
    """Labels of the pictures `index` (N,): "random" = uniform, independent; "balanced" = i mod classes. -> (N,) int64"""
    if mode == "balanced":
        return index % num_classes
    return integers(Keys(seed, 0, index), "label", num_classes)


@torch.no_grad()
def sample_latents(
    network: nn.Module,
    settings: SamplingSettings,
    labels: Tensor,
    index: Tensor,
    seed: int,
    device: torch.device,
    predict: Predict | None = None,
) -> Tensor:
    """Latents of the pictures `index` (N,) with `labels` (N,), scaled for the model. -> (N, C, H, W) float32 on `device`

    `predict` runs the network's forward; None: the network itself does, plainly.
    """
    dit: Any = network
    backbone: Backbone = dit.backbone
    labels, index = labels.to(device), index.to(device)
    shape = (backbone.in_channels, *backbone.latent_size)
    settings = settings.under(backbone.objective)
    assert settings.sampler is not None
    denoise = guided(
        predict or partial(plain_forward, dit),
        labels,
        null_class=backbone.num_classes,
        scale=settings.cfg_scale,
        channels=guided_channels(settings),
        plans=GUIDANCE[settings.guidance](dit),
        interval=Interval.of(settings.guidance_interval),
    )
    start = normal(Keys(seed, 0, index), "start noise", shape)  # (N, C, H, W)
    latents = SAMPLERS[settings.sampler].run(
        denoise, start, settings.num_sampling_steps, lambda step: normal(Keys(seed, step, index), "step noise", shape)
    )
    return latents.float()


def plain_forward(network: nn.Module, x: Tensor, t: Tensor, y: Tensor, plan: Any, index: Tensor | None) -> Tensor:
    """The network as it stands, as guidance calls it."""
    return network(x, t, y, plan, index=index)


def picture_grid(pictures: Tensor, columns: int | None = None) -> Tensor:
    """(N, H, W, 3) uint8 -> one picture, rows of `columns` (default: about square), missing places black, gaps of 2 pixels."""
    count, height, width, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = pictures.new_zeros(rows * (height + 2) - 2, columns * (width + 2) - 2, 3)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        grid[top : top + height, left : left + width] = picture
    return grid
