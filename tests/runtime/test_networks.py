"""Blueprints, descriptions and the lines printed about networks; loading weights is in tests/models/test_weights.py."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import METHODS, Backbone
from runtime.checkpoint import Weights
from runtime.config import InputError
from runtime.networks import (
    blueprint,
    build,
    build_with,
    describe,
    described,
    fit_weights,
    method_name,
    published_objective,
    published_time_scale,
    recognized,
    summary,
    with_density,
)
from tests.models.random_networks import network, tiny
from tests.models.random_networks import one_thread as one_thread

every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_blueprint_needs_no_storage_and_checks_its_options(method: str) -> None:
    plan = blueprint(method, Backbone.named("DiT-XL/2", (64, 64)), {})
    assert all(tensor.is_meta for tensor in plan.state_dict().values())
    assert method_name(plan) == method
    assert not torch.empty(1).is_meta
    with pytest.raises(InputError, match=f"method {method}: unknown key 'sparse_gridd'"):
        blueprint(method, tiny(), {"sparse_gridd": 8})


@every_method
def test_building_is_seeded_by_torch(method: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(blueprint(method, tiny(), {})).state_dict())
    key = "blocks.3.mlp.fc1.weight"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0][key], states[2][key])


@every_method
@pytest.mark.parametrize("options", [{}, {"density": "3x5,2@0,500", "readd_position": True}], ids=["default", "options"])
def test_descriptions_survive_json(method: str, options: dict[str, Any]) -> None:
    plan = blueprint(method, tiny(latent_size=(12, 16), label_drop=0.25), options if method == "sparsedit" else {})
    description = describe(plan, "DiT-T/2")
    again = described(json.loads(json.dumps(description)))
    assert describe(again, "DiT-T/2") == description
    assert (again.backbone, again.options, type(again)) == (plan.backbone, plan.options, type(plan))


def test_another_density_changes_that_alone() -> None:
    options = {"poolingformer_blocks": 0, "top_blocks": 2, "density": "3"}
    plan = blueprint("sparsedit", tiny(), options)
    other = with_density(plan, "0.44:0.61/4")
    assert other.options == replace(plan.options, density="6,6,5,5@0,250,500,750")
    assert all(tensor.is_meta for tensor in other.state_dict().values())
    with pytest.raises(InputError, match="--density 3: a network of --method dense has no token density"):
        with_density(blueprint("dense", tiny(), {}), "3")


def test_a_description_of_every_default_holds_after_the_defaults_change() -> None:
    """The description names what was built, not what was asked for: no option is left at "by depth"."""
    assert None not in describe(blueprint("sparsedit", tiny(), {}), "DiT-T/2")["options"].values()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dense", ["dense DiT-XL/2", "676,014,368 parameters", "524.5 GMACs", "100.0% of the dense"]),
        (
            "sparsedit",
            ["sparsedit DiT-XL/2", "681,327,392 parameters", "223 GMACs", "42.5% of the dense", "524.5", "density 8"],
        ),
    ],
)
def test_the_summary_says_what_is_built(method: str, words: list[str]) -> None:
    line = summary(blueprint(method, Backbone.named("DiT-XL/2", (64, 64)), {}), "DiT-XL/2")
    assert "\n" not in line
    for word in words:
        assert word in line


@every_method
def test_weights_without_header_tell_the_sizes(method: str) -> None:
    published: dict[str, Any] = {"objective": published_objective("DiT-T/2", method)}
    published["time_scale"] = published_time_scale("DiT-T/2", method)
    original = network(method, tiny(in_channels=3, num_classes=2, learn_sigma=False, **published))
    plan = recognized(Weights(original.state_dict(), "file"), "DiT-T/2", (16, 16))
    told = {"drop_ratio": 0.0} if method == "sprint" else {}  # what training dropped is not told
    assert (plan.backbone, plan.options) == (original.backbone, replace(original.options, **told))
    assert build_with(plan, Weights(original.state_dict(), "file"))[1].new == ()


def test_errors_name_the_checkpoint() -> None:
    weights = Weights({"conv.weight": torch.zeros(1)}, "some/file.pt")
    for call in (
        lambda: fit_weights(weights, blueprint("dense", tiny(), {})),
        lambda: recognized(weights, "DiT-T/2", (16, 16)),
    ):
        with pytest.raises(InputError, match=r"^some/file.pt: the checkpoint's keys \(conv.weight\)"):
            call()
    original = Weights(network("dense", tiny()).state_dict(), "file")
    with pytest.raises(InputError, match=r"^file: --model 'DiT-T/3' is not known"):
        recognized(original, "DiT-T/3", (16, 16))
    with pytest.raises(InputError, match=r"^file: the checkpoint .* does not fit"):
        build_with(recognized(original, "DiT-S/2", (16, 16)), original)
