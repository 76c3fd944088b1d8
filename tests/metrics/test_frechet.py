from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from metrics.frechet import MeanAndCovariance, Statistics, frechet_distance, statistics_of
from runtime.config import InputError


def random_statistics(dimension: int, rows: int, seed: int) -> Statistics:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((dimension, dimension))
    return statistics_of(generator.standard_normal((rows, dimension)) @ mixing + generator.standard_normal(dimension))


def through_matrix_root(first: Statistics, second: Statistics) -> float:
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.covariance + second.covariance - 2 * root))


@pytest.mark.parametrize("dimension", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_the_matrix_root(dimension: int, seed: int) -> None:
    first, second = random_statistics(dimension, 200, seed), random_statistics(dimension, 150, seed + 100)
    ours = frechet_distance(first, second)
    assert ours == pytest.approx(through_matrix_root(first, second), rel=1e-8)
    assert ours == pytest.approx(frechet_distance(second, first), rel=1e-10)
    # The known-bad variant: the root of each covariance by itself, which is right for commuting covariances alone.
    separate = scipy.linalg.sqrtm(first.covariance) @ scipy.linalg.sqrtm(second.covariance)
    shift = first.mean - second.mean
    wrong = shift @ shift + np.trace(first.covariance + second.covariance - 2 * separate.real)
    assert dimension < 7 or wrong != pytest.approx(ours, rel=1e-3)


def test_commuting_covariances_have_a_closed_form() -> None:
    """Shared eigenvectors: |m1 - m2|^2 + sum of (s1 - s2)^2 over the axes."""
    generator = np.random.default_rng(0)
    axes = scipy.linalg.qr(generator.standard_normal((12, 12)))[0]
    spread = generator.uniform(0.1, 3.0, (2, 12))
    mean = generator.standard_normal((2, 12))
    sides = [Statistics(m, (axes * s**2) @ axes.T) for m, s in zip(mean, spread, strict=True)]
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((spread[0] - spread[1]) ** 2).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("swap", [False, True])
def test_singular_covariances(swap: bool) -> None:
    first, second = np.array([4.0, 9.0, 0.0, 0.0]), np.array([1.0, 0.0, 16.0, 0.0])
    sides = [Statistics(np.zeros(4), np.diag(variances)) for variances in ((second, first) if swap else (first, second))]
    assert frechet_distance(*sides) == pytest.approx((2 - 1) ** 2 + 9 + 16)


def test_distance_without_overlap_of_the_supports_is_the_sum_of_the_traces() -> None:
    """Rounding leaves tiny eigenvalues of either sign here, which must not be taken for a damaged covariance."""
    generator = np.random.default_rng(0)
    axes = scipy.linalg.qr(generator.standard_normal((20, 20)))[0]
    halves = [Statistics(np.zeros(20), part @ part.T) for part in (axes[:, :8], axes[:, 8:])]
    assert frechet_distance(*halves) == pytest.approx(20, rel=1e-6)


def test_rank_deficient_features_against_themselves() -> None:
    few = random_statistics(60, 20, 0)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4 * np.trace(few.covariance))
    constant = Statistics(np.ones(3), np.zeros((3, 3)))
    assert frechet_distance(constant, constant) == 0


def naive_float32_covariance(rows: np.ndarray) -> np.ndarray:
    """The known-bad variant: sums of squares in float32, which cancel when the mean is large."""
    rows = rows.astype(np.float32)
    mean = rows.mean(axis=0)
    return (rows.T @ rows - len(rows) * np.outer(mean, mean)) / (len(rows) - 1)


@pytest.mark.parametrize("piece", [1, 64, 511, 5_000])
def test_statistics_in_pieces_equal_those_of_the_whole(piece: int) -> None:
    rows = np.random.default_rng(0).standard_normal((1_500, 6)) * [1, 2, 3, 0.1, 1, 1] + 1e4
    accumulator = MeanAndCovariance()
    for start in range(0, len(rows), piece):
        accumulator.update(rows[start : start + piece])
    streamed = accumulator.statistics()
    np.testing.assert_allclose(streamed.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(rows, rowvar=False), atol=1e-9)
    assert np.abs(naive_float32_covariance(rows) - np.cov(rows, rowvar=False)).max() > 1


def test_accumulator_keeps_no_view_of_its_input() -> None:
    accumulator, rows = MeanAndCovariance(), np.random.default_rng(0).standard_normal((8, 3))
    expected = statistics_of(rows.copy())
    accumulator.update(rows)
    rows[:] = 0
    np.testing.assert_allclose(accumulator.statistics().covariance, expected.covariance)


def test_reading_statistics_does_not_end_the_accumulation() -> None:
    accumulator, rows = MeanAndCovariance(), np.random.default_rng(0).standard_normal((40, 3))
    accumulator.update(rows[:10])
    early = accumulator.statistics()
    accumulator.update(rows[10:])
    np.testing.assert_allclose(early.covariance, np.cov(rows[:10], rowvar=False))
    np.testing.assert_allclose(accumulator.statistics().covariance, np.cov(rows, rowvar=False))


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="at least two"):
        statistics_of(np.ones((1, 3)))


def test_what_is_no_covariance_is_refused() -> None:
    good = Statistics(np.zeros(2), np.eye(2))
    for bad in (Statistics(np.zeros(2), np.diag([1.0, -0.5])), Statistics(np.zeros(2), -np.eye(2))):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(InputError, match="negative eigenvalues"):
                frechet_distance(*pair)
    with pytest.raises(InputError, match="features of 2 and of 3 numbers"):
        frechet_distance(good, Statistics(np.zeros(3), np.eye(3)))
    with pytest.raises(InputError, match="not finite"):
        statistics_of(np.array([[1.0, np.nan], [0.0, 1.0]]))
