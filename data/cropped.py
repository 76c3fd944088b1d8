"""A source of labelled pictures as a batch of one size, cropped while it is read: what a reference is computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from data.images import BrokenPicture, FolderSource, Listing, PictureSource, load_picture, open_source
from runtime.config import InputError
from runtime.files import read_ahead

CROP_VERSION = 1
"""Raised whenever `data.images.center_crop` or `to_rgb` gives other pixels: the digest stands for the pictures as they are
used, and features of the old pixels would be found under it."""
_LARGEST_SIZE = 4096
_BROKEN_NAMED = 3


class CroppedPictures:
    """Every picture of a folder of class folders (or a zip of one), in ADM's crop. Implements `metrics.pictures.Pictures`."""

    def __init__(self, path: Path, size: int) -> None:
        """Lists the pictures; reads none. Raises InputError as `PictureSource.list_pictures`, or for a size out of reach."""
        if not 1 <= size <= _LARGEST_SIZE:
            raise InputError(f"--image-size must be at least 1 and at most {_LARGEST_SIZE:,}, not {size:,}; give the size of "
                             "the samples that the reference is for.")  # fmt: skip
        self._source = open_source(path)
        self._listing = self._source.list_pictures()
        self.count, self.height, self.width = len(self._listing.names), size, size
        self.names: Sequence[str] = self._listing.names if isinstance(self._source, FolderSource) else [""]
        """The files that hold the pictures, relative to the path; "" is the path itself."""
        self.preparation = f"ADM's crop to {size} x {size}, version {CROP_VERSION}"
        """What is done to the content of the files."""

    def labels(self) -> NDArray[np.int64]:
        """The class of each picture: the place of its folder among the class folders. -> (count,)"""
        return self._listing.labels()

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """The pictures of each range (first, stop). Raises InputError naming the first one that cannot be decoded."""
        pictures = read_ahead(self._load, (name for first, stop in ranges for name in self._listing.names[first:stop]))
        for first, stop in ranges:
            yield np.stack(list(islice(pictures, stop - first)))

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Pictures from `start` up to `stop` (the end), `size` at a time, the last piece shorter."""
        end = self.count if stop is None else stop
        return self.pieces([(first, min(first + size, end)) for first in range(start, end, size)])

    def take(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """The pictures of these indices, in any order and with repeats. (n,) -> (n, size, size, 3)"""
        names = [self._listing.names[index] for index in np.asarray(indices, dtype=np.int64)]
        taken = np.empty((len(names), self.height, self.width, 3), np.uint8)
        for row, picture in enumerate(read_ahead(self._load, names)):
            taken[row] = picture
        return taken

    def digest(self) -> str:
        """SHA-256 over the preparation and the name and SHA-256 of each picture's file, in order.

        Every picture is also decoded and cropped: one that turned out to be broken only when it is used could not be mended
        without changing the digest, and with it the place of all that had been computed by then.
        Raises InputError naming some of the broken pictures, and how many there are.
        """
        digest = hashlib.sha256(f"{self.preparation}\0".encode())
        broken = []
        names = tqdm(self._listing.names, f"{self._source.path.name}: checking", unit=" pictures", dynamic_ncols=True)
        for name, (content, problem) in zip(names, read_ahead(self._examine, self._listing.names), strict=True):
            digest.update(f"{name}\0{content}\0".encode())
            if problem:
                broken.append(f"{name} ({problem})")
        if broken:
            some = ", ".join(broken[:_BROKEN_NAMED]) + (", ..." if len(broken) > _BROKEN_NAMED else "")
            raise InputError(f"{self._source.path}: {len(broken):,} of {self.count:,} pictures cannot be used: {some}; mend "
                             "them or move them elsewhere.")  # fmt: skip
        return digest.hexdigest()

    def _examine(self, name: str) -> tuple[str, str | None]:
        """SHA-256 of a picture's file, and what is wrong with it."""
        source = _HashedSource(self._source)
        try:
            load_picture(source, name, self.height)
        except BrokenPicture as error:
            return source.sha256, str(error)
        return source.sha256, None

    def _load(self, name: str) -> NDArray[np.uint8]:
        try:
            return load_picture(self._source, name, self.height)
        except BrokenPicture as error:
            raise InputError(f"{self._source.path}: {name} cannot be used ({error}); mend it or move it elsewhere.") from None


class _HashedSource(PictureSource):
    """A source that keeps the SHA-256 of the last picture read, so that one is hashed and decoded in one reading."""

    def __init__(self, source: PictureSource) -> None:
        self.path = source.path
        self.sha256 = ""
        self._source = source

    def list_pictures(self) -> Listing:
        return self._source.list_pictures()

    def read(self, name: str) -> bytes:
        content = self._source.read(name)
        self.sha256 = hashlib.sha256(content).hexdigest()
        return content
