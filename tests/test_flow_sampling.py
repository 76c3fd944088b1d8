"""Networks trained under flow, through sample.py and sample_ddp.py: samplers, path-drop guidance, costs, records, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_runs import assert_refused
from small_runs import call, random_network, succeed
from torch import Tensor

from diffusion.samplers import SAMPLERS
from diffusion.schedule import plan_timestep
from models import METHODS, Backbone, DiT
from runtime import sampling
from runtime.checkpoint import save_checkpoint
from runtime.networks import describe, published_time_scale
from runtime.sampling import SamplingSettings, plain_forward, sample_latents, sampling_cost

OF_FLOW = [name for name, sampler in SAMPLERS.items() if sampler.objective == "flow"]
CPU = torch.device("cpu")
Make = Callable[..., Path]


def blueprint(method: str, options: dict[str, Any] | None = None, **sizes: Any) -> DiT:
    backbone = Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4, learn_sigma=False, objective="flow",
                              time_scale=published_time_scale("DiT-T/2", method))  # fmt: skip
    return random_network(method, replace(backbone, **sizes), options).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Method, options and sizes -> a checkpoint of random weights that makes pictures of 8 x 8 without a decoder."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("flow")

    def one(method: str, options: dict[str, Any] | None = None, **sizes: Any) -> Path:
        name = f"{method}-{options}-{sizes}"
        if name not in made:
            torch.manual_seed(0)
            network = blueprint(method, options, **sizes)
            codec = {"name": "pixels", "architecture": "pixels", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
            header = {"network": describe(network, "DiT-T/2"), "step": 7,
                      "data": {"image_size": 8, "codec": codec, "classes": list("abcd")}}  # fmt: skip
            made[name] = folder / f"{len(made)}.safetensors"
            save_checkpoint(made[name], network.state_dict(), header)
        return made[name]

    return one


def flags(path: Path, samples: Path, *more: str) -> list[str]:
    return ["--ckpt", str(path), "--num-fid-samples", "6", "--num-sampling-steps", "4", "--per-proc-batch-size", "4",
            "--sample-dir", str(samples), *more]  # fmt: skip


def record(samples: Path) -> dict[str, Any]:
    (path,) = samples.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def pictures(samples: Path) -> np.ndarray:
    (path,) = samples.glob("*.npz")
    found: np.ndarray = np.load(path)["arr_0"].astype(np.int64)
    return found


# Through the scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_sampled_as_published_for_flow(method: str, make: Make, tmp_path: Path) -> None:
    said = succeed("sample_ddp", *flags(make(method), tmp_path)).out
    assert "guidance 1.5 at all 4 steps: 8 network passes and " in said
    made = record(tmp_path)
    assert made["objective"] == "flow"
    assert made["time_scale"] == published_time_scale("DiT-T/2", method)
    assert made["sampler"] == "euler-maruyama"
    assert made["guidance"] == {"kind": "classifier-free", "scale": 1.5, "channels": "all", "interval": None}
    assert made["passes_per_picture"] == 8
    (path,) = tmp_path.glob("*.npz")
    assert "-euler-maruyama-4-seed-0" in path.stem
    assert pictures(tmp_path).std() > 20


@pytest.mark.parametrize("sampler", OF_FLOW)
def test_batches_of_any_size_make_the_same_pictures(
    sampler: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = flags(make("dense"), tmp_path, "--sampler", sampler)
    for batch in ("4", "5"):
        succeed("sample_ddp", *words, "--sample-dir", tmp_path / batch, "--per-proc-batch-size", batch)
    by_four = pictures(tmp_path / "4")
    assert np.abs(by_four[1:] - by_four[:-1]).mean() > 5
    assert np.abs(by_four - pictures(tmp_path / "5")).max() <= 1
    # Planted bug: noise named by the place in the batch.
    normal = sampling.normal
    monkeypatch.setattr(
        sampling, "normal", lambda keys, *rest: normal(replace(keys, index=torch.arange(len(keys.index))), *rest)
    )
    succeed("sample_ddp", *words, "--sample-dir", tmp_path / "bug")
    assert np.abs(by_four - pictures(tmp_path / "bug")).max() > 20


@pytest.mark.parametrize("sampler", OF_FLOW)
def test_a_grid_by_every_sampler(sampler: str, make: Make, tmp_path: Path) -> None:
    calls = 2 if sampler == "heun" else 1
    steps = "8 calls of 4 steps" if calls == 2 else "4 steps"
    said = succeed("sample", "--ckpt", make("dense"), "--class-labels", "0,1", "--num-sampling-steps", "4",
                   "--sampler", sampler, "--output", tmp_path / "grid.png").out  # fmt: skip
    assert f"guidance 4 at all {steps}: {8 * calls} network passes and " in said
    assert (tmp_path / "grid.png").is_file()


def test_path_drop_is_said_named_recorded_and_another_set(make: Make, tmp_path: Path) -> None:
    words = flags(make("sprint"), tmp_path)
    said = succeed("sample_ddp", *words, "--guidance", "path-drop").out
    network = blueprint("sprint")
    dropped = 4 * (network.macs(network.plan(0)) + network.macs(network.cheap_plan(0)))
    assert f"8 network passes and {dropped / 1e12:.4g} TMACs per picture" in said
    made = record(tmp_path)
    assert made["guidance"]["kind"] == "path-drop"
    assert made["gmacs_per_pass"] == pytest.approx(dropped / 8 / 1e9)
    (path,) = tmp_path.glob("*.npz")
    assert path.stem.endswith("-seed-0-path-drop")
    assert_refused(call("sample_ddp", *words, "--sample-name", path.stem), "another guidance;")
    succeed("sample_ddp", *words, "--sample-dir", tmp_path / "whole")
    assert record(tmp_path / "whole")["gmacs_per_pass"] > made["gmacs_per_pass"]
    assert np.abs(pictures(tmp_path) - pictures(tmp_path / "whole")).max() > 20


def test_records_from_before_flow_match(make: Make, tmp_path: Path) -> None:
    """A set of a ddpm network, whose record does not name what there was no choice of."""
    path = make("dense", objective="ddpm")
    words = flags(path, tmp_path, "--sample-name", "set")
    succeed("sample_ddp", *words)
    for place in (tmp_path / "set.json", tmp_path / "set" / "protocol.json"):
        older = json.loads(place.read_text())
        assert (older.pop("objective"), older.pop("time_scale")) == ("ddpm", 1000)
        assert older["guidance"].pop("kind") == "classifier-free"
        place.write_text(json.dumps(older))
    succeed("sample_ddp", *words, "--num-fid-samples", "7")
    assert record(tmp_path)["objective"] == "ddpm"


def test_another_time_scale_of_released_weights_is_another_set(tmp_path: Path) -> None:
    """Nothing in the file tells it: the flag alone does."""
    torch.save(blueprint("dense").state_dict(), tmp_path / "released.pt")
    samples = tmp_path / "samples"
    words = [*flags(tmp_path / "released.pt", samples, "--sample-name", "set"), "--model", "DiT-T/2", "--objective", "flow",
             "--vae", "pixels"]  # fmt: skip
    succeed("sample_ddp", *words)
    assert record(samples)["time_scale"] == 1000
    assert_refused(call("sample_ddp", *words, "--time-scale", "1"), "another time_scale;")
    assert_refused(call("sample_ddp", *words, "--time-scale", "0"), "--time-scale is 0; it must be 0.001 to 1,000,000.")
    assert_refused(call("sample_ddp", *words, "--time-scale", "-1"), "--time-scale is -1; it must be 0.001 to 1,000,000.")


REFUSED: dict[str, tuple[str, list[str], list[str]]] = {
    "a sampler of ddpm": ("dense", ["--sampler", "ddim"],
                          ["--sampler ddim is not for networks trained under flow; choose from euler, heun, euler-maruyama."]),
    "sections": ("dense", ["--num-sampling-steps", "10,15,20"], ["'10,15,20' are not understood: under flow give a number"]),
    "no steps": ("dense", ["--num-sampling-steps", "0"], ["'0' are not understood"]),
    "no cheap path": ("dense", ["--guidance", "path-drop"], ["path-drop needs a network with a cheap path"]),
    "no cheap path either": ("dydit", ["--guidance", "path-drop", "--cfg-scale", "1"], ["needs a network with a cheap path"]),
    "another objective": ("dense", ["--objective", "ddpm"], ["holds a network for --objective flow, not ddpm"]),
    "another time scale": ("sprint", ["--time-scale", "1000"], ["holds a network for --time-scale 1.0, not 1000.0"]),
    "no time scale": ("sprint", ["--time-scale", "0"], ["--time-scale 1.0, not 0.0"]),
}  # fmt: skip


@pytest.mark.parametrize("script", ["sample", "sample_ddp"])
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused_in_one_sentence(
    case: str, script: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.sampling.build_with", lambda *arguments: pytest.fail("a network was built"))
    method, words, named = REFUSED[case]
    place = ["--sample-dir", tmp_path / "samples"] if script == "sample_ddp" else ["--output", tmp_path / "grid.png"]
    assert_refused(call(script, "--ckpt", make(method), *place, *words), *named)


@pytest.mark.parametrize("sampler", OF_FLOW)
def test_samplers_of_flow_are_refused_under_ddpm(sampler: str, make: Make, tmp_path: Path) -> None:
    path = make("dense", objective="ddpm")
    refused = call("sample_ddp", *flags(path, tmp_path), "--sampler", sampler)
    assert_refused(refused, f"--sampler {sampler} is not for networks trained under ddpm; choose from ddpm, ddim.")


# What is computed ----------------------------------------------------------------------------------------------------


class Pass:
    """Of a network, as guidance calls it: pictures, the exact timestep, the plan."""

    def __init__(self, count: int, timestep: float, plan: Any) -> None:
        self.count, self.timestep, self.plan = count, timestep, plan


def passes(network: DiT, settings: SamplingSettings) -> list[Pass]:
    """Those of sampling two pictures."""
    seen, index = list[Pass](), torch.arange(2)

    def predict(x: Tensor, t: Tensor, y: Tensor, plan: Any, rows: Tensor | None) -> Tensor:
        seen.append(Pass(len(x), float(t), plan))
        return plain_forward(network, x, t, y, plan, rows)

    sample_latents(network, settings, index, index, 0, CPU, predict)
    return seen


COSTS: dict[str, SamplingSettings] = {
    "guidance 1.5 at all 5 steps: 10 network": SamplingSettings(num_sampling_steps="5"),
    "guidance 1.5 at all 10 calls of 5 steps: 20 network": SamplingSettings(num_sampling_steps="5", sampler="heun"),
    # 1000, 800 | 800, 600 | 600, 400 | 400, 200 | 200, 0: the first and the last step are guided at one of their calls.
    "guidance 1.5 at 8 of 10 calls of 5 steps: 18 network": SamplingSettings(
        num_sampling_steps="5", sampler="heun", guidance_interval=(0.2, 0.8)
    ),
    "no guidance: 10 network": SamplingSettings(num_sampling_steps="5", sampler="heun", cfg_scale=1.0),
    "guidance 3 at 3 of 10 steps: 13 network": SamplingSettings(
        num_sampling_steps="10", sampler="euler", cfg_scale=3.0, guidance_interval=(0.3, 0.5)
    ),
}


@pytest.mark.parametrize("kind", ["classifier-free", "path-drop"])
@pytest.mark.parametrize("said", list(COSTS))
def test_what_a_picture_costs_is_what_its_sampling_computes(said: str, kind: Any) -> None:
    network, settings = blueprint("sprint"), replace(COSTS[said], guidance=kind)
    cost, seen = sampling_cost(network, settings), passes(network, settings)
    assert str(cost).startswith(said)
    assert cost.passes == sum(one.count for one in seen) // 2
    assert cost.macs == sum(one.count * network.macs(one.plan) for one in seen) // 2
    cheap = [one for one in seen if one.plan == network.cheap_plan(0)]
    assert len(cheap) == (cost.guided_steps if kind == "path-drop" else 0)
    if kind == "path-drop" and cheap:  # known-bad variant: both halves counted as whole passes
        assert cost.macs < cost.passes * network.macs(network.plan(0))


@pytest.mark.parametrize("sampler", OF_FLOW)
@pytest.mark.parametrize(("method", "options"), [("sparsedit", {"density": "4,3,2,1@0,150,500,750"}), ("dydit", {})])
def test_the_plan_is_that_of_the_timestep_at_or_below_the_exact_time(method: str, options: Any, sampler: Any) -> None:
    network, settings = blueprint(method, options), SamplingSettings(num_sampling_steps="9", sampler=sampler)
    seen = passes(network, settings)
    asked = SAMPLERS[sampler].timesteps("9")
    assert len({one.timestep for one in seen}) == len(set(asked))
    for one in seen:
        (place,) = {timestep for timestep in asked if abs(one.timestep - timestep) < 1e-3}  # the network is given the exact one
        assert one.plan in network.guidance_plans(min(int(place), 999))
    assert [plan_timestep(t) for t in (0.0, 0.99, 149.99, 150.0, 999.5, 1000.0)] == [0, 0, 149, 150, 999, 999]


def test_the_exact_time_counts() -> None:
    """The network would answer otherwise at the plan's timestep: known-bad variant of what it is given."""
    network, x = blueprint("dydit"), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, plan = torch.tensor([0, 1]), network.plan(857)
    exact, floored = (network(x, torch.tensor([t]), y, plan) for t in (857.9, 857.0))
    assert (exact - floored).abs().max() > 1e-5
