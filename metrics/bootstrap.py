"""95 % intervals of scores: how far a score would move with other samples from the same model.

The bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife") draws as many pictures as there are, with
replacement, and computes the score again. Resampled sets repeat pictures, which shifts some scores to one side: it inflates
FID and lowers the entropy of mean class probabilities. Only the spread is therefore taken from the resamplings: an interval
is the score plus (quantiles of the resampled scores - their mean). It covers the score's expected value at this number of
samples, the bias of FID at few samples included: it says nothing about that bias.

The reference is taken as it is, for it is the same in every evaluation; the kernel distance's interval alone counts its
variation too. Some scores have no interval:

- sFID: its features are summed up as they come, and what is not kept cannot be drawn again.
- Recall and coverage: they ask of each reference picture whether any sample reaches it. To draw reference pictures again
  tells how the score moves with other references, which is another question, and up to three times too narrow an answer; to
  draw samples again leaves out more than a third of them each time, and with them every ball that only they held or reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.distances import block_of, full_precision, slices
from metrics.frechet import Statistics, factor_of, frechet_distance
from metrics.inception_score import SPLIT_SIZE, weighted_inception_scores
from metrics.kernel_distance import KernelDistance

REPEATS = 1_000
FRECHET_REPEATS = 100
_TAIL = 0.025
_NORMAL_QUANTILE = 1.96
_ROWS_AT_ONCE = 2_048
_CPU = torch.device("cpu")


class Interval(NamedTuple):
    """The two ends of a 95 % interval."""

    low: float
    high: float


def mean_interval(values: NDArray[np.bool_] | NDArray[np.float32], repeats: int = REPEATS, seed: int = 0) -> Interval:
    """Of the mean of a value per sample (N,): precision, density. The balls that samples lie in are the reference's."""
    generator = np.random.default_rng(seed)
    numbers = values.astype(np.float64)
    means = [numbers[generator.integers(0, len(numbers), len(numbers))].mean() for _ in range(repeats)]
    return _around(float(numbers.mean()), np.array(means))


@full_precision()
def frechet_interval(
    reference: Statistics,
    features: NDArray[np.float32],
    distance: float,
    repeats: int = FRECHET_REPEATS,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    device: torch.device = _CPU,
) -> Interval:
    """Of the Fréchet distance `distance` between `reference` and the samples' `features` (M, D).

    Every repetition costs a weighted covariance, M D^2 float32 multiply-adds of which 37 % fall away, on `device`, and one
    set of eigenvalues: at 2,048 dimensions about 2.5 s of one CPU core for 10,000 pictures and 5.5 s for 50,000.
    `progress` is told each repetition done.
    """
    generator = np.random.default_rng(seed)
    factor = factor_of(reference.covariance)
    distances = []
    for _ in range(repeats):
        counts = _counts(generator, len(features))
        distances.append(frechet_distance(reference, _weighted_statistics(features, counts, device), factor))
        if progress:
            progress(1)
    interval = _around(distance, np.array(distances))
    return Interval(max(interval.low, 0.0), interval.high)


def inception_score_interval(
    features: NDArray[np.floating],
    head: NDArray[np.floating],
    score: float,
    split_size: int = SPLIT_SIZE,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Interval:
    """Of the Inception Score `score`; features and head as `inception_score` takes them. Pictures stay in their split."""
    generator = np.random.default_rng(seed)

    def draw(count: int) -> NDArray[np.float64]:
        return np.stack([_counts(generator, count) for _ in range(repeats)])

    return _around(score, weighted_inception_scores(features, head, draw, split_size))


def kernel_interval(distance: KernelDistance, reference_count: int, sample_count: int) -> Interval | None:
    """Of a kernel distance, from the spread of its subsets; None where subsets of this size say nothing about the whole.

    Subsampling (Politis and Romano 1994, "Large sample confidence regions based on subsamples under minimal assumptions"): a
    score of m vectors has about N / m times the variance of one of N. Subsets drawn without replacement from N vectors have
    (1 - m / N) of the variance they would have over fresh data, and their mean over s subsets keeps 1 / s of theirs. N is the
    smaller side, to be on the safe side. Subsets of more than half of it overlap too much to tell. As subsets are drawn from
    both sides, the interval counts how far the score would move with another reference too, unlike all others here.
    """
    share = distance.subset_size / min(reference_count, sample_count)
    if share > 0.5 or distance.subsets < 2:
        return None
    variance = distance.deviation**2 * (share / (1.0 - share) + 1.0 / distance.subsets)
    reach = _NORMAL_QUANTILE * math.sqrt(variance)
    return Interval(distance.mean - reach, distance.mean + reach)


def _around(estimate: float, replicates: NDArray[np.float64]) -> Interval:
    low, high = estimate + np.quantile(replicates, (_TAIL, 1.0 - _TAIL)) - replicates.mean()
    return Interval(float(low), float(high))


def _counts(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    """How often each of `count` pictures is drawn in `count` draws."""
    return np.bincount(generator.integers(0, count, count), minlength=count).astype(np.float64)


def _weighted_statistics(features: NDArray[np.float32], counts: NDArray[np.float64], device: torch.device) -> Statistics:
    """Mean and covariance (divisor N - 1) of features (N, D), each taken `counts` times."""
    total, dimension = counts.sum(), features.shape[1]
    drawn = np.flatnonzero(counts)
    pieces = [drawn[place] for place in slices(0, len(drawn), _ROWS_AT_ONCE)]
    # About their own mean, not about one of all pictures: where nearly all drawn are alike, as of a collapsed model, the
    # difference of float32 sums would be rounding alone, and no covariance.
    mean = sum((counts[rows] @ features[rows].astype(np.float64) for rows in pieces), np.zeros(dimension)) / total  # (D,)
    origin = torch.from_numpy(mean).float().to(device)
    scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
    for rows in pieces:
        roots = torch.from_numpy(np.sqrt(counts[rows])).float().to(device)
        weighted = (block_of(features, rows, device) - origin) * roots[:, None]  # (n, D)
        scatter += weighted.T @ weighted  # (D, D)
    return Statistics(mean, scatter.cpu().numpy() / (total - 1.0), int(total))
