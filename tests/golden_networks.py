"""Networks against the outputs of the published implementations (tests/golden/README.md).

The kind of a file is its set of keys and its config: a DiT, a SparseDiT in the released key layout, or a DiT's weights that
are loaded into a SparseDiT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, keys, label, npz_files
from torch import Tensor

from diffusion.guidance import combine, guided
from models import METHODS, Backbone, DiT
from models.weights import LoadingPlan, identify
from runtime.checkpoint import Weights
from runtime.networks import blueprint, build_with
from runtime.sampling import plain_forward

TOLERANCE = 2e-5
GUIDANCE = {"cfg_x", "cfg_t", "cfg_y", "cfg_scale", "cfg_out"}
NETWORK = {"x", "t", "y", "out", "config"}

BACKBONE_ARGUMENTS = {
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_classes": 1000,
    "learn_sigma": True,
    "mlp_ratio": 4.0,
}
"""The reference's constructor arguments that are fields of our backbone, and its defaults: those of DiT-XL/2."""

SPARSE_ARGUMENTS = {
    "num_poolingformer": "poolingformer_blocks",
    "num_dumbbell": "modules",
    "dumbbell_group": "module_blocks",
    "num_normal_block": "top_blocks",
    "semantic_size": "sparse_grid",
}

NOT_OURS = {"input_size", "class_dropout_prob"}


@dataclass(frozen=True)
class Golden:
    """One file: its arrays without the weights, its weights, and the network it describes."""

    arrays: dict[str, Tensor]
    state: dict[str, Tensor]
    method: str
    backbone: Backbone
    options: dict[str, Any]

    def network(self, state: dict[str, Tensor] | None = None) -> tuple[DiT, LoadingPlan]:
        """The described network with the file's weights."""
        plan = blueprint(self.method, self.backbone, self.options)
        return build_with(plan, Weights(self.state if state is None else state, "golden"))


def own_keys(path: Path) -> set[str]:
    """The keys beside the state."""
    return {key for key in keys(path) if not key.startswith("state/")}


def is_network(path: Path) -> bool:
    """A DiT or SparseDiT with guidance, or a conversion (`missing`); DyDiT (golden_dydit.py) and SPRINT files hold others."""
    return NETWORK <= own_keys(path) <= NETWORK | GUIDANCE | {"missing"}


def read(path: Path) -> Golden:
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        arrays = {key: torch.from_numpy(file[key]) for key in own_keys(path) - {"config", "missing"}}
        state = {key.removeprefix("state/"): torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")}
    unknown = set(config) - set(BACKBONE_ARGUMENTS) - set(SPARSE_ARGUMENTS) - NOT_OURS
    assert not unknown, f"{path}: the config holds {sorted(unknown)}, which this test does not know"
    side = config.get("input_size", 32)
    sizes = {name: config.get(name, default) for name, default in BACKBONE_ARGUMENTS.items()}
    options = {ours: config[theirs] for theirs, ours in SPARSE_ARGUMENTS.items() if theirs in config}
    return Golden(arrays, state, "sparsedit" if options else "dense", Backbone(**sizes, latent_size=(side, side)), options)


FILES = [path for path in npz_files() if is_network(path)]
every_file = pytest.mark.parametrize("path", [pytest.param(path, id=label(path)) for path in FILES])
ours_alone = pytest.mark.parametrize("path", [pytest.param(path, id=label(path)) for path in FILES if GOLDEN in path.parents])
guided_files = [pytest.param(path, id=label(path)) for path in FILES if own_keys(path) >= GUIDANCE]
conversions = [pytest.param(path, id=label(path)) for path in FILES if "missing" in own_keys(path)]


@pytest.fixture(autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    """Networks this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def output_error(network: DiT, golden: Golden) -> float:
    return error(network(golden.arrays["x"], golden.arrays["t"], golden.arrays["y"]), golden.arrays["out"])


def guidance_error(network: DiT, golden: Golden, channels: int | None = 3) -> float:
    """The reference runs the first half of cfg_x for both halves of cfg_y, and guides 3 channels of both halves alike."""
    x, t, y = (golden.arrays[f"cfg_{name}"] for name in "xty")
    half, epsilons = len(x) // 2, golden.backbone.in_channels
    conditional, unconditional = network(torch.cat((x[:half], x[:half])), t, y).chunk(2)
    first = combine(conditional, unconditional, float(golden.arrays["cfg_scale"]), epsilons, channels)
    second = torch.cat((first[:, :3], unconditional[:, 3:]), dim=1)
    return error(torch.cat((first, second)), golden.arrays["cfg_out"])


def test_every_kind_is_here() -> None:
    here = {path.stem for path in FILES if GOLDEN in path.parents}
    assert here == {"dit_dense", "sparsedit", "sparsedit_odd_grid", "dense_to_sparsedit"}
    assert not is_network(GOLDEN / "dydit.npz")
    assert not is_network(GOLDEN / "sprint.npz")


@every_file
def test_output(path: Path) -> None:
    golden = read(path)
    assert output_error(golden.network()[0], golden) < TOLERANCE


@every_file
def test_the_layout_tells_the_method_and_its_split(path: Path) -> None:
    golden = read(path)
    method, _, options = identify({key: tuple(value.shape) for key, value in golden.state.items()}, METHODS)
    assert method == ("dense" if "missing" in own_keys(path) else golden.method)
    told = {name: value for name, value in golden.options.items() if name != "sparse_grid"}
    assert options == (told if method == "sparsedit" else {})


@pytest.mark.parametrize("path", guided_files)
def test_guidance(path: Path) -> None:
    golden = read(path)
    network, _ = golden.network()
    assert guidance_error(network, golden) < TOLERANCE
    x, t, y = (golden.arrays[f"cfg_{name}"] for name in "xty")
    half, null, predict = len(x) // 2, golden.backbone.num_classes, partial(plain_forward, network)
    assert (y[half:] == null).all()
    for place in range(half):  # the sampler's own path, one timestep at a time
        denoise = guided(predict, y[place : place + 1], null, float(golden.arrays["cfg_scale"]))
        ours = denoise(x[place : place + 1], int(t[place]))
        assert error(ours, golden.arrays["cfg_out"][place : place + 1]) < 2 * TOLERANCE


@pytest.mark.parametrize("path", guided_files)
def test_guidance_of_all_channels_is_caught(path: Path) -> None:
    golden = read(path)
    assert golden.backbone.in_channels <= 3 or guidance_error(golden.network()[0], golden, channels=None) > 100 * TOLERANCE


@pytest.mark.parametrize("path", conversions)
def test_a_conversion_says_what_has_no_source(path: Path) -> None:
    golden = read(path)
    network, plan = golden.network()
    names = network.layout_names(network.released_layout)
    with np.load(path) as file:
        missing = set(file["missing"].tolist())
    assert {names[key] for key in plan.new} == missing
    assert plan.warnings == ()


@ours_alone
def test_a_small_change_of_any_block_is_caught(path: Path) -> None:
    """The known-bad variants: one layer of one block off by a thousandth, in turn for every block."""
    golden = read(path)
    network, _ = golden.network()
    for block in network.blocks:
        block.mlp.fc1.weight.mul_(1.001)
        assert output_error(network, golden) > TOLERANCE
        block.mlp.fc1.weight.div_(1.001)


@ours_alone
def test_another_activation_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, gelu = read(path), torch.nn.functional.gelu
    monkeypatch.setattr("models.layers.F.gelu", lambda x, approximate: gelu(x))
    assert output_error(golden.network()[0], golden) > TOLERANCE
