"""A source of labelled pictures as a batch of one size, cropped while it is read: what a reference is computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.images import BrokenPicture, FolderSource, load_picture, open_source
from runtime.config import InputError


class CroppedPictures:
    """Every picture of a folder of class folders (or a zip of one), in ADM's crop. Implements `metrics.pictures.Pictures`."""

    def __init__(self, path: Path, size: int) -> None:
        """Lists the pictures; reads none. Raises InputError as `PictureSource.list_pictures`, or for a size below 1."""
        if size < 1:
            raise InputError(f"--image-size must be at least 1, not {size}.")
        self._source = open_source(path)
        self._listing = self._source.list_pictures()
        self.count, self.height, self.width = len(self._listing.names), size, size
        self.names: Sequence[str] = self._listing.names if isinstance(self._source, FolderSource) else [""]
        """The files that hold the pictures, relative to the path; "" is the path itself."""

    def labels(self) -> NDArray[np.int64]:
        """The class of each picture: the place of its folder among the class folders. -> (count,)"""
        return self._listing.labels()

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """The pictures of each range (first, stop). Raises InputError naming the first one that cannot be decoded."""
        with ThreadPoolExecutor() as threads:
            for first, stop in ranges:
                yield np.stack(list(threads.map(self._load, self._listing.names[first:stop])))

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Pictures from `start` up to `stop` (the end), `size` at a time, the last piece shorter."""
        end = self.count if stop is None else stop
        return self.pieces([(first, min(first + size, end)) for first in range(start, end, size)])

    def take(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """The pictures of these indices, in any order and with repeats. (n,) -> (n, size, size, 3)"""
        with ThreadPoolExecutor() as threads:
            names = [self._listing.names[index] for index in np.asarray(indices, dtype=np.int64)]
            return np.stack(list(threads.map(self._load, names)))

    def digest(self) -> str:
        """SHA-256 over the size and the name, length and content of each picture's file, in order."""
        digest = hashlib.sha256(f"{self.height}\0".encode())
        for name in self._listing.names:
            content = self._source.read(name)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _load(self, name: str) -> NDArray[np.uint8]:
        try:
            return load_picture(self._source, name, self.height)
        except BrokenPicture as error:
            raise InputError(f"{self._source.path}: {name} cannot be used ({error}); mend it or move it elsewhere.") from None
