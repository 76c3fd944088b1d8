"""`benchmark.py density`: that it compares what it says it compares, at sizes that tell nothing about density."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from small_runs import ROOT, header_at, succeed, write_features
from torch import Tensor

import benchmark
from benchmarks import density, paired_seeds
from benchmarks.density import DENSITIES, DensitySettings
from benchmarks.held_out import held_out_losses, split, stratified
from data.features import open_features
from data.latents import PIXELS
from data.manifest import FeatureSettings, Manifest, verify_checksums
from diffusion.schedule import NoiseSchedule
from models.token_density import TokenDensity
from runtime.config import InputError
from runtime.files import write_json

CPU = torch.device("cpu")
CLASSES = 3


def write(folder: Path, count: int, scale: float = 1.0) -> Path:
    """A cache of `count` random pictures of 8 x 8."""
    settings = FeatureSettings(PIXELS, 8, (3, 8, 8), "samples", "original", None, 8)
    rows = scale * np.random.default_rng(0).normal(size=(count, *settings.row_shape))
    return write_features(folder, settings, CLASSES, rows.astype(np.float16))


def test_held_out_pictures_are_in_proportion_to_their_classes() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    kept = stratified(labels, 32)
    assert (kept == stratified(labels, 32)).all()
    assert len(np.unique(kept)) == 32
    assert np.abs(np.bincount(labels[kept]) - [20, 10, 2]).max() <= 1
    assert np.abs(np.bincount(labels[:32], minlength=3) - [20, 10, 2]).max() > 1  # the known-bad choice


def test_the_parts_of_a_cache_are_caches(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 60)
    parts = split(source, tmp_path, 24)
    opened = [open_features(part, 8) for part in parts]
    assert [len(part) for part in opened] == [36, 24]
    for part in parts:
        verify_checksums(part)
    names = [json.loads((part / "sources.json").read_text()) for part in parts]
    assert sorted(names[0] + names[1]) == sorted(json.loads((source / "sources.json").read_text()))
    whole = {row.tobytes() for row in np.load(source / "latents.npy")}
    assert {row.tobytes() for part in parts for row in np.load(part / "latents.npy")} == whole
    with pytest.raises(InputError, match="--held-out is 60"):
        split(source, tmp_path / "other", 60)


class ErrsByTimestep(torch.nn.Module):
    """Knows the noise of pictures that are all zero, and errs by the root of t modulo 20."""

    backbone = SimpleNamespace(learn_sigma=False)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(t)
        deviation = NoiseSchedule.linear().tables(CPU).sqrt_one_minus_alphas_cumprod[t]
        return x / deviation[:, None, None, None] + (t % 20).float().sqrt()[:, None, None, None]


def test_every_timestep_weighs_the_same_in_the_held_out_loss(tmp_path: Path) -> None:
    features = open_features(write(tmp_path / "source", 30, scale=0.0), 8)  # 30: half of the timesteps are met twice
    network: Any = ErrsByTimestep()
    losses = held_out_losses(network, None, features, CPU)
    counts = torch.cat(network.seen).bincount(minlength=1000)
    assert counts.unique().tolist() == [1, 2]
    quarters = [f"loss_at_t/{start}-{start + 249}" for start in (0, 250, 500, 750)]
    assert [*losses] == ["loss", "mse", *quarters]
    assert losses["loss"] == losses["mse"] == pytest.approx(9.5, rel=1e-4)
    assert losses[quarters[0]] == pytest.approx(np.mean(np.arange(250) % 20), rel=1e-4)
    met = torch.cat(network.seen) % 20
    assert float(met.float().mean()) != pytest.approx(9.5, rel=0.1)  # the mean over samples would be another


def test_default_densities_cost_the_same() -> None:
    for side, (fixed, dynamic) in DENSITIES.items():
        grids = TokenDensity.parse(dynamic, (side, side))
        tokens = sum(len(times) * grid[0] * grid[1] for times, grid in zip(grids.intervals, grids.grids, strict=True)) / 1000
        assert tokens == pytest.approx(int(fixed) ** 2, rel=0.005)
        assert sorted(grids.grids, reverse=True) == list(grids.grids)  # most tokens at the clean end


def planned(tmp_path: Path, **chosen: Any) -> density.Experiment:
    source = write(tmp_path / "source", 60)
    return density.set_up(DensitySettings(**chosen), tmp_path, Manifest.read(source), source)[0]


@pytest.mark.parametrize("patch", [1, 2])
def test_the_control_differs_from_the_dynamic_network_in_its_grids_alone(patch: int, tmp_path: Path) -> None:
    arms = planned(tmp_path, patch=patch).densities
    full = (8 // patch, 8 // patch)
    fixed, grouped, dynamic = (TokenDensity.parse(arms[name], full) for name in ("fixed", "fixed-grouped", "dynamic"))
    assert grouped.intervals == dynamic.intervals
    assert set(grouped.grids) == set(fixed.grids)
    assert grouped.grids != dynamic.grids


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"dynamic": "3,2,1@0,250,750"}, "over all timesteps density 3,2,1@0,250,750 costs"),
        ({"sampling_steps": "10"}, "over the sampler's steps density"),
        ({"fixed": "3,2@0,500"}, "the first takes one grid"),
        ({"dynamic": "2"}, "the second several"),
        ({"patch": 4}, "2 x 2 tokens has no default densities; give --fixed and --dynamic"),
    ],
)
def test_what_cannot_be_compared_is_refused(chosen: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        planned(tmp_path, **chosen)


def test_noise_is_called_noise() -> None:
    first = [{"loss": value} for value in (1.0, 1.2, 0.9)]
    second = [{"loss": value} for value in (1.05, 1.1, 1.0)]
    (found,) = paired_seeds.comparisons("dynamic", "fixed", first, second)["differences"].values()
    assert found["mean"] == pytest.approx(-0.05 / 3)
    assert found["standard_error"] == pytest.approx(np.std([-0.05, 0.1, -0.1], ddof=1) / 3**0.5)
    assert found["interval"][1] - found["mean"] == pytest.approx(4.3027 * found["standard_error"], rel=1e-4)
    assert "within noise" in paired_seeds.verdict("dynamic", "fixed", found)
    sure = paired_seeds.difference([-0.1, -0.11, -0.09])
    assert "dynamic is lower (better) than fixed" in paired_seeds.verdict("dynamic", "fixed", sure)
    assert "higher (worse)" in paired_seeds.verdict("fixed", "dynamic", paired_seeds.difference([0.1, 0.11, 0.09]))
    # Two standard errors would already call this a difference; Student's t, with three seeds, does not.
    close = paired_seeds.difference([0.01, 0.05, 0.06])
    assert close["mean"] > 2 * close["standard_error"]
    assert "within noise" in paired_seeds.verdict("dynamic", "fixed", close)
    assert "says nothing of noise" in paired_seeds.verdict("dynamic", "fixed", paired_seeds.difference([0.1]))


class Here(Executor):
    """Runs what it is given at once, in this process: starting others takes most of a small experiment's time."""

    def __init__(self, jobs: int, context: object) -> None:
        pass

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))
        return future


def test_the_experiment_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = []

    def execute(script: str, arguments: list[object], log: Path, threads: int | None = None) -> None:
        trained.append(arguments[arguments.index("--run-name") + 1])
        succeed(script.removesuffix(".py"), *arguments)

    monkeypatch.setattr(density, "execute", execute)
    monkeypatch.setattr(density, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.chdir(ROOT)
    options = {"features": write(tmp_path / "source", 60), "seeds": 1, "steps": 2, "pretraining-steps": 2, "samples": 6,
               "sampling-steps": 20, "held-out": 20, "model": "DiT-T/2", "output": tmp_path / "out"}  # fmt: skip
    words = ["benchmark.py", "density", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [*result["rows"]] == ["dense", "fixed", "fixed-grouped", "dynamic"]
    assert result["rows"]["dynamic"]["measures"]["loss"]["standard_deviation"] is None
    assert shown.count("dense (start)") == 2
    assert "one seed: differences say nothing of noise" in shown
    assert "paired differences" not in shown
    assert all(
        " minus " in sentence and sentence not in shown for pair in result["comparisons"] for sentence in pair["sentences"]
    )
    assert "Dynamic minus fixed in error of epsilon was chosen as the comparison to judge by before any result" in shown
    draws = [header_at(run)["settings"]["density_groups"] for run in sorted((tmp_path / "out" / "runs").iterdir())]
    assert draws == [1, 4, 1, 4]  # dense, dynamic, fixed, fixed-grouped
    trained.clear()
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "2"])
    benchmark.main()
    assert trained == ["dense-0", "fixed-1", "fixed-grouped-1", "dynamic-1"]  # the dense one to see that it is done
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "one seed" not in shown
    assert all(sentence in shown for pair in result["comparisons"] for sentence in pair["sentences"])
    assert paired_seeds.show(result) in shown
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "3", "--cfg-scale", "2"])
    with pytest.raises(InputError, match=r"was started with --steps 2, not 3, and with --cfg-scale 1.5, not 2.0; give that"):
        benchmark.main()
    trained.clear()
    monkeypatch.setattr(sys, "argv", words)
    written = tmp_path / "out" / "results" / "dynamic-0.json"
    for damaged in (written.read_text()[:30], "{}", '{"loss": "low"}'):
        written.write_text(damaged)
        with pytest.raises(InputError, match=r"results/dynamic-0.json is damaged, so delete it, and the same command"):
            benchmark.main()
    assert trained == []


@pytest.mark.parametrize("edited", ["dense", "sparse"])
def test_an_edited_configuration_is_noticed(edited: str, tmp_path: Path) -> None:
    """Whose name tells nothing. What leaves every setting as it was is no change."""
    files = {name: tmp_path / f"{name}.yaml" for name in ("dense", "sparse")}
    for name, file in files.items():
        file.write_text(f"method: {name.replace('sparse', 'sparsedit')}\nlearning_rate: 1e-3\n")
    source = write(tmp_path / "source", 60)
    manifest = Manifest.read(source)
    settings = DensitySettings(dense_config=str(files["dense"]), sparse_config=str(files["sparse"]))

    def check() -> None:
        now = density.conditions(density.set_up(settings, tmp_path, manifest, source)[0], manifest)
        density.check_unchanged(tmp_path, now)
        write_json(tmp_path / "settings.json", now)

    check()
    check()
    before = files[edited].read_text()
    files[edited].write_text(f"# the same\n{before}".replace("1e-3", "0.001"))
    check()
    files[edited].write_text(before.replace("1e-3", "2e-3"))
    with pytest.raises(InputError, match=rf"was started with {files[edited]}: learning_rate 0.001, not 0.002; give that again"):
        check()
    files[edited].write_text(before)
    check()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings.json is damaged, so nobody knows how"):
        check()


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"dense_config": "configs/demo-sparsedit.yaml"}, "is of --method sparsedit; the first network is dense"),
        ({"sparse_config": "configs/demo-dense.yaml"}, "unknown key 'density'"),
        ({"gradient_accumulation": 3}, "--gradient-accumulation 3 does not divide .*global_batch_size 32"),
        ({"held_out": 0}, "--held-out is 0"),
    ],
)
def test_a_refused_experiment_leaves_no_settings_behind(chosen: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The corrected command must not be told that something else stands there."""
    settings = DensitySettings(features=str(write(tmp_path / "source", 60)), output=str(tmp_path / "out"), **chosen)
    with pytest.raises(InputError, match=said):
        density.measure(settings)
    assert not (tmp_path / "out" / "settings.json").exists()


def fails_or_waits(experiment: Any, arm: str, seed: int) -> dict[str, float]:
    if arm == "fixed":
        time.sleep(1)
        raise InputError("this one failed")
    time.sleep(600)
    return {}


def test_a_failure_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "measure_one", fails_or_waits)
    tasks = [("fixed", 0), ("dynamic", 0)]
    started = time.perf_counter()
    with pytest.raises(InputError, match="this one failed"):
        density.measure_rest(SimpleNamespace(settings=DensitySettings(jobs=2), tasks=tasks), tasks)
    assert time.perf_counter() - started < 120
    # The tracker of shared memory stays as long as this process.
    assert not [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def test_a_script_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sample.py ended with exit code 2; .*log.txt says why"):
        density.execute("sample.py", ["--ckpt", "nothing.pt"], tmp_path / "log.txt", threads=1)
    assert "nothing.pt" in (tmp_path / "log.txt").read_text()
