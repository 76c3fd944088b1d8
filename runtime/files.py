"""Writing files so that a kill, a full disk or a second process never leaves half of one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from runtime.config import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_UMASK = os.umask(0)
os.umask(_UMASK)
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""Zip members carry a time; a fixed one keeps equal contents equal files."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it onto `path` when the block ends well, removes it otherwise.

    The temporary name holds the process id, so two processes that write the same target do not meet, and it starts with
    a dot and ends in `.partial`, so no reader takes it for finished work.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # safetensors makes files that their owner alone may read; a colleague must be able to sample from a checkpoint.
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str], flag: str) -> None:
    """Makes `folder` where it is missing and tries a file in it. InputError naming `flag` where that cannot be done."""
    probe = Path(folder) / f".probe.{os.getpid()}.partial"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the run may be tidying up already
    except OSError as error:
        raise InputError(f"{flag}: {folder} cannot be written ({error.strerror}); give another place.") from None


def check_new_file(path: str | os.PathLike[str], flag: str) -> None:
    """InputError naming `flag` where no file can be written at `path`."""
    if Path(path).is_dir():
        raise InputError(f"{flag}: {path} is a folder; name a file.")
    check_writable(Path(path).parent, flag)


def lock(folder: Path, busy: str) -> IO[str]:
    """Holds `folder` for this process until the returned file is closed or the process ends, however it ends.

    Raises InputError `busy` where another process holds it.
    """
    try:
        handle = open(folder / ".lock", "a+")  # noqa: SIM115
    except PermissionError:
        raise InputError(f"{folder} belongs to another user and cannot be written; name another folder.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise InputError(busy) from None
    except OSError:
        pass  # a network file system without locks: nobody is kept out, as without this function
    return handle


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: other readers do not know them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        # A path on disk may hold bytes that are no UTF-8; Python hands them on as lone surrogates.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def stream_npz(
    path: str | os.PathLike[str], shape: tuple[int, ...], pieces: Iterable[bytes], others: Mapping[str, np.ndarray]
) -> None:
    """Writes an npz atomically: `arr_0`, uint8 of `shape`, from the bytes of `pieces` as they come; then the arrays `others`.

    `arr_0` is left out where `shape` begins with 0. Equal content makes equal files. Memory does not grow with `shape`.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        if shape[0]:
            with archive.open(zipfile.ZipInfo("arr_0.npy", _EARLIEST), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(piece)
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EARLIEST), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 64) -> Iterator[Result]:
    """`function` of each item, in order, computed by threads up to `ahead` items ahead: for files that take time to decode."""
    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor() as threads:
        for item in items:
            coming.append(threads.submit(function, item))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
