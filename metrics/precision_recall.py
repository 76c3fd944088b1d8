"""Improved precision and recall (Kynkäänniemi et al. 2019, "Improved precision and recall metric", equations 1 and 2).

The published figures come from ADM's evaluator, which computes squared distances in half precision. That is coarse enough
to move both numbers by half a point, so it is part of the definition and is repeated here: features, their squared norms,
the products and every sum between them are rounded to float16, and a block of 10,000 x 10,000 distances that is not
finite throughout is computed in float32 instead, that block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.config import InputError

NEIGHBOURS = 3
# The block is ADM's, because it is the unit that falls back to float32; the tile only bounds memory.
_BLOCK = 10_000
_TILE = 1_000
_HALF_LARGEST = float(torch.finfo(torch.float16).max)

Progress = Callable[[int], object]


class PrecisionRecall(NamedTuple):
    """Precision: the share of samples within a reference picture's ball. Recall: the share of references within a sample's."""

    precision: float
    recall: float


def precision_recall(
    reference: NDArray[np.float32], samples: NDArray[np.float32], k: int = NEIGHBOURS, progress: Progress | None = None
) -> PrecisionRecall:
    """Precision and recall of `samples` (M, D) against `reference` (N, D).

    A picture's ball reaches to its k-th nearest neighbour within its own set. `progress` is told the number of pairs done,
    `pair_count` in all. Raises InputError below k + 1 vectors on a side, or for vectors that are not finite.
    """
    reference_radii = torch.from_numpy(neighbour_radii(reference, k, progress))
    sample_radii = torch.from_numpy(neighbour_radii(samples, k, progress))
    sample_is_covered = torch.zeros(len(samples), dtype=torch.bool)
    reference_is_covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns, distances in _tiles(_vectors(reference), _vectors(samples)):
        sample_is_covered[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
        reference_is_covered[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
        if progress:
            progress(distances.numel())
    return PrecisionRecall(float(sample_is_covered.double().mean()), float(reference_is_covered.double().mean()))


def neighbour_radii(
    features: NDArray[np.float32], k: int = NEIGHBOURS, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Squared distance from each of `features` (N, D) to its k-th nearest neighbour. -> (N,) float32

    The nearest of all is taken to be the vector itself, at distance zero, and is not counted. Raises as `precision_recall`.
    """
    if len(features) <= k:
        raise InputError(f"{len(features)} pictures are too few to have {k} neighbours each; give at least {k + 1}.")
    vectors = _vectors(features)
    nearest = torch.full((len(features), k + 1), float("inf"))
    for rows, _, distances in _tiles(vectors, vectors):
        candidates = torch.cat((nearest[rows], distances), dim=1)  # (tile, k + 1 + block)
        nearest[rows] = torch.topk(candidates, k + 1, dim=1, largest=False).values
        if progress:
            progress(distances.numel())
    return nearest[:, k].numpy()


def pair_count(reference_count: int, sample_count: int) -> int:
    """The number of distances that `precision_recall` computes."""
    return reference_count**2 + sample_count**2 + reference_count * sample_count


@dataclass(frozen=True)
class _Side:
    """One side of a block: vectors (N, D) in float32 and squared norms (N,) in the precision that distances are made in."""

    vectors: Tensor
    norms: Tensor

    def part(self, place: slice) -> _Side:
        return _Side(self.vectors[place], self.norms[place])


def _tiles(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """All squared distances between two sets of vectors, as (rows, columns, float32 distances of these)."""
    for row_block in _slices(0, len(rows), _BLOCK):
        for column_block in _slices(0, len(columns), _BLOCK):
            row_side, column_side = _half(rows[row_block]), _half(columns[column_block])
            if not _finite_in_half(row_side, column_side):
                row_side, column_side = _single(rows[row_block]), _single(columns[column_block])
            for tile in _slices(row_block.start, row_block.stop, _TILE):
                within = slice(tile.start - row_block.start, tile.stop - row_block.start)
                yield tile, column_block, _distances(row_side.part(within), column_side).float()


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def _distances(rows: _Side, columns: _Side) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, at least 0, every operation rounded to the precision of the norms. -> (N, M)"""
    # TensorFlow sums half-precision products in float32 and rounds once, which is also many times faster here.
    products = (rows.vectors @ columns.vectors.T).to(rows.norms.dtype)
    return (rows.norms[:, None] - 2 * products + columns.norms[None, :]).clamp(min=0)


def _finite_in_half(rows: _Side, columns: _Side) -> bool:
    largest_row, largest_column = float(rows.norms.max()), float(columns.norms.max())
    if not np.isfinite(largest_row + largest_column):
        return False
    # No distance and no step on the way to it exceeds (|u| + |v|)^2, but for rounding: mostly nothing need be computed.
    if (largest_row**0.5 + largest_column**0.5) ** 2 < 0.9 * _HALF_LARGEST:
        return True
    return all(bool(torch.isfinite(_distances(rows.part(tile), columns)).all()) for tile in _slices(0, len(rows.norms), _TILE))


def _half(vectors: Tensor) -> _Side:
    rounded = vectors.half()
    return _Side(rounded.float(), _sum_in_half(rounded * rounded))


def _single(vectors: Tensor) -> _Side:
    return _Side(vectors, (vectors * vectors).sum(dim=1))


def _sum_in_half(terms: Tensor) -> Tensor:
    """Row sums (N, D) -> (N,) in float16, added in the order TensorFlow's CPU kernel adds them.

    The order decides the last bit of a norm, and with it whether distances tie. Measured, bit for bit, on TensorFlow 2.21:
    eight lanes, four running sums each, then the lanes together in float32; rows longer than 1,600 in two halves first.
    """
    count, dimension = terms.shape
    if dimension > 1_600:
        middle = 8 * -(-dimension // 16)
        return _sum_in_half(terms[:, :middle]) + _sum_in_half(terms[:, middle:])
    unrolled, lanes = dimension // 32 * 32, dimension // 8 * 8
    running = terms.new_zeros(count, 4, 8)
    for start in range(0, unrolled, 32):
        running += terms[:, start : start + 32].reshape(count, 4, 8)
    lane_sums = running[:, 0] + running[:, 1] + running[:, 2] + running[:, 3]  # (N, 8)
    for start in range(unrolled, lanes, 8):
        lane_sums = lane_sums + terms[:, start : start + 8]
    remainder = terms.new_zeros(count)
    for place in range(lanes, dimension):
        remainder = remainder + terms[:, place]
    return remainder + lane_sums.float().sum(dim=1).half()


def _vectors(features: NDArray[np.float32]) -> Tensor:
    vectors = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    if not all(bool(torch.isfinite(vectors[place]).all()) for place in _slices(0, len(vectors), _BLOCK)):
        raise InputError("the features hold numbers that are not finite; check the network's weights file.")
    return vectors
