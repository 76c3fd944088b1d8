"""`train.py export`: the weights of a checkpoint alone, under our names or a released layout's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import call, differing, succeed

from models import METHODS
from runtime.checkpoint import checkpoints, read_weights
from runtime.config import InputError
from runtime.networks import blueprint
from runtime.sampling import load_checkpoint
from tests.models.random_networks import tiny


@pytest.fixture(scope="session")
def trained(features: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> the checkpoint of a training of a few steps."""
    results, made = tmp_path_factory.mktemp("trained"), {}

    def train_once(method: str) -> Path:
        if method not in made:
            start = pretrained if starts_from_dense(method) else "none"
            succeed("train", "--model", "DiT-T/2", "--method", method, "--pretrained", start, "--feature-path", features,
                    "--image-size", "64", "--max-steps", "3", "--global-batch-size", "4", "--lr", "1e-2",
                    "--results-dir", results)  # fmt: skip
            made[method] = checkpoints(results / f"DiT-T-2-{method}-64")[-1]
        return made[method]

    return train_once


def starts_from_dense(method: str) -> bool:
    try:
        blueprint(method, tiny(), {}).dense_rules()
    except InputError:
        return False
    return True


@pytest.mark.parametrize("method", ["dense", "sparsedit"])
def test_export_holds_the_average_alone_and_samples_like_the_checkpoint(
    method: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, output = trained(method), tmp_path / "exported.safetensors"
    said = succeed("train", "export", checkpoint, output).out
    assert said.strip() == f"{output}: averaged weights of step 3, ours layout"
    weights = read_weights(str(output))
    average = read_weights(str(checkpoint)).state
    assert differing(weights.state, average) == []
    assert output.stat().st_size < checkpoint.stat().st_size / 3
    loaded = load_checkpoint(str(output), None, None)
    assert (loaded.step, loaded.model, loaded.image_size) == (3, "DiT-T/2", 64)
    succeed("train", "export", checkpoint, tmp_path / "raw.safetensors", "--raw")
    raw = read_weights(str(tmp_path / "raw.safetensors")).state
    assert differing(raw, read_weights(str(checkpoint), averaged=False).state) == []
    assert differing(raw, average) != []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_released_layouts_round_trip(method: str, suffix: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, output = trained(method), tmp_path / f"released{suffix}"
    succeed("train", "export", checkpoint, output, "--layout", "released")
    weights = read_weights(str(output))
    assert weights.header is None
    if method == "sparsedit":
        assert any(name.startswith("dumbbell_blocks.0.") for name in weights.state)
    back = load_checkpoint(str(output), "DiT-T/2", 64)
    ours = load_checkpoint(str(checkpoint), None, None)
    assert differing(back.network.state_dict(), ours.network.state_dict()) == []
    if method == "dydit":
        assert any(name == "blocks.0.token_selection.mlp_head.2.bias" for name in weights.state)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    out = ours.network(x, t, y)
    assert out.std() > 0.05
    assert torch.equal(back.network(x, t, y), out)


def test_a_released_layout_of_sprint_samples_the_same_pictures(
    trained: Callable[[str], Path], tiny_vae: Path, tmp_path: Path
) -> None:
    checkpoint = trained("sprint")

    def pictures(path: Path, *more: str) -> bytes:
        succeed("sample", "--ckpt", path, "--class-labels", "0,1", "--num-sampling-steps", "3", "--guidance", "path-drop",
                "--vae", tiny_vae, "--output", tmp_path / "grid.png", *more)  # fmt: skip
        return (tmp_path / "grid.png").read_bytes()

    made = {}
    for kind, flags in (("ema", []), ("raw", ["--raw"])):
        succeed("train", "export", checkpoint, tmp_path / f"{kind}.pt", "--layout", "released", *flags)
        made[kind] = pictures(tmp_path / f"{kind}.pt", "--model", "DiT-T/2", "--image-size", "64")
    assert made["ema"] == pictures(checkpoint)
    assert made["raw"] == pictures(checkpoint, "--weights", "raw")
    assert made["raw"] != made["ema"]  # other weights make other pictures


def test_an_export_is_a_pretrained_network(trained: Callable[[str], Path], features: Path, tmp_path: Path) -> None:
    succeed("train", "export", trained("dense"), tmp_path / "dense.safetensors")
    flags = ["--model", "DiT-T/2", "--image-size", "64", "--max-steps", "1", "--global-batch-size", "8"]
    places = ["--pretrained", tmp_path / "dense.safetensors", "--feature-path", features, "--results-dir", tmp_path]
    said = succeed("train", *flags, *places).out
    assert "dense.safetensors: 96 tensors loaded from DiT weights" in said


def test_an_export_says_whether_it_is_the_average(trained: Callable[[str], Path], tiny_vae: Path, tmp_path: Path) -> None:
    """The protocol record of its samples says it too: published scores are those of averaged weights."""
    words = ["--vae", tiny_vae, "--num-fid-samples", "1", "--num-sampling-steps", "1", "--sample-dir", tmp_path]
    for name, flags in (("ema", []), ("raw", ["--raw"])):
        succeed("train", "export", trained("dense"), tmp_path / f"{name}.safetensors", *flags)
        succeed("sample_ddp", "--ckpt", tmp_path / f"{name}.safetensors", "--sample-name", name, *words)
        assert json.loads((tmp_path / f"{name}.json").read_text())["weights"] == name
    result = call("sample_ddp", "--ckpt", tmp_path / "ema.safetensors", "--weights", "raw", *words, "--sample-name", "x")
    assert result.code == 2
    assert "ema.safetensors" in result.err


@pytest.mark.parametrize("case", ["released file", "an export", "suffix that says pickle", "missing"])
def test_export_refuses_in_one_sentence(case: str, trained: Callable[[str], Path], pretrained: Path, tmp_path: Path) -> None:
    succeed("train", "export", trained("dense"), tmp_path / "dense.safetensors")
    arguments: dict[str, tuple[Path, Path]] = {
        "released file": (pretrained, tmp_path / "out.safetensors"),
        "an export": (tmp_path / "dense.safetensors", tmp_path / "out.safetensors"),
        "suffix that says pickle": (trained("dense"), tmp_path / "out.pt"),  # ours is safetensors: nobody could read it back
        "missing": (tmp_path / "nothing.safetensors", tmp_path / "out.safetensors"),
    }
    result = call("train", "export", *arguments[case])
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not arguments[case][1].exists()
