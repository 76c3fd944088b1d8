"""The Fréchet distance between two Gaussians, and the means and covariances it is computed from.

FID (Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6)
is this distance on Inception's pool features; sFID (Nash et al. 2021, "Generating images with sparse representations")
is the same on spatial features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from runtime.config import InputError

_ROWS_AT_ONCE = 512
# What rounding, of float32 files too, may leave below zero in a true covariance, relative to its trace.
_NEGATIVE_EIGENVALUE = 1e-4
_ASYMMETRY = 1e-3
# Rounding in double precision at 2,048 dimensions is of the order of 1e-13.
_ROUNDING = 1e-8


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of a set of feature vectors, float64, and how many vectors, where that is known."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None = None


class Factor(NamedTuple):
    """F with F F' = a covariance, (D, D), but for negative eigenvalues of at most `lost` in size, which were rounding."""

    matrix: NDArray[np.float64]
    lost: float


class MeanAndCovariance:
    """Mean and unbiased covariance (divisor N - 1, as np.cov) of rows that arrive in pieces, in float64.

    Pieces are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel when the mean is
    large against the spread. Memory: three D x D matrices, whatever the number of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: NDArray[np.float64] | None = None
        self._scatter: NDArray[np.float64] | None = None
        self._waiting: list[NDArray[np.float64]] = []
        self._waiting_rows = 0

    def update(self, rows: NDArray[np.floating]) -> None:
        """Adds feature vectors, shape (N, D). Raises InputError where one is not finite."""
        if not np.isfinite(rows).all():
            raise InputError("the feature network returned numbers that are not finite; check its weights file.")
        # A copy: the caller may fill the same array again before these rows are merged.
        self._waiting.append(np.array(rows, dtype=np.float64))
        self._waiting_rows += len(rows)
        # A D x D update costs the same for 64 rows as for 512, so small batches wait for each other.
        if self._waiting_rows >= _ROWS_AT_ONCE:
            self._merge()

    def statistics(self) -> Statistics:
        """The statistics of all rows so far. Raises ValueError below two rows, where a covariance does not exist."""
        self._merge()
        if self.count < 2 or self._mean is None or self._scatter is None:
            raise ValueError("a covariance needs at least two feature vectors")
        return Statistics(self._mean.copy(), self._scatter / (self.count - 1), self.count)

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)  # (N, D)
        self._waiting, self._waiting_rows = [], 0
        mean = rows.mean(axis=0)  # (D,)
        rows -= mean
        scatter = rows.T @ rows  # (D, D)
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = len(rows), mean, scatter
            return
        total = self.count + len(rows)
        step = mean - self._mean
        scatter += np.outer(step, step * (self.count * len(rows) / total))
        self._scatter += scatter
        self._mean = self._mean + step * (len(rows) / total)
        self.count = total


def statistics_of(features: NDArray[np.floating]) -> Statistics:
    """Mean and covariance of feature vectors, shape (N, D), N >= 2."""
    accumulator = MeanAndCovariance()
    for start in range(0, len(features), _ROWS_AT_ONCE):
        accumulator.update(features[start : start + _ROWS_AT_ONCE])
    return accumulator.statistics()


def frechet_distance(first: Statistics, second: Statistics, factor: Factor | None = None) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6).

    With S1 = F F', S1 S2 has the eigenvalues of the symmetric F' S2 F, so the trace of its root needs symmetric eigenvalues
    alone: several times faster than a general matrix root, and defined where S1 S2 is singular. The eigenvalues are checked
    against sums that need none. `factor` is `factor_of(first.covariance)`, where that stands already.
    Raises InputError where the two differ in dimension, one is no covariance, or the eigenvalues fail their check.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"features of {len(first.mean)} and of {len(second.mean)} numbers cannot be compared; "
            "both sides must come from the same network."
        )
    factor = factor or factor_of(first.covariance)
    product = _symmetric(factor.matrix.T @ _checked(second.covariance) @ factor.matrix)  # (D, D)
    eigenvalues = scipy.linalg.eigvalsh(product)
    traces = float(np.trace(first.covariance)), float(np.trace(second.covariance))
    _check_eigenvalues(eigenvalues, product, first.covariance, second.covariance, factor.lost * traces[1])
    roots = np.sqrt(_non_negative(eigenvalues, traces[0] * traces[1]))
    shift = first.mean - second.mean
    with np.errstate(over="ignore"):  # absurd means give infinity, which the caller can tell from a distance
        return max(float(shift @ shift + traces[0] + traces[1] - 2.0 * roots.sum()), 0.0)


def rank_of(statistics: Statistics) -> int:
    """The numerical rank of a covariance: how many of its D eigenvalues exceed D * 2.2e-16 of the largest.

    A covariance of N vectors has at most the rank N - 1, and the Fréchet distance of a lower rank than D is biased upwards.
    Rounding leaves the missing eigenvalues near 1e-16 of the largest; the least of a healthy covariance of features stands
    far above. Rounding of a covariance that was stored in float32 leaves them near 1e-8 and hides the deficiency.
    Costs one set of eigenvalues, so `Statistics.count` is to be asked first. Raises InputError for what is no covariance.
    """
    eigenvalues = scipy.linalg.eigvalsh(_checked(statistics.covariance))
    threshold = len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues[-1]
    return int((eigenvalues > threshold).sum())


def frechet_of_few(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """The Fréchet distance between two sets of vectors, (N, D) and (M, D), at a cost that suits N or M below D.

    With centred rows X1 and X2, S1 = X1' X1 / (N - 1), and S1 S2 has the non-zero eigenvalues of A A' and of A' A with
    A = X1 X2' / ((N - 1) (M - 1))^(1/2), N x M: the smaller of the two products takes the place of a D x D matrix.
    Raises InputError below two vectors on a side, or for vectors that are not finite.
    """
    if min(len(first), len(second)) < 2:
        raise InputError(f"a covariance needs at least two pictures on either side, not {min(len(first), len(second))}.")
    means, deviations = [], []
    for rows in (first, second):
        vectors = np.asarray(rows, dtype=np.float64)
        if not np.isfinite(vectors).all():
            raise InputError("the features hold numbers that are not finite; check the network's weights file.")
        means.append(vectors.mean(axis=0))
        deviations.append((vectors - means[-1]) / np.sqrt(len(vectors) - 1))
    fewer, more = sorted(deviations, key=len)
    between = fewer @ more.T  # (fewer, more)
    traces = [float((rows * rows).sum()) for rows in deviations]
    roots = np.sqrt(_non_negative(scipy.linalg.eigvalsh(between @ between.T), traces[0] * traces[1]))
    shift = means[0] - means[1]
    return max(float(shift @ shift + sum(traces) - 2.0 * roots.sum()), 0.0)


def factor_of(covariance: NDArray[np.float64]) -> Factor:
    """F with F F' = covariance, (D, D). Raises InputError for a matrix that is no covariance."""
    symmetric = _checked(covariance)
    try:
        return Factor(scipy.linalg.cholesky(symmetric, lower=True), 0.0)
    except scipy.linalg.LinAlgError:
        # Fewer samples than dimensions: Cholesky's factor does not exist, the symmetric eigenvectors do.
        values, vectors = scipy.linalg.eigh(symmetric, driver="evd")
        roots = np.sqrt(_non_negative(values, float(np.trace(symmetric))))
        return Factor(vectors * roots, max(-float(values[0]), 0.0))


def is_symmetric(matrix: NDArray[np.float64]) -> bool:
    """Whether a matrix (D, D) is symmetric but for rounding, of float32 files too."""
    return bool(np.abs(matrix - matrix.T).max() <= _ASYMMETRY * np.abs(matrix).max())


def _checked(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The covariance without the asymmetry of rounding. Raises InputError for what is no symmetric matrix of numbers."""
    if not np.isfinite(covariance).all():
        raise InputError("a covariance holds numbers that are not finite; compute its statistics again.")
    if not is_symmetric(covariance):
        raise InputError("a covariance is not symmetric; the sigma it was read from is damaged or holds something else.")
    return _symmetric(covariance)


def _symmetric(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return (matrix + matrix.T) / 2.0


def _check_eigenvalues(
    eigenvalues: NDArray[np.float64],
    product: NDArray[np.float64],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    lost: float,
) -> None:
    """Two identities that a wrong factor, product or eigenvalue breaks. Raises InputError where one does not hold.

    The eigenvalues sum to Tr(S1 S2), their squares to |F' S2 F|^2, both sums over elements. `lost` is what the first may miss.
    """
    found, expected = float(eigenvalues.sum()), float((first * second).sum())
    of_squares, squares = float((eigenvalues**2).sum()), float((product**2).sum())
    allowed = lost + _ROUNDING * float(np.linalg.norm(first) * np.linalg.norm(second))
    if not abs(found - expected) <= allowed or not abs(of_squares - squares) <= _ROUNDING * squares:
        raise InputError(
            f"the eigenvalues of the covariances' product contradict its trace ({found:.6g} against {expected:.6g}, their "
            f"squares {of_squares:.6g} against {squares:.6g}), so the Fréchet distance would be wrong; reinstall NumPy and "
            "SciPy, or try OMP_NUM_THREADS=1."
        )


def _non_negative(eigenvalues: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """The eigenvalues (ascending) with rounding below zero removed; `scale` is what they were computed from, in size."""
    if eigenvalues[0] < -_NEGATIVE_EIGENVALUE * abs(scale):
        raise InputError(
            f"a covariance has negative eigenvalues ({eigenvalues[0]:.3g} against {eigenvalues[-1]:.3g}), which no covariance "
            "has; the sigma it was read from is damaged or holds something else."
        )
    return np.clip(eigenvalues, 0.0, None)
