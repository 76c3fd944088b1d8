"""Batches of pictures, read a few at a time: an npz file (read in place, stored or compressed) or a folder of PNGs.

Opening reads headers alone and finds whatever is wrong with them; memory does not grow with the number of pictures.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metrics.frechet import Statistics
from runtime.config import InputError

_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif"}


class Pictures(Protocol):
    """Pictures of one size in a fixed order."""

    count: int
    height: int
    width: int

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """The pictures in order, `size` at a time. -> (size, height, width, 3) uint8, the last one shorter"""
        ...


@dataclass(frozen=True)
class PictureBatch:
    """What one file or folder holds: pictures, ready-made statistics of their features, or both."""

    path: Path
    pictures: Pictures | None
    pool: Statistics | None
    spatial: Statistics | None


def open_batch(path: str | os.PathLike[str]) -> PictureBatch:
    """Opens a folder of PNGs, or an npz with `arr_0` (N, H, W, 3) uint8, or `mu, sigma, mu_s, sigma_s`, or all of these.

    Reads headers and the statistics, no pictures. Raises InputError for anything that cannot be evaluated.
    """
    place = Path(path)
    if place.is_dir():
        return PictureBatch(place, FolderPictures(place), None, None)
    if not place.exists():
        raise InputError(f"{place}: no such file or folder; give an npz with arr_0 or a folder of PNGs.")
    try:
        with zipfile.ZipFile(place) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{place} is not a readable npz file ({_one_line(error)}); write it with numpy.savez.") from None
    pool, spatial = _statistics(place, names, "mu", "sigma"), _statistics(place, names, "mu_s", "sigma_s")
    pictures = NpzPictures(place) if "arr_0" in names else None
    if pictures is None and pool is None and spatial is None:
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise InputError(
            f"{place} holds {found}, but neither pictures (arr_0) nor statistics (mu, sigma); write the pictures as arr_0."
        )
    return PictureBatch(place, pictures, pool, spatial)


class NpzPictures:
    """`arr_0` of an npz file, read piece by piece from within the zip archive. Implements `Pictures`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            try:
                member = archive.getinfo("arr_0.npy")
                with archive.open(member) as file:
                    shape, in_fortran_order, dtype = _read_header(file)
                    header_size = file.tell()
            except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise InputError(f"{path}: arr_0 cannot be read ({_one_line(error)}); write the file again.") from None
        if dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {dtype}; pictures must be uint8 with values 0 to 255.")
        if len(shape) != 4 or shape[3] != 3:
            hint = "move the channels last" if len(shape) == 4 and shape[1] == 3 else "store RGB pictures"
            raise InputError(f"{path}: arr_0 has the shape {shape} instead of (pictures, height, width, 3); {hint}.")
        if in_fortran_order:
            raise InputError(f"{path}: arr_0 is in Fortran order and cannot be read in pieces; apply numpy.ascontiguousarray.")
        self.count, self.height, self.width = shape[:3]
        if self.count == 0 or self.height == 0 or self.width == 0:
            raise InputError(f"{path}: arr_0 holds no pictures, its shape is {shape}.")
        if member.file_size != header_size + self.count * self.height * self.width * 3:
            raise InputError(f"{path}: arr_0 is cut short; write the file again.")

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.batches`. Raises InputError where the file turns out to be damaged."""
        with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            for start in range(0, self.count, size):
                shape = (min(size, self.count - start), self.height, self.width, 3)
                try:
                    content = file.read(int(np.prod(shape)))
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise InputError(
                        f"{self._path} is damaged after picture {start} ({_one_line(error)}); write it again."
                    ) from None
                yield np.frombuffer(content, dtype=np.uint8).reshape(shape)


class FolderPictures:
    """The PNGs of one folder, subfolders apart, in the order of their numbers (2.png before 10.png). Implements `Pictures`."""

    def __init__(self, path: Path) -> None:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        other = [name for name in names if Path(name).suffix.lower() in _OTHER_PICTURES]
        if other:
            raise InputError(f"{path} holds {min(other)}, which is no PNG; convert it without loss or move it elsewhere.")
        self._files = [path / name for name in sorted(names, key=_numeric_order) if name.lower().endswith(".png")]
        if not self._files:
            raise InputError(f"{path} holds no PNG files (subfolders are not searched).")
        with ThreadPoolExecutor() as threads:
            sizes = list(threads.map(_png_size, self._files))
        for file, size in zip(self._files, sizes, strict=True):
            if size != sizes[0]:
                raise InputError(
                    f"{path} mixes sizes: {self._files[0].name} is {sizes[0][0]} x {sizes[0][1]}, {file.name} is "
                    f"{size[0]} x {size[1]} pixels; keep pictures of one size."
                )
        self.count = len(self._files)
        self.width, self.height = sizes[0]

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.batches`. Raises InputError naming the first file that cannot be decoded."""
        with ThreadPoolExecutor() as threads:
            for start in range(0, self.count, size):
                yield np.stack(list(threads.map(_decode, self._files[start : start + size])))


def _statistics(path: Path, names: set[str], mean_name: str, covariance_name: str) -> Statistics | None:
    present = {mean_name, covariance_name} & names
    if not present:
        return None
    if len(present) == 1:
        (missing,) = {mean_name, covariance_name} - names
        raise InputError(f"{path} holds {present.pop()} without {missing}; store both or neither.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean = np.asarray(arrays[mean_name], dtype=np.float64)
            covariance = np.asarray(arrays[covariance_name], dtype=np.float64)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {mean_name} or {covariance_name} cannot be read ({_one_line(error)}).") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: {mean_name} has the shape {mean.shape} and {covariance_name} the shape {covariance.shape}; "
            "(D,) and (D, D) are needed."
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise InputError(f"{path}: {mean_name} or {covariance_name} holds numbers that are not finite.")
    return Statistics(mean, covariance)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype from the start of an npy stream, which is left at the first value."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy format version {version[0]}.{version[1]}")


def _png_size(file: Path) -> tuple[int, int]:
    """(width, height) from a PNG's header. Raises InputError for anything but an RGB PNG."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            if picture.mode != "RGB":
                raise InputError(f"{file} is not an RGB picture (its mode is {picture.mode}); convert it to RGB.")
            return picture.size
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file} is not a readable PNG ({_one_line(error)}).") from None


def _decode(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return np.asarray(picture)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file} cannot be decoded ({_one_line(error)}); write it again.") from None


def _numeric_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key: runs of digits by their value, all else as text; the name itself where 1.png meets 01.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"\d+|\D+", name)], name


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
