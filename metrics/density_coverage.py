"""Density and coverage (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models")."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.distances import (
    block_of,
    check_features,
    check_neighbours,
    full_precision,
    merge_nearest,
    slices,
    squared_distances,
)

NEIGHBOURS = 5
_TILE = 1_000
_CPU = torch.device("cpu")

Progress = Callable[[int], object]


class DensityCoverage(NamedTuple):
    """Per picture; the scores are the means.

    density (M,) float32: the number of reference balls that a sample lies in, divided by k; its mean is not bounded by 1.
    coverage (N,) bool: whether a reference's ball holds a sample.
    """

    density: NDArray[np.float32]
    coverage: NDArray[np.bool_]


@full_precision()
def density_coverage(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    k: int = NEIGHBOURS,
    progress: Progress | None = None,
    device: torch.device = _CPU,
) -> DensityCoverage:
    """Density and coverage of `samples` (M, D) against `reference` (N, D) (Naeem et al. 2020, equations 2 and 3).

    A reference's ball reaches to its k-th nearest neighbour among the references, itself not counted; its surface does not
    belong to it, as in the authors' program, so a set against itself has density 1. Distances are float32. `progress` is told
    the number of pairs done, `pair_count` in all. Raises InputError below k + 1 references, or for vectors not finite.
    """
    check_features(reference, samples)
    check_neighbours(reference, k)
    radii = _radii(reference, k, progress, device)
    balls = torch.zeros(len(samples), dtype=torch.float32, device=device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows in slices(0, len(reference), _TILE):
        of_rows = block_of(reference, rows, device)
        for columns in slices(0, len(samples), _TILE):
            inside = squared_distances(of_rows, block_of(samples, columns, device)) < radii[rows, None]  # (rows, columns)
            balls[columns] += inside.sum(dim=0)
            covered[rows] |= inside.any(dim=1)
            if progress:
                progress(inside.numel())
    return DensityCoverage((balls / k).cpu().numpy(), covered.cpu().numpy())


def pair_count(reference_count: int, sample_count: int) -> int:
    """The number of pairs that `density_coverage` tells its progress."""
    return reference_count * (reference_count + sample_count)


def _radii(features: NDArray[np.float32], k: int, progress: Progress | None, device: torch.device) -> Tensor:
    """Squared distance of each vector to its k-th nearest neighbour. -> (N,)"""
    nearest = torch.full((len(features), k + 1), float("inf"), device=device)
    for rows in slices(0, len(features), _TILE):
        of_rows = block_of(features, rows, device)
        for columns in slices(rows.start, len(features), _TILE):
            distances = squared_distances(of_rows, block_of(features, columns, device))
            if rows == columns:
                distances.fill_diagonal_(0.0)
            else:
                merge_nearest(nearest, columns, distances.T.contiguous())
            merge_nearest(nearest, rows, distances)
            if progress:
                progress(distances.numel() * (1 if rows == columns else 2))
    return nearest[:, k]
