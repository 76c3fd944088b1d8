"""The tensors of a TorchScript archive, read without running the code beside them.

`torch.jit.load` runs what an archive's classes call `__setstate__`, and TorchScript can write files. An archive is a zip of
`data.pkl`, a pickle of the attributes of nested objects; `data/N`, the numbers of its tensors; and `code/`, the classes,
which are looked at for the names of parameters and buffers alone.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
_PLAIN: dict[tuple[str, str], Any] = {
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
    ("collections", "OrderedDict"): dict,
    ("torch", "device"): str,
    ("builtins", "complex"): complex,
}
"""What stands for the globals that a pickle names. None of it can be changed by a pickle, nor do anything."""


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by the mark that torch goes by; weights of torch.save are zips without it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors that `torch.jit.load(path).state_dict()` has, by the same names, on the CPU. Nothing in the file is run.

    Raises pickle.UnpicklingError where the file holds more than data, as objects do that restore themselves by code; whatever
    else a damaged file comes to (ValueError, KeyError, zipfile.BadZipFile ...) is raised as it is.
    """
    with zipfile.ZipFile(path) as archive:
        content = _Content(archive)
        module = _Unpickler(io.BytesIO(content.read("data.pkl"))).load()
        if not isinstance(module, _Object):
            raise pickle.UnpicklingError("the archive holds no module")
        return dict(content.state(module, ""))


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    length: int


class _View(NamedTuple):
    """A tensor that has not been read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Object:
    """An instance of one of the archive's classes: no more than its attributes. Each class becomes a subclass."""

    class_name = ""
    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        # A class with code of its own for this saves what that code wants, mostly a tuple.
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"an object of {self.class_name} restores itself by code")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    """Makes `_Object`s, `_View`s and plain data of a pickle; every other name in it is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("_Object", (_Object,), {"class_name": f"{module}.{name}"})
        # Made anew for every file: a pickle can set the attributes of a function that it is given.
        functions: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, requires_grad, hooks: _View(
                storage, offset, shape, strides
            ),
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
        }
        found = functions.get((module, name), _PLAIN.get((module, name)))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is more than data")
        return found

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, length = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} is no storage of numbers")
        return _Storage(dtype, key, length)


class _Content:
    """The entries of an archive, all of which lie in one folder of any name."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._names = set(archive.namelist())
        self._folder = archive.namelist()[0].partition("/")[0]
        self._storages: dict[_Storage, Tensor] = {}
        # Archives from before this entry are little-endian.
        if f"{self._folder}/byteorder" in self._names and self.read("byteorder").strip() != b"little":
            raise ValueError("it was written on a big-endian machine")

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._folder}/{name}")

    def state(self, module: _Object, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of a module and of the modules in it, by dotted names."""
        kept = self._parameters_and_buffers(module.class_name)
        for name, value in module.attributes.items():
            if isinstance(value, _View) and name in kept:
                yield f"{prefix}{name}", self._tensor(value)
            elif isinstance(value, _Object):
                yield from self.state(value, f"{prefix}{name}.")

    def _parameters_and_buffers(self, class_name: str) -> set[str]:
        """The pickle does not tell them from other tensors; the lists at the head of a module's class do."""
        place, _, name = class_name.rpartition(".")
        source = self.read(f"code/{place.replace('.', '/')}.py").decode()
        lists = rf"^class {re.escape(name)}\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?"
        found = re.search(lists, source, re.MULTILINE)
        return set(re.findall(r'"([^"]*)"', " ".join(filter(None, found.groups())))) if found else set()

    def _tensor(self, view: _View) -> Tensor:
        storage, offset, shape, strides = view
        if storage not in self._storages:
            self._storages[storage] = self._numbers(storage)
        return self._storages[storage].as_strided(shape, strides, offset)  # torch refuses what lies outside

    def _numbers(self, storage: _Storage) -> Tensor:
        content = self.read(f"data/{storage.key}")
        if len(content) != storage.length * storage.dtype.itemsize:
            raise ValueError(f"{len(content)} bytes of {storage.length * storage.dtype.itemsize} are there")
        return torch.frombuffer(bytearray(content), dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
