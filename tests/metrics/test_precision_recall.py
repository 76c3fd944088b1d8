from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import precision_recall as module
from metrics.precision_recall import covered, neighbour_radii, pair_count, precision_recall
from runtime.config import InputError

BLOCK = 40


def block_distances(rows: np.ndarray, columns: np.ndarray, kind: type) -> np.ndarray:
    """One block by the definition, every operation in `kind`."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows, columns = rows.astype(kind), columns.astype(kind)
        norms = [module._sum_in_half(torch.from_numpy(side**2)).numpy() if kind is np.float16 else (side**2).sum(axis=1)
                 for side in (rows, columns)]  # fmt: skip
        products = (rows.astype(np.float32) @ columns.astype(np.float32).T).astype(kind)
        return np.maximum(norms[0][:, None] - kind(2) * products + norms[1][None], kind(0)).astype(np.float32)


def all_distances(rows: np.ndarray, columns: np.ndarray, block: int) -> np.ndarray:
    """Blocks in half precision, in single precision where a block is not finite throughout."""
    result = np.empty((len(rows), len(columns)), np.float32)
    for i in range(0, len(rows), block):
        for j in range(0, len(columns), block):
            distances = block_distances(rows[i : i + block], columns[j : j + block], np.float16)
            if not np.isfinite(distances).all():
                distances = block_distances(rows[i : i + block], columns[j : j + block], np.float32)
            result[i : i + block, j : j + block] = distances
    return result


def by_the_definition(reference: np.ndarray, samples: np.ndarray, block: int, k: int = 3) -> tuple[float, float]:
    reference_radii = np.sort(all_distances(reference, reference, block), axis=1)[:, k]
    sample_radii = np.sort(all_distances(samples, samples, block), axis=1)[:, k]
    between = all_distances(reference, samples, block)
    return (between <= reference_radii[:, None]).any(axis=0).mean(), (between <= sample_radii[None]).any(axis=1).mean()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", BLOCK)
    monkeypatch.setattr(module, "_TILE", 7)


def features(count: int, seed: int, scale: float, dimension: int = 24) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, dimension)) * scale).astype(np.float32)


def agreement(ours: np.ndarray, expected: np.ndarray) -> float:
    """The share of equal numbers. Another BLAS may move a product across a rounding boundary, once in thousands."""
    return float(np.isclose(ours, expected, rtol=1e-6).mean())


def radii_by_the_definition(vectors: np.ndarray, block: int) -> np.ndarray:
    return np.sort(all_distances(vectors, vectors, block), axis=1)[:, 3]


# Squared norms are around 24 scale^2, half precision ends at 65,504: far within it; so near that the distances decide,
# which stay small between positive features and overflow between signed ones; beyond it.
@pytest.mark.parametrize(("scale", "positive"), [(1.0, False), (28.0, True), (28.0, False), (80.0, True)])
def test_equals_the_definition_in_small_blocks(small_blocks: None, scale: float, positive: bool) -> None:
    reference, samples = features(131, 0, scale), features(97, 1, scale * 0.95)
    if positive:
        reference, samples = np.abs(reference), np.abs(samples)
    expected = radii_by_the_definition(reference, BLOCK)
    assert agreement(neighbour_radii(reference), expected) > 0.97
    assert precision_recall(reference, samples) == pytest.approx(by_the_definition(reference, samples, BLOCK), abs=0.03)
    # The known-bad variants: one precision throughout. Which one is wrong depends on the scale.
    everywhere = [np.sort(block_distances(reference, reference, kind), axis=1)[:, 3] for kind in (np.float16, np.float32)]
    half_fits = np.isfinite(block_distances(reference, reference, np.float16)).all()
    assert half_fits == (scale == 1.0 or (scale == 28.0 and positive))
    assert agreement(everywhere[1 if half_fits else 0], expected) < 0.9


def test_fallback_is_per_block(small_blocks: None) -> None:
    """One vector beyond half's range moves its own blocks to float32, and no other."""
    reference = features(131, 0, 3.0)
    reference[17] *= 60
    ours = neighbour_radii(reference)
    assert agreement(ours, radii_by_the_definition(reference, BLOCK)) > 0.97
    # The known-bad variants: everything in float32, and blocks of another size.
    assert agreement(ours, np.sort(block_distances(reference, reference, np.float32), axis=1)[:, 3]) < 0.9
    assert agreement(ours, radii_by_the_definition(reference, 131)) < 0.9


def test_blocks_do_not_change_exact_numbers(small_blocks: None) -> None:
    """Small whole numbers are exact in half precision, so plain float64 distances decide."""
    generator = np.random.default_rng(0)
    reference, samples = (generator.integers(-6, 7, (count, 10)).astype(np.float32) for count in (123, 85))

    def distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return ((rows[:, None].astype(np.float64) - columns[None]) ** 2).sum(axis=2)

    for k in (1, 3, 5):
        reference_radii = np.sort(distances(reference, reference), axis=1)[:, k]
        sample_radii = np.sort(distances(samples, samples), axis=1)[:, k]
        between = distances(reference, samples)
        expected = (between <= reference_radii[:, None]).any(0).mean(), (between <= sample_radii[None]).any(1).mean()
        assert precision_recall(reference, samples, k) == expected
        np.testing.assert_array_equal(neighbour_radii(reference, k), reference_radii)
        # The known-bad variant: the vector itself counted among its neighbours.
        assert (neighbour_radii(reference, k) != np.sort(distances(reference, reference), axis=1)[:, k - 1]).any()


def test_precision_and_recall_are_not_exchanged() -> None:
    narrow, wide = features(300, 0, 0.2), features(300, 1, 1.0)
    assert precision_recall(wide, narrow).precision > 0.9 > 0.3 > precision_recall(wide, narrow).recall
    assert precision_recall(narrow, wide).precision < 0.3 < 0.9 < precision_recall(narrow, wide).recall
    assert precision_recall(wide, wide) == (1.0, 1.0)


def test_progress_counts_every_pair(small_blocks: None) -> None:
    steps: list[int] = []
    precision_recall(features(90, 0, 1.0), features(50, 1, 1.0), progress=steps.append)
    assert sum(steps) == pair_count(90, 50) == 90 * 90 + 50 * 50 + 90 * 50
    assert len(steps) > 10


def test_bad_features() -> None:
    good = features(10, 0, 1.0)
    with pytest.raises(InputError, match="3 pictures are too few to have 3 neighbours each; give at least 4"):
        precision_recall(good, good[:3])
    bad = good.copy()
    bad[4, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        precision_recall(good, bad)


@pytest.mark.parametrize("dimension", [5, 48, 203, 1_608, 2_048])
def test_half_precision_sums_are_tensorflows(dimension: int) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    terms = (np.random.default_rng(dimension).standard_normal((500, dimension)) ** 2).astype(np.float16)
    theirs = tensorflow.reduce_sum(tensorflow.constant(terms), 1).numpy()
    np.testing.assert_array_equal(module._sum_in_half(torch.from_numpy(terms)).numpy(), theirs)
    # The known-bad variant: a sum in float32, rounded once.
    if dimension > 5:
        assert (terms.astype(np.float32).sum(axis=1).astype(np.float16) != theirs).any()


def plain_distances(rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """One block in half precision in the plainest torch: every direction for itself, nothing shared, nothing in place."""
    halves = [torch.from_numpy(side).half() for side in (rows, columns)]
    norms = [module._sum_in_half(half * half) for half in halves]
    products = (halves[0].float() @ halves[1].float().T).half()
    return (norms[0][:, None] - 2 * products + norms[1][None]).clamp(min=0).float()


def test_sharing_products_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 64)
    reference, samples = features(320, 0, 1.0, 200), features(256, 1, 1.05, 200)
    radii = []
    for side in (reference, samples):
        expected = plain_distances(side, side)
        radii.append(expected.sort(dim=1).values[:, 3])
        np.testing.assert_array_equal(neighbour_radii(side), radii[-1].numpy())
        # The known-bad variant: the sums of one direction for both. Half precision rounds them apart.
        one_way = torch.triu(expected) + torch.triu(expected, 1).T
        assert (one_way.sort(dim=1).values[:, 3] != radii[-1]).any()
    between = plain_distances(reference, samples)
    ours = covered(reference, samples)
    np.testing.assert_array_equal(ours.samples, (between <= radii[0][:, None]).any(0).numpy())
    np.testing.assert_array_equal(ours.references, (between <= radii[1][None]).any(1).numpy())
    assert 0 < ours.samples.mean() < 1
    assert 0 < ours.references.mean() < 1
    assert precision_recall(reference, samples) == (ours.samples.mean(), ours.references.mean())


def test_directions_of_two_precisions(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may let a block fit half precision one way and not the other: then each way is computed for itself."""
    reference = features(70, 0, 3.0)
    reference[45] *= 60
    monkeypatch.setattr(module, "_finite_in_half", lambda rows, columns: len(rows.norms) >= len(columns.norms))
    rows, columns = reference[:BLOCK], reference[BLOCK:]
    kinds = {(0, 0): np.float16, (0, 1): np.float16, (1, 0): np.float32, (1, 1): np.float16}
    blocks = [[block_distances((rows, columns)[i], (rows, columns)[j], kinds[i, j]) for j in (0, 1)] for i in (0, 1)]
    with np.errstate(invalid="ignore"):
        expected = np.sort(np.nan_to_num(np.block(blocks), nan=np.inf), axis=1)[:, 3]
    ours = neighbour_radii(reference)
    finite = np.isfinite(expected)
    assert finite.sum() > 60
    assert agreement(ours[finite], expected[finite]) > 0.97


def test_read_only_memory_maps(tmp_path: Path) -> None:
    arrays = features(60, 0, 1.0), features(50, 1, 1.0)
    maps = []
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
        maps.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert precision_recall(*maps) == precision_recall(*arrays)
    with pytest.raises(InputError, match="features of 24 and of 25 numbers"):
        covered(arrays[0], features(60, 0, 1.0, 25))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_agrees_with_the_processor() -> None:
    reference, samples = features(3_000, 0, 1.0, 200), features(2_500, 1, 1.05, 200)
    ours, expected = (covered(reference, samples, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert (ours.samples == expected.samples).mean() > 0.999
    assert (ours.references == expected.references).mean() > 0.999


def test_given_radii_are_those_computed() -> None:
    generator = np.random.default_rng(5)
    reference, samples = (generator.standard_normal((count, 16)).astype(np.float32) for count in (60, 50))
    radii = neighbour_radii(reference), neighbour_radii(samples)
    for ours, expected in zip(covered(reference, samples, radii=radii), covered(reference, samples), strict=True):
        np.testing.assert_array_equal(ours, expected)
    # The known-bad variant: radii of other sets must change the answer, or they are not used.
    assert covered(reference, samples, radii=(radii[0] / 4, radii[1])).samples.sum() < covered(reference, samples).samples.sum()
