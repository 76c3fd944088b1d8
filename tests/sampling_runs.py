"""A tiny checkpoint, flags to sample it quickly, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import Result, random_network

from models import Backbone
from runtime.checkpoint import save_checkpoint
from runtime.networks import describe

COUNT = 10


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network that makes pictures of 8 x 8 without a decoder, as `train.py export` writes it."""
    torch.manual_seed(0)
    network = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4))
    codec = {"name": "pixels", "architecture": "pixels", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
    header = {
        "network": describe(network, "DiT-T/2"),
        "data": {"image_size": 8, "codec": codec, "classes": ["tench", "church", "golf ball", "chain saw"]},
        "step": 7,
    }
    path = tmp_path_factory.mktemp("sample") / "small.safetensors"
    save_checkpoint(path, network.state_dict(), header)
    return path


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> list[str]:
    return flags(checkpoint, tmp_path)


def flags(checkpoint: Path, samples: Path) -> list[str]:
    return ["--ckpt", str(checkpoint), "--num-fid-samples", str(COUNT), "--num-sampling-steps", "3",
            "--per-proc-batch-size", "4", "--sample-dir", str(samples), "--sample-name", "set"]  # fmt: skip


def assert_refused(result: Result, *named: str, last_line_only: bool = False) -> None:
    """One sentence, exit code 2. `last_line_only`: a progress bar was drawn before it."""
    assert result.code == 2, result.err
    lines = result.err.strip().splitlines()
    assert last_line_only or len(lines) == 1, result.err
    for word in ("error: ", *named):
        assert word in lines[-1]
