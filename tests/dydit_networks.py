"""A DyDiT that leaves about half of its work out, as a trained one would, for pictures of 8 x 8 without a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_runs import random_network

from models import Backbone, DiT, DyDiT
from runtime.checkpoint import save_checkpoint
from runtime.networks import describe
from runtime.seeding import Keys, normal

PIXELS = {"name": "pixels", "architecture": "pixels", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}


def dydit(channels: int = 3, **options: Any) -> DyDiT:
    """4 x 4 tokens, 4 heads, 8 layers; the same weights every time."""
    torch.manual_seed(0)
    made = random_network("dydit", Backbone.named("DiT-T/2", (8, 8), in_channels=channels, num_classes=4), options)
    assert isinstance(made, DyDiT)
    index = torch.arange(16)
    made.imitate_training(normal(Keys(0, 0, index), "x", (channels, 8, 8)), index * 66, index % 4)
    return made.eval().requires_grad_(False)


def saved(path: Path, made: DiT) -> Path:
    """A checkpoint as `train.py export` writes it."""
    header = {"network": describe(made, "DiT-T/2"), "data": {"image_size": 8, "codec": PIXELS, "classes": None}, "step": 7}
    save_checkpoint(path, made.state_dict(), header)
    return path
