from __future__ import annotations

import numpy as np
import pytest

from metrics import neighbours as module
from metrics.neighbours import nearest_neighbours
from runtime.config import InputError


def features(count: int, seed: int, dimension: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("blocks", [(7, 13), (500, 4_000)])
def test_equals_sorting_all_distances(k: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", blocks[0])
    monkeypatch.setattr(module, "_COLUMNS", blocks[1])
    queries, reference = features(30, 0), features(100, 1)
    distances = np.sqrt(((queries[:, None].astype(float) - reference[None]) ** 2).sum(axis=2))
    ours = nearest_neighbours(queries, reference, k)
    np.testing.assert_array_equal(ours.indices, np.argsort(distances, axis=1)[:, :k])
    np.testing.assert_allclose(ours.distances, np.sort(distances, axis=1)[:, :k], rtol=1e-5)
    # The known-bad variant: indices counted within their block.
    assert (ours.indices >= 13).any()


def test_a_copy_is_at_distance_zero() -> None:
    """Memorised pictures are what this is for. The blurred distance of a copy is about 1, with features as large as these."""
    reference = features(50, 0, 2_048) + 100
    near = reference[[3, 17]].copy()
    near[1, 0] += 1e-3
    ours = nearest_neighbours(near, reference, 2)
    np.testing.assert_array_equal(ours.indices[:, 0], [3, 17])
    assert ours.distances[0, 0] == 0
    assert ours.distances[1, 0] == pytest.approx(1e-3, rel=1e-2)
    assert (ours.distances[:, 1] > 10).all()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="4 nearest pictures were asked for, of a reference of 3"):
        nearest_neighbours(features(5, 0), features(3, 1), 4)
    with pytest.raises(InputError, match="the sample features hold numbers that are not finite"):
        nearest_neighbours(features(5, 0) * np.nan, features(3, 1), 1)
