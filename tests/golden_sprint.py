"""SPRINT against the published implementation: passes, path-drop halves and both samplers (tests/golden/README.md).

The kind of a file is its set of keys. Its times are flow times; ours are timesteps, 1000 of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, label, npz_files
from golden_networks import TOLERANCE, Golden, error, own_keys
from torch import Tensor

from diffusion import flow
from diffusion.guidance import GUIDANCE, guided
from models import METHODS, SPRINT, Backbone, DiT
from models import sprint as sprint_module
from models.sprint import Rotation
from models.weights import export, identify
from runtime.sampling import plain_forward

MASKED = {"x", "t", "y", "ids_keep", "out_masked"}
HALVES = {"pdg_x", "pdg_t", "pdg_y", "pdg_out"}
SAMPLED = {"z", "ode5", "sde5", "sde_noise"}

SIZE_ARGUMENTS = ("hidden_size", "num_heads", "num_classes", "patch_size", "in_channels")
DEPTH_ARGUMENTS = ("encoder_depth", "middle_depth", "decoder_depth")
OTHER_ARGUMENTS = {"context_size", "mlp_ratio", "use_swiglu_large", "q_norm", "k_norm"}
"""What the config may hold beside these and shares that training drops; use_swiglu_large has no effect."""


def read_sprint(path: Path) -> Golden:
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        arrays = {key: torch.from_numpy(file[key]) for key in own_keys(path) - {"config"}}
        state = {key.removeprefix("state/"): torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")}
    unknown = set(config) - {*SIZE_ARGUMENTS, *DEPTH_ARGUMENTS} - OTHER_ARGUMENTS
    # What training drops, of labels, tokens or paths, is no part of these forwards: the file says which tokens are kept.
    unknown = {name for name in unknown if "drop" not in name}
    assert not unknown, f"{path}: the config holds {sorted(unknown)}, which this test does not know"
    assert {config.get(name, "RMSNorm") for name in ("q_norm", "k_norm")} == {"RMSNorm"}
    side = config["context_size"]
    sizes = {name: config[name] for name in SIZE_ARGUMENTS}
    depth = sum(config[name] for name in DEPTH_ARGUMENTS)
    backbone = Backbone(
        **sizes,
        depth=depth,
        latent_size=(side, side),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        learn_sigma=False,
        objective="flow",
        time_scale=1.0,
    )
    # Which tokens are kept the file says: a map that cannot be cut into groups is no reason to refuse it.
    options = {"encoder_blocks": config["encoder_depth"], "decoder_blocks": config["decoder_depth"], "drop_pattern": "random"}
    return Golden(arrays, state, "sprint", backbone, options)


def sprint(path: Path) -> tuple[Golden, SPRINT]:
    golden = read_sprint(path)
    network = golden.network()[0]
    assert isinstance(network, SPRINT)
    return golden, network


SPRINT_FILES = [path for path in npz_files() if own_keys(path) >= MASKED]
every_sprint = pytest.mark.parametrize("path", [pytest.param(path, id=label(path)) for path in SPRINT_FILES])


def having(keys: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", [pytest.param(p, id=label(p)) for p in SPRINT_FILES if own_keys(p) >= keys])


def full_error(golden: Golden, network: SPRINT) -> float:
    arrays = golden.arrays
    return error(network(arrays["x"], 1000 * arrays["t"], arrays["y"], network.plan(0)), arrays["out"])


def masked_error(golden: Golden, network: SPRINT) -> float:
    arrays, kept = golden.arrays, golden.arrays["ids_keep"]
    nothing = torch.zeros(len(kept), dtype=torch.bool)
    draws = {"label_drop": nothing, "path_drop": nothing, "kept": kept}
    plan = sprint_module.middle_plan(kept.shape[1])
    return error(network(arrays["x"], 1000 * arrays["t"], arrays["y"], plan, draws), arrays["out_masked"])


def halves_error(golden: Golden, network: SPRINT) -> float:
    """Both halves of path-drop guidance under the plans that guidance takes."""
    x, t, y = (golden.arrays[f"pdg_{name}"].chunk(2) for name in "xty")
    plans = GUIDANCE["path-drop"](network)(500)
    halves = [network(x[half], 1000 * t[half], y[half], plans[half]) for half in range(2)]
    return error(torch.cat(halves), golden.arrays["pdg_out"])


def sampled(golden: Golden, network: SPRINT, sampler: Callable[..., Tensor], *more: object) -> Tensor:
    z = golden.arrays["z"]
    labels = torch.arange(1, len(z) + 1)
    denoise = guided(partial(plain_forward, network), labels, golden.backbone.num_classes, 1.0, plans=network.guidance_plans)
    return sampler(denoise, z, 5, *more)


def ode_error(golden: Golden, network: SPRINT) -> float:
    return error(sampled(golden, network, flow.euler), golden.arrays["ode5"])


def sde_error(golden: Golden, network: SPRINT) -> float:
    return error(sampled(golden, network, flow.euler_maruyama, golden.arrays["sde_noise"].__getitem__), golden.arrays["sde5"])


def test_sprint_is_here() -> None:
    path = GOLDEN / "sprint.npz"
    assert path in SPRINT_FILES
    assert own_keys(path) == MASKED | HALVES | SAMPLED | {"out", "config"}


@every_sprint
def test_sprint_output_with_and_without_drop(path: Path) -> None:
    golden, network = sprint(path)
    assert masked_error(golden, network) < TOLERANCE
    if "out" in golden.arrays:
        assert full_error(golden, network) < TOLERANCE
        assert error(golden.arrays["out_masked"], golden.arrays["out"]) > 100 * TOLERANCE  # what is kept matters


@having(HALVES)
def test_sprint_halves_of_path_drop_guidance(path: Path) -> None:
    assert halves_error(*sprint(path)) < TOLERANCE


@having(SAMPLED)
def test_sprint_samplers(path: Path) -> None:
    golden, network = sprint(path)
    assert ode_error(golden, network) < TOLERANCE
    assert sde_error(golden, network) < TOLERANCE


@every_sprint
def test_sprint_is_told_by_its_keys_and_goes_back_to_them(path: Path) -> None:
    golden, network = sprint(path)
    shapes = {key: tuple(value.shape) for key, value in golden.state.items()}
    told = {"encoder_blocks": golden.options["encoder_blocks"], "decoder_blocks": golden.options["decoder_blocks"]}
    assert identify(shapes, METHODS) == ("sprint", "released SPRINT", {**told, "drop_ratio": 0.0})
    back = export(network, network.released_layout)
    assert set(back) == set(golden.state)
    assert all(torch.equal(back[key], value) for key, value in golden.state.items())


# Known-bad variants: each in what it must change ----------------------------------------------------------------------


def rows_and_columns_swapped(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (network.rotation_cos, network.rotation_sin):
        table.copy_(torch.cat(table.chunk(2, dim=1)[::-1], dim=1))


def channels_paired_across_the_head(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel of the head's first half with one of its second, as other rotary networks pair them, not with its neighbour."""

    def turn(rotation: Rotation, vectors: Tensor) -> Tensor:
        first, second = vectors.chunk(2, dim=3)
        return torch.cat((first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin), dim=3)

    monkeypatch.setattr(Rotation, "turn", turn)


def fusion_order_swapped(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = network.renoise_linear.weight
    weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def pixels_channels_last(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, patch = network.x_embedder.proj.weight, network.backbone.patch_size
    weight.copy_(weight.unflatten(1, (-1, patch * patch)).transpose(1, 2).flatten(1))


def outputs_channels_last(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPRINT, "unpatchify", DiT.unpatchify)


def norms_left_out(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            monkeypatch.setattr(norm, "forward", lambda x: x)


def time_in_thousands(network: SPRINT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPRINT, "embedded_time", lambda self, t: t)


BUGS = [
    rows_and_columns_swapped,
    channels_paired_across_the_head,
    fusion_order_swapped,
    pixels_channels_last,
    outputs_channels_last,
    norms_left_out,
    time_in_thousands,
]


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_sprint_is_caught(bug: Callable[[SPRINT, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    golden, network = sprint(GOLDEN / "sprint.npz")
    bug(network, monkeypatch)
    for measure in (full_error, masked_error, halves_error, ode_error, sde_error):
        assert measure(golden, network) > 10 * TOLERANCE


def test_kept_tokens_that_leave_their_places_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, network = sprint(GOLDEN / "sprint.npz")
    monkeypatch.setattr(Rotation, "at", lambda self, kept: Rotation(self.cos[: kept.shape[1]], self.sin[: kept.shape[1]]))
    assert masked_error(golden, network) > 10 * TOLERANCE


def test_an_unconditional_half_of_the_whole_network_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, network = sprint(GOLDEN / "sprint.npz")
    monkeypatch.setattr(SPRINT, "cheap_plan", SPRINT.plan)
    assert halves_error(golden, network) > 10 * TOLERANCE


def test_noise_in_the_last_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, network = sprint(GOLDEN / "sprint.npz")
    ends = flow.noisy_ends
    monkeypatch.setattr(flow, "noisy_ends", lambda steps: [*ends(steps)[:-1], 1e-12])
    assert sde_error(golden, network) > 10 * TOLERANCE


def test_sprint_noise_of_the_other_sign_is_caught() -> None:
    golden, network = sprint(GOLDEN / "sprint.npz")
    ours = sampled(golden, network, flow.euler_maruyama, lambda step: -golden.arrays["sde_noise"][step])
    assert error(ours, golden.arrays["sde5"]) > 10 * TOLERANCE
