"""Every method under flow matching: it trains, goes on bit for bit, says in its files what it was trained for, and starts only
from what fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_graphs import counted_graphs
from sampling_runs import assert_refused
from small_runs import call, differing, header_at, metrics, state_at, succeed

import models.sprint
from models import METHODS
from runtime.checkpoint import checkpoints, read_tensors, save_checkpoint
from runtime.networks import published_time_scale
from runtime.seeding import Keys, uniform
from runtime.settings import parse_training

every_method = pytest.mark.parametrize("method", METHODS)
DENSITY = ["--density", "4,2@0,500", "--density-groups", "2", "--gradient-accumulation", "2"]


@pytest.fixture(autouse=True)
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling beside checkpoints takes longer than these trainings."""
    monkeypatch.setattr("train.work_meter", lambda *arguments: None)


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    return ["--model", "DiT-T/2", "--feature-path", str(features), "--image-size", "64", "--max-steps", "6",
            "--global-batch-size", "8", "--log-every", "2", "--checkpoint-every", "3", "--keep-checkpoints", "9",
            "--lr", "1e-3", "--results-dir", str(tmp_path)]  # fmt: skip


def flow(words: list[str], method: str, *more: str) -> list[str]:
    return [*words, "--method", method, "--objective", "flow", "--pretrained", "none", *more]


def stopped_at_3(whole: Path, run: Path) -> Path:
    """A copy of a run as a kill after the checkpoint of step 3 leaves it. -> the checkpoint"""
    shutil.copytree(whole, run)
    for path in checkpoints(run):
        if int(path.stem) > 3:
            path.unlink()
    (path,) = checkpoints(run)
    return path


# Every method --------------------------------------------------------------------------------------------------------


@every_method
def test_every_method_trains_and_goes_on_bit_for_bit(method: str, words: list[str], tmp_path: Path) -> None:
    succeed("train", *flow(words, method), "--run-name", "whole")
    stopped_at_3(tmp_path / "whole", tmp_path / "run")
    said = succeed("train", *flow(words, method), "--run-name", "run").out
    assert "at step 3" in said
    whole = state_at(tmp_path / "whole")
    assert differing(whole, state_at(tmp_path / "run")) == []
    assert whole["model/final_layer.linear.weight"].shape[0] == 4 * 4  # a velocity alone
    assert all(0 < line["loss"] < 100 for line in metrics(tmp_path / "whole"))
    saved, resumed = header_at(tmp_path / "whole"), header_at(tmp_path / "run")
    assert saved == {**resumed, "settings": {**resumed["settings"], "run_name": "whole"}}
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for content in (saved, config):
        assert content["objective"] == content["settings"]["objective"] == "flow"
        assert content["settings"]["flow_times"] == "logit-normal"
        assert content["settings"]["learn_sigma"] is False
        backbone = content["network"]["backbone"]
        assert (backbone["objective"], backbone["learn_sigma"]) == ("flow", False)
        assert backbone["time_scale"] == published_time_scale("DiT-T/2", method)


@every_method
def test_micro_batches_are_the_batch(method: str, words: list[str], tmp_path: Path) -> None:
    """What a sample draws, a drop of tokens or of the path among it, follows from its place in the batch."""
    words = flow(words, method, "--timestep-strata", "4")
    succeed("train", *words, "--run-name", "whole")
    succeed("train", *words, "--run-name", "parts", "--gradient-accumulation", "2")
    first, second = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    # DyDiT's penalty looks at the samples that are computed at once; what it makes of the weights is small in six steps.
    assert first == pytest.approx(second, rel=1e-3 if method == "dydit" else 1e-5)


def test_dropped_tokens_of_another_place_in_the_batch_would_be_noticed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: places counted in the micro-batch."""
    words = flow(words, "sprint", "--timestep-strata", "4")
    succeed("train", *words, "--run-name", "whole")

    def by_place(keys: Keys, purpose: str, *shape: Any) -> torch.Tensor:
        return uniform(Keys(keys.seed, keys.step, torch.arange(len(keys.index))), purpose, *shape)

    monkeypatch.setattr(models.sprint, "uniform", by_place)
    succeed("train", *words, "--run-name", "parts", "--gradient-accumulation", "2")
    assert losses(tmp_path / "whole") != pytest.approx(losses(tmp_path / "parts"), rel=1e-4)


def losses(run: Path) -> list[float]:
    """Of the denoising alone."""
    return [line.get("denoising/loss", line["loss"]) for line in metrics(run)]


def test_density_groups_go_on_bit_for_bit(words: list[str], tmp_path: Path) -> None:
    succeed("train", *flow(words, "sparsedit", *DENSITY), "--run-name", "whole")
    stopped_at_3(tmp_path / "whole", tmp_path / "run")
    succeed("train", *flow(words, "sparsedit", *DENSITY), "--run-name", "run")
    assert differing(state_at(tmp_path / "whole"), state_at(tmp_path / "run")) == []
    assert any(name.startswith("loss_at_t/") for line in metrics(tmp_path / "whole") for name in line)


def test_grids_are_sampled_under_flow(pixel_features: Path, tmp_path: Path) -> None:
    succeed("train", "--model", "DiT-T/2", "--method", "sprint", "--feature-path", pixel_features, "--image-size", "8",
            "--results-dir", tmp_path, "--run-name", "run", "--max-steps", "2", "--global-batch-size", "4",
            "--sample-every", "2", "--sample-steps", "3", "--sample-count", "2")  # fmt: skip
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()


# Going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--objective", "ddpm"], ["objective (flow, not ddpm)", "learn_sigma (False, not True)"]),
        (["--flow-times", "uniform"], ["flow_times (logit-normal, not uniform)"]),
        (["--time-scale", "1"], ["time_scale (1000, not 1.0)"]),
    ],
)
def test_a_run_goes_on_for_what_it_was_begun(more: list[str], named: list[str], words: list[str]) -> None:
    begun = flow(words, "dense", "--run-name", "run")
    succeed("train", *begun)
    assert_refused(call("train", *begun, *more, "--max-steps", "9"), "was made with other settings: ", *named)


def test_checkpoints_from_before_flow_go_on(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--method", "dense", "--pretrained", "none"]
    succeed("train", *words, "--run-name", "whole")
    path = stopped_at_3(tmp_path / "whole", tmp_path / "run")
    tensors, header = read_tensors(path, ""), header_at(tmp_path / "run")
    for name in ("objective", "flow_times", "time_scale", "learn_sigma"):
        header["settings"].pop(name)
    for name in ("objective", "time_scale"):
        header["network"]["backbone"].pop(name)
    header.pop("objective")
    save_checkpoint(path, tensors, header)
    assert_refused(call("train", *words, "--run-name", "run", "--objective", "flow"), "objective (ddpm, not flow)")
    assert "at step 3" in succeed("train", *words, "--run-name", "run").out
    assert differing(state_at(tmp_path / "whole"), state_at(tmp_path / "run")) == []


def test_sprint_goes_from_few_tokens_to_all(words: list[str], tmp_path: Path) -> None:
    """Its options are inherited, but for what is given; what it embeds as time is its own."""
    first = [*words, "--method", "sprint", "--encoder-blocks", "3", "--decoder-blocks", "1", "--path-drop", "0.3"]
    said = succeed("train", *first, "--run-name", "first", "--time-scale", "10").out
    assert "structured drop: in training 4 of 16 tokens take the 4 middle blocks" in said
    start = checkpoints(tmp_path / "first")[-1]
    second = [*words, "--method", "sprint", "--drop-ratio", "0", "--pretrained", str(start)]
    said = succeed("train", *second, "--run-name", "second").out
    assert "no token is dropped" in said
    assert f"not as in {start}: drop_ratio (0.75, not 0.0)" in said
    assert said.count("not as in") == 1
    network = header_at(tmp_path / "second")["network"]
    assert network["options"] == {**header_at(tmp_path / "first")["network"]["options"], "drop_ratio": 0.0}
    assert network["backbone"]["time_scale"] == 10
    stopped_at_3(tmp_path / "second", tmp_path / "run")
    succeed("train", *second, "--run-name", "run")
    assert differing(state_at(tmp_path / "second"), state_at(tmp_path / "run")) == []


# Starting ------------------------------------------------------------------------------------------------------------


def test_from_noise_to_velocity_and_not_back_without_a_word(words: list[str], tmp_path: Path, pretrained: Path) -> None:
    dense = [*words, "--method", "dense", "--max-steps", "2"]
    said = succeed("train", *dense, "--pretrained", str(pretrained), "--objective", "flow", "--run-name", "released").out
    assert "the variance outputs are left out" in said
    succeed("train", *dense, "--pretrained", "none", "--run-name", "noise")
    noise = str(checkpoints(tmp_path / "noise")[-1])
    said = succeed("train", *dense, "--pretrained", noise, "--objective", "flow", "--run-name", "velocity").out
    assert f"not as in {noise}: objective (ddpm, not flow): it learns anew what it predicts" in said
    assert "the variance outputs are left out" in said
    velocity = str(checkpoints(tmp_path / "velocity")[-1])
    back = [*dense, "--pretrained", velocity, "--run-name", "back"]
    assert_refused(call("train", *back), f"{velocity} (EMA of step 2): the weights predict no variance",
                   "give that objective (for a SiT its --model SiT-...), or for ddpm --no-learn-sigma.")  # fmt: skip
    assert not (tmp_path / "back").exists()
    said = succeed("train", *back, "--no-learn-sigma").out
    assert f"not as in {velocity}: objective (flow, not ddpm): it learns anew what it predicts" in said
    said = succeed("train", *dense, "--pretrained", velocity, "--objective", "flow", "--run-name", "on").out
    assert "not as in" not in said


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--objective", "flow", "--min-snr-gamma", "5"], ["--min-snr-gamma is no setting of --objective flow; leave it out."]),
        (["--flow-times", "uniform"], ["--flow-times is no setting of --objective ddpm; leave it out."]),
        (["--objective", "flow", "--learn-sigma"], ["--objective flow predicts no variance"]),
        (["--time-scale", "0"], ["--time-scale is 0; it must be 0.001 to 1,000,000."]),
        (["--time-scale", "-1"], ["--time-scale is -1; it must be 0.001"]),
        (
            ["--objective", "flow", "--sample-steps", "10,15,20"],
            ["'10,15,20' are not understood: under flow give"],
        ),
        (["--model", "SiT-S/2", "--objective", "ddpm"], ["a backbone of --objective flow; for ddpm give --model DiT-S/2."]),
        (["--objective", "noise"], ["noise"]),
    ],
)
def test_what_belongs_to_another_objective_is_refused(
    more: list[str], named: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.build", lambda *arguments: pytest.fail("a network was built"))
    assert_refused(call("train", *words, "--method", "dense", *more), *named)
    assert list(tmp_path.iterdir()) == []


@every_method
def test_recipes_leave_out_what_flow_has_not(method: str) -> None:
    settings, _ = parse_training(["--method", method, "--objective", "flow"])
    assert settings.min_snr_gamma is None
    others = {name: value for name, value in METHODS[method].recipe.items() if name != "min_snr_gamma"}
    assert {name: getattr(settings, name) for name in others} == others
    assert parse_training(["--method", method, "--objective", "flow", "--flow-times", "uniform"])[0].flow_times == "uniform"


def test_some_recipe_has_a_setting_that_flow_has_not() -> None:
    """Otherwise the test above would say nothing."""
    assert any("min_snr_gamma" in kind.recipe for kind in METHODS.values())


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_one_graph_for_full_maps_and_one_for_few_tokens(
    checkpointing: str, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "DiT-16x4x2/2", "--method", "sprint", "--encoder-blocks", "1", "--decoder-blocks", "1",
             "--feature-path", features, "--image-size", "64", "--max-steps", "4", "--global-batch-size", "4",
             "--log-every", "1", "--lr", "1e-3", "--results-dir", tmp_path]  # fmt: skip
    with counted_graphs(monkeypatch) as graphs:
        succeed("train", *words, "--run-name", "compiled", "--compile", "default", "--gradient-checkpointing", checkpointing)
        assert graphs.made == 2
        assert graphs.ran >= 4 * 4
        assert graphs.symbolic == 0
    succeed("train", *words, "--run-name", "eager")
    assert differing(state_at(tmp_path / "compiled"), state_at(tmp_path / "eager")) == []


# Few steps -----------------------------------------------------------------------------------------------------------


def test_five_euler_steps_of_a_trained_network_make_the_classes_colours(pixel_features: Path, tmp_path: Path) -> None:
    succeed("train", "--model", "DiT-T/2", "--method", "dense", "--objective", "flow", "--feature-path", pixel_features,
            "--image-size", "8", "--results-dir", tmp_path, "--run-name", "run", "--max-steps", "150", "--lr", "3e-3",
            "--ema-decay", "0.9", "--global-batch-size", "16", "--learning-rate-schedule", "cosine", "--warmup-steps", "5",
            "--time-scale", "1000")  # fmt: skip
    path = checkpoints(tmp_path / "run")[-1]
    words = ["--ckpt", path, "--num-fid-samples", "6", "--labels", "balanced", "--cfg-scale", "1", "--sampler", "euler",
             "--num-sampling-steps", "5", "--sample-dir", tmp_path / "samples", "--sample-name", "set"]  # fmt: skip
    said = succeed("sample_ddp", *words).out
    assert "no guidance: 5 network passes" in said
    pictures = np.load(tmp_path / "samples" / "set.npz")["arr_0"].astype(float).mean(axis=(1, 2))  # (6, 3)
    wanted = 127.5 + 127.5 * np.array([[0.9, -0.9, -0.9], [-0.9, 0.9, -0.9], [-0.9, -0.9, 0.9]] * 2)
    assert np.abs(pictures - wanted).max() < 60  # of 230 between a class's colours
