from __future__ import annotations

import time

import numpy as np
import pytest

from metrics import class_scores as module
from metrics.class_scores import class_scores, scored_classes
from metrics.frechet import frechet_distance, statistics_of
from metrics.precision_recall import Covered


def labelled(counts: list[int], seed: int, dimension: int = 10) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)
    return (generator.standard_normal((len(labels), dimension)) + labels[:, None] ** 0.5).astype(np.float32), labels


def test_equals_each_class_by_itself() -> None:
    reference, reference_labels = labelled([30, 25, 40, 1, 12], 0)
    samples, sample_labels = labelled([20, 35, 0, 15, 22], 1)
    samples[sample_labels == 1] += 2
    generator = np.random.default_rng(2)
    covered = Covered(generator.random(len(samples)) < 0.7, generator.random(len(reference)) < 0.4)
    ours = class_scores(reference, reference_labels, samples, sample_labels, covered)
    # Class 2 has no samples, class 3 a single reference: neither has a covariance.
    assert [score.label for score in ours] == [0, 1, 4]
    assert [(score.references, score.samples) for score in ours] == [(30, 20), (25, 35), (12, 22)]
    for score in ours:
        of_reference, of_samples = reference_labels == score.label, sample_labels == score.label
        full = frechet_distance(statistics_of(reference[of_reference]), statistics_of(samples[of_samples]))
        assert score.distance == pytest.approx(full, rel=1e-6)
        assert score.precision == pytest.approx(covered.samples[of_samples].mean())
        assert score.recall == pytest.approx(covered.references[of_reference].mean())
    # The known-bad variant: the order of the pictures taken for that of the classes.
    assert ours[0].precision != pytest.approx(covered.samples[:20].mean())
    order = sorted(ours, key=lambda score: score.distance)
    assert [score.rank for score in order] == [1, 2, 3]
    assert order[-1].label == 1


def test_without_precision_and_recall() -> None:
    reference, reference_labels = labelled([30, 25, 1, 12], 0)
    samples, sample_labels = labelled([20, 35, 9, 15], 1)
    done: list[int] = []
    ours = class_scores(reference, reference_labels, samples, sample_labels, progress=done.append)
    assert [(score.precision, score.recall) for score in ours] == [(None, None)] * 3
    assert [score.label for score in ours] == scored_classes(reference_labels, sample_labels) == [0, 1, 3]
    assert done == [1, 1, 1]
    covered = Covered(np.ones(len(samples), bool), np.zeros(len(reference), bool))
    of_both = class_scores(reference, reference_labels, samples, sample_labels, covered)
    assert [(score.precision, score.recall) for score in of_both] == [(1.0, 0.0)] * 3
    assert [(score.distance, score.rank) for score in of_both] == [(score.distance, score.rank) for score in ours]


def test_the_route_follows_the_smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """From as many pictures as dimensions the full route costs less; it must not be left for one large side alone."""
    few: list[tuple[int, int]] = []
    of_few = module.frechet_of_few
    monkeypatch.setattr(module, "frechet_of_few", lambda *sides: few.append((len(sides[0]), len(sides[1]))) or of_few(*sides))
    reference, reference_labels = labelled([9, 10, 500, 8, 40], 0)
    samples, sample_labels = labelled([30, 10, 9, 8, 40], 1)
    ours = class_scores(reference, reference_labels, samples, sample_labels)
    assert few == [(9, 30), (500, 9), (8, 8)]
    for score in ours:
        sides = reference[reference_labels == score.label], samples[sample_labels == score.label]
        assert score.distance == pytest.approx(of_few(*sides), rel=1e-6)


def test_no_class_in_common() -> None:
    features, labels = labelled([4, 4], 0)
    covered = Covered(np.ones(8, bool), np.ones(8, bool))
    assert class_scores(features, labels, features, labels + 2, covered) == []


def test_a_thousand_classes_take_seconds() -> None:
    """Inception's 2,048 dimensions. One full route at that size takes longer than 200 classes here may."""
    features, labels = labelled([20] * 200, 0, 2_048)
    covered = Covered(np.ones(len(labels), bool), np.ones(len(labels), bool))
    started = time.process_time()
    ours = class_scores(features, labels, features, labels, covered)
    assert len(ours) == 200
    assert time.process_time() - started < 5
