"""The parts of `make demo` that judge; the whole of it is run by hand (it takes eight minutes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import demo
from benchmarks.digits import SIDE, grey_vectors, write_digits
from demo import ROOT, Row
from diffusion.schedule import NoiseSchedule
from models import Backbone, DiT, create_model
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
        Row("dense", 0.02, 10.0, 50.0, dense, None),
        Row("sparsedit fixed", 0.01, 10.0 * fixed_speed, 60.0, fixed, "2"),
        Row("sparsedit dynamic", gmacs, 10.0 * dynamic_speed, 61.0, dynamic, "3,2,1@0,250,583"),
    ]


def network(stage: str) -> DiT:
    """The network of a stage, on digits, with the weights it is initialised with."""
    settings, options = parse_training(["--config", str(ROOT / "configs" / f"demo-{stage}.yaml")])
    return create_model(settings.method, Backbone.named(settings.model, (SIDE, SIDE), 3, 10), options)


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
    steps = NoiseSchedule.linear().respaced(demo.STEPS).timesteps
    for timesteps in (steps, range(1000)):
        assert dynamic.mean_macs(timesteps) == pytest.approx(fixed.macs(), rel=0.003)
    ten = NoiseSchedule.linear().respaced("10").timesteps
    assert dynamic.mean_macs(ten) != pytest.approx(fixed.macs(), rel=0.01)


def test_the_two_fine_tunings_differ_in_density_and_micro_batches_alone() -> None:
    configs = [parse_training(["--config", str(ROOT / "configs" / f"demo-{name}.yaml")]) for name in list(demo.STAGES)[1:]]
    (fixed, fixed_options), (dynamic, dynamic_options) = configs
    assert {name for name, value in vars(fixed).items() if value != getattr(dynamic, name)} == {"gradient_accumulation"}
    assert {"density"} == dynamic_options.keys() - fixed_options.keys()


def test_rows_tell_fixed_from_dynamic() -> None:
    assert [demo.row_name(network(stage)) for stage in demo.STAGES] == ["dense", "sparsedit fixed", "sparsedit dynamic"]


def test_the_table_says_what_it_shows() -> None:
    table = demo.show(rows())
    assert "1.50x" in table
    assert "1.60x" in table
    assert "dynamic 3,2,1@0,250,583" in table
    assert "+0.30% from the fixed" in table
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
