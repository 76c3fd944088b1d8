"""Many pictures on disk: PNGs written beside the sampling, and the npz that evaluators read, packed without holding it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from runtime.config import InputError
from runtime.files import atomic_write, read_ahead, stream_npz

THREADS = 4


def picture_path(folder: Path, index: int) -> Path:
    """Where picture `index` of a sample set stands."""
    return folder / f"{index:06d}.png"


class PictureWriter:
    """Writes PNGs in threads, each under a temporary name first, so that a PNG that can be seen is whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._pool = ThreadPoolExecutor(THREADS)
        self._pending: list[Future[None]] = []

    def write(self, index: int, picture: Tensor) -> None:
        """Queues picture (H, W, 3) uint8; an error of an earlier one is raised here."""
        self._pending.append(self._pool.submit(self._save, picture_path(self.folder, index), picture.numpy()))
        while len(self._pending) > 64 * THREADS or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for pending in self._pending:
                pending.result()

    @staticmethod
    def _save(path: Path, picture: np.ndarray) -> None:
        with atomic_write(path) as temporary:
            # Level 1 is several times faster than the default and a tenth larger.
            Image.fromarray(picture).save(temporary, format="png", compress_level=1)


def pack_pictures(
    folder: Path, count: int, size: tuple[int, int], target: Path, labels: NDArray[np.int64] | None = None
) -> None:
    """Packs pictures 0 .. count - 1 of a folder into `target`: an npz with `arr_0`, (count, H, W, 3) uint8.

    `labels` (count,) become `arr_1`, as in ADM's batches; the evaluator's table of classes needs them. Reads and writes one
    picture at a time; what stands in memory does not depend on the pictures. InputError names a picture that is missing or
    damaged.
    """
    decoded = read_ahead(lambda index: _read_picture(picture_path(folder, index), size), range(count), 8 * THREADS)
    pictures = tqdm(decoded, "pack", count, unit=" pictures", dynamic_ncols=True)
    stream_npz(target, (count, *size, 3), pictures, {} if labels is None else {"arr_1": labels})


def _read_picture(path: Path, size: tuple[int, int]) -> bytes:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the same sampling command again to make it.") from None
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise InputError(f"{path} is damaged; delete it and run the same sampling command again.") from None
    if pixels.shape != (*size, 3):
        raise InputError(
            f"{path} is {pixels.shape[0]} x {pixels.shape[1]}, not {size[0]} x {size[1]}; delete it and run again."
        )
    return pixels.tobytes()
