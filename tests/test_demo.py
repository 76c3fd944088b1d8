"""The parts of `make demo` that judge; the whole of it is run by hand (it takes eight minutes)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import demo
from benchmarks.digits import SIDE, grey_vectors, write_digits
from demo import ROOT, Row
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DiT
from runtime.config import InputError
from runtime.networks import build, method_name
from runtime.resuming import network_of
from runtime.sampling_settings import SamplingSettings, sampling_cost
from runtime.settings import parse_training


def rows(
    dense: float = 0.99,
    fixed: float = 0.98,
    dynamic: float = 0.97,
    fixed_speed: float = 1.5,
    dynamic_speed: float = 1.6,
    gmacs: float = 0.01003,
) -> list[Row]:
    return [
        Row("dense", 0.02, 10.0, 50.0, dense, None, sampled="ddpm 50, guidance 1.5"),
        Row("sparsedit fixed", 0.01, 10.0 * fixed_speed, 60.0, fixed, "2"),
        Row("sparsedit dynamic", gmacs, 10.0 * dynamic_speed, 61.0, dynamic, "3,2,1@0,250,583"),
    ]


def network(stage: str) -> DiT:
    """The network of a stage, on digits, with the weights it is initialised with."""
    settings, options = parse_training(["--config", str(ROOT / "configs" / f"demo-{stage}.yaml")])
    known = {"learn_sigma": bool(settings.learn_sigma), "objective": str(settings.objective)}
    return build(network_of(settings, Backbone.named(settings.model, (SIDE, SIDE), 3, 10, **known), options, None))


def test_a_good_run_misses_nothing() -> None:
    assert demo.failures(rows()) == []


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"dense": 0.84, "fixed": 0.84, "dynamic": 0.84}, "below 85%"),
        ({"fixed": 0.93}, "sparsedit fixed agreement 93.0% is more than 5 points"),
        ({"dynamic": 0.93}, "sparsedit dynamic agreement 93.0% is more than 5 points"),
        ({"fixed_speed": 1.29}, "sparsedit fixed speed-up 1.29"),
        ({"dynamic_speed": 1.29}, "sparsedit dynamic speed-up 1.29"),
        ({"gmacs": 0.0102}, "differ by more than 1%"),
    ],
)
def test_each_mark_can_be_missed(bad: dict[str, float], named: str) -> None:
    (missed,) = demo.failures(rows(**bad))
    assert named in missed


def test_written_digits_come_back_in_their_own_range(tmp_path: Path) -> None:
    write_digits(tmp_path)
    files = sorted(tmp_path.glob("*/*.png"), key=lambda path: path.stem)
    assert len(files) == 1797
    pictures = np.stack([np.repeat(np.asarray(Image.open(path))[..., None], 3, axis=2) for path in files[:50]])
    assert np.abs(grey_vectors(pictures) - load_digits().data[:50]).max() < 0.04


def test_a_failing_stage_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        demo.run_stage("sample", "sample.py", ["--ckpt", "nothing.pt"])
    assert left.value.code == 1
    assert "'sample' failed with exit code 2" in capfd.readouterr().err


def test_fixed_and_dynamic_cost_the_same() -> None:
    """Over the sampler's steps and over all timesteps, of which training sees the mean; few steps would not tell the truth."""
    fixed, dynamic = network("sparsedit"), network("sparsedit-dynamic")
    assert len(dynamic.training_plans()) == 3
    steps = NoiseSchedule.linear().respaced(demo.SAMPLING.num_sampling_steps).timesteps
    for timesteps in (steps, range(1000)):
        assert dynamic.mean_macs(timesteps) == pytest.approx(fixed.macs(), rel=0.003)
    ten = NoiseSchedule.linear().respaced("10").timesteps
    assert dynamic.mean_macs(ten) != pytest.approx(fixed.macs(), rel=0.01)


def test_the_two_fine_tunings_differ_in_density_and_micro_batches_alone() -> None:
    configs = [
        parse_training(["--config", str(ROOT / "configs" / f"demo-{name}.yaml")]) for name in demo.stages("sparsedit")[1:]
    ]
    (fixed, fixed_options), (dynamic, dynamic_options) = configs
    assert {name for name, value in vars(fixed).items() if value != getattr(dynamic, name)} == {"gradient_accumulation"}
    assert {"density"} == dynamic_options.keys() - fixed_options.keys()


def test_every_line_is_that_of_a_run_with_a_config_and_a_name_of_its_own() -> None:
    files = {path.stem.removeprefix("demo-") for path in (ROOT / "configs").glob("demo-*.yaml")}
    assert {name for method in demo.DEMOS for name in demo.stages(method)} == files
    assert {*demo.STARTS, *demo.STARTS.values()} <= files
    for method in demo.DEMOS:
        names = [entry.sample_name for entry in demo.entries(method)]
        assert len({*names}) == len(names) == len([name for name in names if re.fullmatch(r"[\w-]+", name)])
        assert names[0] == "dense"


def test_every_method_but_dense_has_a_demo() -> None:
    assert demo.stages("dydit") == ["dense", "dydit"]
    for method in set(METHODS) - {"dense"}:
        assert {method_name(network(stage)) for stage in demo.stages(method)[1:]} == {method}
    for method in ("dense", "spars", "dydit-"):
        with pytest.raises(InputError, match=r"has no demo; choose from dydit, flow, sparsedit, sprint\."):
            demo.stages(method)


def test_every_run_comes_after_the_one_that_it_starts_from() -> None:
    assert demo.stages("sprint") == ["dense", "sprint", "sprint-full"]
    for method in demo.DEMOS:
        names = demo.stages(method)
        assert all(names.index(demo.STARTS[name]) < names.index(name) for name in names if name in demo.STARTS)


def test_a_run_is_named_even_where_no_line_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.DEMOS, "last", (demo.Entry("last", "sprint-full"),))
    assert demo.stages("last") == ["dense", "sprint", "sprint-full"]


def test_networks_fit_those_that_they_start_from() -> None:
    """What stage 2 of SPRINT learns from is stage 1's network: the same weights, other drops. Known bad: another split."""
    first, second = network("sprint"), network("sprint-full")
    assert first.backbone == second.backbone
    names = {name for name, value in vars(first.options).items() if value != getattr(second.options, name)}
    assert names == {"drop_ratio"}
    for name, before in demo.STARTS.items():
        assert network(name).backbone.time_scale == network(before).backbone.time_scale


def test_every_line_is_sampled_as_its_objective_and_method_can() -> None:
    for method in demo.DEMOS:
        for entry in demo.entries(method):
            made = network(entry.run)
            sampling_cost(made, entry.sampling)
            assert demo.sampled_as(entry.sampling.under(made.backbone.objective)).startswith(("ddpm", "ddim", "euler"))
    assert demo.sampled_as(demo.PATH_DROP) == "euler 50, guidance 1.5 path-drop"


def test_lines_that_are_there_to_compare_with_miss_no_mark() -> None:
    missed = Row("dense in 5 steps", 0.02, 1.0, 900.0, 0.2, None, judged=False)
    assert demo.failures([*rows(), missed]) == []
    assert len(demo.failures([*rows(), replace(missed, judged=True)])) == 2


def test_a_demo_of_no_method_ends_before_it_deletes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr("sys.argv", ["demo.py", "--method", "dense", "--output", str(tmp_path), "--fresh"])
    with pytest.raises(InputError, match="has no demo"):
        demo.main()
    assert (tmp_path / "samples").is_dir()


def test_counted_work_is_judged_and_shown() -> None:
    def measured(ratio: float, speed: float = 1.5) -> list[Row]:
        return [rows()[0], Row("dydit", 0.0104, 10.0 * speed, 60.0, 0.98, None, ratio, 0.5)]

    for good in (0.4801, 0.5, 0.5199):
        assert demo.failures(measured(good)) == []
    for bad in (0.479, 0.521):
        (missed,) = demo.failures(measured(bad))
        assert f"dydit computes {bad:.1%} of attention and MLP, more than 2 points from the 50%" in missed
    assert "dydit speed-up 1.29" in demo.failures(measured(0.5, 1.29))[0]
    table = demo.show(measured(0.512))
    assert "dydit: 51.2% of the dense network's attention and MLP were computed, 50% were trained for" in table
    assert "Token density" not in table
    assert "were computed" not in demo.show(rows())


def test_a_row_holds_what_was_counted_while_its_speed_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: GMACs of the plans, in which all tokens are on."""
    torch.manual_seed(0)
    made = network("dydit")
    made.imitate_training(torch.randn(8, 3, SIDE, SIDE), torch.arange(8) * 125, torch.arange(8))
    np.savez(tmp_path / "one.npz", arr_0=np.random.default_rng(0).integers(0, 255, (80, SIDE, SIDE, 3), dtype=np.uint8))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "0000001.safetensors").touch()
    checkpoint = SimpleNamespace(network=made.eval().requires_grad_(False), objective="ddpm")
    monkeypatch.setattr(demo, "load_checkpoint", lambda *_: checkpoint)
    for name, value in {"TIMED": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    entry = demo.Entry("one", "run", SamplingSettings(num_sampling_steps="3"))
    (row,) = demo.compare([entry], tmp_path, tmp_path)
    assert (row.name, row.sampled) == ("one", "ddpm 3, guidance 1.5")
    planned = made.mean_macs(NoiseSchedule.linear().respaced("3").timesteps) / 1e9
    assert row.gmacs == made.work.macs / made.work.passes / 1e9 < 0.95 * planned
    assert made.work.passes == 2 * 2 * 2 * 3  # two rounds of two pictures, guided, in three steps
    blocks = [block.attn.macs(16) + block.mlp.macs(16) for block in made.blocks]
    assert row.flops_ratio == pytest.approx(made.work.block_macs / made.work.passes / sum(blocks))
    assert row.flops_target == 0.5


def test_the_table_says_what_it_shows() -> None:
    table = demo.show(rows())
    assert "1.50x" in table
    assert "1.60x" in table
    assert "dynamic 3,2,1@0,250,583" in table
    assert "+0.30% from the fixed" in table
    assert "  ddpm 50, guidance 1.5\n" in table
    assert "not an FID" in table


def test_the_picture_shows_every_network(tmp_path: Path) -> None:
    samples = []
    for place in range(3):
        samples.append(tmp_path / f"{place}.npz")
        np.savez(samples[-1], np.full((80, 8, 8, 3), 80 * (place + 1), dtype=np.uint8))
    demo.draw(samples, tmp_path / "demo.png")
    picture = np.asarray(Image.open(tmp_path / "demo.png"))
    starts = [round(place * (picture.shape[1] + demo.GAP) / 3) for place in range(3)]
    assert [picture[5, start + 5].tolist() for start in starts] == [[80] * 3, [160] * 3, [240] * 3]
    assert (picture[:, [start - 1 for start in starts[1:]]] == 255).all()
