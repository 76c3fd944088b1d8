"""Checkpoints: one safetensors file that holds everything, and the weights of anybody's files, without executing pickles.

A training checkpoint's tensors are named `model/...`, `ema/...`, `optimizer/<parameter>/<moment>`, and `alignment/...` where
the training had a projector beside the network; step, scaler, counters and the whole configuration stand as JSON in the file's
metadata. It is written under a temporary name and renamed, so a checkpoint that can be seen is complete. An exported file holds
the weights alone, with the same JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import InputError
from runtime.files import atomic_write

FORMAT = "sparsedit/1"
FOLDER = "checkpoints"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Weights:
    """A flat dictionary of weights, in words where it came from, and our JSON when the file is ours."""

    state: Mapping[str, Tensor]
    origin: str
    header: Mapping[str, Any] | None = None


def save_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and JSON header as one safetensors file, atomically."""
    metadata = {"format": FORMAT, "header": json.dumps(header)}
    with atomic_write(path) as temporary:
        _save_safetensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata, path)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Writes weights alone for others to read, atomically: `.safetensors`, or a pickle of tensors under any other name."""
    with atomic_write(path) as temporary:
        if str(path).endswith(".safetensors"):
            _save_safetensors(dict(state), temporary, None, path)
        else:
            with open(temporary, "wb", buffering=0) as file:
                buffer = io.BytesIO()
                torch.save(dict(state), buffer)
                view = memoryview(buffer.getbuffer())
                while view:  # torch's own writer turns a full disk into an error that does not say so
                    view = view[file.write(view) :]


def _save_safetensors(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str] | None, path: str | os.PathLike[str]
) -> None:
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        # safetensors wraps the system's error; the number in its text is what tells a full disk from a bug.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The JSON header of a file of ours; None when the file is somebody else's. InputError when it is truncated."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        return None
    try:
        header = json.loads(metadata["header"])
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict) or not _is_sound(header):
        raise InputError(f"{path}: the checkpoint's header is damaged; copy the file again.")
    return header


def _is_sound(header: Mapping[str, Any]) -> bool:
    """Whether the entries that everybody reads are of the kind that we write."""
    groups = (header[name] for name in ("network", "data", "settings") if name in header)
    step = header.get("step", 0)
    return type(step) is int and step >= 0 and all(isinstance(group, dict) for group in groups)


def read_tensors(path: str | os.PathLike[str], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it, on the CPU."""
    with _opened(path) as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    found = [path for path in Path(run, FOLDER).glob("*.safetensors") if re.fullmatch("[0-9]+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def checkpoint_path(run: str | os.PathLike[str], step: int) -> Path:
    """Where a run's checkpoint of `step` stands."""
    return Path(run, FOLDER, f"{step:07d}.safetensors")


def keep_last(run: str | os.PathLike[str], count: int) -> None:
    """Removes all but the last `count` checkpoints of a run."""
    for path in checkpoints(run)[:-count]:
        path.unlink(missing_ok=True)


def remove_leftovers(run: str | os.PathLike[str]) -> None:
    """Removes what killed processes left half written in a run's folder; for the one process that holds its lock."""
    for pattern in (".*.partial", f"{FOLDER}/.*.partial", f"{FOLDER}/.tmp*", "samples/.*.partial"):  # .tmp*: safetensors' own
        for leftover in Path(run).glob(pattern):
            leftover.unlink(missing_ok=True)


def read_weights(source: str, averaged: bool = True) -> Weights:
    """Weights from a file, a diffusers-layout folder, or a hub id. `averaged`: the EMA where the file has one.

    Knows released DiT and SparseDiT files, fast-DiT training checkpoints (`model`, `ema`, `args`), diffusers folders, and
    our own checkpoints and exports, as safetensors or `.pt`. Pickled code is never executed. InputError names what is wrong.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        if source.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise InputError(f"{source}: no such checkpoint; give a file, a diffusers-layout folder, or a hub id such as "
                             "facebook/DiT-XL-2-256.")  # fmt: skip
        return _read_folder(_download(source))
    return _read_safetensors(path, averaged) if path.suffix == ".safetensors" else _read_pickle(path, averaged)


def _opened(path: str | os.PathLike[str]) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint.") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}); copy or download it again.") from None


def _read_safetensors(path: Path, averaged: bool) -> Weights:
    header = read_header(path)
    with _opened(path) as file:
        names = list(file.keys())
    if not any(name.startswith("model/") for name in names):
        return Weights(read_tensors(path, ""), str(path), header)
    which = "ema/" if averaged else "model/"
    kind = "EMA" if averaged else "raw weights"
    step = f" of step {header['step']}" if header and "step" in header else ""
    return Weights(read_tensors(path, which), f"{path} ({kind}{step})", header)


def _read_pickle(path: Path, averaged: bool) -> Weights:
    try:
        # fast-DiT stores its parsed flags beside the weights: plain data once Namespace is declared harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL ([\w.]+)", str(error))
        if reason:
            raise InputError(f"{path} holds a pickled {reason[1]}, which could run code and is not loaded; save its state "
                             "dictionary alone.") from None  # fmt: skip
        raise InputError(f"{path} is truncated or no checkpoint; copy or download it again.") from None
    except Exception:  # what is no pickle can fail anywhere in the unpickler: IndexError, struct.error, AssertionError, ...
        raise InputError(f"{path} is truncated or no checkpoint; copy or download it again.") from None
    kind = ""
    for name in ("ema", "model", "state_dict") if averaged else ("model", "state_dict", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content, kind = content[name], f" ({'EMA' if name == 'ema' else name})"
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no dictionary of weights; give a released DiT file or a training checkpoint.")
    return Weights(content, f"{path}{kind}")


def _read_folder(folder: Path) -> Weights:
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (transformer / name).exists():
            return _read_safetensors(transformer / name, True) if name.endswith("s") else _read_pickle(transformer / name, True)
    saved = checkpoints(folder)
    if saved:
        return _read_safetensors(saved[-1], True)
    raise InputError(f"{folder} holds no diffusers-layout weights (transformer/diffusion_pytorch_model.safetensors) and is no "
                     "run of ours; give a checkpoint file.")  # fmt: skip


def _download(repository: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=["transformer/*", "*.json"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repository} is no file here and cannot be had from the hub ({reason}); download the weights and "
                         "give their path.") from None  # fmt: skip
