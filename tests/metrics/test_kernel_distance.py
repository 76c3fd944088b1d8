from __future__ import annotations

import numpy as np
import pytest

from metrics import kernel_distance as module
from metrics.kernel_distance import kernel_distance
from runtime.config import InputError


def by_the_definition(x: np.ndarray, y: np.ndarray, biased: bool = False) -> float:
    """Sums over pairs, in float64."""
    dimension = x.shape[1]

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return (float(u.astype(float) @ v.astype(float)) / dimension + 1) ** 3

    def within(vectors: np.ndarray) -> float:
        numbers = range(len(vectors))
        pairs = [kernel(vectors[i], vectors[j]) for i in numbers for j in numbers if biased or i != j]
        return float(np.mean(pairs))

    return within(x) + within(y) - 2 * float(np.mean([kernel(u, v) for u in x for v in y]))


def features(count: int, seed: int, shift: float = 0.0, dimension: int = 16) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, dimension)) + shift).astype(np.float32)


def test_whole_sets_equal_the_definition() -> None:
    x, y = features(40, 0), features(40, 1, 0.3)
    ours = kernel_distance(x, y)
    assert ours.mean == pytest.approx(by_the_definition(x, y), rel=1e-5)
    assert (ours.deviation, ours.subset_size, ours.subsets) == (0.0, 40, 1)
    # The known-bad variant: vectors paired with themselves.
    assert ours.mean != pytest.approx(by_the_definition(x, y, biased=True), rel=1e-2)


def test_subsets_are_drawn_without_replacement_from_either_side() -> None:
    x, y = features(60, 0), features(45, 1, 0.3)
    generator = np.random.default_rng(7)
    values = []
    for _ in range(5):
        chosen = [np.sort(generator.choice(count, 20, replace=False)) for count in (60, 45)]
        values.append(by_the_definition(x[chosen[0]], y[chosen[1]]))
    ours = kernel_distance(x, y, subsets=5, subset_size=20, seed=7)
    assert ours == pytest.approx((np.mean(values), np.std(values), 20, 5), rel=1e-4)
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=7) == ours
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=8) != ours


def test_subsets_shrink_to_the_smaller_side() -> None:
    steps: list[int] = []
    ours = kernel_distance(features(60, 0), features(25, 1), subsets=4, progress=steps.append)
    assert (ours.subset_size, ours.subsets, sum(steps)) == (25, 4, 4)


def test_unbiased_around_the_true_value() -> None:
    """Normal vectors in D dimensions, y moved by a: E k = E (x.y / D + 1)^3 has a closed form in |a|^2."""
    dimension, shift, repeats = 4, 0.5, 400
    square = dimension * shift**2
    values = [
        kernel_distance(features(30, 2 * i, 0.0, dimension), features(30, 2 * i + 1, shift, dimension)).mean
        for i in range(repeats)
    ]
    # (1 + t)^3 = 1 + 3 t + 3 t^2 + t^3, t = x.y / D of independent vectors. The moments of x.y:
    within_x = 1 + 3 * dimension / dimension**2
    between = 1 + 3 * (dimension + square) / dimension**2
    second = dimension + 2 * square + square**2
    third = square**3 + 6 * square**2 + 3 * square * dimension + 6 * square
    within_y = 1 + 3 * square / dimension + 3 * second / dimension**2 + third / dimension**3
    expected = within_x + within_y - 2 * between
    noise = np.std(values) / np.sqrt(repeats)
    assert abs(np.mean(values) - expected) < 4 * noise
    assert expected > 10 * noise


def test_small_distances_are_not_lost_in_rounding() -> None:
    """Kernel values near 8 and a distance near 1e-5: float32 sums would drown it."""
    x, y = np.abs(features(500, 0, dimension=64)), np.abs(features(500, 1, dimension=64))
    exact = [((u.astype(float) @ v.astype(float).T / 64 + 1) ** 3) for u, v in ((x, x), (y, y), (x, y))]
    expected = sum((k.sum() - np.trace(k)) / (500 * 499) for k in exact[:2]) - 2 * exact[2].mean()
    assert kernel_distance(x, y).mean == pytest.approx(expected, abs=2e-7)


def test_bad_input() -> None:
    good = features(10, 0)
    with pytest.raises(InputError, match="at least two pictures, not 100 subsets of 1"):
        kernel_distance(good, good[:1])
    bad = good.copy()
    bad[3, 3] = np.inf
    with pytest.raises(InputError, match="the sample features hold numbers that are not finite"):
        kernel_distance(good, bad)
    with pytest.raises(InputError, match="features of 16 and of 8 numbers"):
        kernel_distance(good, good[:, :8])
    assert module.SUBSETS == 100
    assert module.SUBSET_SIZE == 1_000
