"""The Fréchet distance between two Gaussians, and the means and covariances it is computed from.

FID (Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6)
is this distance on Inception's pool features; sFID (Nash et al. 2021, "Generating images with sparse representations")
is the same on spatial features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from runtime.config import InputError

_ROWS_AT_ONCE = 512
# What rounding, of float32 files too, may leave below zero in a true covariance, relative to its trace.
_NEGATIVE_EIGENVALUE = 1e-4


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of a set of feature vectors, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


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
        return Statistics(self._mean.copy(), self._scatter / (self.count - 1))

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


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6).

    With S1 = F F', S1 S2 has the eigenvalues of the symmetric F' S2 F, so the trace of its root needs symmetric eigenvalues
    alone: several times faster than a general matrix root, and defined where S1 S2 is singular.
    Raises InputError where the two differ in dimension or one is no covariance.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"features of {len(first.mean)} and of {len(second.mean)} numbers cannot be compared; "
            "both sides must come from the same network."
        )
    factor = _factor(_symmetric(first.covariance))
    product = factor.T @ _symmetric(second.covariance) @ factor  # (D, D)
    traces = float(np.trace(first.covariance)), float(np.trace(second.covariance))
    eigenvalues = _non_negative(scipy.linalg.eigvalsh(_symmetric(product)), traces[0] * traces[1])
    shift = first.mean - second.mean
    distance = shift @ shift + traces[0] + traces[1] - 2.0 * np.sqrt(eigenvalues).sum()
    return max(float(distance), 0.0)


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """F with F F' = covariance. (D, D)"""
    try:
        return scipy.linalg.cholesky(covariance, lower=True)
    except scipy.linalg.LinAlgError:
        # Fewer samples than dimensions: Cholesky's factor does not exist, the symmetric eigenvectors do.
        values, vectors = scipy.linalg.eigh(covariance, driver="evd")
        return vectors * np.sqrt(_non_negative(values, float(np.trace(covariance))))


def _symmetric(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return (matrix + matrix.T) / 2.0


def _non_negative(eigenvalues: NDArray[np.floating], scale: float) -> NDArray[np.floating]:
    """The eigenvalues (ascending) with rounding below zero removed; `scale` is what they were computed from, in size."""
    if eigenvalues[0] < -_NEGATIVE_EIGENVALUE * abs(scale):
        raise InputError(
            f"a covariance has negative eigenvalues ({eigenvalues[0]:.3g} against {eigenvalues[-1]:.3g}), which no covariance "
            "has; the sigma it was read from is damaged or holds something else."
        )
    return np.clip(eigenvalues, 0.0, None)
