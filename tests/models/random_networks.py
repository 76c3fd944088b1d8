"""Networks whose every parameter is drawn, inputs for them, and how outputs and costs are measured.

A freshly initialised DiT outputs exactly zero, whatever is wrong inside it: tests of equality and of gradients draw the
parameters first. The draws are keyed, so the values do not depend on torch's generator or its version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import METHODS, Backbone, DiT, Plan, create_model
from models.dynamic_block import DynamicBlock
from runtime.seeding import Keys, integers, normal

Module = TypeVar("Module", bound=nn.Module)

CLASSES = 10


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    t: Tensor  # (N,) int64, 0 .. 999
    y: Tensor  # (N,) int64, the null class included


@cache
def drawn(seed: int, count: int) -> Tensor:
    """Standard normal numbers, kept: hundreds of tests ask for the same."""
    return normal(Keys(seed, 0, torch.arange(1)), "weights", (count,))[0]


def randomized(module: Module, seed: int = 0) -> Module:
    """Every trainable parameter becomes normal: matrices of gain 1, vectors of deviation 0.2. Position tables stay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    with torch.no_grad():
        for parameter, values in zip(parameters, drawn(seed, sum(sizes)).split(sizes), strict=True):
            deviation = 0.2 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(deviation * values.reshape(parameter.shape))
    return module


def fitting(method: str, backbone: Backbone) -> dict[str, Any]:
    """Options without which the method's defaults do not fit the backbone: an odd map has no groups of neighbours."""
    drops = "drop_pattern" in {field.name for field in fields(METHODS[method].options_type)}
    return {"drop_pattern": "random"} if drops and any(side % 2 for side in backbone.grid) else {}


def network(method: str, backbone: Backbone, options: Mapping[str, Any] | None = None, seed: int = 0) -> DiT:
    """A network of `method` whose output is not small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what is frozen where it was drawn
        model = create_model(method, backbone, {**fitting(method, backbone), **(options or {})})
    return randomized(model, seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For a module that imports it: networks this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(model: str = "DiT-T/2", latent_size: tuple[int, int] = (16, 16), **sizes: Any) -> Backbone:
    """A backbone of the debug size, with few classes."""
    return Backbone.named(model, latent_size, **{"num_classes": CLASSES, **sizes})


SIZES: Mapping[str, Backbone] = {
    "debug": tiny(),
    "rectangular": tiny(latent_size=(8, 20)),
    "odd grid": tiny(latent_size=(10, 14)),
    "in numbers": tiny("DiT-96x8x4/1", (6, 6), in_channels=1),
    "patch 4": tiny("DiT-48x8x4/4", (16, 24)),
    "three channels": tiny(in_channels=3),
    "no sigma": tiny(learn_sigma=False),
    "one class": tiny(num_classes=1),
    "12 deep": tiny("DiT-32x12x2/2"),
}
"""Backbones of every kind."""


def inputs(backbone: Backbone, count: int = 3, seed: int = 1) -> Inputs:
    """A batch for a backbone."""
    keys = Keys(seed, 0, torch.arange(count))
    x = normal(keys, "x", (backbone.in_channels, *backbone.latent_size))
    return Inputs(x, integers(keys, "t", 1000), integers(keys, "y", backbone.num_classes + 1))


def distance(ours: Tensor, reference: Tensor) -> float:
    """Largest difference as a share of the largest reference value; the reference must not be small."""
    assert ours.shape == reference.shape
    scale = reference.abs().max()
    assert scale > 0.1, "the reference is too small to compare with"
    return float(((ours - reference).abs().max() / scale).detach())


def counted_macs(model: DiT, plan: Plan | None = None) -> float:
    """Multiply-accumulates as torch counts them on the meta device, where it counts attention too.

    Without a plan under that of timestep 0. Tokens that values would choose are all there.
    """
    backbone, plan = model.backbone, model.plan(0) if plan is None else plan
    for block in model.blocks:
        if isinstance(block, DynamicBlock):
            block.select = lambda logits: torch.arange(logits.numel(), device=logits.device)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, backbone.in_channels, *backbone.latent_size), torch.zeros(1), torch.zeros(1, dtype=torch.long), plan
        )
    return counter.get_total_flops() / 2
