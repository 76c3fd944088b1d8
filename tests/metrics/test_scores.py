from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import scores as module
from metrics.features import Features
from metrics.frechet import Statistics, statistics_of
from metrics.scores import SCORES_OF, Scores, score

DIMENSION = 12
ALL = SCORES_OF["FID"]
HEAD = np.random.default_rng(0).standard_normal((DIMENSION, 5)).astype(np.float32)


def vectors(count: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def features(count: int, seed: int, entry: Path | None = None) -> Features:
    pool, spatial = vectors(count, seed), vectors(count, seed + 1_000, 6)
    return Features(pool, statistics_of(pool), statistics_of(spatial), entry)


def scores_of(reference: Features, samples: Features, repeats: int = 0) -> Scores:
    return score(reference, samples, HEAD, ALL, repeats, torch.device("cpu"))


def from_a_file(count: int, seed: int, condition: float = 1.0) -> Statistics:
    """Statistics as a file brings them, of vectors whose number it does not tell."""
    rows = np.random.default_rng(seed).standard_normal((count, DIMENSION)) * np.logspace(0, -np.log10(condition) / 2, DIMENSION)
    known = statistics_of(rows)
    return Statistics(known.mean, known.covariance)


def warnings_of(reference: Statistics, samples: Statistics) -> list[str]:
    sides = Features(None, reference, None), Features(None, samples, None)
    return score(*sides, None, ("fid",), 0, torch.device("cpu")).warnings


@pytest.mark.parametrize("condition", [1.0, 1e7, 1e10])
def test_healthy_statistics_from_a_file_are_not_warned_of(condition: float) -> None:
    assert warnings_of(from_a_file(2_000, 0, condition), from_a_file(2_000, 1, condition)) == []


@pytest.mark.parametrize("count", [5, DIMENSION])
@pytest.mark.parametrize("condition", [1.0, 1e7])
def test_statistics_from_a_file_of_too_few_pictures_are_warned_of(count: int, condition: float) -> None:
    healthy, few = from_a_file(2_000, 0, condition), from_a_file(count, 1, condition)
    expected = f"batch has a covariance of rank {count - 1} over 12 feature dimensions, as from too few pictures"
    (warning,) = warnings_of(few, healthy)
    assert warning.startswith(f"FID: the reference {expected}")
    assert "biased upwards" in warning
    (warning,) = warnings_of(healthy, few)
    assert warning.startswith(f"FID: the sample {expected}")
    assert len(warnings_of(few, few)) == 2


def test_a_known_count_decides_without_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large count silences the warning, whatever the covariance: features that never vary are no lack of pictures."""
    few, asked = from_a_file(5, 0), []
    assert len(warnings_of(few, few)) == 2
    rank_of = module.rank_of
    monkeypatch.setattr(module, "rank_of", lambda statistics: asked.append(statistics) or rank_of(statistics))
    many = Statistics(few.mean, few.covariance, 50_000)
    assert warnings_of(many, many) == []
    (warning,) = warnings_of(many, Statistics(few.mean, few.covariance, DIMENSION))
    assert "the sample batch holds 12 pictures, too few for a covariance over 12 feature dimensions" in warning
    assert asked == []
    # One side unknown: its eigenvalues alone are asked for.
    assert len(warnings_of(few, many)) == 1
    assert asked == [few]


@pytest.mark.parametrize(
    ("references", "count", "lost"),
    [
        (6, 4, {}),
        (6, 3, {"precision": "sample", "recall": "sample"}),
        (5, 4, {"density": "reference", "coverage": "reference"}),
        (3, 9, dict.fromkeys(("precision", "recall", "density", "coverage"), "reference")),
        (2, 2, dict.fromkeys(("precision", "recall", "density", "coverage"), "reference")),
    ],
)
def test_too_few_pictures_for_a_score_lose_that_score_alone(references: int, count: int, lost: dict[str, str]) -> None:
    ours = scores_of(features(references, 0), features(count, 1), repeats=5)
    assert tuple(ours.values) == ALL
    assert {key for key, value in ours.values.items() if value is None} == lost.keys() == ours.not_computed.keys()
    for key, role in lost.items():
        needed = 4 if key in ("precision", "recall") else 6
        held = references if role == "reference" else count
        assert ours.not_computed[key] == f"the {role} batch has too few pictures ({held}; at least {needed} are needed)"
        assert key not in ours.intervals
    assert np.isfinite([value for value in ours.values.values() if value is not None]).all()


def test_one_picture_has_no_kernel_distance() -> None:
    lone = Features(vectors(1, 0), None, None)
    ours = score(features(50, 1), lone, None, ("kid", "density"), 0, torch.device("cpu"))
    assert ours.values["kid"] is None
    assert ours.not_computed == {"kid": "the sample batch has too few pictures (1; at least 2 are needed)"}
    assert ours.values["density"] is not None


def test_which_scores_have_an_interval() -> None:
    """An interval of recall or of coverage over references would be another quantity than the rest."""
    ours = scores_of(features(3_000, 0), features(2_500, 1), repeats=20)
    assert set(ours.intervals) == {"fid", "inception_score", "precision", "kid", "density"}
    for key, interval in ours.intervals.items():
        value = ours.values[key]
        assert value is not None
        assert interval.low <= value <= interval.high
    assert scores_of(features(40, 0), features(40, 1)).intervals == {}


def test_only_wanted_scores_of_a_pair_have_values_and_intervals() -> None:
    ours = score(features(40, 0), features(40, 1), HEAD, ("recall", "coverage"), 5, torch.device("cpu"))
    assert tuple(ours.values) == ("recall", "coverage")
    assert ours.intervals == {}


def test_radii_are_kept_under_a_versioned_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("reference", "samples"):
        (tmp_path / role).mkdir()
    sides = features(40, 0, tmp_path / "reference"), features(40, 1, tmp_path / "samples")
    first = scores_of(*sides)
    assert [path.name for path in sorted(tmp_path.rglob("*.npz"))] == ["radii-half-3-v1.npz"] * 2
    np.savez(tmp_path / "reference" / "radii-half-3-v1.npz", values=np.zeros(40, np.float32))
    assert scores_of(*sides).values["precision"] == 0.0
    # A new version must not take the radii of the old one.
    monkeypatch.setattr(module, "RADII_NAME", "radii-half-3-v2")
    assert scores_of(*sides).values == first.values


def test_a_result_that_is_no_number_is_not_computed() -> None:
    far = Statistics(np.full(DIMENSION, 1e200), np.eye(DIMENSION), 1_000)
    near = Statistics(np.zeros(DIMENSION), np.eye(DIMENSION), 1_000)
    scores = score(Features(None, near, None), Features(None, far, None), None, ("fid",), 0, torch.device("cpu"))
    assert scores.values == {"fid": None}
    assert "not a finite number" in scores.not_computed["fid"]
