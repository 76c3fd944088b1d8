"""The kernel distance between two sets of features: KID on Inception's (Bińkowski et al. 2018, "Demystifying MMD GANs")."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.distances import block_of, check_features, full_precision
from runtime.config import InputError

SUBSETS = 100
SUBSET_SIZE = 1_000
_CPU = torch.device("cpu")


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, of which there were `subsets`, `subset_size` vectors of either side in each."""

    mean: float
    deviation: float
    subset_size: int
    subsets: int


@full_precision()
def kernel_distance(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    device: torch.device = _CPU,
) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, as KID is published.

    Per subset (Gretton et al. 2012, "A kernel two-sample test", equation 3), with vectors drawn without replacement:
    the means of k(x, x') and of k(y, y') over pairs of different vectors, less twice the mean of k(x, y). It may be negative.
    Where a side holds fewer than `subset_size` vectors, subsets have the size of the smaller side; where both sides are
    drawn whole there is one subset, of deviation 0. `progress` is told each subset done. Products are float32, sums float64.
    Raises InputError for vectors that are not finite, and below two vectors a subset.
    """
    check_features(reference, samples)
    size = min(subset_size, len(reference), len(samples))
    if size < 2 or subsets < 1:
        raise InputError(f"a kernel distance needs subsets of at least two pictures, not {subsets} subsets of {size}.")
    if size == len(reference) == len(samples):
        subsets = 1
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (block_of(side, _draw(generator, len(side), size), device) for side in (reference, samples))
        values.append(_discrepancy(x, y))
        if progress:
            progress(1)
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size, subsets)


def _draw(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """`size` different numbers below `count`, ascending, so that a memory map is read in one direction."""
    return np.sort(generator.choice(count, size, replace=False))


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of two sets of vectors, (m, D) each."""
    pairs = len(x) * (len(x) - 1)
    within = sum(float(kernel.sum() - kernel.diagonal().sum()) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / pairs - 2.0 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 in float64: the discrepancy is a small difference of means that are not small. -> (m, n)"""
    return ((x @ y.T).double() / x.shape[1] + 1.0) ** 3
