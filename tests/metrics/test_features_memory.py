"""Memory of feature extraction: nothing that grows with the number of pictures stays in it."""

from __future__ import annotations

import gc
import io
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from feature_runs import SmallNetwork, random_pictures, write

from metrics import content as content_module
from metrics import features as features_module
from metrics.features import extract
from metrics.pictures import PictureBatch, open_batch


def write_sparse(path: Path, count: int, side: int) -> PictureBatch:
    """An npz of `count` black pictures, but for four, that takes next to no room on the disk."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)})
    name, total = b"arr_0.npy", side * side * 3 * count
    coloured = {index * (count // 4): random_pictures(1, side, seed=index)[0].tobytes() for index in range(4)}
    checksum = zlib.crc32(header.getvalue())
    for index in range(count):
        checksum = zlib.crc32(coloured.get(index) or bytes(side * side * 3), checksum)
    sizes = struct.pack("<3I", checksum, *[len(header.getvalue()) + total] * 2)
    local = b"PK\3\4" + struct.pack("<5H", 20, 0, 0, 0, 0) + sizes + struct.pack("<2H", len(name), 0) + name
    central = b"PK\1\2" + struct.pack("<6H", 20, 20, 0, 0, 0, 0) + sizes
    central += struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, 0) + name
    data = len(local) + len(header.getvalue())
    with open(path, "wb") as file:
        file.write(local + header.getvalue())
        for index, content in coloured.items():
            file.seek(data + index * side * side * 3)
            file.write(content)
        file.truncate(data + total)
        file.seek(data + total)
        file.write(central + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, len(central), data + total, 0))
    return open_batch(path)


def hoard(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """What `_read_ahead` must not be: everything read before the first piece is used."""
    yield from list(pieces)


class Measured(SmallNetwork):
    """Keeps the largest resident memory while the work runs."""

    def __init__(self, sha256: str) -> None:
        super().__init__(sha256)
        self.resident = 0

    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.resident = max(self.resident, psutil.Process().memory_info().rss)
        return super().activations(pictures)


def test_resident_memory_does_not_grow_with_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 1_000)
    monkeypatch.setattr(content_module, "_SETTLED_SECONDS", -60.0)  # hashed once, then remembered
    batches = {count: write_sparse(tmp_path / f"{count}.npz", count, 64) for count in (2_000, 20_000)}
    assert batches[20_000].path.stat().st_size > 245_000_000

    def growth(count: int, network_hash: str) -> int:
        network = Measured(network_hash)
        gc.collect()
        before = psutil.Process().memory_info().rss
        extract(batches[count], network, tmp_path / "cache", 64, "samples")
        return network.resident - before

    few, many = growth(2_000, "few"), growth(20_000, "many")
    assert many - few < 25_000_000
    monkeypatch.setattr(features_module, "_read_ahead", hoard)
    assert growth(20_000, "hoarded") - few > 100_000_000


def test_allocated_memory_does_not_grow_with_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 500)

    def peak(count: int, cache: str) -> int:
        batch = write(tmp_path / f"{count}.npz", np.resize(random_pictures(500, 16), (count, 16, 16, 3)))
        tracemalloc.start()
        try:
            extract(batch, SmallNetwork(), tmp_path / cache, 64, "samples")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2_000, "few"), peak(20_000, "many")
    # Of 15 MB of pictures and 2 MB of features.
    assert many - few < 300_000
    # The known-bad variant: rows kept until the end instead of written block by block.
    monkeypatch.setattr(features_module, "BLOCK", 20_000)
    assert peak(20_000, "hoarded") - few > 1_000_000
