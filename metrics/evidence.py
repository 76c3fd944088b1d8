"""What a report shows beside the numbers: some samples, the real pictures nearest to a few of them, and every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.class_scores import ClassScore, class_scores, scored_classes
from metrics.features import Features
from metrics.neighbours import nearest_neighbours
from metrics.pictures import PictureBatch
from metrics.precision_recall import Covered
from metrics.report import Neighbours, Report

GRID, ROWS, NEAREST, REAL = 64, 8, 5, 1_000
"""Samples in the grid, samples whose neighbours are shown, neighbours of each, real pictures the typical distance is of."""


def make_report(
    record: Mapping[str, Any],
    batches: tuple[PictureBatch, PictureBatch],
    features: tuple[Features, Features],
    covered: Covered | None,
    others: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> Report:
    """The report on `record`, of (reference, samples). What a batch without pictures or classes cannot give stays empty."""
    samples = batches[1].pictures
    grid = np.zeros((0, 1, 1, 3), np.uint8) if samples is None else samples.take(evenly_spaced(samples.count, GRID))
    neighbours = _neighbours(batches, features, device)
    of_reference, of_samples = (batch.labels for batch in batches)
    if of_reference is None or of_samples is None or any(side.pool is None for side in features):
        return Report(record, grid, neighbours, [], others)
    labels = of_reference, of_samples
    return Report(record, grid, neighbours, _classes(labels, features, covered), others, labels)


def evenly_spaced(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` different indices below `count`, all of them where there are no more, spread over the whole. -> (n,)"""
    number = min(count, wanted)
    return np.arange(number, dtype=np.int64) * count // max(number, 1)


def _neighbours(
    batches: tuple[PictureBatch, PictureBatch], features: tuple[Features, Features], device: torch.device
) -> Neighbours | None:
    real, drawn = (batch.pictures for batch in batches)
    reference, samples = (side.pool for side in features)
    if real is None or drawn is None or reference is None or samples is None:
        return None
    chosen = evenly_spaced(drawn.count, ROWS)
    found = nearest_neighbours(samples[chosen], reference, min(NEAREST, real.count), device)
    nearest = real.take(found.indices.ravel()).reshape(*found.indices.shape, real.height, real.width, 3)
    some = evenly_spaced(real.count, REAL)
    # The nearest of all is the picture itself.
    typical = float(np.median(nearest_neighbours(reference[some], reference, 2, device).distances[:, 1]))
    return Neighbours(drawn.take(chosen), nearest, found.distances, typical)


def _classes(
    labels: tuple[NDArray[np.int64], NDArray[np.int64]], features: tuple[Features, Features], covered: Covered | None
) -> Sequence[ClassScore]:
    reference, samples = (side.pool for side in features)
    assert reference is not None
    assert samples is not None
    with tqdm(total=len(scored_classes(*labels)), desc="classes", unit="class", dynamic_ncols=True) as bar:
        return class_scores(reference, labels[0], samples, labels[1], covered, bar.update)
