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

from metrics.distances import block_of, check_features, check_neighbours, full_precision, merge_nearest, slices

NEIGHBOURS = 3
# Under this name radii stay in the cache of features, which knows the pictures and the network but not this code: a change
# of anything here or in metrics.distances that changes a radius must come with a new version, or old radii are taken for new.
RADII_NAME = f"radii-half-{NEIGHBOURS}-v1"
# The block is ADM's, because it is the unit that falls back to float32; the tile only bounds memory.
_BLOCK = 10_000
_TILE = 500
_HALF_LARGEST = float(torch.finfo(torch.float16).max)
_CPU = torch.device("cpu")

Progress = Callable[[int], object]


class Covered(NamedTuple):
    """Which pictures lie within a ball of the other set: (M,) booleans for the samples, (N,) for the references."""

    samples: NDArray[np.bool_]
    references: NDArray[np.bool_]


class PrecisionRecall(NamedTuple):
    """Precision: the share of samples within a reference picture's ball. Recall: the share of references within a sample's."""

    precision: float
    recall: float


def precision_recall(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    k: int = NEIGHBOURS,
    progress: Progress | None = None,
    device: torch.device = _CPU,
) -> PrecisionRecall:
    """Precision and recall of `samples` (M, D) against `reference` (N, D): the means of `covered`, which see."""
    inside = covered(reference, samples, k, progress, device)
    return PrecisionRecall(float(inside.samples.mean()), float(inside.references.mean()))


@full_precision()
def covered(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    k: int = NEIGHBOURS,
    progress: Progress | None = None,
    device: torch.device = _CPU,
    radii: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> Covered:
    """Which of `samples` (M, D) lie within a ball of `reference` (N, D), and which references within a sample's.

    A picture's ball reaches to its k-th nearest neighbour within its own set, and its surface belongs to it. Both arrays may
    be memory maps; blocks of 10,000 vectors are computed on `device`. `progress` is told the number of pairs done,
    `pair_count` in all. `radii`, of the reference and of the samples as `neighbour_radii` gives them, spares most of these.
    Raises InputError below k + 1 vectors on a side, or for vectors that are not finite.
    """
    check_features(reference, samples)
    for features in (reference, samples):
        check_neighbours(features, k)
    if radii is None:
        reference_radii, sample_radii = (_radii(features, k, progress, device) for features in (reference, samples))
    else:
        reference_radii, sample_radii = (torch.from_numpy(each).to(device) for each in radii)
    sample_is_covered = torch.zeros(len(samples), dtype=torch.bool, device=device)
    reference_is_covered = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, columns, distances in _tiles_between(reference, samples, device):
        sample_is_covered[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
        reference_is_covered[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
        if progress:
            progress(distances.numel())
    return Covered(sample_is_covered.cpu().numpy(), reference_is_covered.cpu().numpy())


@full_precision()
def neighbour_radii(
    features: NDArray[np.float32], k: int = NEIGHBOURS, progress: Progress | None = None, device: torch.device = _CPU
) -> NDArray[np.float32]:
    """Squared distance from each of `features` (N, D) to its k-th nearest neighbour. -> (N,) float32

    The nearest of all is taken to be the vector itself, at distance zero, and is not counted. Raises as `covered`.
    """
    check_features(features, features)
    check_neighbours(features, k)
    return _radii(features, k, progress, device).cpu().numpy()


def pair_count(reference_count: int, sample_count: int) -> int:
    """The number of distances that `covered` computes."""
    return reference_count**2 + sample_count**2 + reference_count * sample_count


def _radii(features: NDArray[np.float32], k: int, progress: Progress | None, device: torch.device) -> Tensor:
    nearest = torch.full((len(features), k + 1), float("inf"), device=device)
    for rows, _, distances in _tiles_within(features, device):
        merge_nearest(nearest, rows, distances)
        if progress:
            progress(distances.numel())
    return nearest[:, k]


@dataclass(frozen=True)
class _Side:
    """One side of a block: vectors (N, D) in float32 and squared norms (N,) in the precision that distances are made in."""

    vectors: Tensor
    norms: Tensor

    def part(self, place: slice) -> _Side:
        return _Side(self.vectors[place], self.norms[place])


_Tile = tuple[slice, slice, Tensor]
"""Rows, columns, and the float32 squared distances between them."""


def _tiles_between(rows: NDArray[np.float32], columns: NDArray[np.float32], device: torch.device) -> Iterator[_Tile]:
    """All squared distances between two sets of vectors."""
    for row_block in slices(0, len(rows), _BLOCK):
        for column_block in slices(0, len(columns), _BLOCK):
            sides = _sides(block_of(rows, row_block, device), block_of(columns, column_block, device))
            yield from _tiles_of_block(*sides, row_block.start, column_block.start)


def _tiles_within(features: NDArray[np.float32], device: torch.device) -> Iterator[_Tile]:
    """All squared distances within one set of vectors, in both directions, from half of the products."""
    for first in slices(0, len(features), _BLOCK):
        for second in slices(first.start, len(features), _BLOCK):
            rows, columns = block_of(features, first, device), block_of(features, second, device)
            forward = _sides(rows, columns)
            backward = forward if first == second else _sides(columns, rows)
            if forward[0].norms.dtype == backward[0].norms.dtype:
                yield from _tiles_of_both_directions(*forward, first.start, second.start)
            else:
                yield from _tiles_of_block(*forward, first.start, second.start)
                yield from _tiles_of_block(*backward, second.start, first.start)


def _tiles_of_block(rows: _Side, columns: _Side, row_start: int, column_start: int) -> Iterator[_Tile]:
    for tile in slices(0, len(rows.norms), _TILE):
        for other in slices(0, len(columns.norms), _TILE):
            distances = _distances(rows.part(tile), columns.part(other)).float()
            yield _moved(tile, row_start), _moved(other, column_start), distances


def _tiles_of_both_directions(rows: _Side, columns: _Side, row_start: int, column_start: int) -> Iterator[_Tile]:
    """Distances from rows to columns and from columns to rows; each once where both are one block."""
    for tile in slices(0, len(rows.norms), _TILE):
        for other in slices(tile.start if row_start == column_start else 0, len(columns.norms), _TILE):
            here, there = rows.part(tile), columns.part(other)
            products = _products(here, there)
            places = _moved(tile, row_start), _moved(other, column_start)
            # The sums are made for each direction: (|u|^2 - 2 u.v) + |v|^2 rounds otherwise than (|v|^2 - 2 u.v) + |u|^2.
            yield *places, _sums(here.norms, products, there.norms).float()
            if places[0] != places[1]:
                yield *places[::-1], _sums(there.norms, products.T.contiguous(), here.norms).float()


def _moved(place: slice, offset: int) -> slice:
    return slice(place.start + offset, place.stop + offset)


def _distances(rows: _Side, columns: _Side) -> Tensor:
    """Squared distances, at least 0, every operation rounded to the precision of the norms. -> (N, M)"""
    return _sums(rows.norms, _products(rows, columns), columns.norms)


def _products(rows: _Side, columns: _Side) -> Tensor:
    """2 u.v, rounded to the precision of the norms. -> (N, M)"""
    # TensorFlow sums half-precision products in float32 and rounds once, which is also many times faster here.
    return (rows.vectors @ columns.vectors.T).to(rows.norms.dtype).mul_(2)


def _sums(row_norms: Tensor, products: Tensor, column_norms: Tensor) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2. -> (N, M)"""
    return (row_norms[:, None] - products).add_(column_norms).clamp_(min=0)


def _sides(rows: Tensor, columns: Tensor) -> tuple[_Side, _Side]:
    """The two sides of a block, in half precision where all its distances are finite in it."""
    half = _half(rows), _half(columns)
    return half if _finite_in_half(*half) else (_single(rows), _single(columns))


def _finite_in_half(rows: _Side, columns: _Side) -> bool:
    largest_row, largest_column = float(rows.norms.max()), float(columns.norms.max())
    if not np.isfinite(largest_row + largest_column):
        return False
    # No distance and no step on the way to it exceeds (|u| + |v|)^2, but for rounding: mostly nothing need be computed.
    if (largest_row**0.5 + largest_column**0.5) ** 2 < 0.9 * _HALF_LARGEST:
        return True
    return all(bool(torch.isfinite(_distances(rows.part(tile), columns)).all()) for tile in slices(0, len(rows.norms), _TILE))


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
