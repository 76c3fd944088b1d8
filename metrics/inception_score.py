"""The Inception Score (Salimans et al. 2016, "Improved techniques for training GANs", section 4)."""

from __future__ import annotations

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
    splits = [features[start : start + split_size] for start in range(0, len(features), split_size)]
    return float(np.mean([np.exp(_mean_divergence(split, head.astype(np.float64))) for split in splits]))


def _mean_divergence(features: NDArray[np.floating], head: NDArray[np.float64]) -> float:
    """E_x KL(p(y|x) || p(y)) = H(p(y)) - E_x H(p(y|x))."""
    total = np.zeros(head.shape[1])
    conditional_entropy = 0.0
    for start in range(0, len(features), _ROWS_AT_ONCE):
        logits = features[start : start + _ROWS_AT_ONCE].astype(np.float64) @ head  # (n, classes)
        probabilities = np.exp(log_softmax(logits, axis=1))
        total += probabilities.sum(axis=0)
        conditional_entropy += entr(probabilities).sum()
    return float(entr(total / len(features)).sum() - conditional_entropy / len(features))
