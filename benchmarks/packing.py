"""Memory of packing a sample set into an npz: it must not grow with the number of pictures."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.memory import CPU
from benchmarks.options import CommonSettings, recorded
from benchmarks.result import Work, rows_of
from benchmarks.timing import interleaved
from runtime.config import option
from runtime.pictures import pack_pictures, picture_path

DISTINCT = 64
PACKED = "packed"


@dataclass(frozen=True)
class PackSettings(CommonSettings):
    rounds: int = option(1, "how often they are packed; the process's memory is that of the round that adds most")
    count: int = option(20_000, "pictures")
    image_size: int = option(256, "picture side")


QUICK: Mapping[str, Any] = {"count": 2000}


def measure(settings: PackSettings) -> dict[str, Any]:
    """Peak resident memory that packing `count` pictures adds to the process before it, and pictures per second."""
    count, side = settings.count, settings.image_size
    with tempfile.TemporaryDirectory() as name:
        folder, packed = Path(name, "pictures"), Path(name, "packed.npz")
        make_pictures(folder, count, side)
        # The first round counts: memory that a warm-up took, the process would keep.
        run = {PACKED: lambda: pack_pictures(folder, count, (side, side), packed)}
        timings = interleaved(run, settings.rounds, CPU, warm_up=0)
        size = packed.stat().st_size
    rows = rows_of(timings, {PACKED: Work(images=count, memory_gib=0.0)}, "none")
    return {"settings": recorded(settings), "npz_mb": size / 1e6, "rows": rows}


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
    settings, row = result["settings"], result["rows"][PACKED]
    return (
        f"packing {settings['count']} pictures of {settings['image_size']} x {settings['image_size']} into "
        f"{result['npz_mb']:.0f} MB adds {row['peak_memory_gib'] * 2**30 / 1e6:.0f} MB to the process, "
        f"{row['images_per_second']:.0f} pictures/s"
    )
