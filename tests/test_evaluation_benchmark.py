"""`benchmark.py eval` runs, at sizes that tell nothing about speed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import benchmark
from benchmarks import evaluation
from benchmarks.memory import watch_memory
from runtime.config import InputError


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark.main()


def test_frechet_and_sqrtm_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "eval", "--only", "frechet", "--dimensions", "48", "--rounds", "1", "--output", str(tmp_path))
    result = json.loads((tmp_path / "eval.json").read_text())
    ours, baseline = result["parts"]["frechet"]["values"].values()
    assert ours == pytest.approx(baseline, rel=1e-6)
    assert result["rows"]["frechet: scipy.linalg.sqrtm"]["ratio"] == {"median": 1, "fastest": 1, "slowest": 1}
    shown = capsys.readouterr().out
    assert "Fréchet distance, 48 dimensions" in shown
    assert f"{ours:.8g}" in shown


def test_distances_and_cdist_nearly_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", "--only", "distances", "--count", "400", "--dimensions", "16", "--rounds", "1", "--output", str(tmp_path))
    run(monkeypatch, *words)
    assert "adds, GiB" in capsys.readouterr().out
    part = evaluation.measure_distances(400, 16, 1)
    ours, baseline = part["values"]["ours, cpu"], part["values"]["torch.cdist, cpu"]
    assert ours == pytest.approx(baseline, abs=0.02)
    assert 0.1 < baseline[0] < 1
    assert all(row["peak_memory_gib"] >= 0 for row in part["rows"].values())


def test_network_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A narrow graph of random weights, where no graph is cached; with TensorFlow where it is installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = evaluation.measure_network(None, batch=2, side=40, rounds=1, width=0.05)
    assert "random weights, 0.05 x its width" in part["title"]
    assert part["rows"]["torch, cpu"]["images_per_second"] > 0
    if "tensorflow" in part["rows"]:
        assert part["values"]["tensorflow"] < 1e-4
        assert part["rows"]["tensorflow"]["ratio"]["median"] == 1


def test_network_without_tensorflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def missing(name: str, backend: str) -> None:
        raise InputError("TensorFlow is not installed.")

    monkeypatch.setattr(evaluation, "check_network", missing)
    part = evaluation.measure_network(None, batch=1, side=32, rounds=1, width=0.05)
    assert list(part["rows"]) == ["torch, cpu"]
    rows = {f"network: {name}": row for name, row in part.pop("rows").items()}
    assert "ratio" not in rows["network: torch, cpu"]
    shown = evaluation.show({"device": "cpu", "torch": "2", "scipy": "1", "parts": {"network": part}, "rows": rows})
    assert "no row for TensorFlow: TensorFlow is not installed." in shown


def test_bad_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--dimensions must be at least 1, not 0"):
        run(monkeypatch, "eval", "--dimensions", "0")
    with pytest.raises(InputError, match="no such file"):
        run(monkeypatch, "eval", "--only", "network", "--weights", str(tmp_path / "none.pb"))


def test_memory_that_is_gone_again_has_been_seen() -> None:
    with watch_memory() as added:
        block = np.ones(200_000_000, dtype=np.uint8)
        time.sleep(0.05)
        del block
    assert 150 < added.megabytes < 300  # what earlier tests left is given back meanwhile
