from __future__ import annotations

import numpy as np
import pytest
import torch

from metrics import bootstrap as module
from metrics.bootstrap import (
    Interval,
    frechet_interval,
    inception_score_interval,
    kernel_interval,
    mean_interval,
)
from metrics.frechet import Statistics, frechet_distance, statistics_of
from metrics.inception_score import inception_score, weighted_inception_scores
from metrics.kernel_distance import KernelDistance, kernel_distance

DIMENSION = 3
REFERENCE = Statistics(np.zeros(DIMENSION), np.eye(DIMENSION))


def draw(count: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, dimension)) * np.linspace(0.7, 1.5, dimension) + 0.4).astype(np.float32)


def coverage(intervals: list[Interval], expected: float) -> float:
    return float(np.mean([interval.low <= expected <= interval.high for interval in intervals]))


def test_frechet_interval_covers_its_expected_value() -> None:
    features = [draw(100, seed) for seed in range(120)]
    distances = [frechet_distance(REFERENCE, statistics_of(rows)) for rows in features]
    intervals = [
        frechet_interval(REFERENCE, rows, distance, repeats=50, seed=seed)
        for seed, (rows, distance) in enumerate(zip(features, distances, strict=True))
    ]
    expected = float(np.mean(distances))
    assert 0.85 <= coverage(intervals, expected) <= 0.99
    # Plain quantiles would lie above the distance: repeats of pictures inflate it.
    upwards = np.mean([(i.low + i.high) / 2 - d for i, d in zip(intervals, distances, strict=True)])
    assert abs(upwards) < 0.1 * np.mean([interval.high - interval.low for interval in intervals])


def test_resampling_inflates_the_distance_and_the_interval_is_put_right() -> None:
    """15 dimensions, 40 pictures: most resampled distances lie above the distance itself."""
    rows = draw(40, 0, 15)
    reference = Statistics(np.zeros(15), np.eye(15))
    distance = frechet_distance(reference, statistics_of(rows))
    generator = np.random.default_rng(0)
    resampled = [frechet_distance(reference, statistics_of(rows[generator.integers(0, 40, 40)])) for _ in range(200)]
    assert np.quantile(resampled, 0.1) > distance
    interval = frechet_interval(reference, rows, distance, repeats=200)
    assert interval.low < distance < interval.high
    assert interval.high - interval.low == pytest.approx(np.subtract(*np.quantile(resampled, (0.975, 0.025))), rel=0.3)


def test_weighted_statistics_are_those_of_repeated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 50)
    rows = draw(300, 0, 6) + 20
    counts = np.bincount(np.random.default_rng(0).integers(0, 300, 300), minlength=300).astype(float)
    ours = module._weighted_statistics(rows, counts, torch.device("cpu"))
    expected = statistics_of(np.repeat(rows, counts.astype(int), axis=0))
    np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(ours.covariance, expected.covariance, atol=1e-5)
    assert ours.count == 300
    # The known-bad variant: each drawn picture once.
    assert np.abs(statistics_of(rows[counts > 0]).covariance - expected.covariance).max() > 1e-2


@pytest.mark.parametrize("count", [2, 3, 40])
def test_pictures_that_are_all_but_alike_have_an_interval(count: int) -> None:
    """A third of the draws hold copies of one picture alone: their covariance is zero, not what rounding leaves of it."""
    rows = np.repeat(draw(1, 0, 12), count, axis=0)
    rows[0] += 1.5
    counts = np.zeros(count)
    counts[-1] = count
    assert (module._weighted_statistics(rows, counts, torch.device("cpu")).covariance == 0).all()
    reference = statistics_of(draw(4, 1, 12))
    distance = frechet_distance(reference, statistics_of(rows))
    interval = frechet_interval(reference, rows, distance, repeats=60)
    assert 0 <= interval.low <= distance <= interval.high
    # The known-bad variant: about the mean of all pictures, in float32.
    moved = (rows[-1:] - rows.mean(axis=0)).repeat(count, axis=0)
    about_all = moved.T @ moved - count * np.outer(moved[0], moved[0])
    assert count == 2 or np.linalg.eigvalsh(about_all.astype(float))[0] < 0


def test_mean_interval_covers_the_true_share() -> None:
    generator = np.random.default_rng(0)
    intervals = [mean_interval(generator.random(150) < 0.3, repeats=150, seed=seed) for seed in range(200)]
    assert 0.85 <= coverage(intervals, 0.3) <= 0.99
    width = np.mean([interval.high - interval.low for interval in intervals])
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 150), rel=0.1)
    assert mean_interval(np.ones(20, bool)) == (1.0, 1.0)


def test_inception_score_interval_covers_its_expected_value() -> None:
    head = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * 1.5
    features = [draw(80, seed, 4) for seed in range(120)]
    scores = [inception_score(rows, head, split_size=40) for rows in features]
    intervals = [
        inception_score_interval(rows, head, score, split_size=40, repeats=80, seed=seed)
        for seed, (rows, score) in enumerate(zip(features, scores, strict=True))
    ]
    assert 0.85 <= coverage(intervals, float(np.mean(scores))) <= 0.99


def test_weights_of_the_inception_score_are_repeated_pictures() -> None:
    generator = np.random.default_rng(0)
    features, head = draw(130, 0, 4), generator.standard_normal((4, 6)).astype(np.float32)
    weights = [generator.multinomial(count, np.full(count, 1 / count), size=3).astype(float) for count in (50, 50, 30)]
    given = iter(weights)
    ours = weighted_inception_scores(features, head, lambda count: next(given), split_size=50)
    for row in range(3):
        scores = [
            inception_score(np.repeat(features[start : start + 50], split[row].astype(int), axis=0), head)
            for start, split in zip((0, 50, 100), weights, strict=True)
        ]
        assert ours[row] == pytest.approx(np.mean(scores), rel=1e-9)


def test_kernel_interval_covers_the_true_distance() -> None:
    """The mean over the distances of many whole sets stands for the true one, as the score has no bias."""
    sides = [(draw(300, 2 * seed) - 0.4, draw(300, 2 * seed + 1)) for seed in range(120)]
    expected = float(np.mean([kernel_distance(*pair).mean for pair in sides]))
    intervals = [
        kernel_interval(kernel_distance(*pair, subsets=16, subset_size=30, seed=seed), 300, 300)
        for seed, pair in enumerate(sides)
    ]
    assert all(interval is not None for interval in intervals)
    assert 0.85 <= coverage([interval for interval in intervals if interval], expected) <= 0.99


def test_kernel_interval_is_refused_where_subsets_overlap_too_much() -> None:
    assert kernel_interval(KernelDistance(0.1, 0.01, 1_000, 100), 1_500, 50_000) is None
    assert kernel_interval(KernelDistance(0.1, 0.0, 1_000, 1), 1_000, 1_000) is None
    wide = kernel_interval(KernelDistance(0.1, 0.01, 1_000, 100), 10_000, 50_000)
    assert wide is not None
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.01 * np.sqrt(1 / 9 + 1 / 100))


def test_seeds_and_progress() -> None:
    rows, values, steps = draw(50, 0), np.random.default_rng(0).random(50).astype(np.float32), []
    head = np.eye(DIMENSION, dtype=np.float32)
    for interval in (
        lambda seed: frechet_interval(REFERENCE, rows, 1.0, repeats=20, seed=seed, progress=steps.append),
        lambda seed: mean_interval(values, repeats=20, seed=seed),
        lambda seed: inception_score_interval(rows, head, 1.5, repeats=20, seed=seed),
    ):
        assert interval(3) == interval(3)
        assert interval(3) != interval(4)
        assert interval(3).low <= interval(3).high
    assert sum(steps) % 20 == 0
    assert frechet_interval(REFERENCE, rows, 0.0, repeats=20).low == 0.0
