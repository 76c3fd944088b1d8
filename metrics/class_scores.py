"""Scores of each class by itself: which classes a model does well, and which badly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metrics.frechet import frechet_distance, frechet_of_few, statistics_of
from metrics.precision_recall import Covered


@dataclass(frozen=True)
class ClassScore:
    """One class: its pictures on either side, its Fréchet distance and the distance's rank among classes (1 is the best).

    Precision and recall are None where it was not computed which pictures lie within a ball.

    A distance of some tens of pictures is biased upwards, the more the fewer they are: it serves to compare classes of about
    equal counts with each other, and means nothing beside a distance of whole batches.
    """

    label: int
    samples: int
    references: int
    distance: float
    rank: int
    precision: float | None
    recall: float | None


def class_scores(
    reference: NDArray[np.float32],
    reference_labels: NDArray[np.int64],
    samples: NDArray[np.float32],
    sample_labels: NDArray[np.int64],
    covered: Covered | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[ClassScore]:
    """Scores per class, ascending by label, of features (N, D) and (M, D) whose classes are (N,) and (M,).

    The classes are those of `scored_classes`; `progress` is told each one done. Precision and recall are the shares, within
    the class, of `covered`: balls of the whole sets, whatever their class.
    """
    of_reference, of_samples = _places(reference_labels), _places(sample_labels)
    labels = scored_classes(reference_labels, sample_labels)
    distances = []
    for label in labels:
        distances.append(_distance(reference[of_reference[label]], samples[of_samples[label]]))
        if progress:
            progress(1)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[np.argsort(distances, kind="stable")] = np.arange(1, len(labels) + 1)
    return [
        ClassScore(
            label=label,
            samples=len(of_samples[label]),
            references=len(of_reference[label]),
            distance=distance,
            rank=int(rank),
            precision=float(covered.samples[of_samples[label]].mean()) if covered else None,
            recall=float(covered.references[of_reference[label]].mean()) if covered else None,
        )
        for label, distance, rank in zip(labels, distances, ranks, strict=True)
    ]


def scored_classes(reference_labels: NDArray[np.int64], sample_labels: NDArray[np.int64]) -> list[int]:
    """Ascending, the classes with two pictures or more on either side: fewer have no covariance."""
    occurring = [np.unique(labels, return_counts=True) for labels in (reference_labels, sample_labels)]
    of_reference, of_samples = (labels[counts >= 2] for labels, counts in occurring)
    return [int(label) for label in np.intersect1d(of_reference, of_samples)]


def _distance(reference: NDArray[np.float32], samples: NDArray[np.float32]) -> float:
    """The Fréchet distance of (N, D) and (M, D), by the route that takes eigenvalues of the smaller matrix."""
    if min(len(reference), len(samples)) < reference.shape[1]:
        return frechet_of_few(reference, samples)
    return frechet_distance(statistics_of(reference), statistics_of(samples))


def _places(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Class -> the rows that are of it, ascending."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return {int(label): rows for label, rows in zip(classes, np.split(order, starts[1:]), strict=True)}
