"""Encodes a folder or zip of labelled pictures into the feature cache that train.py reads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.extraction import Extraction, begin_extraction, join_extraction
from data.images import BrokenPicture, PictureSource, load_picture, open_source
from data.latents import Codec, load_codec, pixels_from_bytes, resolve_codec
from data.manifest import FeatureSettings, Manifest
from metrics.networks.dino import PatchFeatures
from runtime import seeding
from runtime.alignment_encoder import alignment_spec, open_encoder
from runtime.config import ArgumentParser, InputError, from_mapping, option, run_script
from runtime.seeding import Keys

EPILOG = """examples:
  python extract_features.py --data-path imagenet/train --features-path features --image-size 256
  torchrun --nproc_per_node=8 extract_features.py --data-path imagenet/train --features-path features --image-size 512
  python extract_features.py --data-path imagenet/train --features-path aligned --image-size 256 --alignment dinov2-b

--alignment is for `train.py --alignment` (REPA) and large: at 256 pixels dinov2-b takes 393 KB for each picture and each
mirror image (ImageNet: 1 TB, with --mirrors original half of it), beside 16 KB of latents. It needs timm
(`pip install -e .[dinov2]`).

The same command continues after an interruption. The result is the same for any number of processes."""

BLOCKS_READ_AHEAD = 3


@dataclass(frozen=True)
class ExtractConfig:
    """What the command line says."""

    data_path: str | None = option(None, "folder that holds one folder of pictures per class, or a zip of one; required")
    features_path: str | None = option(None, "folder for the features; required", flags=("--feature-path",))
    image_size: int = option(256, "pictures are cropped to squares of this side")
    vae: str = option("ema", "codec: ema, mse, taesd, pixels, or the folder of a diffusers autoencoder", flags=("--codec",))
    kind: Literal["moments", "samples"] | None = option(
        None,
        "store mean and deviation, drawn from afresh at each training step, or one sample; default: moments for ema and mse",
    )
    mirrors: Literal["both", "original"] = option("both", "store each picture with its mirror image, or alone")
    skip_broken: bool = option(False, "leave out pictures that cannot be read")
    batch_size: int = option(16, "pictures encoded at once by each process", flags=("--per-proc-batch-size",))
    alignment: Literal["none", "dinov2-s", "dinov2-b", "dinov2-l"] = option(
        "none", "encoder whose patch features are stored too, for training with --alignment: REPA's is dinov2-b"
    )
    alignment_weights: str | None = option(
        None, "file of its weights, Meta's .pth or timm's .safetensors; none: timm's, from the Hugging Face hub"
    )
    alignment_patch: int = option(2, "patch size of the network to be trained: one feature for each of its tokens")
    num_workers: int = option(8, "threads that read pictures in each process")
    seed: int = option(0, "seed of --kind samples", flags=("--global-seed",))


@dataclass(frozen=True)
class WorkOrder:
    """What process 0 tells the others."""

    settings: FeatureSettings
    pending_blocks: list[int]


def main() -> None:
    """Parses, checks, encodes this process's share; process 0 prepares the output and finishes it."""
    parser = ArgumentParser(__doc__ or "", epilog=EPILOG)
    parser.add_config(ExtractConfig)
    config = from_mapping(ExtractConfig, vars(parser.parse_args()), "command line")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # Only process 0 checks the input: should it fail, one sentence is printed and torchrun ends the others.
    extraction = prepare(config, world_size) if rank == 0 else None
    order = WorkOrder(extraction.settings, extraction.pending_blocks()) if extraction else None
    order = from_process_zero(order, world_size)
    if order is None:  # complete already
        return
    share = order.pending_blocks[rank::world_size]
    if rank != 0 and not share:  # process 0 may have finished already, so there may be nothing left to join
        return
    if extraction is None:
        extraction = join_extraction(Path(str(config.features_path)), order.settings)
    with extraction:
        extract(extraction, config, share, rank)
        if rank == 0:
            report(extraction.finish(config.skip_broken), extraction.folder)


def prepare(config: ExtractConfig, world_size: int) -> Extraction | None:
    """Checks all that can be checked before a codec is loaded and prepares the output; None when it is complete already."""
    if config.data_path is None or config.features_path is None:
        missing = "--data-path IMAGES" if config.data_path is None else "--features-path FOLDER"
        raise InputError(f"{missing} is missing; --help shows examples.")
    settings = feature_settings(config)
    listing = open_source(config.data_path).list_pictures()
    settings = with_alignment(settings, config)
    extraction = begin_extraction(Path(config.features_path), settings, listing)
    if isinstance(extraction, Manifest):
        print(f"{config.features_path} is complete: {extraction.count} pictures, {settings.describe()}.", flush=True)
        return None
    finished = extraction.finished_pictures()
    print(
        f"Extracting {len(listing.names)} pictures of {len(listing.classes)} classes into {config.features_path}: "
        f"{settings.describe()}; {world_size} process{'es' if world_size > 1 else ''} on {device_of_process().type}"
        + (f"; {finished} pictures were done before." if finished else "."),
        flush=True,
    )
    return extraction


def feature_settings(config: ExtractConfig) -> FeatureSettings:
    """What will be written, checked against the codec's facts."""
    for name in ("batch_size", "num_workers"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give at least 1.")
    codec = resolve_codec(config.vae)
    kind = config.kind or ("moments" if codec.has_posterior else "samples")
    if kind == "moments" and not codec.has_posterior:
        raise InputError(f"--kind moments needs a codec with a posterior, but {codec.name} gives one latent; leave --kind out.")
    return FeatureSettings(
        codec=codec,
        image_size=config.image_size,
        latent_shape=codec.latent_shape(config.image_size),
        kind=kind,
        mirrors=config.mirrors,
        seed=config.seed if codec.has_posterior and kind == "samples" else None,
        batch_size=config.batch_size,
    )


def with_alignment(settings: FeatureSettings, config: ExtractConfig) -> FeatureSettings:
    """The settings with what --alignment asks for; the weights of its encoder are looked for, and hashed."""
    if config.alignment == "none":
        for name in ("alignment_weights", "alignment_patch"):
            if getattr(config, name) != getattr(ExtractConfig, name):
                raise InputError(f"--{name.replace('_', '-')} is for --alignment, which is none; give an encoder, or leave the "
                                 "flag out.")  # fmt: skip
        return settings
    spec = alignment_spec(
        config.alignment, config.alignment_weights, config.alignment_patch, settings.codec, settings.image_size
    )
    return replace(settings, alignment=spec)


def from_process_zero(order: WorkOrder | None, world_size: int) -> WorkOrder | None:
    """The `order` of process 0, in every process; returns when all have arrived.

    The processes are connected for this moment only, so none can time out later while another still works.
    """
    if world_size == 1:
        return order
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    box = [order]
    torch.distributed.broadcast_object_list(box, src=0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return box[0]


def device_of_process() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def extract(extraction: Extraction, config: ExtractConfig, blocks: list[int], rank: int) -> None:
    """Encodes and stores `blocks`; process 0 then waits for the blocks of the others, so that its bar shows them all."""
    torch.backends.cudnn.deterministic = True
    extraction.open_for_writing(rank)
    bar = tqdm(
        total=len(extraction.listing.names),
        initial=extraction.finished_pictures(),
        unit=" pictures",
        disable=rank != 0,
        smoothing=0.05,
    )
    with bar:
        if blocks:
            codec = load_codec(extraction.settings.codec, device_of_process())
            spec = extraction.settings.alignment
            encoder = open_encoder(spec, config.alignment_weights, device_of_process()) if spec else None
            source = open_source(str(config.data_path))
            for block, pictures, broken in read_blocks(extraction, source, blocks, config.num_workers):
                for index, reason in broken.items():
                    bar.write(f"broken picture: {extraction.listing.names[index]}: {reason}")
                targets = encode_targets(extraction, encoder, block, pictures) if encoder else None
                extraction.write_block(block, encode_block(extraction, codec, block, pictures), broken, targets)
                bar.update(extraction.finished_pictures() - bar.n)
        while rank == 0 and bar.n < len(extraction.listing.names):
            sleep(0.2)
            bar.update(extraction.finished_pictures() - bar.n)


def read_blocks(
    extraction: Extraction, source: PictureSource, blocks: list[int], num_workers: int
) -> Iterator[tuple[int, np.ndarray, dict[int, str]]]:
    """Reads the pictures of `blocks` in threads, some blocks ahead of the codec.

    Yields block, pictures (batch_size, S, S, 3) uint8 (black where broken, or past the end), reasons of the broken ones.
    """
    size, names = extraction.settings.image_size, extraction.listing.names
    waiting: deque[tuple[int, list[Future[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for block in [*blocks, *[None] * BLOCKS_READ_AHEAD]:
                if block is not None:
                    tasks = [pool.submit(load_picture, source, names[i], size) for i in extraction.pictures_of(block)]
                    waiting.append((block, tasks))
                if waiting and (block is None or len(waiting) > BLOCKS_READ_AHEAD):
                    yield collect_block(extraction, *waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def collect_block(
    extraction: Extraction, block: int, tasks: list[Future[np.ndarray]]
) -> tuple[int, np.ndarray, dict[int, str]]:
    """Waits for the pictures of one block; see `read_blocks`."""
    size = extraction.settings.image_size
    pictures = np.zeros((extraction.settings.batch_size, size, size, 3), dtype=np.uint8)
    broken = {}
    for place, (index, task) in enumerate(zip(extraction.pictures_of(block), tasks, strict=True)):
        if error := task.exception():
            if not isinstance(error, BrokenPicture):
                raise error
            broken[index] = str(error)
        else:
            pictures[place] = task.result()
    return block, pictures, broken


def encode_block(extraction: Extraction, codec: Codec, block: int, pictures: np.ndarray) -> np.ndarray:
    """pictures (batch_size, S, S, 3) uint8 -> rows (n, *row_shape) float16 for the n pictures of `block`"""
    indices, settings = extraction.pictures_of(block), extraction.settings
    pixels = pixels_from_bytes(torch.from_numpy(pictures))  # (B, 3, S, S)
    views = [pixels, pixels.flip(3)] if settings.mirrors == "both" else [pixels]
    noise: Tensor | None = None
    if settings.seed is not None:
        keys = Keys(settings.seed, 0, torch.arange(indices.start, indices.start + len(pictures)))
        noise = seeding.normal(keys, "extracted sample", (len(views), *settings.latent_shape))  # (B, M, C, h, w)
    rows = []
    for mirror, view in enumerate(views):
        mean, deviation = (moment.cpu() for moment in codec.encode_moments(view))  # (B, C, h, w) each
        if settings.kind == "moments":
            rows.append(torch.stack((mean, deviation), dim=1))  # (B, 2, C, h, w)
        else:
            rows.append(mean if noise is None else mean + deviation * noise[:, mirror])  # (B, C, h, w)
    stored = torch.stack(rows, dim=1)[: len(indices)].half().numpy()  # (n, M, ...)
    check_finite(stored, extraction, block, f"codec {settings.codec.name}", "codec")
    return stored


def encode_targets(extraction: Extraction, encoder: PatchFeatures, block: int, pictures: np.ndarray) -> np.ndarray:
    """pictures (batch_size, S, S, 3) uint8 -> targets (n, mirrors, tokens, width) float16 for the n pictures of `block`"""
    spec = extraction.settings.alignment
    assert spec is not None
    views = [pictures, pictures[:, :, ::-1]] if extraction.settings.mirrors == "both" else [pictures]
    targets = torch.stack([encoder(np.ascontiguousarray(view)) for view in views], dim=1)  # (B, M, T, D)
    stored = targets[: len(extraction.pictures_of(block))].half().numpy()
    check_finite(stored, extraction, block, f"--alignment {spec.name}", "encoder")
    return stored


def check_finite(stored: np.ndarray, extraction: Extraction, block: int, maker: str, kind: str) -> None:
    """InputError naming the first picture of `block` whose numbers (n, ...) float16 does not hold."""
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if not finite.all():
        name = extraction.listing.names[extraction.pictures_of(block)[int(np.argmin(finite))]]
        raise InputError(f"{maker} gives values beyond float16 for {name}; use another {kind}.")


def report(manifest: Manifest, folder: Path) -> None:
    """Says what was written, in one or two lines."""
    size = sum((folder / name).stat().st_size for name in manifest.arrays)
    print(f"Wrote {manifest.count} pictures to {folder} ({size / 1e6:,.1f} MB, {manifest.describe()}).", flush=True)
    if manifest.skipped:
        print(f"Left out {len(manifest.skipped)} broken pictures; {folder / 'manifest.json'} names them.", flush=True)


if __name__ == "__main__":
    run_script(main)
