"""The nearest vectors of one set to those of another: which real pictures a sample resembles most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.distances import block_of, check_features, full_precision, slices, squared_distances
from runtime.config import InputError

_ROWS, _COLUMNS = 500, 4_000
_CPU = torch.device("cpu")


class Nearest(NamedTuple):
    """The rows of the reference nearest to each query, nearest first, and how far they are: (Q, k) both."""

    indices: NDArray[np.int64]
    distances: NDArray[np.float32]


@full_precision()
def nearest_neighbours(
    queries: NDArray[np.float32], reference: NDArray[np.float32], k: int, device: torch.device = _CPU
) -> Nearest:
    """The `k` nearest of `reference` (N, D) to each of `queries` (Q, D), by Euclidean distance.

    Neighbours are found by |u|^2 - 2 u.v + |v|^2, which is fast and blurred near zero; the distances of those found are then
    computed from differences, so that a copy is at distance 0. Raises InputError for k > N, or vectors that are not finite.
    """
    check_features(reference, queries)
    if not 1 <= k <= len(reference):
        raise InputError(f"{k} nearest pictures were asked for, of a reference of {len(reference)}; ask for 1 to that many.")
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k), dtype=np.float32)
    for rows in slices(0, len(queries), _ROWS):
        of_rows = block_of(queries, rows, device)
        nearest = torch.full((len(of_rows), k), float("inf"), device=device)
        places = torch.zeros((len(of_rows), k), dtype=torch.int64, device=device)
        for columns in slices(0, len(reference), _COLUMNS):
            found = squared_distances(of_rows, block_of(reference, columns, device))  # (rows, columns)
            numbers = torch.arange(columns.start, columns.stop, device=device).expand(len(of_rows), -1)
            nearest, chosen = torch.topk(torch.cat((nearest, found), dim=1), k, dim=1, largest=False)
            places = torch.cat((places, numbers), dim=1).gather(1, chosen)
        for rank in range(k):
            there = block_of(reference, places[:, rank].cpu().numpy(), device)
            nearest[:, rank] = (of_rows - there).square().sum(dim=1).sqrt()
        nearest, order = nearest.sort(dim=1, stable=True)
        indices[rows] = places.gather(1, order).cpu().numpy()
        distances[rows] = nearest.cpu().numpy()
    return Nearest(indices, distances)
