"""Features of a batch: computed a block at a time by any number of processes, kept on disk, and found there the next time.

The cache is a folder of plain files, one subfolder per content of a batch and network. Whatever is in it may be deleted at
any time: it is computed again. A finished subfolder takes 8 KB per picture and 66 MB (Inception: 2,048 float32 numbers a
picture, two covariances); while it is filled, 24 KB per picture and 66 MB at the peak, when the pool features stand both in
blocks and in the finished file. A batch or a network that changes gets a subfolder of its own and the old one stays.
Features that stand finished beside a batch are used from there, whoever computed them, also where this evaluation cannot
write there: its own subfolder then holds links to them.

    <content>-<network>/entry.json       the full hashes of both, and of the two files below once they are finished
                        pool.npy         pool features (N, D) float32
                        statistics.npz   mu, sigma of the pool features, mu_s, sigma_s of the spatial ones, float64
                        radii-*.npz      what scores compute from the pool features and need again (`Features.kept`)
                        blocks/          while it is filled: the features of 1,000 pictures each
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.content import content_hash, content_state
from metrics.frechet import MeanAndCovariance, Statistics
from metrics.networks import FeatureNetwork, description, network_key
from metrics.networks.weight_files import cache_folder
from metrics.npz import DAMAGE
from metrics.pictures import PictureBatch, Pictures, spans
from runtime.config import InputError
from runtime.files import atomic_write, check_writable, lock, sha256, write_json

BLOCK = 1_000
"""Pictures per block: what a killed process loses at most, and what it keeps in memory."""
_RECORD, _POOL, _STATISTICS, _BLOCKS = "entry.json", "pool.npy", "statistics.npz", "blocks"
_FINISHED = (_POOL, _STATISTICS)
_SECONDS_BETWEEN_LOOKS = 1.0
# Inception's, the widest of the networks: float32 pool and spatial features of a picture; means and covariances in float64.
_POOL_BYTES, _SPATIAL_BYTES = 2_048 * 4, 2_023 * 4
_STATISTICS_BYTES = sum((width + 1) * width * 8 for width in (2_048, 2_023))
_UNREADABLE = (MemoryError, *DAMAGE)

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """What the metrics need of one batch; None where the batch cannot give it."""

    pool: Rows | None
    """(N, D), a read-only memory map of the cache: rows enter memory where they are used."""
    pool_statistics: Statistics | None
    spatial_statistics: Statistics | None
    entry: Path | None = None
    """Where they stand in the cache."""
    content: str | None = None
    """SHA-256 (`pictures.content_hash`) of the batch that they are of, whatever lies at its path by now."""

    def kept(self, name: str, compute: Callable[[], Rows]) -> Rows:
        """A number per picture that follows from the pool features alone: from the cache, or computed and put there. (N,)"""
        assert self.pool is not None
        path = self.entry / f"{name}.npz" if self.entry else None
        if path is not None and path.is_file():
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    values = arrays["values"]
                if values.shape == (len(self.pool),) and values.dtype == np.float32 and np.isfinite(values).all():
                    return values
            except _UNREADABLE:
                pass  # computed again below
        values = compute()
        if path is not None:
            # An entry of another user takes no further files, nor does a folder's place: computed again the next time.
            with suppress(PermissionError, IsADirectoryError), atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, values=values)
        return values


def _nobody_to_wait_for() -> None:
    pass


@dataclass(frozen=True)
class Share:
    """Which of `count` processes this is, and the barrier at which each waits for all."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = _nobody_to_wait_for


ALONE = Share()


def cache_place(batch: PictureBatch, given: str | None) -> Path:
    """The folder for a batch's features: `given`, else NAME.features beside the batch, else one in the user's cache folder.

    Makes it, unless the batch has no pictures to compute features of. Raises InputError where `given` cannot be written;
    that the neighbourhood of the batch cannot be written is printed by the first process, once.
    """
    beside = _beside(batch)
    if batch.pictures is None:
        return beside
    if given is not None:
        check_writable(given, "--cache")
        return Path(given)
    try:
        check_writable(beside, "--cache")
        return beside
    except InputError:
        place = cache_folder() / "features"
    check_writable(place, "--cache")
    if os.environ.get("RANK", "0") == "0":
        _print_once(f"{beside} cannot be written: features are kept in {place} (--cache names another folder)")
    return place


def _beside(batch: PictureBatch) -> Path:
    path = Path(os.path.abspath(batch.path))  # not resolved: "beside the batch" is beside the name the user gave
    return path.with_name(f"{path.name}.features")


@functools.cache
def _print_once(sentence: str) -> None:
    print(sentence)


def extract(
    batch: PictureBatch, network: FeatureNetwork | None, place: Path, batch_size: int, label: str, share: Share = ALONE
) -> Features:
    """The features of a batch and their statistics, from the cache folder `place` or, a first time, from the network.

    Every process of a launch calls this with its own `share`, and all return the same. The numbers do not depend on the
    number of processes, nor on kills and restarts, to the last bit where batch size and threads per process are equal.
    Finished features beside the batch serve as well as those in `place`, whoever computed them.
    The cache does not ask for the batch size: features of another one differ by the rounding of float32.
    Statistics in the batch's own file take precedence. `label` names the batch on the screen.
    Raises InputError for features that are not finite, a damaged batch, one that changes meanwhile, and a disk too full.
    """
    if batch.pictures is None or network is None:
        return Features(None, batch.pool, batch.spatial, content=content_hash(batch))
    if batch.pictures.count < 2:
        raise InputError(f"{batch.path} holds one picture, and statistics of features need two; use more pictures.")
    with ExitStack() as held:
        if share.index > 0:
            share.wait()  # the first process reads the batch for its hash; the others find what it noted
        state = content_state(batch)
        content, key = content_hash(batch, place), network_key(network)
        entry = place / f"{content[:16]}-{key[:16]}"
        record = {"content": content, "network": key, "description": description(network), "files": {}}
        if share.index == 0:
            # A finished entry does not change any more: it needs no lock, which a folder of another user would refuse.
            if not _finished_files(entry, record):
                held.enter_context(_hold(entry, label))
                _prepare(entry, record, label)
                if not _is_finished(entry) and not _link(_beside(batch) / entry.name, entry, record):
                    _check_room(entry, batch.pictures.count)
            share.wait()
        # Until the next barrier nobody changes what this asks for, so that all processes take the same way.
        if _is_finished(entry):
            if share.index == 0:
                print(f"{label}: features found in {(entry / _POOL).resolve().parent}")
            return _read(entry, batch, content)
        _compute(batch, batch.pictures, network, entry, batch_size, label, share)
        share.wait()
        if share.index == 0:
            if content_state(batch) != state:
                with suppress(FileNotFoundError):  # no block was written, or all of them are gone
                    shutil.rmtree(entry / _BLOCKS)
                raise InputError(f"{batch.path} changed while its features were computed; start again when it is complete.")
            _assemble(entry, record, batch.pictures.count, label)
        share.wait()
        return _read(entry, batch, content)


def _hold(entry: Path, label: str) -> IO[str]:
    """The entry's lock. Where another evaluation fills the same entry, waits until that has ended, well or not.

    Raises InputError where the entry cannot be written, as one that another user began.
    """
    check_writable(entry, "--cache")
    told = False
    while True:
        try:
            return lock(entry, "busy")
        except InputError:
            if not told:
                print(f"{label}: waiting for another evaluation, which computes the same features in {entry}", flush=True)
            told = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _prepare(entry: Path, record: dict[str, Any], label: str) -> None:
    """Makes the entry one that may be read or continued: empties it where it is damaged or another's."""
    if not any(not child.name.startswith(".") for child in entry.iterdir()):
        write_json(entry / _RECORD, record)
        return
    problem = _problem(entry, record)
    if problem:
        print(f"{label}: the features in {entry} cannot be used ({problem}) and are computed again")
        _empty(entry)
        write_json(entry / _RECORD, record)


def _problem(entry: Path, record: dict[str, Any]) -> str | None:
    found = _record_in(entry)
    if found is None:
        return f"{_RECORD} is missing or damaged"
    if (found.get("content"), found.get("network")) != (record["content"], record["network"]):
        return "they are of another batch or network"
    for name in _FINISHED if found["files"] else ():
        try:
            whole = sha256(entry / name) == found["files"].get(name)
        except OSError:
            whole = False
        if not whole:
            return f"{name} is missing or damaged"
    return None


def _record_in(entry: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _is_finished(entry: Path) -> bool:
    record = _record_in(entry)
    return record is not None and bool(record["files"])


def _link(finished: Path, entry: Path, record: dict[str, Any]) -> bool:
    """Makes `entry` finished by links to the files of `finished`, another folder's; False where that has no such features.

    By the links every process sees the same entry, though the other folder may be filled or deleted at any time.
    """
    files = _finished_files(finished, record)
    if not files:
        return False
    try:
        for name in _FINISHED:
            (entry / name).unlink(missing_ok=True)
            (entry / name).symlink_to(finished / name)
    except OSError:  # a file system without links: computed as if nothing had been found
        return False
    write_json(entry / _RECORD, record | {"files": files})
    shutil.rmtree(entry / _BLOCKS, ignore_errors=True)
    return True


def _check_room(entry: Path, count: int) -> None:
    """Raises InputError where the disk has no room for the features of `count` pictures, less the blocks that it holds."""
    missing = sum(stop - first for first, stop in spans(0, count, BLOCK) if not _block_file(entry, (first, stop)).is_file())
    needed = missing * (_POOL_BYTES + _SPATIAL_BYTES) + count * _POOL_BYTES + _STATISTICS_BYTES
    free = shutil.disk_usage(entry).free
    if free < needed:
        raise InputError(f"{entry.parent} has {free / 1e9:.1f} GB free, but the features of {count:,} pictures take up to "
                         f"{needed / 1e9:.1f} GB while they are computed; make room or name a folder on another disk with "
                         "--cache.")  # fmt: skip


def _finished_files(entry: Path, record: dict[str, Any]) -> dict[str, str]:
    """The files of an entry that is finished, whole and of this batch and network, with their SHA-256; else none."""
    found = _record_in(entry)
    return found["files"] if found and _problem(entry, record) is None else {}


def _empty(entry: Path) -> None:
    for child in entry.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != ".lock":
            child.unlink()


def _compute(
    batch: PictureBatch,
    pictures: Pictures,
    network: FeatureNetwork,
    entry: Path,
    batch_size: int,
    label: str,
    share: Share,
) -> None:
    """Computes and writes this process's blocks, as far as they are not there yet."""
    own = spans(0, pictures.count, BLOCK)[share.index :: share.count]
    missing = [block for block in own if not _is_whole(_block_file(entry, block), block)]
    # Batches start anew in each block: which process computes it, and after which others, leaves no trace in its rounding.
    ranges = [span for block in missing for span in spans(*block, batch_size)]
    total, left = (sum(stop - first for first, stop in blocks) for blocks in (own, missing))
    bar = tqdm(total=total, initial=total - left, unit="picture", desc=f"{label}: features", disable=share.index > 0)
    with bar, closing(_read_ahead(pictures.pieces(ranges))) as pieces:
        for block in missing:
            pool: list[Rows] = []
            spatial: list[Rows] = []
            for first, stop in spans(*block, batch_size):
                pool_rows, spatial_rows = network.activations(next(pieces))
                bad = _first_not_finite(pool_rows, spatial_rows)
                if bad is not None:
                    for written in own:
                        _block_file(entry, written).unlink(missing_ok=True)
                    raise InputError(f"{batch.path}: the features of picture {first + bad} are not finite numbers; check the "
                                     f"weights of the network ({network.name}).")  # fmt: skip
                pool.append(pool_rows)
                if spatial_rows is not None:
                    spatial.append(spatial_rows)
                bar.update(stop - first)
            _write_block(_block_file(entry, block), pool, spatial)


def _read_ahead(pieces: Iterator[NDArray[np.uint8]]) -> Generator[NDArray[np.uint8], None, None]:
    """The same pieces, the next one being read while the caller works on one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = thread.submit(next, pieces, None)
            yield piece


def _first_not_finite(pool: Rows, spatial: Rows | None) -> int | None:
    """Index of the first row in which a number is not finite, None where all are."""
    finite = np.isfinite(pool).all(axis=1)  # (N,)
    if spatial is not None:
        finite &= np.isfinite(spatial).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))


def _block_file(entry: Path, block: tuple[int, int]) -> Path:
    return entry / _BLOCKS / f"{block[0]:09d}.npz"


def _write_block(path: Path, pool: list[Rows], spatial: list[Rows]) -> None:
    arrays: dict[str, Any] = {"pool": np.concatenate(pool).astype(np.float32, copy=False)}
    if spatial:
        arrays["spatial"] = np.concatenate(spatial).astype(np.float32, copy=False)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # an archive with checksums, so that a damaged block is noticed


def _read_block(path: Path, block: tuple[int, int]) -> tuple[Rows, Rows | None]:
    """Pool features (n, D) and spatial features (n, S) or None. Raises ValueError where it holds another number of rows."""
    with np.load(path, allow_pickle=False) as arrays:
        pool, spatial = arrays["pool"], arrays.get("spatial")
    if any(len(rows) != block[1] - block[0] for rows in (pool, spatial) if rows is not None):
        raise ValueError(f"{path} does not hold the features of pictures {block[0]} to {block[1]}")
    return pool, spatial


def _is_whole(path: Path, block: tuple[int, int]) -> bool:
    try:
        _read_block(path, block)
    except _UNREADABLE:
        return False
    return True


def _assemble(entry: Path, record: dict[str, Any], count: int, label: str) -> None:
    """Joins the blocks, in order, into the finished files; the record, written last, says that they are finished."""
    blocks = spans(0, count, BLOCK)
    absent = sum(not _block_file(entry, block).is_file() for block in blocks)
    if absent:
        raise InputError(f"{entry} lacks {absent} of {len(blocks)} blocks of features; every process must see the same folder: "
                         "name one on a shared disk with --cache.")  # fmt: skip
    pool, spatial = MeanAndCovariance(), MeanAndCovariance()
    has_spatial = False
    with atomic_write(entry / _POOL) as temporary, open(temporary, "wb") as file:
        for block in tqdm(blocks, desc=f"{label}: statistics", unit="block", leave=False):
            pool_rows, spatial_rows = _read_block(_block_file(entry, block), block)
            if block[0] == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, pool_rows.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(pool_rows, dtype="<f4").data)
            pool.update(pool_rows)
            if spatial_rows is not None:
                has_spatial = True
                spatial.update(spatial_rows)
    arrays = _named(pool.statistics(), "mu", "sigma")
    if has_spatial:
        arrays |= _named(spatial.statistics(), "mu_s", "sigma_s")
    with atomic_write(entry / _STATISTICS) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    write_json(entry / _RECORD, record | {"files": {name: sha256(entry / name) for name in _FINISHED}})
    # Errors ignored: a process that outlived a killed launch may still write blocks here, which nobody reads any more.
    shutil.rmtree(entry / _BLOCKS, ignore_errors=True)
    for leftover in entry.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def _named(statistics: Statistics, mean_name: str, covariance_name: str) -> dict[str, Any]:
    return {mean_name: statistics.mean, covariance_name: statistics.covariance}


def _read(entry: Path, batch: PictureBatch, content: str) -> Features:
    """A finished entry, with what the batch's own file says instead where it says something."""
    rows = np.load(entry / _POOL, mmap_mode="r")
    with np.load(entry / _STATISTICS, allow_pickle=False) as arrays:
        pool = Statistics(arrays["mu"], arrays["sigma"], len(rows))
        spatial = Statistics(arrays["mu_s"], arrays["sigma_s"], len(rows)) if "mu_s" in arrays else None
    return Features(rows, batch.pool or pool, batch.spatial or spatial, entry, content)
