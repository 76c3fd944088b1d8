"""A run that was stopped, at whatever moment and in whatever way, ends as the one that was not: bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    ROOT,
    Result,
    WithScaler,
    call,
    differing,
    header_at,
    kill,
    metrics,
    recorded,
    start,
    state_at,
    succeed,
)

import train
from runtime import distributed
from runtime.checkpoint import checkpoints, read_tensors, save_checkpoint
from runtime.training import Trainer

NAME = "DiT-T-2-sparsedit-64"
Batch = tuple[torch.Tensor, torch.Tensor]
VARIANTS = {
    "samples": ["--learning-rate-schedule", "cosine", "--warmup-steps", "3", "--max-steps", "11"],
    "moments": ["--gradient-accumulation", "2", "--gradient-clip", "0.3", "--weight-decay", "0.01", "--max-steps", "11",
                "--ema-warmup", "--precision", "fp32"],
}  # fmt: skip
"""Feature kind -> further flags. The batch of 8 does not divide the 24 pictures' epochs into what was saved at step 4."""


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, features: Path, moment_features: Path) -> list[str]:
    return flags(request.param, features if request.param == "samples" else moment_features)


@pytest.fixture
def moments(moment_features: Path) -> list[str]:
    return flags("moments", moment_features)


def flags(kind: str, features: Path) -> list[str]:
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64",
            "--global-batch-size", "10", "--log-every", "2", "--checkpoint-every", "4", "--keep-checkpoints", "9",
            "--lr", "1e-3", *VARIANTS[kind]]  # fmt: skip


@pytest.fixture(scope="session")
def whole_runs() -> dict[tuple[str, ...], Path]:
    return {}


@pytest.fixture
def whole(whole_runs: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """Flags -> the run folder of a training that nothing stopped; each made once."""

    def make(words: list[str]) -> Path:
        if tuple(words) not in whole_runs:
            results = tmp_path_factory.mktemp("whole")
            succeed("train", *words, "--results-dir", results)
            whole_runs[tuple(words)] = results / NAME
        return whole_runs[tuple(words)]

    return make


def stopped_after(words: list[str], results: Path, step: int, whole_run: Path) -> Path:
    """A run folder as a kill after the checkpoint of `step` leaves it: with log lines of later steps."""
    run = results / NAME
    shutil.copytree(whole_run, run)
    for path in checkpoints(run):
        if int(path.stem) > step:
            path.unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 12, "loss": 0.')  # a kill can cut the last line
    return run


def test_a_resumed_run_ends_as_the_whole_one(
    variant: list[str], whole: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(variant)
    batches: list[Batch] = []
    whole_batches: list[Batch] = []
    batch_at = train.TrainingData.batch_at
    monkeypatch.setattr(train.TrainingData, "batch_at", recorded(batch_at, whole_batches))
    succeed("train", *variant, "--results-dir", tmp_path / "recorded")
    run = stopped_after(variant, tmp_path, 4, expected)
    monkeypatch.setattr(train.TrainingData, "batch_at", recorded(batch_at, batches))
    result = succeed("train", *variant, "--results-dir", tmp_path)

    assert f"resumed from {run}/checkpoints/0000004.safetensors at step 4" in result.out
    assert differing(state_at(run), state_at(expected)) == []
    assert header_at(run) | {"settings": None} == header_at(expected) | {"settings": None}
    remaining = whole_batches[len(whole_batches) * 4 // 11 :]
    assert len(batches) == len(remaining) > 0
    for (latents, labels), (whole_latents, whole_labels) in zip(batches, remaining, strict=True):
        assert torch.equal(latents, whole_latents)
        assert torch.equal(labels, whole_labels)
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 8, 10, 11]
    for resumed_line, whole_line in zip(metrics(run), metrics(expected), strict=True):
        for name in ("loss", "gradient_norm", "learning_rate", "skipped_steps"):
            assert resumed_line[name] == whole_line[name]


def test_the_gradient_scaler_is_restored(moments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Accelerator", WithScaler)
    scales: list[float] = []
    backward = WithScaler.backward

    def noting(self: WithScaler, loss: torch.Tensor) -> None:
        scales.append(self.scaler.get_scale())
        # Step 2 overflows once: the scale falls, the step is skipped, and the growth is counted anew.
        backward(self, loss * float("inf") if len(scales) == 5 else loss)

    monkeypatch.setattr(WithScaler, "backward", noting)
    succeed("train", *moments, "--results-dir", tmp_path / "whole")
    whole_scales, run = scales[:], stopped_after(moments, tmp_path, 4, tmp_path / "whole" / NAME)
    assert min(whole_scales) < whole_scales[0] < max(whole_scales)
    assert header_at(run)["scaler"]["_growth_tracker"] > 0
    assert header_at(run)["skipped_steps"] == 1
    scales[:] = whole_scales[:8]
    succeed("train", *moments, "--results-dir", tmp_path)
    assert scales == whole_scales
    assert differing(state_at(run), state_at(tmp_path / "whole" / NAME)) == []
    assert header_at(run)["scaler"] == header_at(tmp_path / "whole" / NAME)["scaler"]


def ema_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Trainer.restore

    def buggy(self: Trainer, path: Path) -> None:
        restore(self, path)
        self.ema.network.load_state_dict(self.network.state_dict())

    monkeypatch.setattr(Trainer, "restore", buggy)


def moments_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Trainer.restore

    def buggy(self: Trainer, path: Path) -> None:
        state = self.optimizer.state_dict()
        restore(self, path)
        self.optimizer.load_state_dict(state)

    monkeypatch.setattr(Trainer, "restore", buggy)


def position_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_at = train.TrainingData.batch_at
    monkeypatch.setattr(train.TrainingData, "batch_at", lambda self, step, *rest: batch_at(self, step - 4, *rest))


def draws_from_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_at = train.TrainingData.batch_at

    def buggy(*arguments: Any) -> Batch:
        latents, labels = batch_at(*arguments)
        return latents + 0.1 * torch.randn(latents.shape), labels

    monkeypatch.setattr(train.TrainingData, "batch_at", buggy)


@pytest.mark.parametrize(
    ("bug", "spoiled"),
    [
        (ema_not_restored, "ema/"),
        (moments_not_restored, "optimizer/"),
        (position_not_restored, "model/"),
        (draws_from_a_stream, "model/"),
    ],
)
def test_the_comparison_notices(
    bug: Callable[[pytest.MonkeyPatch], None],
    spoiled: str,
    moments: list[str],
    whole: Callable[[list[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    bug(monkeypatch)
    succeed("train", *moments, "--results-dir", tmp_path)
    assert any(name.startswith(spoiled) for name in differing(state_at(run), state_at(whole(moments))))


def test_global_random_states_change_nothing(
    moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    optimize = Trainer.optimize

    def poisoned(self: Trainer) -> torch.Tensor:
        torch.manual_seed(time.time_ns() % 2**32)
        np.random.seed(time.time_ns() % 2**32)  # noqa: NPY002
        random.seed(time.time_ns())
        return optimize(self)

    monkeypatch.setattr(Trainer, "optimize", poisoned)
    succeed("train", *moments, "--results-dir", tmp_path)
    assert differing(state_at(run), state_at(whole(moments))) == []


def test_killed_at_a_random_moment(moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path) -> None:
    words = [*moments, "--max-steps", "60", "--checkpoint-every", "3"]
    expected, run = whole(words), tmp_path / NAME
    words += ["--keep-checkpoints", "2", "--results-dir", str(tmp_path)]
    after, patience = 3 * random.randint(1, 10), random.uniform(0, 0.1)
    process = start([ROOT / "train.py", *words], tmp_path)
    try:
        wait_for(lambda: any(int(path.stem) >= after for path in checkpoints(run)), process, tmp_path)
        time.sleep(patience)
    finally:
        kill(process)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    reached = int(checkpoints(run)[-1].stem)
    assert after <= reached < 60
    result = succeed("train", *words)
    assert f"at step {reached}" in result.out
    assert differing(state_at(run), state_at(expected)) == [], f"killed {patience:.3f} seconds after step {after}"
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(expected)]
    assert not list(run.rglob("*.partial"))
    assert len(checkpoints(run)) == 2


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], folder: Path, patience: float = 60) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < end, (folder / "output.txt").read_text()
        time.sleep(0.01)


def test_sigterm_saves_and_the_same_command_continues(
    moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    batch_at = train.TrainingData.batch_at

    def terminated(self: train.TrainingData, step: int, *rest: Any) -> Batch:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train.TrainingData, "batch_at", terminated)
        result = succeed("train", *moments, "--results-dir", tmp_path)
    assert "stopped by SIGTERM; saved at step 6, the same command continues." in result.out
    assert [int(path.stem) for path in checkpoints(tmp_path / NAME)] == [4, 6]
    assert signal.getsignal(signal.SIGTERM) is handler
    succeed("train", *moments, "--results-dir", tmp_path)
    assert differing(state_at(tmp_path / NAME), state_at(whole(moments))) == []


def test_the_last_checkpoints_are_kept(moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path) -> None:
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    (run / "checkpoints" / ".0000008.safetensors.12345.partial").write_bytes(b"half")
    words = [*moments, "--keep-checkpoints", "2", "--checkpoint-every", "3"]
    succeed("train", *words, "--results-dir", tmp_path)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000009.safetensors", "0000011.safetensors"]


def test_a_finished_run_says_so(moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path) -> None:
    run = stopped_after(moments, tmp_path, 11, whole(moments))
    before = state_at(run)
    result = succeed("train", *moments, "--results-dir", tmp_path)
    assert "nothing to do: the run is at step 11 of 11" in result.out
    assert differing(state_at(run), before) == []


def test_another_way_of_computing_the_same_is_allowed(
    moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    """Accumulation, checkpointing and log intervals change no number beyond rounding, so a resumed run may change them."""
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    succeed("train", *moments, "--gradient-accumulation", "1", "--gradient-checkpointing", "--log-every", "3",
            "--results-dir", tmp_path)  # fmt: skip
    ours, theirs = state_at(run), state_at(whole(moments))
    # Rounding alone: AdamW moves by 1e-3 a step where nothing but rounding drives it (the keys' biases), hence 10 %.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours if name.startswith("model/")) < 1e-4


REFUSED = {
    "learning_rate": ["--lr", "2e-3"],
    "global_batch_size": ["--global-batch-size", "12"],
    "seed": ["--seed", "5"],
    "ema_decay": ["--ema-decay", "0.9"],
    "label_drop": ["--label-drop", "0.2"],
    "min_snr_gamma": ["--min-snr-gamma", "none"],
    "weight_decay": ["--weight-decay", "0.1"],
    "warmup_steps": ["--warmup-steps", "7"],
    "learn_sigma": ["--no-learn-sigma"],
    "model": ["--model", "DiT-64x8x4/2"],
    "method": ["--method", "dense"],
    "density": ["--density", "1"],
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_settings_are_refused(
    name: str, moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(moments, tmp_path, 4, whole(moments))
    monkeypatch.setattr(train, "build", lambda plan: pytest.fail("a network was built"))
    result = call("train", *moments, *REFUSED[name], "--run-name", NAME, "--results-dir", tmp_path)
    assert_refused(result, name, "other settings", "--run-name")


def test_other_data_are_refused(
    features: Path, legacy_features: Path, whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    words = flags("samples", features)
    stopped_after(words, tmp_path, 4, whole(words))
    result = call("train", *words, "--feature-path", legacy_features, "--num-classes", "3", "--results-dir", tmp_path)
    assert_refused(result)


def test_the_length_of_a_cosine_is_fixed_and_of_a_constant_rate_is_not(
    features: Path, moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    cosine = flags("samples", features)
    stopped_after(cosine, tmp_path / "cosine", 4, whole(cosine))
    assert_refused(call("train", *cosine, "--max-steps", "12", "--results-dir", tmp_path / "cosine"), "max_steps")
    stopped_after(moments, tmp_path / "constant", 8, whole(moments))
    succeed("train", *moments, "--max-steps", "12", "--results-dir", tmp_path / "constant")
    assert header_at(tmp_path / "constant" / NAME)["step"] == 12


def test_a_damaged_newest_checkpoint_is_named(
    moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(moments, tmp_path, 8, whole(moments))
    newest = checkpoints(run)[-1]
    whole_bytes = newest.read_bytes()
    monkeypatch.setattr(train, "build", lambda plan: pytest.fail("a network was built"))
    for damaged in (whole_bytes[:-1000], whole_bytes[:100], b"", b"no checkpoint at all"):
        newest.write_bytes(damaged)
        assert_refused(call("train", *moments, "--results-dir", tmp_path), "0000008.safetensors")


@pytest.mark.parametrize("lost", ["model/", "ema/", "optimizer/"])
def test_a_checkpoint_that_lacks_tensors_is_refused(
    lost: str, moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    (path,) = checkpoints(run)
    tensors = read_tensors(path, "")
    gone = [name for name in tensors if name.startswith(lost)][:3]
    save_checkpoint(path, {name: value for name, value in tensors.items() if name not in gone}, header_at(run))
    assert_refused(call("train", *moments, "--results-dir", tmp_path), path.name, "lacks")


def test_resume_takes_a_file_or_none(moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path) -> None:
    run = stopped_after(moments, tmp_path, 4, whole(moments))
    assert_refused(call("train", *moments, "--resume", "none", "--results-dir", tmp_path), str(run), "--run-name")
    assert_refused(call("train", *moments, "--resume", tmp_path / "x.safetensors", "--results-dir", tmp_path), "x.safetensors")
    words = ["--resume", checkpoints(run)[-1], "--run-name", "branch", "--results-dir", tmp_path]
    succeed("train", *moments, *words)
    assert differing(state_at(tmp_path / "branch"), state_at(whole(moments))) == []


def test_a_file_before_later_checkpoints_is_refused_and_branches_off_elsewhere(
    moments: list[str], whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    """Two branches in one folder would overwrite and outlive each other."""
    run = tmp_path / NAME
    shutil.copytree(whole(moments), run)
    early = checkpoints(run)[0]
    before = {path: path.read_bytes() for path in checkpoints(run)}
    assert_refused(
        call("train", *moments, "--results-dir", tmp_path, "--resume", early), "already goes on to step", "--run-name"
    )
    assert {path: path.read_bytes() for path in checkpoints(run)} == before
    succeed("train", *moments, "--results-dir", tmp_path, "--resume", early, "--run-name", "branch")
    assert differing(state_at(tmp_path / "branch"), state_at(run)) == []


def assert_refused(result: Result, *named: str) -> None:
    """One sentence, exit code 2."""
    assert result.code == 2, result.err
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    for word in ("error: ", *named):
        assert word in lines[0]
