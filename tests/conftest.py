"""Tiny data and weights that the end-to-end tests share; made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_runs import SmallNetwork, random_pictures, refused
from hypothesis import settings
from small_runs import QUICK, ROOT, SHORT, Result, call, free_port, random_network, run, succeed, torchrun, write_features

import evaluator
from data.latents import PIXELS, SD_VAE, resolve_codec
from data.manifest import FeatureSettings
from models import Backbone

# The same examples every time: a test that fails must fail again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

PICTURES, CLASSES = 24, 3


@dataclass(frozen=True)
class LiteralRun:
    folder: Path
    training: Result
    sampling: Result

    @property
    def run_folder(self) -> Path:
        return self.folder / "results" / "DiT-T-2-sparsedit-64"

    @property
    def packed(self) -> Path:
        return next((self.folder / "samples").glob("*.npz"))


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder in diffusers' layout, 4 channels and 8 pixels per latent, whose pictures have contrast."""
    import diffusers

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * 4, "num_blocks": (1,) * 4}
    vae: Any = diffusers.AutoencoderTiny(
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items() if name.startswith("b")},
        num_encoder_blocks=sizes["num_blocks"],
        num_decoder_blocks=sizes["num_blocks"],
    )
    last = [module for module in vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    last.weight.data *= 6
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path) -> Path:
    """24 latents 4 x 8 x 8 of three classes, both mirrors, of pictures of size 64, by the tiny autoencoder."""
    settings = FeatureSettings(resolve_codec(str(tiny_vae)), 64, (4, 8, 8), "samples", "both", None, 8)
    rows = np.random.default_rng(0).normal(size=(PICTURES, *settings.row_shape)).astype(np.float16)
    return write_features(tmp_path_factory.mktemp("features") / "samples", settings, CLASSES, rows)


@pytest.fixture(scope="session")
def moment_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `features`, but means and deviations: every training step draws from the posterior."""
    settings = FeatureSettings(SD_VAE, 64, (4, 8, 8), "moments", "both", None, 8)
    rows = np.abs(np.random.default_rng(1).normal(size=(PICTURES, *settings.row_shape))).astype(np.float16)
    return write_features(tmp_path_factory.mktemp("features") / "moments", settings, CLASSES, rows)


@pytest.fixture(scope="session")
def pixel_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 8 x 8 that are easy to learn: each class is one colour."""
    settings = FeatureSettings(PIXELS, 8, (3, 8, 8), "samples", "original", None, 8)
    colours = np.array([[0.9, -0.9, -0.9], [-0.9, 0.9, -0.9], [-0.9, -0.9, 0.9]])
    rows = np.repeat(colours, PICTURES // CLASSES, axis=0)[:, None, :, None, None] * np.ones(settings.row_shape)
    return write_features(tmp_path_factory.mktemp("features") / "pixels", settings, CLASSES, rows.astype(np.float16))


@pytest.fixture(scope="session")
def legacy_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature root as fast-DiT writes it."""
    root = tmp_path_factory.mktemp("legacy")
    generator = np.random.default_rng(2)
    for name in ("features", "labels"):
        (root / f"imagenet64_{name}").mkdir()
    for index in range(10):
        np.save(root / "imagenet64_features" / f"{index}.npy", generator.normal(size=(1, 4, 8, 8)).astype(np.float32))
        np.save(root / "imagenet64_labels" / f"{index}.npy", np.array([index % CLASSES]))
    return root


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense DiT-T/2 as DiT's authors publish theirs, for `features`, every weight random."""
    torch.manual_seed(0)
    network = random_network("dense", Backbone.named("DiT-T/2", (8, 8), num_classes=CLASSES))
    path = tmp_path_factory.mktemp("weights") / "DiT-T-2-64x64.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def literal_run(tmp_path_factory: pytest.TempPathFactory, features: Path, pretrained: Path) -> LiteralRun:
    """The two commands of DESIGN.md as people type them, small; in a folder of their own, with every default of theirs."""
    folder = tmp_path_factory.mktemp("literal")
    training = run(
        ["-m", "accelerate.commands.launch", "--main_process_port", str(free_port()),
         "--multi_gpu", "--num_processes", "2", "--mixed_precision", "fp16", ROOT / "train.py", "--model", "DiT-T/2",
         "--pretrained", pretrained, "--feature-path", features, "--image-size", "64", *SHORT],
        folder,
    )  # fmt: skip
    sampling = run(
        torchrun(2, ROOT / "sample_ddp.py", "--model", "DiT-T/2", "--num-fid-samples", "12", "--image-size", "64",
                 "--seed", "1", *QUICK),
        folder,
    )  # fmt: skip
    return LiteralRun(folder, training, sampling)


# Evaluation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in this process, with the small network."""
    monkeypatch.setattr(evaluator, "open_network", lambda *arguments: SmallNetwork())
    return lambda *words: succeed("evaluator", *words)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command, expects exit code 2 and one line before the network is touched, and returns the line."""

    def too_late(*arguments: object) -> None:
        raise AssertionError("the network was reached")

    monkeypatch.setattr(evaluator, "open_network", too_late)
    return lambda *words: refused(call("evaluator", *words))


@pytest.fixture
def batches(tmp_path: Path) -> tuple[Path, Path]:
    np.savez(tmp_path / "reference.npz", arr_0=random_pictures(70, seed=0))
    np.savez(tmp_path / "samples.npz", arr_0=random_pictures(50, seed=1))
    return tmp_path / "reference.npz", tmp_path / "samples.npz"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that are made."""
    from matplotlib import figure

    made = []

    class Kept(figure.Figure):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return made
