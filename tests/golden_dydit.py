"""DyDiT against the published implementation's evaluation (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_files import GOLDEN, label, npz_files
from golden_networks import TOLERANCE, Golden, error, own_keys, read

from models import METHODS, DyDiT
from models.dydit import COMPLETE, DECISIONS, MASKED, flops_ratio
from models.weights import identify

MASK_KEYS = {"heads": "head_mask", "channels": "mlp_mask", "tokens": "token_mask"}
XL_COSTS = 1.50994944, 2.717908992
"""Attention and MLP of a layer of XL/2 at 256, with which the files' ratios were computed, whatever their network."""

DYDIT_FILES = [path for path in npz_files() if own_keys(path) >= {"out_complete", *MASK_KEYS.values()}]
every_dydit = pytest.mark.parametrize("path", [pytest.param(path, id=label(path)) for path in DYDIT_FILES])


def dydit(path: Path) -> tuple[Golden, DyDiT]:
    golden = replace(read(path), method="dydit")
    network = golden.network()[0]
    assert isinstance(network, DyDiT)
    return golden, network


def by_sample(golden: Golden, network: DyDiT) -> torch.Tensor:
    """Every sample as sampling runs it: sliced and gathered."""
    samples = zip(*(golden.arrays[name] for name in "xty"), strict=True)
    return torch.cat([network(x[None], t[None], y[None], network.plan(int(t))) for x, t, y in samples])


def test_dydit_is_here() -> None:
    assert GOLDEN / "dydit.npz" in DYDIT_FILES


@every_dydit
def test_dydit_output_and_decisions(path: Path) -> None:
    golden, network = dydit(path)
    arrays = golden.arrays
    output, features = network.predict(arrays["x"], arrays["t"], arrays["y"], MASKED, None)
    assert error(output, arrays["out"]) < TOLERANCE
    assert error(network(arrays["x"], arrays["t"], arrays["y"], COMPLETE), arrays["out_complete"]) < TOLERANCE
    assert error(by_sample(golden, network), arrays["out"]) < TOLERANCE
    assert error(arrays["out_complete"], arrays["out"]) > 100 * TOLERANCE  # decisions matter
    for name, key in MASK_KEYS.items():
        assert torch.equal(features[name], arrays[key])


@every_dydit
def test_dydit_ratio_and_loss(path: Path) -> None:
    arrays = read(path).arrays
    ratio = flops_ratio(*(arrays[MASK_KEYS[name]] for name in DECISIONS), *XL_COSTS)
    assert error(ratio, arrays["flops_ratio"]) < TOLERANCE
    assert error(2 * (ratio.mean() - 0.5).square(), arrays["flops_loss_target0p5"]) < 10 * TOLERANCE
    assert error(2 * (ratio - 0.5).square().mean(), arrays["flops_loss_target0p5"]) > 100 * TOLERANCE  # of each sample
    plain = flops_ratio(*(arrays[MASK_KEYS[name]] for name in DECISIONS), 1, 2)  # MLP twice the attention
    assert error(plain, arrays["flops_ratio"]) > 10 * TOLERANCE


@every_dydit
def test_dydit_s_loss_is_that_of_its_own_costs(path: Path) -> None:
    golden, network = dydit(path)
    network.options = replace(network.options, flops_target=0.5, target_warmup=0)
    features = {name: golden.arrays[key] for name, key in MASK_KEYS.items()}
    ratio, block = network.flops_ratio(features), network.blocks[0]
    costs = block.attn.macs(golden.backbone.tokens), block.mlp.macs(golden.backbone.tokens)
    assert torch.equal(ratio, flops_ratio(*features.values(), *costs))
    assert torch.equal(network.extra_losses(features, 0)["flops"], 2 * (ratio.mean() - 0.5).square())


@every_dydit
def test_dydit_is_told_by_its_keys(path: Path) -> None:
    golden, network = dydit(path)
    shapes = {key: tuple(value.shape) for key, value in golden.state.items()}
    assert identify(shapes, METHODS) == ("dydit", "released DyDiT", {})
    assert set(network.state_dict()) == set(shapes)


@every_dydit
def test_a_dydit_block_that_decides_otherwise_is_caught(path: Path) -> None:
    """The known-bad variants: one layer's router turned, in each form."""
    golden, network = dydit(path)
    arrays = golden.arrays
    for router in ("attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.2"):
        layer = network.blocks[-1].get_submodule(router)
        assert isinstance(layer, torch.nn.Linear)
        layer.bias.sub_(100.0)
        assert error(network(arrays["x"], arrays["t"], arrays["y"]), arrays["out"]) > TOLERANCE
        assert error(by_sample(golden, network), arrays["out"]) > TOLERANCE
        layer.bias.add_(100.0)
