"""Files in which people keep the weights of a DiT."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Writer = Callable[[State, Path], Path]


def as_pt(state: State, folder: Path) -> Path:
    torch.save(state, folder / "DiT-T-2.pt")
    return folder / "DiT-T-2.pt"


def as_old_pt(state: State, folder: Path) -> Path:
    """The format of torch before 1.6: one pickle, no zip."""
    torch.save(OrderedDict(state), folder / "DiT-T-2.pth", _use_new_zipfile_serialization=False)
    return folder / "DiT-T-2.pth"


def as_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_fast_dit(state: State, folder: Path) -> Path:
    """Wrapped raw weights, their average, an optimizer, and the parsed flags as a Namespace."""
    content = {
        "model": {f"module._orig_mod.{key}": value + 1 for key, value in state.items()},
        "ema": {f"_orig_mod.{key}": value for key, value in state.items()},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-T/2", image_size=256, lr=1e-4),
    }
    torch.save(content, folder / "0400000.pt")
    return folder / "0400000.pt"


def as_compiled_blocks(state: State, folder: Path) -> Path:
    """torch.compile around the network and around each block, inside DistributedDataParallel."""
    renamed = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", key): value for key, value in state.items()}
    return as_pt({f"_orig_mod.module.{key}": value for key, value in renamed.items()}, folder)


WRITERS: list[Writer] = [as_pt, as_old_pt, as_safetensors, as_fast_dit, as_compiled_blocks]
