"""Batches of pictures, read a few at a time: an npz file (read in place, stored or compressed) or a folder of PNGs.

Opening reads headers alone and finds whatever is wrong with them; memory does not grow with the number of pictures, but for
the names of a folder's files. A stored npz (numpy.savez) and a folder give any picture at once. Compressed data
(numpy.savez_compressed) can only be read from its beginning: every pass decompresses up to the last picture it wants.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from tqdm import tqdm

from metrics.frechet import Statistics
from metrics.npz import DAMAGE, find_member, one_line, read_labels, read_network, read_statistics, stored_at
from runtime.config import InputError
from runtime.files import read_ahead

_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif"}
_PIECE = 1 << 20
_WORTH_A_BAR = 1 << 30
_BROKEN_PNG = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Pictures(Protocol):
    """Pictures of one size in a fixed order."""

    count: int
    height: int
    width: int

    @property
    def names(self) -> Sequence[str]:
        """The files that hold them by now, relative to the batch's path; "" is the path itself."""
        ...

    @property
    def preparation(self) -> str:
        """What is done to the content of the files, such as a crop; "" where they are used as they are."""
        ...

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """The pictures of each range (first, stop), ranges ascending, in one pass. -> (stop - first, height, width, 3) uint8"""
        ...

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Pictures `start` up to `stop` (the end), `size` at a time, the last piece shorter. -> (size, height, width, 3)"""
        ...

    def take(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """The pictures of these indices, in any order and with repeats. (n,) -> (n, height, width, 3)"""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, read wholly."""
        ...


@dataclass(frozen=True)
class PictureBatch:
    """What one file or folder holds: pictures, ready-made statistics of their features, or both."""

    path: Path
    pictures: Pictures | None
    pool: Statistics | None
    spatial: Statistics | None
    labels: NDArray[np.int64] | None = None
    """Class of each picture, `arr_1` of an npz. (N,)"""
    network: Mapping[str, str] | None = None
    """Which network the file's statistics are of, as `metrics.networks.description`; None where the file does not say."""


def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The ranges (first, stop) that cut start..stop into pieces of `size`, the last one shorter."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def open_batch(path: str | os.PathLike[str]) -> PictureBatch:
    """Opens a folder of PNGs, or an npz with `arr_0` (N, H, W, 3) uint8, or `mu, sigma, mu_s, sigma_s`, or all of these.

    Further entries of an npz: `arr_1` (N,), the pictures' classes; `count`, of how many pictures the statistics are;
    `network`, JSON text that says of which network. Reads headers, statistics and classes, no pictures.
    Raises InputError for anything that cannot be evaluated.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return PictureBatch(place, FolderPictures(place), None, None)
        with zipfile.ZipFile(place) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{place}: no such file or folder; give an npz with arr_0 or a folder of PNGs.") from None
    except PermissionError:
        raise InputError(f"{place} cannot be read (permission denied); let its owner make it readable.") from None
    except DAMAGE as error:
        raise InputError(f"{place} is not a readable npz file ({one_line(error)}); write it with numpy.savez.") from None
    pool = read_statistics(place, names, "mu", "sigma")
    spatial = read_statistics(place, names, "mu_s", "sigma_s")
    pictures = NpzPictures(place) if "arr_0" in names else None
    if pictures is None and pool is None and spatial is None:
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise InputError(
            f"{place} holds {found}, but neither pictures (arr_0) nor statistics (mu, sigma); write the pictures as arr_0."
        )
    labels = read_labels(place, pictures.count) if pictures and "arr_1" in names else None
    return PictureBatch(place, pictures, pool, spatial, labels, read_network(place) if "network" in names else None)


class NpzPictures:
    """`arr_0` of an npz file, read piece by piece from within the zip archive. Implements `Pictures`.

    A stored array is read straight from the file, not through a memory map, whose pages would count as this process's
    memory. That passes by the archive's checksum: `content_hash` compares it.
    """

    names = ("",)
    preparation = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._member = member = find_member(path, "arr_0")
        shape = member.shape
        if member.dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {member.dtype}; pictures must be uint8 with values 0 to 255.")
        if len(shape) != 4 or shape[3] != 3:
            hint = "move the channels last" if len(shape) == 4 and shape[1] == 3 else "store RGB pictures"
            raise InputError(f"{path}: arr_0 has the shape {shape} instead of (pictures, height, width, 3); {hint}.")
        if member.in_fortran_order:
            raise InputError(f"{path}: arr_0 is in Fortran order and cannot be read in pieces; apply numpy.ascontiguousarray.")
        self.count, self.height, self.width = shape[:3]
        if self.count == 0 or self.height == 0 or self.width == 0:
            raise InputError(f"{path}: arr_0 holds no pictures, its shape is {shape}.")
        self._picture_bytes = self.height * self.width * 3
        if member.info.file_size != member.header_size + self.count * self._picture_bytes:
            raise InputError(f"{path}: arr_0 is cut short; write the file again.")
        self._stored_at = stored_at(path, member)

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.pieces`. Raises InputError where the file turns out to be damaged."""
        first = 0
        try:
            with self._opened() as (file, start):
                for first, stop in ranges:
                    size = (stop - first) * self._picture_bytes
                    file.seek(start + first * self._picture_bytes)
                    content = file.read(size)
                    if len(content) != size:
                        raise InputError(f"{self._path} is cut short after picture {first}; write it again.")
                    yield np.frombuffer(content, dtype=np.uint8).reshape(-1, self.height, self.width, 3)
        except InputError:
            raise
        except DAMAGE as error:
            raise InputError(f"{self._path} is damaged after picture {first} ({one_line(error)}); write it again.") from None

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.batches`."""
        return self.pieces(spans(start, self.count if stop is None else stop, size))

    def take(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """As `Pictures.take`, in one pass over the file."""
        wanted, places = np.unique(_checked_indices(indices, self.count), return_inverse=True)
        taken = np.empty((len(places), self.height, self.width, 3), np.uint8)
        for place, (picture,) in enumerate(self.pieces([(index, index + 1) for index in wanted.tolist()])):
            taken[places == place] = picture
        return taken

    def digest(self) -> str:
        """SHA-256 of the file. Raises InputError where a stored array does not agree with the archive's checksum of it."""
        total = self._path.stat().st_size
        # Zip's checksum of a compressed member is compared when that is read.
        start = total if self._stored_at is None else self._stored_at
        digest, checksum, position = hashlib.sha256(), 0, 0
        with open(self._path, "rb") as file, _bar(total, self._path) as bar:
            while piece := file.read(_PIECE):
                digest.update(piece)
                inside = slice(max(start - position, 0), max(start + self._member.info.file_size - position, 0))
                checksum = zlib.crc32(memoryview(piece)[inside], checksum)
                position += len(piece)
                bar.update(len(piece))
        if self._stored_at is not None and checksum != self._member.info.CRC:
            raise InputError(f"{self._path} is damaged (arr_0 does not agree with its checksum); write it again.")
        return digest.hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """A file that can seek, and where in it the first picture starts."""
        if self._stored_at is not None:
            with open(self._path, "rb") as file:
                yield file, self._stored_at + self._member.header_size
        else:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._member.info) as member:
                yield member, self._member.header_size


class FolderPictures:
    """The PNGs of one folder, subfolders apart, in the order of their numbers (2.png before 10.png). Implements `Pictures`."""

    preparation = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        names = _files_in(path)
        other = [name for name in names if Path(name).suffix.lower() in _OTHER_PICTURES]
        if other:
            raise InputError(f"{path} holds {min(other)}, which is no PNG; convert it without loss or move it elsewhere.")
        self._names = _pngs_among(names)
        if not self._names:
            raise InputError(f"{path} holds no PNG files, and subfolders are not searched; a folder of class folders becomes a "
                             "reference by `evaluator.py make_reference FOLDER REF.npz --image-size N`.")  # fmt: skip
        with ThreadPoolExecutor() as threads:
            sizes = list(threads.map(lambda name: _png_size(path / name), self._names))
        for name, size in zip(self._names, sizes, strict=True):
            if size != sizes[0]:
                raise InputError(
                    f"{path} mixes sizes: {self._names[0]} is {sizes[0][0]} x {sizes[0][1]}, {name} is "
                    f"{size[0]} x {size[1]} pixels; keep pictures of one size."
                )
        self.count = len(self._names)
        self.width, self.height = sizes[0]

    @property
    def names(self) -> Sequence[str]:
        """The PNGs that the folder holds by now, so that one added after opening is a change; those of opening are read."""
        try:
            return _pngs_among(_files_in(self._path))
        except OSError:  # the folder is gone, and with it each of them
            return self._names

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.pieces`. Raises InputError naming the first file that cannot be decoded."""
        pictures = read_ahead(self._load, (self._path / name for first, stop in ranges for name in self._names[first:stop]))
        for first, stop in ranges:
            yield np.stack(list(islice(pictures, stop - first)))

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """As `Pictures.batches`."""
        return self.pieces(spans(start, self.count if stop is None else stop, size))

    def take(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """As `Pictures.take`."""
        wanted = _checked_indices(indices, self.count)
        taken = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for row, picture in enumerate(read_ahead(self._load, [self._path / self._names[index] for index in wanted])):
            taken[row] = picture
        return taken

    def digest(self) -> str:
        """SHA-256 over name, length and content of each PNG, in order. Raises InputError where PNGs came or went meanwhile."""
        if self.names != self._names:
            raise InputError(f"{self._path} changed while it was read; start again when it is complete.")
        digest = hashlib.sha256()
        with _bar(sum((self._path / name).stat().st_size for name in self._names), self._path) as bar:
            contents = read_ahead(Path.read_bytes, (self._path / name for name in self._names))
            for name, content in zip(self._names, contents, strict=True):
                digest.update(os.fsencode(f"{name}\0{len(content)}\0") + content)
                bar.update(len(content))
        return digest.hexdigest()

    def _load(self, file: Path) -> NDArray[np.uint8]:
        picture = _decode(file)
        if picture.shape != (self.height, self.width, 3):
            raise InputError(f"{file} is no RGB picture of {self.width} x {self.height} pixels any more; the folder changed "
                             "while it was read, start again when it is complete.")  # fmt: skip
        return picture


def _bar(total: int, path: Path) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"{path.name}: hashing the content", disable=total < _WORTH_A_BAR)


def _checked_indices(indices: ArrayLike, count: int) -> NDArray[np.int64]:
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= count):
        raise IndexError(f"pictures {wanted.min()} to {wanted.max()} were asked for, of {count}")
    return wanted


def _files_in(folder: Path) -> list[str]:
    """Names of the files, hidden ones apart; of links too, wherever they lead: one that leads nowhere is no picture less."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.name.startswith(".") and (entry.is_symlink() or entry.is_file())]


def _pngs_among(names: Iterable[str]) -> list[str]:
    return [name for name in sorted(names, key=_numeric_order) if name.lower().endswith(".png")]


def _png_size(file: Path) -> tuple[int, int]:
    """(width, height) from a PNG's header. Raises InputError for anything but an RGB PNG."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            mode, size = picture.mode, picture.size
    except _BROKEN_PNG as error:
        raise InputError(f"{file} is not a readable PNG ({one_line(error)}); write it again or remove it.") from None
    if mode != "RGB":
        raise InputError(f"{file} is not an RGB picture (its mode is {mode}); convert it to RGB.")
    return size


def _decode(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return np.asarray(picture)
    except _BROKEN_PNG as error:
        raise InputError(f"{file} cannot be decoded ({one_line(error)}); write it again.") from None


def _numeric_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key: runs of digits by their value, all else as text; the name itself where 1.png meets 01.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"\d+|\D+", name)], name
