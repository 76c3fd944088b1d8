"""scikit-learn's 1,797 scans of handwritten digits, for the demo and for experiments, and the project's commands on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.config import InputError
from runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SIDE = 8
EXTRACTION = ("--image-size", str(SIDE), "--vae", "pixels", "--mirrors", "original")
"""Digits have no mirror images, and pixels are their latents."""


def load_digits() -> Any:
    """scikit-learn's data set. InputError where scikit-learn is not installed."""
    try:
        # Who measures something else needs no scikit-learn.
        from sklearn import datasets
    except ImportError:
        raise InputError('the digits come with scikit-learn; `pip install -e ".[demo]"` installs it.') from None
    return datasets.load_digits()


def write_digits(folder: Path) -> None:
    """The digits as PNGs, a folder per class; 17 grey levels spread over 0 .. 255."""
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        with atomic_write(folder / str(label) / f"{index:04d}.png") as temporary:
            Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(temporary, format="png")


def grey_vectors(pictures: np.ndarray) -> np.ndarray:
    """(N, 8, 8, 3) uint8 -> (N, 64) float64 in the digits' own range 0 .. 16"""
    return pictures.astype(np.float64).mean(axis=3).reshape(len(pictures), -1) * 16 / 255


def command(script: str, arguments: Sequence[object]) -> list[str]:
    """One of the project's scripts as a user would run it, from `ROOT`."""
    return [sys.executable, script, *map(str, arguments)]
