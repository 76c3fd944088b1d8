"""How fast training reads features: one memory-mapped array against one file per picture, in one run.

Both sides deliver the same thing, a batch of float32 latents and int64 labels in the same random order, from a warm page
cache, in one process and one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import CPU
from benchmarks.options import CommonSettings, recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.timing import interleaved
from data.extraction import Extraction, begin_extraction
from data.features import BatchOrder, FeatureDataset, open_features
from data.images import Listing
from data.latents import SD_VAE
from data.manifest import FeatureSettings
from runtime.config import option
from runtime.seeding import Keys

Read = Callable[[np.ndarray, Keys], tuple[Tensor, Tensor]]

BATCH = 256
FILES = "one file per picture, numpy.load"
"""The baseline: what a training script written after DiT does."""


@dataclass(frozen=True)
class DataSettings(CommonSettings):
    count: int = option(4096, "latents that a round reads; at least 256")
    image_size: int = option(256, "picture side; latents are 4 x SIDE/8 x SIDE/8")


QUICK: Mapping[str, Any] = {"count": 2048}


def measure(settings: DataSettings) -> dict[str, Any]:
    """Features per second of each way to read `count` random latents, in batches of 256; the ways take turns."""
    count, image_size = max(settings.count, BATCH), settings.image_size
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_one_file_per_picture(root / "files", count, image_size)
        moments = FeatureSettings(
            SD_VAE, image_size, SD_VAE.latent_shape(image_size), "moments", "both", seed=None, batch_size=BATCH
        )
        samples = replace(moments, kind="samples", mirrors="original")
        ways: dict[str, Read] = {
            FILES: plain_files(root / "files", image_size),
            "one file per picture, our reader of fast-DiT folders": open_features(root / "files", image_size).batch,
            "memory map, samples": write_cache(root / "samples", samples).batch,
            "memory map, samples, mirror drawn": write_cache(root / "both", replace(samples, mirrors="both")).batch,
            "memory map, moments, mirror and posterior drawn": write_cache(root / "moments", moments).batch,
        }
        timings = interleaved({name: one_pass(read, count) for name, read in ways.items()}, settings.rounds, CPU)
    work = Work(images=count // BATCH * BATCH)
    return {
        "settings": recorded(settings, count=count),
        "latent": list(SD_VAE.latent_shape(image_size)),
        "counted": "features",
        "rows": rows_of(timings, dict.fromkeys(timings, work), FILES),
    }


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    size, count = " x ".join(map(str, result["latent"])), result["settings"]["count"]
    lines = [f"{count} latents of {size}, batches of {BATCH}, warm page cache", *heading(result)]
    return "\n".join(lines + table(result["rows"], {"images_per_second": "features/s"}))


def one_pass(read: Read, count: int) -> Callable[[], None]:
    """A function that reads every picture once, in a random order, a batch at a time."""
    order = BatchOrder(seed=0, count=count, batch_size=BATCH)
    positions = np.arange(BATCH)
    batches = [order.indices(step, positions) for step in range(count // BATCH)]

    def run() -> None:
        for step, indices in enumerate(batches):
            read(indices, Keys(0, step, torch.from_numpy(positions)))

    return run


def write_one_file_per_picture(root: Path, count: int, image_size: int) -> None:
    """As fast-DiT does: float32 features (1, 4, h, w) and labels (1,)."""
    generator = np.random.default_rng(0)
    features, labels = (root / f"imagenet{image_size}_{half}" for half in ("features", "labels"))
    features.mkdir(parents=True)
    labels.mkdir()
    for number in range(count):
        latent = generator.normal(size=(1, *SD_VAE.latent_shape(image_size)))
        np.save(features / f"{number}.npy", latent.astype(np.float32))
        np.save(labels / f"{number}.npy", generator.integers(1000, size=1))


def plain_files(root: Path, image_size: int) -> Read:
    """The simplest reader of such a folder."""

    def read(indices: np.ndarray, keys: Keys) -> tuple[Tensor, Tensor]:
        latents = [np.load(root / f"imagenet{image_size}_features" / f"{index}.npy") for index in indices]
        labels = [np.load(root / f"imagenet{image_size}_labels" / f"{index}.npy") for index in indices]
        return torch.from_numpy(np.concatenate(latents)), torch.from_numpy(np.concatenate(labels))

    return read


def write_cache(folder: Path, settings: FeatureSettings) -> FeatureDataset:
    """A cache of as many random features as the legacy folder beside it holds files."""
    count = sum(1 for _ in (folder.parent / "files").glob("*_labels/*.npy"))
    extraction = begin_extraction(folder, settings, Listing(("class",), tuple(f"class/{i}.png" for i in range(count))))
    assert isinstance(extraction, Extraction)
    generator = np.random.default_rng(0)
    with extraction:
        extraction.open_for_writing(rank=0)
        for block in extraction.pending_blocks():
            shape = (len(extraction.pictures_of(block)), *settings.row_shape)
            extraction.write_block(block, generator.normal(size=shape).astype(np.float16), {})
        extraction.finish(skip_broken=False)
    return open_features(folder, settings.image_size)
