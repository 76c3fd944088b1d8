"""The Inception Score (Salimans et al. 2016, "Improved techniques for training GANs", section 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, log_softmax

SPLIT_SIZE = 5_000
_ROWS_AT_ONCE = 500


def inception_score(features: NDArray[np.floating], head: NDArray[np.floating], split_size: int = SPLIT_SIZE) -> float:
    """The mean over splits of exp(E_x KL(p(y|x) || p(y))), p(y|x) = softmax(features @ head), p(y) its mean in the split.

    features (N, D) in the order of the pictures, which decides the splits; head (D, classes), without a bias: ADM's evaluator
    leaves the graph's bias out, and so do the published figures. A last split of fewer than `split_size` pictures counts
    as much as the others, as in ADM.
    """
    return float(weighted_inception_scores(features, head, lambda count: np.ones((1, count)), split_size)[0])


def weighted_inception_scores(
    features: NDArray[np.floating],
    head: NDArray[np.floating],
    draw_weights: Callable[[int], NDArray[np.float64]],
    split_size: int = SPLIT_SIZE,
) -> NDArray[np.float64]:
    """The Inception Score under R weightings of the pictures, as `inception_score` has it where all weights are 1. -> (R,)

    `draw_weights` is called once a split, with the number n of its pictures, for weights (R, n). Class probabilities are
    computed once for all weightings, 500 pictures at a time; what stays in memory is R x (n + classes) numbers.
    """
    splits = [features[start : start + split_size] for start in range(0, len(features), split_size)]
    scores = [np.exp(_mean_divergences(split, head.astype(np.float64), draw_weights(len(split)))) for split in splits]
    return np.mean(scores, axis=0)


def _mean_divergences(
    features: NDArray[np.floating], head: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """E_x KL(p(y|x) || p(y)) = H(p(y)) - E_x H(p(y|x)), under each row of `weights` (R, n). -> (R,)"""
    total = np.zeros((len(weights), head.shape[1]))  # (R, classes)
    conditional_entropy = np.zeros(len(weights))
    for start in range(0, len(features), _ROWS_AT_ONCE):
        of_rows = weights[:, start : start + _ROWS_AT_ONCE]
        logits = features[start : start + _ROWS_AT_ONCE].astype(np.float64) @ head  # (n, classes)
        probabilities = np.exp(log_softmax(logits, axis=1))
        total += of_rows @ probabilities
        conditional_entropy += of_rows @ entr(probabilities).sum(axis=1)
    sums = weights.sum(axis=1)
    return entr(total / sums[:, None]).sum(axis=1) - conditional_entropy / sums
