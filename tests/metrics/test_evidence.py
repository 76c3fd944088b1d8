from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_runs import SmallNetwork, random_pictures

from metrics.evidence import evenly_spaced, make_report
from metrics.features import Features
from metrics.frechet import statistics_of
from metrics.pictures import PictureBatch, open_batch

CPU = torch.device("cpu")


def side(path: Path, pictures: np.ndarray, labels: np.ndarray | None = None) -> tuple[PictureBatch, Features]:
    np.savez(path, arr_0=pictures, **({} if labels is None else {"arr_1": labels}))
    pool, spatial = SmallNetwork().activations(pictures)
    return open_batch(path), Features(pool, statistics_of(pool), statistics_of(spatial))


def test_nearest_real_pictures_and_what_is_typical(tmp_path: Path) -> None:
    """Sample 0 is a copy of a reference picture; no other is near one."""
    real = random_pictures(40, seed=0)
    drawn = np.concatenate([real[7:8], random_pictures(20, seed=1)])
    reference, samples = side(tmp_path / "reference.npz", real), side(tmp_path / "samples.npz", drawn)
    report = make_report({}, (reference[0], samples[0]), (reference[1], samples[1]), None, [], CPU)
    found = report.neighbours
    np.testing.assert_array_equal(found.samples[0], drawn[0])
    np.testing.assert_array_equal(found.nearest[0, 0], real[7])
    assert found.distances[0, 0] == 0
    assert (np.diff(found.distances, axis=1) >= 0).all()
    apart = np.linalg.norm(reference[1].pool[:, None] - reference[1].pool, axis=2)
    # Each picture is at distance zero from itself, which says nothing.
    assert found.typical == pytest.approx(np.median(np.sort(apart, axis=1)[:, 1]), rel=1e-4)
    assert found.typical > 0
    assert not report.classes


def test_classes_need_labels_but_not_precision_and_recall(tmp_path: Path) -> None:
    reference = side(tmp_path / "reference.npz", random_pictures(40), np.arange(40) % 4)
    samples = side(tmp_path / "samples.npz", random_pictures(24, seed=1), np.arange(24) % 3)
    report = make_report({}, (reference[0], samples[0]), (reference[1], samples[1]), None, [], CPU)
    assert [(score.label, score.samples, score.references) for score in report.classes] == [(0, 8, 10), (1, 8, 10), (2, 8, 10)]
    assert {score.precision for score in report.classes} == {None}
    assert sorted(score.rank for score in report.classes) == [1, 2, 3]


@pytest.mark.parametrize(
    ("count", "wanted", "expected"), [(10, 5, [0, 2, 4, 6, 8]), (3, 8, [0, 1, 2]), (7, 3, [0, 2, 4]), (5, 0, [])]
)
def test_evenly_spaced(count: int, wanted: int, expected: list[int]) -> None:
    assert evenly_spaced(count, wanted).tolist() == expected
