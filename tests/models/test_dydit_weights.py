"""Weights into DyDiT: from dense DiT, from other classes, from released files; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models import DiT, DyDiT
from models.dydit import COMPLETE, MASKED
from runtime.checkpoint import Weights, read_weights
from runtime.networks import blueprint, build_with, recognized
from tests.models.random_networks import distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread
from tests.models.test_weights import refusal


def test_a_dydit_checkpoint_is_no_other_method_s() -> None:
    for target in ("dense", "sparsedit"):
        assert "holds a dydit network" in refusal(network("dydit", tiny()).state_dict(), blueprint(target, tiny(), {}))


def test_a_dydit_of_other_classes_starts_its_label_table_anew() -> None:
    original = network("dydit", tiny(num_classes=4))
    converted, plan = build_with(blueprint("dydit", tiny(), {}), Weights(original.state_dict(), "file"))
    assert plan.new == ("y_embedder.embedding_table.weight",)
    assert "4 classes, this network 10" in plan.warnings[0]
    key = "blocks.3.attn_rate.router.bias"
    assert torch.equal(converted.state_dict()[key], original.state_dict()[key])


def test_a_converted_dydit_says_that_its_routers_are_new() -> None:
    _, plan = build_with(blueprint("dydit", tiny(), {}), Weights(network("dense", tiny()).state_dict(), "file"))
    kinds = {".".join(key.split(".")[2:-1]) for key in plan.new}
    assert kinds == {"attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.0", "token_selection.mlp_head.2"}
    assert len(plan.new) == 8 * 4 * 2
    assert plan.warnings == plan.dropped == ()


def converted_from(dense: DiT) -> Any:
    """The dynamic network that a dense one's weights make."""
    return build_with(blueprint("dydit", dense.backbone, {}), Weights(dense.state_dict(), "file"))[0]


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "large"])
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_a_converted_dit_is_that_dit(scale: float, timestep: int) -> None:
    """Routers read nothing at first: not even activations out of all proportion turn one off."""
    dense: Any = network("dense", tiny())
    dense.requires_grad_(False)
    for block in dense.blocks:
        block.attn.proj.weight.mul_(scale)
    (x, t, y), converted = inputs(tiny()), converted_from(dense)
    t = torch.full_like(t, timestep)
    for plan in (MASKED, COMPLETE, converted.plan(timestep)):
        assert distance(converted(x, t, y, plan), dense(x, t, y)) < 1e-6


def test_a_router_that_reads_at_first_is_caught() -> None:
    dense: Any = network("dense", tiny())
    converted = converted_from(dense.requires_grad_(False))
    for block in converted.blocks:
        block.token_selection.mlp_head[2].weight.data.fill_(-30.0)
    x, t, y = inputs(tiny())
    assert distance(converted(x, t, y), dense(x, t, y)) > 1e-3


def test_keys_are_the_released_ones() -> None:
    dense = set(network("dense", tiny()).state_dict())
    routers = ("attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.0", "token_selection.mlp_head.2")
    new = {f"blocks.{layer}.{router}.{part}" for layer in range(8) for router in routers for part in ("weight", "bias")}
    original = network("dydit", tiny())
    original(*inputs(tiny()), original.plan(0))  # slices are no weights
    assert set(original.state_dict()) == dense | new


def test_a_released_file_is_recognized(tmp_path: Path) -> None:
    original = network("dydit", tiny(num_classes=4))
    torch.save({"model": {f"module.{key}": value for key, value in original.state_dict().items()}}, tmp_path / "released.pt")
    weights = read_weights(str(tmp_path / "released.pt"))
    plan = recognized(weights, "DiT-T/2", (16, 16))
    assert (type(plan), plan.backbone) == (DyDiT, original.backbone)
    again, loading = build_with(plan, weights)
    assert loading.new == loading.dropped == ()
    assert torch.equal(again(*inputs(tiny(num_classes=4))), original(*inputs(tiny(num_classes=4))))
