"""Multiply-accumulates are exact: every `macs` against torch's own count, and against published figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from models import METHODS, Backbone, Plan
from models.backbone import BACKBONES
from models.layers import Attention
from runtime.networks import blueprint
from tests.models.random_networks import SIZES, counted_macs, fitting, tiny

every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("name", BACKBONES)
def test_macs_are_exact_for_every_named_backbone(method: str, name: str) -> None:
    model = blueprint(method, Backbone.named(name, (32, 32)), {})
    assert model.macs() == counted_macs(model)


@every_method
@pytest.mark.parametrize("size", ["rectangular", "odd grid", "in numbers", "patch 4", "no sigma"])
def test_macs_are_exact_on_every_kind_of_latent(method: str, size: str) -> None:
    model = blueprint(method, SIZES[size], fitting(method, SIZES[size]))
    assert model.macs() == counted_macs(model)


@pytest.mark.parametrize("density", ["1", "5", "8x2"])
@pytest.mark.parametrize(
    "split",
    [
        {},
        {"poolingformer_blocks": 0, "modules": 2, "module_blocks": "1,1,1,1", "top_blocks": 0},
        {"poolingformer_blocks": 1, "modules": 1, "module_blocks": "2,1,2,1", "top_blocks": 1},
        {"poolingformer_blocks": 0, "modules": 2, "module_blocks": "1,0,2,0", "top_blocks": 2},
    ],
    ids=lambda split: "-".join(str(value) for value in split.values()) or "default",
)
def test_macs_are_exact_for_every_split(split: Mapping[str, Any], density: str) -> None:
    model = blueprint("sparsedit", tiny(), {**split, "density": density})
    assert model.macs() == counted_macs(model)


def test_macs_follow_the_plan() -> None:
    model = blueprint("sparsedit", tiny(), {})
    assert model.plan(0).signature == ("sparse grid", 4, 4)
    for grid in ((2, 3), (7, 7)):
        plan = Plan(("sparse grid", *grid))
        assert model.macs(plan) == counted_macs(model, plan) != model.macs()


@every_method
def test_the_macs_test_catches_uncounted_softmax_attention(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "macs", lambda self, tokens: tokens * 4 * self.proj.in_features**2)
    model = blueprint(method, tiny(), {})
    assert model.macs() < counted_macs(model)


RELEASE_256 = {"poolingformer_blocks": 1, "top_blocks": 3}
PUBLISHED = [
    ("dense", 32, {}, 675_129_632, 118.6),
    ("dense", 64, {}, 676_014_368, 524.5),
    ("sparsedit", 32, {}, 680_442_656, 65.8),
    ("sparsedit", 32, RELEASE_256, 683_099_168, None),
    ("sparsedit", 64, {}, 681_327_392, 223.0),
]
"""Method, latent side, options, parameters, GMACs of XL/2 (reference/sparsedit.md). 680,442,656 is 681,327,392 with the
smaller position table of 256 x 256 pictures."""


@pytest.mark.parametrize(("method", "side", "options", "parameters", "gmacs"), PUBLISHED)
def test_published_sizes(method: str, side: int, options: dict, parameters: int, gmacs: float | None) -> None:
    model = blueprint(method, Backbone.named("DiT-XL/2", (side, side)), options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert gmacs is None or round(model.macs() / 1e9, 1) == gmacs
