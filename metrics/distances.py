"""What every metric that compares single vectors needs: blocks of features on a device, and float32 distances between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks.numerics import float32_products
from runtime.config import InputError

_ROWS_AT_ONCE = 4_096


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """start:stop in pieces of `size`, the last one perhaps shorter."""
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def check_features(reference: NDArray[np.float32], samples: NDArray[np.float32]) -> None:
    """Raises InputError where two sets of vectors, (N, D) and (M, D), differ in D or hold a number that is not finite."""
    if reference.shape[1:] != samples.shape[1:]:
        raise InputError(
            f"features of {reference.shape[1]} and of {samples.shape[1]} numbers cannot be compared; "
            "both sides must come from the same network."
        )
    for role, features in (("reference", reference), ("sample", samples)):
        if not all(np.isfinite(features[place]).all() for place in slices(0, len(features), _ROWS_AT_ONCE)):
            raise InputError(f"the {role} features hold numbers that are not finite; check the network's weights file.")


def check_neighbours(features: NDArray[np.float32], k: int) -> None:
    """Raises InputError where a set is too small for every vector to have `k` neighbours besides itself."""
    if len(features) <= k:
        raise InputError(f"{len(features)} pictures are too few to have {k} neighbours each; give at least {k + 1}.")


def block_of(features: NDArray[np.float32], place: slice | NDArray[np.int64], device: torch.device) -> Tensor:
    """Rows of `features` as a float32 tensor on `device`. A copy, so that a read-only memory map can be the source."""
    return torch.from_numpy(np.array(features[place], dtype=np.float32, order="C")).to(device)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2 in float32, at least 0. (N, D), (M, D) -> (N, M)

    The difference of large numbers: its error is about 1e-7 (|u|^2 + |v|^2), which matters to near duplicates alone.
    """
    norms = (rows * rows).sum(dim=1)[:, None] + (columns * columns).sum(dim=1)  # (N, M)
    # In this order the distance from u to v is, to the last bit, that from v to u, so that ties stay ties.
    return norms.sub_(rows @ columns.T, alpha=2).clamp_(min=0)


def merge_nearest(nearest: Tensor, rows: slice, distances: Tensor) -> None:
    """Keeps in `nearest` (N, k), ascending, the k least of each row and of further distances of the same `rows`, (rows, M)."""
    candidates = torch.cat((nearest[rows], distances), dim=1)  # (rows, k + M)
    nearest[rows] = torch.topk(candidates, nearest.shape[1], dim=1, largest=False).values


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, float32 products are float32 and not TF32, whatever the feature network was allowed."""
    with float32_products(False):
        yield
