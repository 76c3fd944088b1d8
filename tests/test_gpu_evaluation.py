"""Evaluation on a CUDA device against the CPU. `make gpu-test`, or `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metrics.bootstrap import _weighted_statistics
from metrics.density_coverage import density_coverage
from metrics.distances import full_precision
from metrics.frechet import Statistics
from metrics.kernel_distance import KernelDistance, kernel_distance
from metrics.neighbours import nearest_neighbours
from metrics.networks import FeatureNetwork, open_network
from metrics.precision_recall import covered, neighbour_radii

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GOLDEN = Path(__file__).resolve().parent / "golden" / "adm_layout"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPREADS = {"half precision": 0.25, "float32, for half precision overflows": 8.0}
"""Of features of 2,048 numbers: squared norms of about 150, and of about 150,000, where 65,504 is the largest in float16."""


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """As torch sets them itself: no TF32 in matrix products, TF32 in convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(products=False, convolutions=True)
    yield
    allow_tf32(*before)


def allow_tf32(products: bool, convolutions: bool) -> None:
    # Without this, torch 2.9 and later call it a mixture where products were allowed TF32 by its other function before.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def require_tf32() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")


def adm() -> FeatureNetwork:
    return open_network("adm", str(GOLDEN), None, "torch", GPU)


def golden(role: str) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Pictures, and what the published implementation makes of them."""
    with np.load(GOLDEN / "activations_head.npz") as expected, np.load(GOLDEN / f"{role}s.npz") as batch:
        activations = {kind: expected[f"{role}_{kind}"] for kind in ("pool", "spatial")}
        return batch["arr_0"][: len(activations["pool"])], activations


def activation_error(network: FeatureNetwork) -> float:
    """The largest difference from the golden activations, relative to their largest."""
    pictures, expected = golden("sample")
    worst = 0.0
    for kind, ours in zip(("pool", "spatial"), network.activations(pictures), strict=True):
        assert ours is not None
        worst = max(worst, float(np.abs(ours - expected[kind]).max() / np.abs(expected[kind]).max()))
    return worst


def features(count: int, seed: int, spread: float = 0.25) -> NDArray[np.float32]:
    """As Inception's: 2,048 numbers, none negative, in groups that resemble each other."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(8, 2048))
    rows = centres[generator.integers(0, 8, count)] + 0.5 * generator.normal(size=(count, 2048))
    return (spread * np.abs(rows)).astype(np.float32)


def test_activations_are_the_golden_ones() -> None:
    network = adm()
    assert network.backend == "PyTorch float32"
    assert activation_error(network) < 1e-4
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, True)


def test_tf32_comes_where_it_was_asked_for_alone() -> None:
    require_tf32()
    pictures, _ = golden("sample")
    exact = adm()
    before = exact.activations(pictures)
    allow_tf32(products=True, convolutions=False)
    coarse = adm()
    assert (exact.backend, coarse.backend) == ("PyTorch float32", "PyTorch TF32")
    rounded = coarse.activations(pictures)
    # cuDNN's switch says no, and the network was opened as one of TF32.
    assert not np.array_equal(rounded[0], before[0])
    assert activation_error(coarse) < 5e-2
    # And the other way about: both switches say yes, and the network was opened as one of float32.
    allow_tf32(products=True, convolutions=True)
    for one, other in zip(exact.activations(pictures), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_pictures_give_the_same_bytes() -> None:
    pictures, _ = golden("sample")
    first, second = adm().activations(pictures), adm().activations(pictures)
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
def test_radii_are_those_of_the_cpu(spread: float) -> None:
    """Sums of products in another order may round to the neighbouring number; in half precision few do, and by one step."""
    rows = features(1_300, 1, spread)
    here, there = neighbour_radii(rows), neighbour_radii(rows, device=GPU)
    largest_norm = float((rows**2).sum(axis=1).max())
    if spread == SPREADS["half precision"]:
        assert largest_norm < 1_000
        assert (here == there).mean() > 0.9
        step = float(np.spacing(np.float16(4 * largest_norm)))  # of |u|^2 + |v|^2 and 2 u.v, doubled to be safe
        assert np.abs(here - there).max() <= 2 * step
    else:
        assert largest_norm > 65_504
        np.testing.assert_allclose(there, here, rtol=0, atol=1e-6 * 4 * largest_norm)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
def test_what_is_covered_is_what_is_covered_on_the_cpu(spread: float) -> None:
    reference, samples = features(1_300, 1, spread), features(1_100, 2, spread)
    here, there = covered(reference, samples), covered(reference, samples, device=GPU)
    for one, other in zip(here, there, strict=True):
        assert 0.05 < one.mean() < 0.95
        assert (one != other).mean() <= 0.01


def test_nearest_neighbours_are_those_of_the_cpu() -> None:
    reference, samples = features(1_300, 1), features(50, 2)
    here, there = (nearest_neighbours(samples, reference, 3, device) for device in (CPU, GPU))
    assert (here.indices == there.indices).mean() > 0.98
    np.testing.assert_allclose(there.distances, here.distances, rtol=1e-4)
    assert nearest_neighbours(reference[:5], reference, 1, GPU).distances.tolist() == [[0.0]] * 5


def kernel_distance_there() -> KernelDistance:
    return kernel_distance(features(1_300, 1), features(1_100, 2), subsets=5, subset_size=500, device=GPU)


def test_the_kernel_distance_is_that_of_the_cpu() -> None:
    here = kernel_distance(features(1_300, 1), features(1_100, 2), subsets=5, subset_size=500)
    assert kernel_distance_there() == pytest.approx(here, rel=1e-3, abs=1e-7)


def test_tf32_moves_no_metric() -> None:
    """The switch is the feature network's. That a plain product does change with it shows that it works on this GPU."""
    require_tf32()
    reference, samples = features(1_300, 1), features(1_100, 2)
    product = torch.from_numpy(reference).to(GPU)
    results = []
    for allowed in (False, True):
        allow_tf32(products=allowed, convolutions=allowed)
        density, coverage = density_coverage(reference, samples, device=GPU)
        inside = covered(reference, samples, device=GPU)
        results.append(
            (product @ product.T, kernel_distance_there(), density, coverage, neighbour_radii(reference, device=GPU), *inside)
        )
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    (plain, kid, *arrays), (rounded, kid_after, *arrays_after) = results
    assert not torch.equal(plain, rounded)
    assert kid_after == kid
    for one, other in zip(arrays, arrays_after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_density_and_coverage_are_those_of_the_cpu() -> None:
    reference, samples = features(1_300, 1), features(1_100, 2)
    here, there = density_coverage(reference, samples), density_coverage(reference, samples, device=GPU)
    assert 0.05 < here.coverage.mean() <= 1
    assert (here.coverage != there.coverage).mean() <= 0.01
    assert abs(here.density.mean() - there.density.mean()) <= 1e-3 * here.density.mean()


def resampled(device: torch.device) -> Statistics:
    """Of 3,500 vectors, of which 2,200 are drawn: more than one block of them."""
    rows = features(3_500, 1)
    counts = np.bincount(np.random.default_rng(0).integers(0, len(rows), len(rows)), minlength=len(rows)).astype(np.float64)
    with full_precision():
        return _weighted_statistics(rows, counts, device)


def test_resampled_statistics_are_those_of_the_cpu() -> None:
    here, there = resampled(CPU), resampled(GPU)
    assert here.count == there.count == 3_500
    np.testing.assert_allclose(there.mean, here.mean, rtol=1e-6)
    assert np.abs(there.covariance - here.covariance).max() <= 1e-5 * np.abs(here.covariance).max()
    # What is wrong by a mean that was not taken off is wrong by far more.
    assert np.abs(np.outer(here.mean, here.mean)).max() > 1e-3 * np.abs(here.covariance).max()


def test_the_same_features_give_the_same_bytes() -> None:
    reference, samples = features(1_300, 1), features(1_100, 2)
    runs = []
    for _ in range(2):
        density = density_coverage(reference, samples, device=GPU)
        statistics = resampled(GPU)
        radii = neighbour_radii(reference, device=GPU)
        inside = covered(reference, samples, device=GPU)
        nearest = nearest_neighbours(samples[:50], reference, 3, GPU)
        arrays = (*density, radii, *inside, *nearest, statistics.mean, statistics.covariance)
        runs.append([array.tobytes() for array in arrays])
    assert runs[0] == runs[1]
    assert kernel_distance_there() == kernel_distance_there()
