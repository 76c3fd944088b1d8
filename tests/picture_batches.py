"""Batches of noise in every form a batch may have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SAVE = {"stored": np.savez, "compressed": np.savez_compressed}


def random_pictures(count: int, height: int = 6, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_folder(folder: Path, pictures: np.ndarray, name: Callable[[int], str] = "{}.png".format) -> Path:
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / name(index))
    return folder


def write_any(form: str, folder: Path, pictures: np.ndarray) -> Path:
    if form == "folder":
        return write_folder(folder / "pictures", pictures)
    # Another entry first: arr_0 does not stand where the file begins.
    SAVE[form](folder / "pictures.npz", arr_1=np.arange(len(pictures)), arr_0=pictures)
    return folder / "pictures.npz"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def not_again(self: object) -> str:
    raise AssertionError("the content was read again")
