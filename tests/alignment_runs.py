"""A vision transformer in timm's place, and features with alignment targets."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import write_features
from torch import Tensor, nn

from data.latents import PIXELS
from data.manifest import AlignmentSpec, FeatureSettings

WIDTH = 384
"""Of dinov2-s."""
TARGET_WIDTH = 6
COUNT, CLASSES = 24, 3


class SmallTransformer(nn.Module):
    """timm's names and shapes for the parts that matter here: no layer, a position table, a class token."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // 14) ** 2, WIDTH) / 10)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 14, 14)})
        self.norm = nn.LayerNorm(WIDTH)

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        return self.norm(torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1) + self.pos_embed)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """From now on timm makes small transformers. -> weights of one, as published, for 37 x 37 patches"""

    def create_model(name: str, *, pretrained: bool, img_size: int, num_classes: int) -> nn.Module:
        assert (name, pretrained, num_classes) == ("vit_small_patch14_dinov2.lvd142m", False, 0)
        return SmallTransformer(img_size)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    torch.manual_seed(0)
    torch.save(SmallTransformer(518).state_dict(), folder / "small.pth")
    return folder / "small.pth"


def aligned_settings(side: int = 8, grid: int = 4, mirrors: str = "both") -> FeatureSettings:
    """Of pixels, with targets of six numbers a token."""
    spec = AlignmentSpec("dinov2-s", "5" * 64, side // grid, (grid, grid), TARGET_WIDTH)
    return FeatureSettings(PIXELS, side, (3, side, side), "samples", mirrors, None, 5, alignment=spec)  # type: ignore[arg-type]


def aligned_features(folder: Path) -> Path:
    """24 pictures of 8 x 8 pixels whose targets are the mean colours and deviations of the tokens' patches."""
    settings = aligned_settings()
    originals = np.random.default_rng(3).uniform(-1, 1, (COUNT, 3, 8, 8))
    rows = np.stack((originals, originals[..., ::-1]), axis=1)  # (count, 2, 3, 8, 8)
    return write_features(folder, settings, CLASSES, rows.astype(np.float16), targets_of(rows).astype(np.float16))


def targets_of(rows: np.ndarray) -> np.ndarray:
    """(..., 3, 8, 8) -> (..., 16, 6)"""
    patches = rows.reshape(*rows.shape[:-2], 4, 2, 4, 2)  # (..., 3, 4, 2, 4, 2)
    both = np.concatenate((patches.mean(axis=(-3, -1)), patches.std(axis=(-3, -1))), axis=-3)  # (..., 6, 4, 4)
    return np.moveaxis(both.reshape(*both.shape[:-2], 16), -1, -2)
