"""The parts of `make demo` that judge; the whole of it is run by hand (it takes six minutes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import demo
from demo import Row


def rows(dense: float = 0.99, sparse: float = 0.98, speed: float = 1.5) -> list[Row]:
    return [Row("dense", 0.02, 10.0, 50.0, dense), Row("sparsedit", 0.01, 10.0 * speed, 60.0, sparse)]


def test_a_good_run_misses_nothing() -> None:
    assert demo.failures(rows()) == []


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"dense": 0.84, "sparse": 0.84}, "below 85%"),
        ({"sparse": 0.93}, "5 points"),
        ({"speed": 1.29}, "speed-up 1.29"),
    ],
)
def test_each_mark_can_be_missed(bad: dict[str, float], named: str) -> None:
    (missed,) = demo.failures(rows(**bad))
    assert named in missed


def test_written_digits_come_back_in_their_own_range(tmp_path: Path) -> None:
    demo.write_digits(tmp_path)
    files = sorted(tmp_path.glob("*/*.png"), key=lambda path: path.stem)
    assert len(files) == 1797
    pictures = np.stack([np.repeat(np.asarray(demo.Image.open(path))[..., None], 3, axis=2) for path in files[:50]])
    assert np.abs(demo.grey_vectors(pictures) - load_digits().data[:50]).max() < 0.04


def test_a_failing_stage_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        demo.run_stage("sample", "sample.py", ["--ckpt", "nothing.pt"])
    assert left.value.code == 1
    assert "'sample' failed with exit code 2" in capfd.readouterr().err


def test_the_table_calls_its_distance_by_its_name() -> None:
    table = demo.show(rows())
    assert "1.50x" in table
    assert "not an FID" in table
