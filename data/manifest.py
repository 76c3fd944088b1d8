"""What a feature cache is: the files of its folder and the manifest that describes them.

A cache folder holds
    manifest.json   what the arrays are (`Manifest`); written last, so its presence means that the cache is complete
    latents.npy     kind "samples": (count, mirrors, C, h, w) float16, scaled for the model
    moments.npy     kind "moments": (count, mirrors, 2, C, h, w) float16, mean and standard deviation, scaled for the model
    alignment.npy   where asked for: (count, mirrors, tokens, width) float16, what a vision encoder makes of each picture
    labels.npy      (count,) int64
    sources.json    the name of the picture behind each row
The standard deviation is stored, not its logarithm: in float16 the logarithm of a small one would be off by a percent.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.latents import CodecSpec
from runtime.config import InputError, checked_values, from_mapping, to_mapping
from runtime.files import sha256, write_json

MANIFEST = "manifest.json"
LABELS = "labels.npy"
SOURCES = "sources.json"
ALIGNMENT = "alignment.npy"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AlignmentSpec:
    """Features of a frozen vision encoder, one vector for each token of the map: targets of representation alignment."""

    name: str  # of the encoder: dinov2-b ...
    sha256: str  # of its weights
    patch_size: int  # latent places on a side of a token
    grid: tuple[int, int]  # rows and columns of tokens
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of one picture's targets: (tokens, width)"""
        return self.grid[0] * self.grid[1], self.width

    def describe(self) -> str:
        return f"{self.name} features of {self.grid[0]} x {self.grid[1]} tokens"


@dataclass(frozen=True)
class FeatureSettings:
    """All that decides the bytes of a cache, apart from the pictures."""

    codec: CodecSpec
    image_size: int
    latent_shape: tuple[int, ...]  # (C, h, w)
    kind: Literal["moments", "samples"]
    mirrors: Literal["both", "original"]  # "both": the picture and its left-right mirror image, in this order
    seed: int | None  # of the posterior's samples; None where nothing was drawn
    batch_size: int  # convolutions round differently for different batch sizes
    alignment: AlignmentSpec | None = field(default=None, kw_only=True)

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """The arrays that hold an entry for each picture: file name -> shape of an entry."""
        arrays: dict[str, tuple[int, ...]] = {self.array_name: self.row_shape}
        if self.alignment:
            arrays[ALIGNMENT] = (self.row_shape[0], *self.alignment.shape)
        return arrays

    @property
    def array_name(self) -> str:
        return "moments.npy" if self.kind == "moments" else "latents.npy"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one picture's entry in the array."""
        mirrors = 2 if self.mirrors == "both" else 1
        return (mirrors, 2, *self.latent_shape) if self.kind == "moments" else (mirrors, *self.latent_shape)

    def describe(self) -> str:
        """Codec, latent size, kind and mirrors in a few words."""
        size = " x ".join(map(str, self.latent_shape))
        mirrors = "both mirrors" if self.mirrors == "both" else "originals only"
        targets = f", {self.alignment.describe()}" if self.alignment else ""
        return f"codec {self.codec.name}, latents {size}, {self.kind}, {mirrors}{targets}"


@dataclass(frozen=True)
class Manifest(FeatureSettings):
    """What manifest.json says."""

    format_version: int
    count: int
    classes: tuple[str, ...]  # the position is the label
    sha256: dict[str, str]  # file name -> hash
    skipped: dict[str, str] = field(default_factory=dict)  # picture -> why it was left out
    written_with: dict[str, str] = field(default_factory=dict)  # package -> version

    @property
    def settings(self) -> FeatureSettings:
        return FeatureSettings(**{entry.name: getattr(self, entry.name) for entry in fields(FeatureSettings)})

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, to_mapping(self))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises InputError when the manifest is damaged or of another format version."""
        mapping = read_json(folder / MANIFEST)
        version = mapping.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder / MANIFEST} has format version {version!r}; this code reads {FORMAT_VERSION}; extract again."
            )
        manifest = settings_from_mapping(Manifest, mapping, str(folder / MANIFEST))
        if len(manifest.latent_shape) != 3 or min(manifest.latent_shape) < 1:
            raise InputError(
                f"{folder / MANIFEST} is damaged (latent_shape {manifest.latent_shape}); extract the features again."
            )
        return manifest


def settings_from_mapping(cls: Any, mapping: dict[str, Any], where: str) -> Any:
    """FeatureSettings or Manifest from parsed JSON; InputError naming `where` when a value is missing or odd."""
    rest = dict(mapping)
    try:
        codec = from_mapping(CodecSpec, rest.pop("codec", {}), f"{where}: codec")
        aligned = rest.pop("alignment", None)  # older caches know of none
        alignment = None if aligned is None else from_mapping(AlignmentSpec, aligned, f"{where}: alignment")
        return cls(codec=codec, alignment=alignment, **checked_values(cls, rest, where))
    except (TypeError, AttributeError) as error:
        raise InputError(f"{where} is damaged ({error}); extract the features again.") from None


def read_json(path: Path) -> Any:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again, or extract the features again.") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{path} is not a feature manifest; extract the features again.")
    return mapping


def verify_checksums(path: str | os.PathLike[str]) -> None:
    """Reads a whole cache and compares its files with the manifest's SHA-256; InputError names the first that differs."""
    folder = Path(path)
    for name, expected in Manifest.read(folder).sha256.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; copy the cache again, or extract it again.")
        if sha256(folder / name) != expected:
            raise InputError(f"{folder / name} differs from what was extracted; copy it again, or extract it again.")


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory-maps `path` after checking that it is whole and what the manifest says; InputError otherwise."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            found, _, found_dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the cache again, or extract it again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no .npy array ({error}); copy it again, or extract it again.") from None
    if found != shape or found_dtype != np.dtype(dtype):
        raise InputError(
            f"{path} holds {found_dtype} {found}, but its manifest says {np.dtype(dtype)} {shape}; copy the cache again."
        )
    promised, actual = header + int(np.prod(shape)) * np.dtype(dtype).itemsize, path.stat().st_size
    if actual != promised:
        raise InputError(
            f"{path} has {actual} bytes instead of {promised}, so it is incomplete; copy it again, or extract it again."
        )
    return np.load(path, mmap_mode="r")
