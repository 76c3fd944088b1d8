from __future__ import annotations

import numpy as np
import pytest

from metrics.inception_score import inception_score


def by_the_definition(features: np.ndarray, head: np.ndarray, split_size: int, bias: np.ndarray | float = 0.0) -> float:
    scores = []
    for start in range(0, len(features), split_size):
        logits = features[start : start + split_size].astype(np.float64) @ head + bias
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        divergence = (probabilities * (np.log(probabilities) - np.log(probabilities.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def test_equals_the_definition_split_by_split() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((1_700, 6)).astype(np.float32) + np.linspace(0, 4, 1_700)[:, None].astype(np.float32)
    head = generator.standard_normal((6, 9)).astype(np.float32)
    ours = inception_score(features, head, split_size=600)
    assert ours == pytest.approx(by_the_definition(features, head, 600), rel=1e-10)
    # The known-bad variants: one split, another order of the pictures, a bias.
    assert ours != pytest.approx(by_the_definition(features, head, 1_700), rel=1e-3)
    assert ours != pytest.approx(inception_score(generator.permutation(features), head, split_size=600), rel=1e-3)
    assert ours != pytest.approx(by_the_definition(features, head, 600, bias=np.arange(9.0)), rel=1e-3)


def test_limits() -> None:
    classes = np.eye(5, dtype=np.float32)
    assert inception_score(np.tile(classes, (40, 1)), classes * 1_000) == pytest.approx(5)  # sure, and all classes alike
    assert inception_score(np.tile(classes[:1], (40, 1)), classes * 1_000) == pytest.approx(1)  # sure, one class
    assert inception_score(np.tile(classes, (40, 1)), np.zeros((5, 5), np.float32)) == pytest.approx(1)  # never sure
