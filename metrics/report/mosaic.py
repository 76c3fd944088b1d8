"""Pictures as PNGs: many in one file at full size, and small enough to stand in a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL = 96
"""Pictures much smaller than this are enlarged by a whole factor, to about this many pixels."""
GAP = 2


def enlargement(height: int, width: int) -> int:
    """The whole factor by which pictures of this size are shown larger: 8 x 8 twelvefold, 32 x 32 threefold, 80 x 80 not."""
    return max(1, round(SMALL / max(height, width)))


def mosaic(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (rows, columns, H, W, 3) side by side on white, small ones enlarged by a whole factor: pixels stay square.

    Returns (rows * h + (rows - 1) * GAP, columns * w + (columns - 1) * GAP, 3) with h, w the enlarged height and width.
    """
    factor = enlargement(*pictures.shape[2:4])
    cells = pictures.repeat(factor, axis=2).repeat(factor, axis=3)  # (rows, columns, h, w, 3)
    rows, columns, height, width = cells.shape[:4]
    canvas = np.full((rows, height + GAP, columns, width + GAP, 3), 255, np.uint8)
    canvas[:, :height, :, :width] = cells.transpose(0, 2, 1, 3, 4)
    return canvas.reshape(rows * (height + GAP), columns * (width + GAP), 3)[:-GAP, :-GAP]


def in_rows(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (n, H, W, 3), n >= 1, as (rows, columns, H, W, 3), about square and filled up with white."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    filled = np.full((rows * columns, *pictures.shape[1:]), 255, np.uint8)
    filled[: len(pictures)] = pictures
    return filled.reshape(rows, columns, *pictures.shape[1:])


def within_pixels(pictures: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Pictures (n, H, W, 3), scaled down alike where all of them together have more than `most` pixels."""
    count, height, width = pictures.shape[:3]
    scale = (most / max(1, count * height * width)) ** 0.5
    if scale >= 1:
        return pictures
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)) for picture in pictures])


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as the bytes of a PNG."""
    buffer = io.BytesIO()
    # Photographs hardly shrink by level 6, which takes three times as long.
    Image.fromarray(picture).save(buffer, format="png", compress_level=3)
    return buffer.getvalue()


def data_address(picture: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as a data: address, for a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")
