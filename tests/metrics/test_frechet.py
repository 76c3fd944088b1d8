from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from metrics import frechet as module
from metrics.frechet import (
    MeanAndCovariance,
    Statistics,
    factor_of,
    frechet_distance,
    frechet_of_few,
    rank_of,
    statistics_of,
)
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


@pytest.mark.parametrize("dimension", [64, 256])
def test_agrees_with_the_matrix_root_at_full_rank(dimension: int) -> None:
    first, second = random_statistics(dimension, 2 * dimension, 0), random_statistics(dimension, 3 * dimension, 1)
    ours = frechet_distance(first, second)
    assert ours == pytest.approx(through_matrix_root(first, second), rel=1e-6)
    assert frechet_distance(first, second, factor_of(first.covariance)) == ours


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


@pytest.mark.parametrize(("rows", "rank"), [(2, 1), (20, 19), (60, 59), (61, 60), (200, 60)])
def test_rank_is_one_less_than_the_vectors_up_to_the_dimensions(rows: int, rank: int) -> None:
    of_rows = random_statistics(60, rows, 0)
    assert rank_of(of_rows) == rank
    assert of_rows.count == rows


def conditioned(dimension: int, condition: float, rows: int, seed: int) -> Statistics:
    """Of vectors whose variances fall evenly, on a logarithmic scale, from 1 to 1 / `condition`, along the same axes."""
    axes = scipy.linalg.qr(np.random.default_rng(9).standard_normal((dimension, dimension)))[0]
    deviations = np.logspace(0, -np.log10(condition) / 2, dimension)
    return statistics_of((np.random.default_rng(seed).standard_normal((rows, dimension)) * deviations) @ axes)


def test_rank_of_an_ill_conditioned_covariance_is_full() -> None:
    """Inception's spectra span seven orders of magnitude; that is no sign of too few vectors."""
    first, second = (conditioned(128, 1e7, 2_000, seed) for seed in (0, 1))
    assert rank_of(first) == rank_of(second) == 128
    # The known-bad variant: the rank of the product, whose condition is the square.
    root = factor_of(first.covariance).matrix
    product = np.linalg.eigvalsh(root.T @ second.covariance @ root)
    assert (product > 128 * np.finfo(float).eps * product[-1]).sum() < 128
    assert rank_of(conditioned(128, 1e10, 2_000, 0)) == 128
    # As ill-conditioned, of too few vectors: the rank of a covariance is found whatever its spectrum.
    assert rank_of(conditioned(128, 1e7, 100, 0)) == 99


def test_rank_through_float32_is_not_found() -> None:
    """As the docstring says. The scale must not matter, that of the covariance as little as that of its rounding."""
    few = random_statistics(60, 20, 0)
    assert rank_of(Statistics(few.mean, few.covariance * 1e-9)) == 19
    rounded = few.covariance.astype(np.float32).astype(float)
    assert rank_of(Statistics(few.mean, rounded)) > 19
    assert rank_of(Statistics(np.zeros(3), np.zeros((3, 3)))) == 0


PLANTED = {
    "one eigenvalue missing": ("eigvalsh", lambda matrix: np.concatenate(([0.0], np.linalg.eigvalsh(matrix)[:-1]))),
    "eigenvalues a little too large": ("eigvalsh", lambda matrix: np.linalg.eigvalsh(matrix) * (1 + 1e-6)),
    "the right sum of wrong eigenvalues": ("eigvalsh", lambda matrix: np.full(len(matrix), np.trace(matrix) / len(matrix))),
    "eigenvalues that are no numbers": ("eigvalsh", lambda matrix: np.full(len(matrix), np.nan)),
    "the other triangle's factor": ("cholesky", lambda matrix, lower: np.linalg.cholesky(matrix).T),
    "a factor of half precision": (
        "cholesky",
        lambda matrix, lower: np.linalg.cholesky(matrix).astype(np.float16).astype(float),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_wrong_linear_algebra_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = random_statistics(30, 200, 0), random_statistics(30, 150, 1)
    right = frechet_distance(first, second)
    function, wrong = PLANTED[name]
    monkeypatch.setattr(module.scipy.linalg, function, wrong)
    with pytest.raises(InputError, match="contradict its trace"):
        frechet_distance(first, second)
    # Without the check the number is wrong and looks like any other.
    monkeypatch.setattr(module, "_check_eigenvalues", lambda *_: None)
    assert frechet_distance(first, second) != right


def test_statistics_rounded_to_float32_pass_the_check() -> None:
    """Rounding makes a covariance of low rank indefinite: what is cut off below zero must not look like an error."""
    first, second = random_statistics(80, 40, 0), random_statistics(80, 50, 1)
    rounded = [Statistics(side.mean, side.covariance.astype(np.float32).astype(float)) for side in (first, second)]
    assert np.linalg.eigvalsh(rounded[0].covariance)[0] < 0
    exact = frechet_distance(first, second)
    for pair in ((rounded[0], second), (first, rounded[1]), rounded):
        assert frechet_distance(*pair) == pytest.approx(exact, rel=1e-2)


def test_rounding_below_zero_is_cut_off_and_not_an_error() -> None:
    first, second = Statistics(np.zeros(3), np.diag([1.0, 1.0, -1e-4])), Statistics(np.zeros(3), np.diag([4.0, 1.0, 1.0]))
    for pair in ((first, second), (second, first)):
        assert frechet_distance(*pair) == pytest.approx(1 + 0 + 1, abs=1e-3)


def test_damaged_statistics() -> None:
    good = random_statistics(4, 50, 0)
    lopsided = Statistics(good.mean, np.triu(good.covariance))
    holed = Statistics(good.mean, np.where(np.eye(4) > 0, np.nan, good.covariance))
    for bad, sentence in ((lopsided, "not symmetric"), (holed, "not finite")):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(InputError, match=sentence):
                frechet_distance(*pair)
        with pytest.raises(InputError, match=sentence):
            rank_of(bad)


@pytest.mark.parametrize(("rows", "others", "dimension"), [(2, 3, 8), (12, 9, 40), (30, 200, 50), (200, 30, 50), (90, 70, 30)])
def test_few_vectors_agree_with_the_full_route(rows: int, others: int, dimension: int) -> None:
    generator = np.random.default_rng(rows)
    first = generator.standard_normal((rows, dimension)) @ generator.standard_normal((dimension, dimension))
    second = generator.standard_normal((others, dimension)) * 3 + 1
    full = frechet_distance(statistics_of(first), statistics_of(second))
    assert frechet_of_few(first, second) == pytest.approx(full, rel=1e-6)
    # The known-bad variants: rows that are not centred, and the Frobenius norm in place of the nuclear one.
    product = (first - first.mean(0)) @ (second - second.mean(0)).T / np.sqrt((rows - 1) * (others - 1))
    traces = first.var(0, ddof=1).sum() + second.var(0, ddof=1).sum() + ((first.mean(0) - second.mean(0)) ** 2).sum()
    uncentred = np.linalg.svd(first @ second.T / np.sqrt((rows - 1) * (others - 1)), compute_uv=False).sum()
    for wrong in (uncentred, np.linalg.norm(product)):
        assert rows == 2 or traces - 2 * wrong != pytest.approx(full, rel=1e-3)


def test_few_vectors_have_a_closed_form() -> None:
    """Two points each: S1 and S2 are of rank 1, and Tr (S1 S2)^(1/2) = |a.b| for S1 = a a', S2 = b b'."""
    a, b = np.array([3.0, 4.0, 0.0]), np.array([1.0, 0.0, 2.0])
    first, second = np.stack([a, -a]) / np.sqrt(2), np.stack([b, -b]) / np.sqrt(2)
    assert frechet_of_few(first, second) == pytest.approx(25 + 5 - 2 * 3)
    assert frechet_of_few(first, first + 2) == pytest.approx(12)


def test_few_vectors_cost_what_the_smaller_side_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    eigvalsh = scipy.linalg.eigvalsh
    monkeypatch.setattr(module.scipy.linalg, "eigvalsh", lambda matrix: sizes.append(len(matrix)) or eigvalsh(matrix))
    rows = np.random.default_rng(0).standard_normal((90, 40))
    assert frechet_of_few(rows, rows[:7]) == pytest.approx(frechet_of_few(rows[:7], rows))
    assert sizes == [7, 7]


def test_few_vectors_against_themselves() -> None:
    """Repeated vectors leave many eigenvalues that are rounding, whose roots are far larger than they."""
    rows = np.random.default_rng(0).standard_normal((40, 200)).repeat(5, axis=0)
    assert frechet_of_few(rows, rows) == pytest.approx(0, abs=1e-5 * np.trace(statistics_of(rows).covariance))


def test_too_few_of_few() -> None:
    with pytest.raises(InputError, match="at least two pictures on either side, not 1"):
        frechet_of_few(np.ones((1, 3)), np.ones((4, 3)))
    with pytest.raises(InputError, match="not finite"):
        frechet_of_few(np.full((2, 3), np.inf), np.ones((4, 3)))
