"""What tests of feature extraction share: a network that takes no time and can fail, batches of noise, what is on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from metrics.features import Features
from metrics.pictures import PictureBatch, open_batch


class SmallNetwork:
    """Mean colours of the four quarters as pool features (12), the first row's pixels as spatial ones.

    As float32 products do, its numbers depend a little on the size of the batch a picture is in.
    """

    name, protocol, backend, distance_name, head = "quarters", "none", "NumPy", "FID", None

    def __init__(self, sha256: str = "5" * 64, fails_at: int | None = None, nan_at: int | None = None) -> None:
        self.sha256 = sha256
        self.seen = 0
        self._fails_at, self._nan_at = fails_at, nan_at

    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        count, height, width, _ = pictures.shape
        if self._fails_at is not None and self.seen + count > self._fails_at:
            raise RuntimeError("killed")
        quarters = pictures.reshape(count, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4), dtype=np.float32)
        pool = quarters.reshape(count, 12) + np.float32(count / 1024)
        if self._nan_at is not None and self.seen <= self._nan_at < self.seen + count:
            pool[self._nan_at - self.seen, 5] = np.nan
        self.seen += count
        return pool, pictures[:, 0, :4].reshape(count, -1).astype(np.float32)


def random_pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write(path: Path, pictures: np.ndarray, save: Callable[..., None] = np.savez) -> PictureBatch:
    save(path, arr_0=pictures)
    return open_batch(path)


def direct(pictures: np.ndarray, block: int = 10, batch_size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Pool and spatial features, computed the plain way."""
    cuts = [
        cut for start in range(0, len(pictures), block) for cut in range(start, min(start + block, len(pictures)), batch_size)
    ]
    results = [
        SmallNetwork().activations(pictures[first : min(first + batch_size, first // block * block + block)]) for first in cuts
    ]
    return np.concatenate([pool for pool, _ in results]), np.concatenate([spatial for _, spatial in results])


def numbers(features: Features) -> bytes:
    """Everything a metric is computed from, as bytes."""
    parts = [features.pool]
    for statistics in (features.pool_statistics, features.spatial_statistics):
        parts += [statistics.mean, statistics.covariance]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def files_in(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*") if path.is_file() and not path.name.startswith("content-")}


def blocks_in(place: Path) -> set[str]:
    return {path.name for path in place.glob("*/blocks/*.npz")}


FINISHED = {".lock", "entry.json", "pool.npy", "statistics.npz"}


class Unused(SmallNetwork):
    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        raise AssertionError("the network was reached")
