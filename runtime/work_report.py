"""What passes computed where that depends on what they saw: figures for the terminal and the record, a heat map.

GMACs are those of one image and one pass, averaged over the passes that were made; guidance makes two passes of a step. The
paper of DyDiT counts attention and MLP alone; "in full" is everything a pass computes.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate.utils import gather_object

from models import DiT
from models.token_density import TIMESTEPS
from models.work import CountedWork
from runtime.config import InputError
from runtime.files import stream_npz
from runtime.networks import dense_blueprint
from runtime.plots import new_canvas, save_canvas, try_to_draw
from runtime.sampling import SamplingSettings, draw_labels, sample_latents

PROBED, PROBED_STEPS = 8, "25"
"""Pictures and steps of a probe."""


def probe(network: DiT, device: torch.device, seed: int = 0) -> CountedWork:
    """What sampling a few latents from the network computes; its own counts stay as they were. -> the counts of the probe"""
    if network.work is None:
        raise ValueError("a plan of this network says all that its passes compute; there is nothing to measure")
    own, network.work = network.work, CountedWork(network.backbone.depth)
    try:
        index = torch.arange(PROBED)
        labels = draw_labels("balanced", network.backbone.num_classes, seed, index)
        sample_latents(network, SamplingSettings(num_sampling_steps=PROBED_STEPS), labels, index, seed, device)
        return network.work
    finally:
        network.work = own


def measured_ratio(network: DiT, work: CountedWork) -> float:
    """The share of the dense backbone's attention and MLP that was computed, the mean over passes."""
    return work.block_macs / work.passes / dense_block_macs(network)


def dense_block_macs(network: DiT) -> int:
    """Multiply-accumulates of the dense backbone's attention and MLP for one image."""
    tokens = network.backbone.tokens
    return sum(block.macs(tokens, tokens) - block.modulation_macs() for block in dense_blueprint(network).blocks)


def work_record(network: DiT, work: CountedWork) -> dict[str, Any]:
    """The means, for JSON."""
    return {
        "passes": work.passes,
        "gmacs_per_pass": work.macs / work.passes / 1e9,
        "attention_and_mlp_gmacs_per_pass": work.block_macs / work.passes / 1e9,
        "flops_ratio": measured_ratio(network, work),
    }


def work_lines(network: DiT, work: CountedWork) -> list[str]:
    """What is printed after sampling: measured means in full and in the paper's convention; nothing where nothing passed."""
    if not work.passes:
        return []
    made, dense = work_record(network, work), dense_blueprint(network).macs() / 1e9
    full, blocks = made["gmacs_per_pass"], made["attention_and_mlp_gmacs_per_pass"]
    return [
        f"measured over {work.passes:,} passes: {full:.4g} GMACs per image and pass in full ({full / dense:.1%} of the dense "
        f"backbone's {dense:.4g})",
        f"  attention and MLP alone, which FLOPs ratios are of: {blocks:.4g} GMACs ({made['flops_ratio']:.1%} of the dense "
        f"backbone's {dense_block_macs(network) / 1e9:.4g})",
    ]


def gather_work(network: DiT) -> CountedWork | None:
    """The counts of all processes together; all must call it. None where there are none."""
    if network.work is None:
        return None
    total = CountedWork(network.backbone.depth)
    for work in gather_object([network.work]):
        total.add(work)
    return total


def save_work(work: CountedWork, path: Path) -> None:
    """The counts for `read_work`. Equal counts make equal files."""
    counts = {"macs": work.macs, "block_macs": work.block_macs, "images": work.images, **work.kept}
    stream_npz(path, (0,), [], {name: np.asarray(values) for name, values in counts.items()})


def read_work(path: Path, depth: int) -> CountedWork:
    """The counts of `save_work`; none where there is no file. InputError for a file that is none of its kind."""
    work = CountedWork(depth)
    if not path.exists():
        return work
    try:
        with np.load(path) as counts:
            work.macs, work.block_macs = int(counts["macs"]), int(counts["block_macs"])
            work.images += counts["images"]
            for name, values in work.kept.items():
                values += counts[name]
        kept = np.stack(list(work.kept.values()))
        if min(work.macs, work.block_macs, work.images.min()) < 0 or not np.all((kept >= 0) & (kept <= work.images + 1e-6)):
            raise ValueError("no counts")
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zlib.error, BadZipFile):
        raise InputError(
            f"{path} is damaged, and with it what was counted so far; delete it, and what is sampled from now on is counted "
            "(nothing where the set is complete: another --sample-name counts anew)."
        ) from None
    return work


def draw_work(network: DiT, work: CountedWork, path: Path) -> None:
    """Heads, channels and tokens that were on, layer by timestep, as a PNG; noise to the right.

    Each timestep that was met is a band that reaches half-way to its neighbours. No file where nothing passed.
    """
    met = np.flatnonzero(work.images)
    if not len(met):
        return
    canvas, layers = new_canvas(path, 8, 7), np.arange(network.backbone.depth + 1) - 0.5
    figure = canvas.figure
    figure.suptitle(
        f"{measured_ratio(network, work):.1%} of attention and MLP computed, mean of {work.passes:,} passes of a picture",
        fontsize=10,
    )
    edges = [0, *((met[:-1] + met[1:] + 1) / 2), TIMESTEPS]
    panels = figure.subplots(len(work.kept), 1, sharex=True)
    for panel, name in zip(panels, work.kept, strict=True):
        rates = work.rates(name)[:, met]  # (layers, timesteps met)
        mesh = panel.pcolormesh(edges, layers, rates, vmin=0, vmax=1, cmap="viridis")
        panel.set_title(f"{name} that were on", fontsize=9, loc="left")
        panel.set_ylabel("layer, 0 first")
        panel.yaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("timestep t (0 clean, 999 noise)")
    figure.colorbar(mesh, ax=list(panels), label="share on")
    save_canvas(canvas, path)


def record_work(network: DiT, work: CountedWork, path: Path) -> None:
    """`draw_work` beside work that is more than the picture: what keeps it from being drawn is a warning."""
    try_to_draw("what was computed", lambda: draw_work(network, work, path))
