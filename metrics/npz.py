"""The entries of an npz file: how the archive holds them, and those that may stand beside the pictures."""

from __future__ import annotations

import json
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metrics.frechet import Statistics, is_symmetric
from runtime.config import InputError

DAMAGE = (
    OSError, ValueError, KeyError, RuntimeError, SyntaxError, EOFError, tokenize.TokenError, struct.error, zlib.error,
    lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
"""What opening and reading a damaged archive raises; RuntimeError where it is encrypted or packed by an unknown method."""


class Member(NamedTuple):
    """One array of an npz file, as its headers describe it."""

    info: zipfile.ZipInfo
    header_size: int
    """Bytes of the npy header, which the values follow."""
    shape: tuple[int, ...]
    in_fortran_order: bool
    dtype: np.dtype


def find_member(path: Path, name: str) -> Member:
    """The array `name` of an npz, its headers alone. Raises InputError where they cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                shape, in_fortran_order, dtype = _read_header(file)
                if any(size < 0 for size in shape):
                    raise ValueError(f"its shape is {shape}")
                return Member(info, file.tell(), shape, in_fortran_order, dtype)
    except (MemoryError, *DAMAGE) as error:  # MemoryError: Python's parser, of a header of many brackets
        raise InputError(f"{path}: {name} cannot be read ({one_line(error)}); write the file again.") from None


def stored_at(path: Path, member: Member) -> int | None:
    """Where an uncompressed member's bytes (npy header, then values) begin in the file; None for a compressed one."""
    if member.info.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        file.seek(member.info.header_offset)
        # The local header ends with two fields of variable length, which the archive's directory does not repeat
        # (PKWARE's APPNOTE.TXT, 4.3.7).
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
    return member.info.header_offset + 30 + name_length + extra_length


def read_statistics(path: Path, names: set[str], mean_name: str, covariance_name: str) -> Statistics | None:
    """Mean and covariance of features, with the number of pictures they are of (`count`) where the file tells it.

    Headers are looked at before memory is spent. Raises InputError for half of a pair, wrong shapes and numbers that are not
    finite.
    """
    present = {mean_name, covariance_name} & names
    if not present:
        return None
    if len(present) == 1:
        (missing,) = {mean_name, covariance_name} - names
        raise InputError(f"{path} holds {present.pop()} without {missing}; store both or neither.")
    sizes = [_numbers(path, name) for name in (mean_name, covariance_name)]
    if len(sizes[0]) != 1 or sizes[0] == (0,) or sizes[1] != sizes[0] * 2:
        raise InputError(f"{path}: {mean_name} has the shape {sizes[0]} and {covariance_name} the shape {sizes[1]}; (D,) and "
                         "(D, D) are needed; compute them again.")  # fmt: skip
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean = np.asarray(arrays[mean_name], dtype=np.float64)
            covariance = np.asarray(arrays[covariance_name], dtype=np.float64)
    except (MemoryError, *DAMAGE) as error:
        raise InputError(f"{path}: {mean_name} or {covariance_name} cannot be read ({one_line(error)}); "
                         "compute them again.") from None  # fmt: skip
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise InputError(f"{path}: {mean_name} or {covariance_name} holds numbers that are not finite; compute them again.")
    # Refused here, because the distance itself is computed only after the features of all pictures.
    if not is_symmetric(covariance):
        raise InputError(f"{path}: {covariance_name} is not symmetric, which every covariance is; compute it again.")
    return Statistics(mean, covariance, _read_count(path) if "count" in names else None)


def read_labels(path: Path, count: int) -> NDArray[np.int64]:
    """`arr_1`, the class of each of `count` pictures, whole numbers in whatever type. (count,). Raises InputError otherwise."""
    needed = f"the class of each picture, {count} integers"
    values = _read_small(path, "arr_1", count, needed)
    if values.shape != (count,) or values.dtype.kind not in "iuf":
        raise _unfit(path, "arr_1", values, needed)
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.int64)
    if (labels != values).any():
        raise _unfit(path, "arr_1", values, needed)
    return labels


def read_network(path: Path) -> dict[str, str]:
    """`network`, JSON text as `metrics.networks.description` has it. Raises InputError for anything else."""
    needed = "JSON text that describes the network mu and sigma are of"
    value = _read_small(path, "network", 1, needed)
    try:
        network = json.loads(str(value.item()))
    except (ValueError, RecursionError):
        network = None
    if not isinstance(network, dict) or not all(isinstance(text, str) for text in network.values()):
        raise _unfit(path, "network", value, needed)
    return network


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_count(path: Path) -> int:
    needed = "one whole number, of how many pictures mu and sigma are"
    value = _read_small(path, "count", 1, needed)
    if value.dtype.kind not in "iu" or value.size != 1 or value.item() < 1:
        raise _unfit(path, "count", value, needed)
    return int(value.item())


def _numbers(path: Path, name: str) -> tuple[int, ...]:
    """The shape of an array of numbers, from its headers. Raises InputError where the archive does not hold so many."""
    member = find_member(path, name)
    if member.dtype.kind not in "iuf":
        raise _unfit(path, name, member, "numbers")
    # A header may declare an array of terabytes, which would be allocated before the first value is missed.
    if member.info.file_size != member.header_size + math.prod(member.shape) * member.dtype.itemsize:
        raise InputError(f"{path}: {name} is cut short; write the file again.")
    return member.shape


def _read_small(path: Path, name: str, largest: int, needed: str) -> NDArray[Any]:
    """An array of up to `largest` elements: its header is looked at before memory is spent."""
    member = find_member(path, name)
    if math.prod(member.shape) > largest:
        raise _unfit(path, name, member, needed)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except (MemoryError, *DAMAGE) as error:
        raise InputError(f"{path}: {name} cannot be read ({one_line(error)}); mend it or leave it out.") from None


def _unfit(path: Path, name: str, found: NDArray[Any] | Member, needed: str) -> InputError:
    return InputError(f"{path}: {name} ({found.dtype} of the shape {found.shape}) must be {needed}; mend it or leave it out.")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype from the start of an npy stream, which is left at the first value."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy format version {version[0]}.{version[1]}")
