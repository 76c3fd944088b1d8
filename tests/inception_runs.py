"""Small Inception networks and what they are given, for the tests of networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks.inception_layout import CONVOLUTIONS, nvidia_name
from metrics.networks.weight_files import WeightsFile

CPU = torch.device("cpu")


WIDTH = 1 / 16


def file(path: Path) -> WeightsFile:
    return WeightsFile(path, "0" * 64)


def pictures(count: int = 3, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).byte().numpy()


def nvidia_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """As NVIDIA names them; without gamma, which the frozen graph does not use."""
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    result = {
        f"{prefix}layers.{nvidia_name(layer.name)}.{part}": state[f"{layer.torchvision}.{theirs}"]
        for layer in CONVOLUTIONS
        for part, theirs in parts.items()
    }
    return {**result, f"{prefix}output.weight": state["fc.weight"], f"{prefix}output.bias": state["fc.bias"]}
