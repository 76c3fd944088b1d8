"""Pictures, and extract_features.py run on them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import extract_features

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of three classes, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(23):
        folder = root / "abc"[index % 3]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (generator.integers(8, 30), generator.integers(8, 30), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


def flags(pictures: Path, features: Path, *more: str) -> list[str]:
    return ["--data-path", str(pictures), "--features-path", str(features), "--image-size", "8", "--batch-size", "4",
            "--num-workers", "2", *(more or ("--vae", "pixels"))]  # fmt: skip


def extract(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script's main, in this process."""
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *arguments])
    extract_features.main()


def extract_in_turn(
    config: extract_features.ExtractConfig, world_size: int, before_rank: Callable[[int], None] = lambda rank: None
) -> dict[str, str]:
    """What `world_size` processes do, one after the other in this one. -> `digests` of the result"""
    main = extract_features.prepare(config, world_size)
    assert main is not None
    pending = main.pending_blocks()
    with main:
        for rank in range(1, world_size):
            before_rank(rank)
            with extract_features.join_extraction(main.folder, main.settings) as own:
                extract_features.extract(own, config, pending[rank::world_size], rank)
        before_rank(0)
        extract_features.extract(main, config, pending[::world_size], 0)
        main.finish(config.skip_broken)
    return digests(main.folder)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def digests(features: Path) -> dict[str, str]:
    """Hash of each file of a finished cache."""
    assert not (features / ".progress").exists()
    assert not list(features.glob(".*.partial"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in features.iterdir() if path.name != ".lock"}


@pytest.fixture
def undisturbed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    extract(monkeypatch, *flags(pictures, tmp_path / "undisturbed"))
    result = digests(tmp_path / "undisturbed")
    assert set(result) == {"latents.npy", "labels.npy", "sources.json", "manifest.json"}
    return result
