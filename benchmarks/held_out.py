"""Pictures kept from training, and what they and samples tell of a network: the loss at every timestep, vectors to compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.digits import grey_vectors
from data.features import FeatureDataset
from data.latents import bytes_from_pixels
from data.manifest import LABELS, MANIFEST, SOURCES, Manifest, open_array
from diffusion.gaussian import EpsilonObjective, q_sample
from diffusion.schedule import NoiseSchedule
from models import DiT
from models.token_density import TIMESTEPS
from runtime.config import InputError
from runtime.files import atomic_write, sha256, write_json
from runtime.sampling import SamplingSettings, sample_latents
from runtime.seeding import Keys, normal, permutation

PASSES = 50
"""Timesteps at which every held-out picture is scored, evenly spread."""
NEIGHBOURS = TIMESTEPS // PASSES
"""Consecutive pictures start at as many consecutive timesteps, so that together they meet all."""
AT_ONCE = 250
POOLED = 8
"""Side to which latents are pooled before they are compared: a covariance needs more pictures than numbers in a vector."""


def stratified(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the pictures with these labels (N,), every class in proportion to within one, always the same. -> (count,)"""
    order = permutation(0, "held out", 0, len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.argsort(place, kind="stable")[:count])


def split(source: Path, target: Path, held_out: int) -> tuple[Path, Path]:
    """Two feature caches under `target` from the one at `source`: for training, and `held_out` pictures kept from it."""
    manifest = Manifest.read(source)
    if not NEIGHBOURS <= held_out < manifest.count:
        raise InputError(f"--held-out is {held_out}; {source} holds {manifest.count} pictures, so give {NEIGHBOURS} to "
                         f"{manifest.count - 1}.")  # fmt: skip
    labels = np.array(open_array(source / LABELS, (manifest.count,), np.int64))
    kept = stratified(labels, held_out)
    parts = {target / "training": np.setdiff1d(np.arange(manifest.count), kept), target / "held-out": kept}
    for folder, rows in parts.items():
        if not (folder / MANIFEST).exists():
            write_part(source, manifest, folder, rows)
    training, held = parts
    return training, held


def write_part(source: Path, manifest: Manifest, folder: Path, rows: NDArray[np.int64]) -> None:
    """A cache of the pictures `rows` of another."""
    latents = open_array(source / manifest.array_name, (manifest.count, *manifest.row_shape), np.float16)
    labels = open_array(source / LABELS, (manifest.count,), np.int64)
    for name, array in ((manifest.array_name, latents), (LABELS, labels)):
        with atomic_write(folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, array[rows])
    sources = json.loads((source / SOURCES).read_text(encoding="utf-8"))
    write_json(folder / SOURCES, [sources[row] for row in rows])
    hashes = {name: sha256(folder / name) for name in (manifest.array_name, LABELS, SOURCES)}
    replace(manifest, count=len(rows), sha256=hashes, skipped={}).write(folder)


@torch.no_grad()
def held_out_losses(network: DiT, gamma: float | None, features: FeatureDataset, device: torch.device) -> dict[str, float]:
    """The training objective (min-SNR `gamma`) and the plain squared error of epsilon on pictures kept from training.

    Means over all timesteps, each with the same weight ("loss", "mse"), and of the loss over the quarters of the timesteps,
    named as training logs its intervals; every timestep under its own plan. Pictures, timesteps and noise are the same
    whatever the network.
    """
    schedule = NoiseSchedule.linear()
    trained = EpsilonObjective(schedule, gamma, network.backbone.learn_sigma)
    plain = EpsilonObjective(schedule, None, network.backbone.learn_sigma)
    sums, counts = torch.zeros(2, TIMESTEPS, dtype=torch.float64), torch.zeros(TIMESTEPS, dtype=torch.float64)
    for number in range(PASSES):
        for index in torch.arange(len(features)).split(AT_ONCE):
            keys = Keys(0, number, index)
            x0, labels = features.batch(index.numpy(), keys, device)
            noise = normal(keys.on(device), "held-out noise", tuple(x0.shape[1:]))  # (n, C, H, W)
            t = number * NEIGHBOURS + index % NEIGHBOURS  # (n,)
            x_t = q_sample(schedule, x0, t.to(device), noise)
            output = network(x_t, t.to(device), labels)
            scores = (trained(output, x0, t.to(device), noise).total, plain(output, x0, t.to(device), noise).mse)
            sums.index_add_(1, t, torch.stack(scores).double().cpu())
            counts.index_add_(0, t, torch.ones_like(t, dtype=torch.float64))
    by_timestep = sums / counts  # (2, TIMESTEPS)
    loss, mse = by_timestep.mean(1).tolist()
    quarters = by_timestep[0].split(TIMESTEPS // 4)
    named = {
        f"loss_at_t/{place * len(part)}-{(place + 1) * len(part) - 1}": float(part.mean())
        for place, part in enumerate(quarters)
    }
    return {"loss": loss, "mse": mse, **named}


def digit_vectors(latents: Tensor) -> NDArray[np.float64]:
    """Digits as their 64 raw pixels, 0 .. 16. latents (N, 3, 8, 8) -> (N, 64)"""
    return grey_vectors(bytes_from_pixels(latents).numpy())


def pooled_vectors(latents: Tensor) -> NDArray[np.float64]:
    """Latents averaged down to at most 8 x 8 places. (N, C, H, W) -> (N, C * 64 or less)"""
    size = (min(POOLED, latents.shape[2]), min(POOLED, latents.shape[3]))
    return F.adaptive_avg_pool2d(latents.double(), size).flatten(1).numpy()


def all_latents(features: FeatureDataset) -> Tensor:
    """Every picture's latent, in order. -> (N, C, H, W) on the CPU"""
    pieces = torch.arange(len(features)).split(AT_ONCE)
    return torch.cat([features.batch(index.numpy(), Keys(0, 0, index))[0] for index in pieces])


def sampled_latents(network: DiT, settings: SamplingSettings, count: int, seed: int, device: torch.device) -> Tensor:
    """`count` samples, the classes in turn; picture i of a seed starts from the same noise in every network. -> (N, C, H, W)"""
    pieces = torch.arange(count).split(AT_ONCE)
    classes = network.backbone.num_classes
    return torch.cat([sample_latents(network, settings, index % classes, index, seed, device).cpu() for index in pieces])
