from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from metrics.report.mosaic import GAP, enlargement, in_rows, mosaic, png, within_pixels

MOST = 1_000_000


def random_pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(("side", "factor"), [(1, 96), (8, 12), (28, 3), (32, 3), (64, 2), (65, 1), (512, 1)])
def test_enlargement(side: int, factor: int) -> None:
    assert enlargement(side, side) == enlargement(side, 1) == factor


def test_mosaic_places_every_picture() -> None:
    pictures = random_pictures(5, 96, 100)
    arranged = in_rows(pictures)
    assert arranged.shape == (2, 3, 96, 100, 3)
    canvas = np.asarray(Image.open(io.BytesIO(png(mosaic(arranged)))))
    assert canvas.shape == (2 * 96 + GAP, 3 * 100 + 2 * GAP, 3)
    for index, picture in enumerate(pictures):
        top, left = index // 3 * (96 + GAP), index % 3 * (100 + GAP)
        np.testing.assert_array_equal(canvas[top : top + 96, left : left + 100], picture)
    assert canvas[98:, 204:].min() == canvas[96:98].min() == 255


def test_within_pixels() -> None:
    few, many = random_pictures(2, 8, 6), np.full((40, 512, 256, 3), 77, np.uint8)
    assert within_pixels(few, MOST) is few
    smaller = within_pixels(many, MOST)
    count, height, width = smaller.shape[:3]
    assert count == 40
    assert 0.98 * MOST < count * height * width <= MOST
    assert height / width == pytest.approx(2, rel=0.01)
    assert smaller.min() == smaller.max() == 77
