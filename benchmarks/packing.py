"""Memory of packing a sample set into an npz: it must not grow with the number of pictures."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.memory import watch_memory
from runtime.pictures import pack_pictures, picture_path

DISTINCT = 64


def measure(count: int, side: int) -> dict[str, Any]:
    """Peak resident memory that packing `count` pictures adds to the process before it, in MB, and pictures per second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "pictures")
        make_pictures(folder, count, side)
        started = time.perf_counter()
        with watch_memory() as added:
            pack_pictures(folder, count, (side, side), Path(name, "packed.npz"))
        seconds = time.perf_counter() - started
        packed = Path(name, "packed.npz").stat().st_size
    return {
        "measured": "pack",
        "count": count,
        "side": side,
        "added_mb": added.megabytes,
        "npz_mb": packed / 1e6,
        "pictures_per_second": count / seconds,
    }


def make_pictures(folder: Path, count: int, side: int) -> None:
    """`count` PNGs of which 64 are distinct; the rest are hard links, so that the disk holds them."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for index in range(count):
        if index < DISTINCT:
            pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture_path(folder, index), compress_level=1)
        elif hasattr(os, "link"):
            os.link(picture_path(folder, index % DISTINCT), picture_path(folder, index))
        else:
            shutil.copy(picture_path(folder, index % DISTINCT), picture_path(folder, index))


def show(result: Mapping[str, Any]) -> str:
    """The result in one line."""
    return (
        f"packing {result['count']} pictures of {result['side']} x {result['side']} into {result['npz_mb']:.0f} MB adds "
        f"{result['added_mb']:.0f} MB to the process, {result['pictures_per_second']:.0f} pictures/s"
    )
