"""Released SiT weights through the scripts: sampled, trained on, exported and read back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_runs import assert_refused
from small_runs import call, header_at, random_network, state_at, succeed
from torch import Tensor

from data.latents import PIXELS, load_codec
from models import Backbone, DiT
from models.weights import from_sit
from runtime.checkpoint import checkpoints, read_tensors
from runtime.decoding import decode_pictures
from runtime.sampling import picture_grid
from runtime.seeding import Keys, normal
from tests.models.random_networks import one_thread as one_thread

NAME = "SiT-T/2"
SCALE = 1.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs() -> DiT:
    """A SiT for pictures of 8 x 8 as its authors train it: DiT's network with variance outputs, which is given its own time."""
    torch.manual_seed(0)
    backbone = Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=3)
    return random_network("dense", replace(backbone, time_scale=1.0)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def released(theirs: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sit") / "SiT-T-2-8x8.pt"
    torch.save({"ema": theirs.state_dict(), "args": None}, path)
    return path


# Sampling ------------------------------------------------------------------------------------------------------------


def words(path: Path, output: Path) -> list[object]:
    return ["--ckpt", path, "--class-labels", "0,1,2", "--sampler", "euler", "--num-sampling-steps", "5", "--cfg-scale", SCALE,
            "--output", output]  # fmt: skip


def of_released(path: Path, output: Path, model: str = NAME) -> list[object]:
    return [*words(path, output), "--model", model, "--image-size", "8", "--vae", "pixels"]


def pixels(path: Path) -> np.ndarray:
    found: np.ndarray = np.asarray(Image.open(path)).astype(np.int64)
    return found


def their_pictures(theirs: DiT) -> np.ndarray:
    """Euler's method along SiT's own time, from noise (0) to data (1), on its own velocities, the first half of what it puts
    out.
    """
    labels, null = torch.arange(3), torch.full((3,), 3)
    x = normal(Keys(0, 0, labels), "start noise", (3, 8, 8)).double()
    for step in range(5):
        # Our timestep is 1000 times what a network of time_scale 1 is given.
        time = torch.full((3,), 1000 * step / 5)
        conditional, unconditional = (theirs(x.float(), time, y).chunk(2, dim=1)[0].double() for y in (labels, null))
        x = x + (unconditional + SCALE * (conditional - unconditional)) / 5
    grid: np.ndarray = picture_grid(decode_pictures(load_codec(PIXELS, CPU), x.float())).numpy().astype(np.int64)
    return grid


def test_a_released_sit_samples_as_along_its_own_time(theirs: DiT, released: Path, tmp_path: Path) -> None:
    said = succeed("sample", *of_released(released, tmp_path / "grid.png")).out
    assert "SiT: time and velocity reversed, variance outputs left out" in said
    assert f"dense {NAME} under flow" in said
    assert "the variance outputs are left out" not in said  # said once is enough
    made, expected = pixels(tmp_path / "grid.png"), their_pictures(theirs)
    assert expected.std() > 30
    assert np.abs(made - expected).max() <= 1


def test_a_sit_that_is_not_converted_is_caught(
    theirs: DiT, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.sampling.as_ours", lambda weights, *rest: weights)
    succeed("sample", *of_released(released, tmp_path / "grid.png"))
    assert np.abs(pixels(tmp_path / "grid.png") - their_pictures(theirs)).max() > 20


# Training ------------------------------------------------------------------------------------------------------------


Train = Callable[..., str]


@pytest.fixture
def train(pixel_features: Path, released: Path, tmp_path: Path) -> Train:
    """One step so short that it leaves the weights where they were -> what was said."""

    def run(method: str, *more: object) -> str:
        return succeed("train", *trained(method, pixel_features, released, tmp_path), *more).out

    return run


def trained(method: str, features: Path, start: Path, results: Path) -> list[object]:
    return ["--model", NAME, "--method", method, "--pretrained", start, "--feature-path", features, "--image-size", "8",
            "--max-steps", "1", "--global-batch-size", "4", "--lr", "1e-12", "--results-dir", results,
            "--run-name", method]  # fmt: skip


def moved(run: Path, theirs: DiT) -> float:
    """How far a run's weights are from those of the SiT it started from, in our conventions."""
    ours, expected = state_at(run), from_sit(theirs.state_dict())
    names = ("t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias",
             "y_embedder.embedding_table.weight")  # fmt: skip
    return max(float((ours[f"model/{name}"] - expected[name]).abs().max()) for name in names)


@pytest.mark.parametrize("method", ["dense", "sparsedit"])
def test_training_starts_from_a_released_sit(method: str, train: Train, theirs: DiT, tmp_path: Path) -> None:
    assert "SiT: time and velocity reversed" in train(method)
    header = header_at(tmp_path / method)
    backbone = header["network"]["backbone"]
    assert (header["objective"], backbone["objective"], backbone["time_scale"]) == ("flow", "flow", 1.0)
    assert (backbone["learn_sigma"], header["network"]["model"]) == (False, NAME)
    assert moved(tmp_path / method, theirs) < 1e-6


def test_training_from_a_sit_that_is_not_converted_is_caught(
    train: Train, theirs: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.as_ours", lambda weights, *rest: weights)
    train("dense")
    assert moved(tmp_path / "dense", theirs) > 0.01


# Export --------------------------------------------------------------------------------------------------------------


def exported(run: Path, output: Path) -> Path:
    said = succeed("train", "export", checkpoints(run)[-1], output, "--layout", "released").out
    assert said.strip() == f"{output}: averaged weights of step 1, released layout"  # nothing that the loader must know
    return output


@pytest.mark.parametrize("method", ["dense", "sparsedit"])
def test_an_exported_sit_reads_back_as_one(method: str, train: Train, tmp_path: Path) -> None:
    train(method)
    output = exported(tmp_path / method, tmp_path / "released.pt")
    succeed("sample", *words(checkpoints(tmp_path / method)[-1], tmp_path / "ours.png"))
    succeed("sample", *of_released(output, tmp_path / "back.png"))
    ours, back = pixels(tmp_path / "ours.png"), pixels(tmp_path / "back.png")
    assert ours.std() > 30
    assert np.abs(ours - back).max() <= 1  # the time's weights are rounded twice


def test_an_exported_sit_is_in_its_authors_conventions(train: Train, theirs: DiT, tmp_path: Path) -> None:
    train("dense")
    output = exported(tmp_path / "dense", tmp_path / "released.safetensors")
    state, original = read_tensors(output, ""), theirs.state_dict()
    assert set(state) == set(original)
    without: list[Tensor] = [state["t_embedder.mlp.0.weight"] - original["t_embedder.mlp.0.weight"]]
    # Six channels at each of a patch's four places, of which the last three are the variance that SiT throws away.
    rows, theirs_rows = (weights["final_layer.linear.weight"].unflatten(0, (4, 6)) for weights in (state, original))
    without.append(rows[:, :3] - theirs_rows[:, :3])
    assert not rows[:, 3:].any()
    assert max(float(part.abs().max()) for part in without) < 1e-6


def test_an_export_that_is_not_turned_back_is_caught(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("dense")
    monkeypatch.setattr("runtime.export.from_sit", lambda state: state)
    output = exported(tmp_path / "dense", tmp_path / "released.pt")
    succeed("sample", *words(checkpoints(tmp_path / "dense")[-1], tmp_path / "ours.png"))
    succeed("sample", *of_released(output, tmp_path / "back.png"))
    assert np.abs(pixels(tmp_path / "ours.png") - pixels(tmp_path / "back.png")).max() > 20


# Refusals ------------------------------------------------------------------------------------------------------------


SAMPLING_REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "another time": (["--time-scale", "1000"], ["SiT embeds the flow time itself; leave out --time-scale 1000."]),
    "noise": (["--objective", "ddpm", "--sampler", "ddpm"], [NAME, "flow"]),
    "a sampler of noise": (["--sampler", "ddim"], ["--sampler ddim is not for networks trained under flow; choose from euler"]),
    "another size": (["--image-size", "16"], ["--image-size 8", "not 16"]),
    "no cheap path": (["--guidance", "path-drop"], ["path-drop needs a network with a cheap path"]),
}


@pytest.mark.parametrize("case", SAMPLING_REFUSED)
def test_sampling_a_sit_refuses_in_one_sentence(
    case: str, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.sampling.build_with", lambda *arguments: pytest.fail("a network was built"))
    more, named = SAMPLING_REFUSED[case]
    assert_refused(call("sample", *of_released(released, tmp_path / "grid.png"), *more), *named)
    assert not (tmp_path / "grid.png").exists()


TRAINING_REFUSED: dict[str, tuple[str, list[str], list[str]]] = {
    "another time": ("dense", ["--time-scale", "1000"], ["SiT embeds the flow time itself; leave out --time-scale 1000."]),
    "noise": ("dense", ["--objective", "ddpm"], ["a backbone of --objective flow; for ddpm give --model DiT-T/2."]),
    "a variance": ("dense", ["--learn-sigma"], ["--objective flow predicts no variance"]),
    "another method": ("sprint", [], ["--method sprint cannot start from its weights"]),
    "another backbone": ("dense", ["--model", "SiT-S/2"], ["does not fit the network", "give the --model it was made with"]),
}


@pytest.mark.parametrize("case", list(TRAINING_REFUSED))
def test_training_from_a_sit_refuses_in_one_sentence(
    case: str, pixel_features: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.build", lambda *arguments: pytest.fail("a network was built"))
    method, more, named = TRAINING_REFUSED[case]
    assert_refused(call("train", *trained(method, pixel_features, released, tmp_path / "results"), *more), *named)
    assert not (tmp_path / "results").exists()


def test_a_sit_of_ours_is_never_converted_again(train: Train, theirs: DiT, tmp_path: Path) -> None:
    """Its header says what it is; the known-bad variant: the same tensors without it."""
    train("dense")
    path = checkpoints(tmp_path / "dense")[-1]
    refused = call("sample", *words(path, tmp_path / "grid.png"), "--model", "DiT-T/2")
    assert_refused(refused, f"holds a network for --model {NAME}, not DiT-T/2")
    assert "reversed" not in train("dense", "--pretrained", path, "--run-name", "again")
    assert moved(tmp_path / "again", theirs) < 1e-6
    torch.save(read_tensors(path, "ema/"), tmp_path / "bare.pt")
    train("dense", "--pretrained", tmp_path / "bare.pt", "--run-name", "twice")
    assert moved(tmp_path / "twice", theirs) > 0.01
