"""Which network a command samples: from a run, a released file, or nothing that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runtime.config import InputError
from runtime.distributed import choose_precision
from runtime.sampling import CheckpointSettings, choose_checkpoint, load_checkpoint, read_checkpoint
from tests.models.random_networks import network, tiny
from tests.models.random_networks import one_thread as one_thread


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A DiT-T/2 for latents of 16 x 16, pictures of 128."""
    torch.save(network("dense", tiny(latent_size=(16, 16))).state_dict(), tmp_path / "released.pt")
    return tmp_path / "released.pt"


@pytest.mark.parametrize("asked", [None, 128])
def test_a_released_file_tells_its_picture_size(released: Path, asked: int | None) -> None:
    checkpoint = load_checkpoint(str(released), "DiT-T/2", asked)
    assert checkpoint.image_size == 128
    assert checkpoint.network.backbone.latent_size == (16, 16)
    assert checkpoint.weights.state == {}  # the tensors are kept once


def test_another_size_than_the_released_file_is_refused(released: Path) -> None:
    with pytest.raises(InputError, match=r"--image-size 128 \(latents 1/8 as wide\), not 256"):
        read_checkpoint(str(released), "DiT-T/2", 256)


def test_the_size_of_a_released_file_is_that_of_its_autoencoder(released: Path) -> None:
    assert read_checkpoint(str(released), "DiT-T/2", 16, factor=1).network.backbone.latent_size == (16, 16)
    with pytest.raises(InputError, match=r"--image-size 16 \(latents 1/1 as wide\), not 128"):
        read_checkpoint(str(released), "DiT-T/2", 128, factor=1)


def test_a_file_without_a_position_table_needs_the_size(released: Path) -> None:
    state = torch.load(released)
    del state["pos_embed"]
    torch.save(state, released)
    with pytest.raises(InputError, match="give --image-size"):
        read_checkpoint(str(released), "DiT-T/2", None)
    assert read_checkpoint(str(released), "DiT-T/2", 64).network.backbone.latent_size == (8, 8)


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "no JSON", '{"network": 3}'])
def test_foreign_folders_among_the_results_are_passed_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(content)
    with pytest.raises(InputError, match="holds no run of any method, any model at size any"):
        choose_checkpoint(CheckpointSettings(results_dir=str(tmp_path)))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "0000001.safetensors").touch()
    (run / "config.json").write_text(
        json.dumps({"network": {"model": "DiT-T/2", "method": "dense"}, "data": {"image_size": 64}})
    )
    assert choose_checkpoint(CheckpointSettings(results_dir=str(tmp_path), model="DiT-T/2")).endswith("0000001.safetensors")


def test_a_launcher_that_says_no_does_not_choose_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate exports "no" when --mixed_precision is not given."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision("auto", None, torch.device("cuda")) == ("bf16", None)
    assert choose_precision("fp32", None, torch.device("cuda")) == ("fp32", None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision("auto", None, torch.device("cuda")) == ("fp16", None)
