"""Writing a feature cache from several processes, so that a kill at any moment loses no finished block.

Pictures are taken in blocks of `batch_size` consecutive ones, the last one padded. A block's bytes depend on its pictures
alone, so any process may compute any block. Until the end everything lies in FOLDER/.progress:
    settings.json       what is being written, and for which pictures; written last, so its presence means "begun"
    listing.json        classes and picture names
    moments.npy (...)   the arrays, at full size from the start; each process writes its blocks at their place
    blocks.*.jsonl      one line per finished block, added after the block's bytes have reached the disk
Arrays are written as files, not through memory maps: a full disk is then an error message instead of a SIGBUS, and two
machines on one NFS do not overwrite each other's half of a page.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.images import Listing
from data.manifest import (
    FORMAT_VERSION,
    LABELS,
    MANIFEST,
    SOURCES,
    FeatureSettings,
    Manifest,
    read_json,
    settings_from_mapping,
)
from runtime.config import InputError, to_mapping
from runtime.files import atomic_write, sha256, write_json

PROGRESS = ".progress"
_LOCK = ".lock"
_SETTINGS, _LISTING = "settings.json", "listing.json"
_NAMED_BROKEN_PICTURES = 10
_BYTES_COPIED_AT_ONCE = 2**26


class Journal:
    """The finished blocks, as all processes note them. `poll` reads what was added since it was last called."""

    def __init__(self, progress: Path) -> None:
        self._progress = progress
        self._offsets: dict[Path, int] = {}
        self.broken: dict[int, dict[int, str]] = {}  # finished block -> its broken pictures (index -> reason)

    def poll(self) -> None:
        for path in sorted(self._progress.glob("blocks.*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                # What follows the last line break is still being written, or was cut off by a kill.
                complete, line_break, _ = file.read().rpartition(b"\n")
            self._offsets[path] = self._offsets.get(path, 0) + len(complete) + len(line_break)
            for line in complete.splitlines():
                try:
                    entry = json.loads(line)
                    broken = {int(index): str(reason) for index, reason in entry["broken"].items()}
                    self.broken[int(entry["block"])] = broken
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # a damaged line: its block is computed again


class Extraction:
    """One cache while it is being written, in one of the processes that write it; `with` releases it."""

    def __init__(self, folder: Path, settings: FeatureSettings, listing: Listing, lock: IO[str]) -> None:
        self.folder, self.settings, self.listing = folder, settings, listing
        self.journal = Journal(folder / PROGRESS)
        self.block_count = -(-len(listing.names) // settings.batch_size)
        self._lock = lock
        self._array_files: dict[str, IO[bytes]] = {}
        self._journal_file: IO[bytes] | None = None

    def __enter__(self) -> Extraction:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (*self._array_files.values(), self._journal_file, self._lock):
            if file is not None:
                file.close()

    def pictures_of(self, block: int) -> range:
        """The indices of the pictures of `block`."""
        start = block * self.settings.batch_size
        return range(start, min(start + self.settings.batch_size, len(self.listing.names)))

    def pending_blocks(self) -> list[int]:
        """The blocks that no process has finished."""
        self.journal.poll()
        return [block for block in range(self.block_count) if block not in self.journal.broken]

    def finished_pictures(self) -> int:
        """How many pictures all processes together have finished."""
        self.journal.poll()
        finished = self.journal.broken
        padding = self.block_count * self.settings.batch_size - len(self.listing.names)
        return len(finished) * self.settings.batch_size - (padding if self.block_count - 1 in finished else 0)

    def open_for_writing(self, rank: int) -> None:
        """Must be called before `write_block`."""
        progress = self.folder / PROGRESS
        self._array_files = {name: open(progress / name, "r+b", buffering=0) for name in self.settings.arrays}  # noqa: SIM115
        self._journal_file = open(progress / f"blocks.rank{rank}.jsonl", "ab", buffering=0)  # noqa: SIM115

    def write_block(self, block: int, rows: np.ndarray, broken: dict[int, str], targets: np.ndarray | None = None) -> None:
        """Stores the rows (n, *row_shape) float16 of `block`, and the targets (n, mirrors, tokens, width) float16 where the
        settings have an alignment; `broken` says why pictures (by index) have none.
        """
        assert self._journal_file is not None
        parts = [rows] if targets is None else [rows, targets]
        for (name, file), part in zip(self._array_files.items(), parts, strict=True):
            assert part.shape[1:] == self.settings.arrays[name]
            file.seek(_header_size(self.shape_of(name)) + self.pictures_of(block).start * part[0].nbytes)
            _write_all(file, part.tobytes())
        _write_all(self._journal_file, (json.dumps({"block": block, "broken": broken}) + "\n").encode())

    def shape_of(self, array: str) -> tuple[int, ...]:
        """Of the array in the file `array`."""
        return (len(self.listing.names), *self.settings.arrays[array])

    def finish(self, skip_broken: bool) -> Manifest:
        """Puts arrays and manifest into place, when every block is finished; one process alone may call it.

        Raises InputError naming the broken pictures, unless `skip_broken` leaves them out.
        """
        self.journal.poll()
        broken = {index: reason for block in self.journal.broken.values() for index, reason in block.items()}
        names = self.listing.names
        skipped = {names[index]: broken[index] for index in sorted(broken)}
        if len(skipped) == len(names) or (skipped and not skip_broken):
            raise InputError(_broken_message(skipped, len(names), self.folder))
        keep = np.ones(len(names), dtype=bool)
        keep[list(broken)] = False

        with atomic_write(self.folder / LABELS) as temporary, open(temporary, "wb") as file:
            np.save(file, self.listing.labels()[keep])
        write_json(self.folder / SOURCES, [name for name, kept in zip(names, keep, strict=True) if kept])
        arrays = self.settings.arrays
        for array in arrays:
            if skipped:
                _copy_rows(self.folder / PROGRESS / array, self.folder / array, keep)
            else:
                os.replace(self.folder / PROGRESS / array, self.folder / array)
        manifest = Manifest(
            **{entry.name: getattr(self.settings, entry.name) for entry in fields(FeatureSettings)},
            format_version=FORMAT_VERSION,
            count=int(keep.sum()),
            classes=self.listing.classes,
            sha256={name: sha256(self.folder / name) for name in (*arrays, LABELS, SOURCES)},
            skipped=skipped,
            written_with=_versions(self.settings),
        )
        manifest.write(self.folder)
        shutil.rmtree(self.folder / PROGRESS)
        return manifest


def begin_extraction(folder: Path, settings: FeatureSettings, listing: Listing) -> Extraction | Manifest:
    """Starts or continues the cache in `folder`, for the one process that prepares it; the manifest if it is complete.

    Raises InputError when the folder holds something else, or the cache of other settings or pictures, or when another run
    is writing it, or when it does not fit on the disk.
    """
    _refuse_foreign(folder)
    lock = _lock(folder, exclusive=True)
    try:
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()
        if (folder / MANIFEST).exists():
            manifest = _check_complete(folder, settings, listing)
            shutil.rmtree(folder / PROGRESS, ignore_errors=True)
            lock.close()
            return manifest
        extraction = Extraction(folder, settings, listing, lock)
        # With no finished block there is nothing to lose: a first try that failed (no network) may be corrected.
        if (folder / PROGRESS / _SETTINGS).exists() and extraction.finished_pictures():
            _check_unfinished(folder, settings, listing)
            _resume(extraction)
            extraction.journal = Journal(folder / PROGRESS)
        else:
            _create(extraction)
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return extraction


def join_extraction(folder: Path, settings: FeatureSettings) -> Extraction:
    """The cache that another process of the same run has begun, for its other processes."""
    listing = read_json(folder / PROGRESS / _LISTING)
    names = Listing(tuple(listing["classes"]), tuple(listing["names"]))
    return Extraction(folder, settings, names, _lock(folder, exclusive=False))


def _create(extraction: Extraction) -> None:
    progress, settings, listing = extraction.folder / PROGRESS, extraction.settings, extraction.listing
    shutil.rmtree(progress, ignore_errors=True)
    progress.mkdir()
    _check_space(extraction, present=0)
    for name in settings.arrays:
        shape = extraction.shape_of(name)
        with open(progress / name, "wb") as file:
            np.lib.format.write_array_header_1_0(file, _header(shape))
            file.truncate(_header_size(shape) + int(np.prod(shape)) * 2)
    write_json(progress / _LISTING, {"classes": listing.classes, "names": listing.names})
    write_json(progress / _SETTINGS, to_mapping(settings))


def _resume(extraction: Extraction) -> None:
    progress, arrays = extraction.folder / PROGRESS, extraction.settings.arrays
    for name in arrays:
        if (progress / name).exists():
            continue
        if not (extraction.folder / name).exists():
            raise InputError(f"{progress / name} is gone; delete {extraction.folder} to start again.")
        # Killed between putting the arrays into place and writing the manifest.
        os.replace(extraction.folder / name, progress / name)
    _check_space(extraction, present=sum((progress / name).stat().st_blocks * 512 for name in arrays))
    journal = Journal(progress)
    journal.poll()
    # One file instead of one per earlier process. Blocks with broken pictures are left out, so that they are read again:
    # the picture may have been repaired.
    whole = sorted(block for block, broken in journal.broken.items() if not broken)
    before = sorted(progress.glob("blocks.*.jsonl"))
    with atomic_write(progress / "blocks.earlier.jsonl") as temporary:
        temporary.write_text("".join(json.dumps({"block": block, "broken": {}}) + "\n" for block in whole))
    for path in before:
        if path.name != "blocks.earlier.jsonl":
            path.unlink()


def _check_complete(folder: Path, settings: FeatureSettings, listing: Listing) -> Manifest:
    manifest = Manifest.read(folder)
    remedy = f"give another --features-path, or delete {folder}"
    _refuse_other_settings(f"{folder} holds finished features", manifest.settings, settings, remedy)
    names = set(json.loads((folder / SOURCES).read_text(encoding="utf-8"))) | set(manifest.skipped)
    if names != set(listing.names) or manifest.classes != listing.classes:
        raise InputError(f"{folder} holds finished features of other pictures{_difference(names, listing.names)}; {remedy}.")
    return manifest


def _check_unfinished(folder: Path, settings: FeatureSettings, listing: Listing) -> None:
    path = folder / PROGRESS / _SETTINGS
    begun = settings_from_mapping(FeatureSettings, read_json(path), str(path))
    what = f"{folder} holds an unfinished extraction"
    remedy = f"give the same flags to continue it, or delete {folder} to start again"
    _refuse_other_settings(what, begun, settings, remedy)
    before = read_json(folder / PROGRESS / _LISTING)
    if tuple(before["names"]) != listing.names or tuple(before["classes"]) != listing.classes:
        difference = _difference(set(before["names"]), listing.names)
        raise InputError(
            f"{what} of other pictures{difference}; restore them to continue it, or delete {folder} to start again."
        )


def _refuse_other_settings(what: str, begun: FeatureSettings, wanted: FeatureSettings, remedy: str) -> None:
    before, now = to_mapping(begun), to_mapping(wanted)
    # The codec comes before what follows from it (latent shape, kind), so the first difference is the cause.
    for name in before:
        if before[name] != now[name]:
            raise InputError(f"{what} with {_other(name, before[name], now[name])}; {remedy}.")


def _other(name: str, before: Any, now: Any) -> str:
    """In words how a setting differs; a group is called by its name, or by its first entry that differs."""
    old, new = (value["name"] if isinstance(value, dict) else value for value in (before, now))
    if isinstance(before, dict) and old == new:
        return next(_other(f"{name} {entry}", before[entry], now[entry]) for entry in before if before[entry] != now[entry])
    return f"{name} {'none' if old is None else old}, not {'none' if new is None else new}"


def _difference(before: set[str], now: Sequence[str]) -> str:
    """Names one picture that is new or gone, where there is one."""
    if gone := before - set(now):
        return f" ({min(gone)} is gone)"
    if new := set(now) - before:
        return f" ({min(new)} is new)"
    return ""


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for --features-path.")
    if not folder.exists() or (folder / MANIFEST).exists() or (folder / PROGRESS).exists():
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name != _LOCK):
        raise InputError(f"{folder} holds something else ({others[0]}); give a new or empty folder for --features-path.")


def _lock(folder: Path, exclusive: bool) -> IO[str]:
    """Marks `folder` as being written, until the process ends however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "a+")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); give another --features-path.") from None
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another run is writing {folder}; wait until it has ended, or give another --features-path."
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be locked ({error.strerror}); give a folder on a disk that knows file locks."
        ) from None
    return lock


def _check_space(extraction: Extraction, present: int) -> None:
    needed = sum(int(np.prod(extraction.shape_of(name))) * 2 for name in extraction.settings.arrays) - present
    free = shutil.disk_usage(extraction.folder).free
    if needed > free:
        raise InputError(
            f"the features need {needed / 1e9:.1f} GB, but the disk of {extraction.folder} has {free / 1e9:.1f} GB free; "
            "free some space or give another --features-path."
        )


def _header(shape: tuple[int, ...]) -> dict[str, object]:
    return {"descr": "<f2", "fortran_order": False, "shape": shape}


def _header_size(shape: tuple[int, ...]) -> int:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, _header(shape))
    return buffer.tell()


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Writes `data`, all of it and onto the disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _copy_rows(source: Path, target: Path, keep: np.ndarray) -> None:
    rows = np.load(source, mmap_mode="r")
    at_once = max(1, _BYTES_COPIED_AT_ONCE // rows[0].nbytes)
    with atomic_write(target) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, _header((int(keep.sum()), *rows.shape[1:])))
        for start in range(0, len(rows), at_once):
            file.write(rows[start : start + at_once][keep[start : start + at_once]].tobytes())


def _broken_message(skipped: dict[str, str], count: int, folder: Path) -> str:
    named = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:_NAMED_BROKEN_PICTURES])
    if len(skipped) > _NAMED_BROKEN_PICTURES:
        write_json(folder / PROGRESS / "broken.json", skipped)
        named += f" and the others in {folder / PROGRESS / 'broken.json'}"
    if len(skipped) == count:
        return f"none of the {count} pictures can be read: {named}."
    return (
        f"{len(skipped)} of {count} pictures cannot be read: {named}; repair them and run the same command again, or add "
        "--skip-broken to leave them out (finished work is kept)."
    )


def _versions(settings: FeatureSettings) -> dict[str, str]:
    packages = ["numpy", "pillow", "torch"] + (["diffusers"] if settings.codec.architecture != "pixels" else [])
    return {package: importlib.metadata.version(package) for package in packages}
