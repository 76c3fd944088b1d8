"""Features as training reads them: memory-mapped caches, the folders of fast-DiT, and which samples make which batch.

One large array is read more than ten times as fast as one file per picture (benchmarks/data_loading.py).
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import SD_VAE, CodecSpec
from data.manifest import ALIGNMENT, LABELS, MANIFEST, AlignmentSpec, Manifest, open_array
from runtime import seeding
from runtime.config import InputError
from runtime.seeding import Keys

CPU = torch.device("cpu")
_IMAGENET_CLASSES = 1000
# Few enough to be widened from the processor's cache: twice as fast as a whole batch through memory.
_ROWS_AT_ONCE = 32
_NUMBERED = re.compile(r"\d+\.npy")


class FeatureDataset(ABC):
    """Latents and labels of a training set; the same sample always comes out for the same keys."""

    path: Path
    codec: CodecSpec
    image_size: int
    latent_shape: tuple[int, int, int]  # (C, h, w)
    num_classes: int
    kind: Literal["moments", "samples"]
    mirrors: Literal["both", "original"]

    @abstractmethod
    def __len__(self) -> int:
        """The number of pictures; mirror images are not counted."""

    @abstractmethod
    def batch(self, indices: np.ndarray, keys: Keys, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Reads the pictures `indices` (N,), each at random as it is or mirrored, drawn from its posterior where that is
        stored. `keys` are on the CPU, where the mirror must be known. -> latents (N, C, h, w) float32, labels (N,), on `device`
        """

    def open_alignment(self) -> AlignmentTargets:
        """The targets of representation alignment. InputError where there are none."""
        raise InputError(
            f"{self.path} holds no alignment features, which --alignment needs; extract into another folder with "
            "`extract_features.py --alignment dinov2-b`, or leave --alignment out."
        )

    @abstractmethod
    def describe(self) -> str:
        """One line for the log."""


@dataclass(frozen=True)
class AlignmentTargets:
    """What a vision encoder made of each picture and its mirror image, memory-mapped."""

    spec: AlignmentSpec
    mirrors: Literal["both", "original"]
    array: np.ndarray  # (count, mirrors, tokens, width) float16

    def batch(self, indices: np.ndarray, keys: Keys, device: torch.device = CPU) -> Tensor:
        """Of the pictures `indices` (N,), each as it is or mirrored: as `FeatureDataset.batch` draws it for the same `keys`.
        -> (N, tokens, width) float16, on `device`
        """
        return torch.from_numpy(self.array[indices, drawn_mirrors(keys, self.mirrors)]).to(device)


def drawn_mirrors(keys: Keys, mirrors: Literal["both", "original"]) -> np.ndarray:
    """For each sample 1 where it is mirrored, else 0. -> (N,) int64"""
    if mirrors == "original":
        return np.zeros(len(keys.index), dtype=np.int64)
    return seeding.integers(keys, "mirror", 2).numpy()


class CachedFeatures(FeatureDataset):
    """A cache written by extract_features.py, memory-mapped."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.codec, self.image_size = manifest.codec, manifest.image_size
        channels, height, width = manifest.latent_shape
        self.latent_shape = channels, height, width
        self.kind, self.mirrors = manifest.kind, manifest.mirrors
        self.num_classes = len(manifest.classes)
        self._array = open_array(path / manifest.array_name, (manifest.count, *manifest.row_shape), np.float16)
        self._labels = np.array(open_array(path / LABELS, (manifest.count,), np.int64))
        _check_labels(self._labels, self.num_classes, str(path / LABELS))

    def __len__(self) -> int:
        return self.manifest.count

    def batch(self, indices: np.ndarray, keys: Keys, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        mirror = drawn_mirrors(keys, self.mirrors)
        latents = torch.empty(len(indices), *self._array.shape[2:])  # (N, C, h, w) or (N, 2, C, h, w)
        for start in range(0, len(indices), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            latents[part] = torch.from_numpy(self._array[indices[part], mirror[part]])
        latents = latents.to(device)
        if self.kind == "moments":
            mean, deviation = latents.unbind(1)  # (N, C, h, w) each
            latents = mean + deviation * seeding.normal(keys.on(device), "posterior", self.latent_shape)  # (N, C, h, w)
        return latents, torch.from_numpy(self._labels[indices]).to(device)

    def open_alignment(self) -> AlignmentTargets:
        spec = self.manifest.alignment
        if spec is None:
            return super().open_alignment()
        shape = (self.manifest.count, *self.manifest.arrays[ALIGNMENT])
        return AlignmentTargets(spec, self.mirrors, open_array(self.path / ALIGNMENT, shape, np.float16))

    def describe(self) -> str:
        return f"{len(self)} pictures of {self.num_classes} classes from {self.path}: {self.manifest.describe()}"


class LegacyFeatures(FeatureDataset):
    """A folder of fast-DiT, as it is: ROOT/imagenet{size}_features/{i}.npy, (1, 4, h, w) of the SD VAE, originals only, and
    ROOT/imagenet{size}_labels/{i}.npy, (1,).

    Labels are read once, at the start. A feature file is opened whenever its picture is drawn, which is slow:
    `extract_features.py` makes fast ones.
    """

    def __init__(self, features: Path, labels: Path, names: list[str], image_size: int, num_classes: int) -> None:
        self.path = features.parent
        self.codec = SD_VAE
        self.image_size = image_size
        channels, height, width = SD_VAE.latent_shape(image_size)
        self.latent_shape = channels, height, width
        self.kind, self.mirrors = "samples", "original"
        self.num_classes = num_classes
        self._files = [features / name for name in names]
        self._read_feature(self._files[0])
        self._labels = _read_labels([labels / name for name in names], num_classes)

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: np.ndarray, keys: Keys, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        latents = np.concatenate([self._read_feature(self._files[index]) for index in indices])  # (N, C, h, w)
        return torch.from_numpy(latents).float().to(device), torch.from_numpy(self._labels[indices]).to(device)

    def describe(self) -> str:
        size = " x ".join(map(str, self.latent_shape))
        return f"{len(self)} pictures from the legacy folder {self.path}: latents {size}, one file each, originals only"

    def _read_feature(self, path: Path) -> np.ndarray:
        feature = _read_array(path)  # (1, C, h, w)
        if feature.shape != (1, *self.latent_shape):
            raise InputError(
                f"{path} holds an array of shape {feature.shape}, but pictures of size {self.image_size} have "
                f"{(1, *self.latent_shape)}; give the --image-size it was extracted with."
            )
        return feature


@dataclass
class BatchOrder:
    """Which pictures make global batch `step`: a fresh permutation each epoch, batches running on across its end, so that
    every picture is seen exactly once per epoch whatever the batch size. A function of its fields: nothing to save.
    """

    seed: int
    count: int  # pictures in the data set
    batch_size: int  # of the global batch
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def indices(self, step: int, positions: np.ndarray) -> np.ndarray:
        """The pictures at places `positions` (n,), each in [0, batch_size), of global batch `step`. -> (n,) int64"""
        epochs, places = np.divmod(step * self.batch_size + positions.astype(np.int64), self.count)
        needed = np.unique(epochs).tolist()
        self._permutations = {
            epoch: self._permutations[epoch] if epoch in self._permutations else self._permutation(epoch) for epoch in needed
        }
        chosen = np.empty(len(positions), dtype=np.int64)
        for epoch in needed:
            chosen[epochs == epoch] = self._permutations[epoch][places[epochs == epoch]]
        return chosen

    def _permutation(self, epoch: int) -> np.ndarray:
        return seeding.permutation(self.seed, "data order", epoch, self.count)


def open_features(
    path: str | os.PathLike[str], image_size: int, num_classes: int | None = None, channels: int | None = None
) -> FeatureDataset:
    """The features at `path`, a cache with a manifest or a legacy fast-DiT root, checked against what the model expects.

    `num_classes` must be the cache's number of classes; a legacy root does not know its own, there it bounds the labels
    (None: 1000). `channels` must be the latents' number of channels. Raises InputError for what does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: no such feature folder; make one with `python extract_features.py --data-path IMAGES "
                         f"--features-path {path} --image-size {image_size}`.")  # fmt: skip
    dataset: FeatureDataset
    if (folder / MANIFEST).is_file():
        dataset = CachedFeatures(folder, Manifest.read(folder))
    else:
        dataset = _open_legacy(folder, image_size, num_classes)
    if dataset.image_size != image_size:
        size, latent = dataset.image_size, " x ".join(map(str, dataset.latent_shape))
        raise InputError(
            f"{path} holds features of pictures of size {size} (latents {latent}), but --image-size is {image_size}; "
            f"give --image-size {size}, or extract features of size {image_size}."
        )
    if num_classes is not None and dataset.num_classes != num_classes:
        raise InputError(
            f"{path} holds {dataset.num_classes} classes, but --num-classes is {num_classes}; "
            f"give --num-classes {dataset.num_classes}."
        )
    if channels is not None and dataset.latent_shape[0] != channels:
        raise InputError(
            f"{path} holds latents of {dataset.latent_shape[0]} channels (codec {dataset.codec.name}), but the model takes "
            f"{channels}; use another model or other features."
        )
    return dataset


def _open_legacy(root: Path, image_size: int, num_classes: int | None) -> LegacyFeatures:
    """The legacy features of `image_size` under `root`. InputError when they are not there, or incomplete."""
    features, labels = root / f"imagenet{image_size}_features", root / f"imagenet{image_size}_labels"
    if not features.is_dir():
        raise InputError(_what_is_there(root, image_size))
    if not labels.is_dir():
        raise InputError(f"{labels} is missing beside {features.name}; copy it there too.")
    names = [path.name for path in features.iterdir() if _NUMBERED.fullmatch(path.name)]
    if not names:
        raise InputError(f"{features} holds no numbered .npy files; extract the features again.")
    names.sort(key=lambda name: int(name.removesuffix(".npy")))
    return LegacyFeatures(features, labels, names, image_size, num_classes if num_classes is not None else _IMAGENET_CLASSES)


def _what_is_there(root: Path, image_size: int) -> str:
    """Why `root` cannot be read, with the remedy that fits what it holds."""
    if (root / ".progress").is_dir():
        return f"{root} holds an extraction that is not finished; run the same extract_features.py command again."
    others = sorted(path.name for path in root.glob("imagenet*_features"))
    if others:
        return f"{root} holds {', '.join(others)}, but --image-size is {image_size}; give the size that is there."
    if re.fullmatch(r"imagenet\d+_features", root.name):
        return f"{root} is one half of a legacy folder; give the folder above it, {root.parent}."
    return f"{root} holds neither manifest.json nor imagenet{image_size}_features; give a folder made by extract_features.py."


def _read_labels(paths: list[Path], num_classes: int) -> np.ndarray:
    """-> (len(paths),) int64; InputError names the first file that is missing, odd, or outside [0, num_classes)."""
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(_read_label, paths, repeat(num_classes))
        return np.fromiter(
            tqdm(read, "labels", len(paths), unit=" files", delay=5, leave=False), dtype=np.int64, count=len(paths)
        )


def _read_label(path: Path, num_classes: int) -> int:
    label = _read_array(path)
    if label.size != 1 or label.dtype.kind not in "iu":
        raise InputError(f"{path} holds {label.dtype} {label.shape} instead of one whole number; extract the features again.")
    if not 0 <= int(label.flat[0]) < num_classes:
        raise InputError(f"{path} holds label {int(label.flat[0])}, but there are {num_classes} classes; give --num-classes.")
    return int(label.flat[0])


def _read_array(path: Path) -> np.ndarray:
    try:
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; features and labels must have the same numbers.") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is no whole .npy array ({error}); copy it again.") from None


def _check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(
            f"{where} holds labels {labels.min()} to {labels.max()}, but there are {num_classes} classes; extract again."
        )
