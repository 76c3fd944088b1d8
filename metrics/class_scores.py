"""Scores of each class by itself: which classes a model does well, and which badly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metrics.frechet import frechet_of_few
from metrics.precision_recall import Covered


@dataclass(frozen=True)
class ClassScore:
    """One class: its pictures on either side, its Fréchet distance and the distance's rank among classes (1 is the best).

    A distance of some tens of pictures is biased upwards, the more the fewer they are: it serves to compare classes of about
    equal counts with each other, and means nothing beside a distance of whole batches.
    """

    label: int
    samples: int
    references: int
    distance: float
    rank: int
    precision: float
    recall: float


def class_scores(
    reference: NDArray[np.float32],
    reference_labels: NDArray[np.int64],
    samples: NDArray[np.float32],
    sample_labels: NDArray[np.int64],
    covered: Covered,
) -> list[ClassScore]:
    """Scores per class, ascending by label, of features (N, D) and (M, D) whose classes are (N,) and (M,).

    Classes with fewer than two pictures on a side have no covariance and are left out. Precision and recall are the shares,
    within the class, of `covered`: balls of the whole sets, whatever their class.
    """
    place_of = [_places(labels) for labels in (reference_labels, sample_labels)]
    labels = [
        label for label, places in sorted(place_of[0].items()) if len(places) >= 2 and len(place_of[1].get(label, ())) >= 2
    ]
    distances = [frechet_of_few(reference[place_of[0][label]], samples[place_of[1][label]]) for label in labels]
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[np.argsort(distances, kind="stable")] = np.arange(1, len(labels) + 1)
    return [
        ClassScore(
            label=label,
            samples=len(place_of[1][label]),
            references=len(place_of[0][label]),
            distance=distance,
            rank=int(rank),
            precision=float(covered.samples[place_of[1][label]].mean()),
            recall=float(covered.references[place_of[0][label]].mean()),
        )
        for label, distance, rank in zip(labels, distances, ranks, strict=True)
    ]


def _places(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Class -> the rows that are of it, ascending."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return {int(label): rows for label, rows in zip(classes, np.split(order, starts[1:]), strict=True)}
