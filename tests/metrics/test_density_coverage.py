from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from metrics import density_coverage as module
from metrics.density_coverage import density_coverage, pair_count
from runtime.config import InputError


def distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.sqrt(((rows[:, None].astype(float) - columns[None]) ** 2).sum(axis=2))


def by_the_definition(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    radii = np.sort(distances(reference, reference), axis=1)[:, k]
    density = np.array([sum(distances(reference, s[None])[:, 0] < radii) / k for s in samples])
    coverage = np.array([(distances(r[None], samples) < radius).any() for r, radius in zip(reference, radii, strict=True)])
    return density, coverage


def features(count: int, seed: int, scale: float = 1.0, dimension: int = 12) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, dimension)) * scale).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("tile", [37, 1_000])
def test_equals_the_definition(k: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    reference, samples = features(150, 0), features(90, 1, 0.9)
    expected = by_the_definition(reference, samples, k)
    ours = density_coverage(reference, samples, k)
    np.testing.assert_allclose(ours.density, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(ours.coverage, expected[1])
    assert 0 < ours.coverage.mean() < 1
    # The known-bad variants: the vector itself counted as a neighbour, the two sides exchanged.
    exchanged = by_the_definition(samples, reference, k)
    assert ours.coverage.mean() != pytest.approx(exchanged[1].mean())
    for wrong in (k - 1, k + 1) if k > 1 else (k + 1,):
        density, coverage = by_the_definition(reference, samples, wrong)
        assert ours.density.mean() != pytest.approx(density.mean() * wrong / k, rel=1e-2)
        assert ours.coverage.mean() != pytest.approx(coverage.mean())


def test_a_set_against_itself() -> None:
    """Each of N balls holds its own centre and k - 1 neighbours, the k-th lies on the surface: density 1, coverage 1."""
    ours = density_coverage(*(features(2_300, 0, dimension=8),) * 2)
    assert ours.density.mean() == pytest.approx(1.0, abs=1e-3)
    assert ours.coverage.all()


def test_coverage_of_the_same_distribution_has_a_closed_form() -> None:
    """Naeem et al. 2020, lemma 2: 1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k)), whatever the distribution."""
    count, k = 60, 5
    shares = [density_coverage(features(count, 2 * i), features(count, 2 * i + 1), k).coverage.mean() for i in range(150)]
    expected = 1 - np.prod([(count - i) / (2 * count - i) for i in range(1, k + 1)])
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / np.sqrt(150))
    assert np.std(shares) / np.sqrt(150) < 0.005


def test_density_rewards_samples_at_dense_places_and_coverage_misses_modes() -> None:
    two_modes = np.concatenate((features(300, 0) - 20, features(300, 2) + 20))
    one_mode = density_coverage(two_modes, features(600, 1) + 20)
    assert one_mode.density.mean() == pytest.approx(1.0, rel=0.1)
    assert one_mode.coverage[:300].sum() == 0
    assert one_mode.coverage[300:].mean() > 0.95
    assert density_coverage(two_modes, features(600, 1, 0.3) + 20).density.mean() > 2
    far = density_coverage(two_modes, features(500, 1) + 90)
    assert (far.density.sum(), far.coverage.sum()) == (0, 0)


def test_progress_memory_maps_and_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 16)
    reference, steps = features(50, 0), []
    np.save(tmp_path / "reference.npy", reference)
    mapped = np.load(tmp_path / "reference.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density_coverage(mapped, features(30, 1), progress=steps.append)
    assert sum(steps) == pair_count(50, 30)
    with pytest.raises(InputError, match="5 pictures are too few to have 5 neighbours each"):
        density_coverage(reference[:5], reference)
    bad = reference.copy()
    bad[4, 2] = np.nan
    with pytest.raises(InputError, match="the reference features hold numbers that are not finite"):
        density_coverage(bad, reference)
    assert module.NEIGHBOURS == 5
