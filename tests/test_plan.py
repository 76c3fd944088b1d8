"""`train.py plan`: the cost of a network before there are features or weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from small_runs import call, random_network, succeed

from models import Backbone
from runtime.checkpoint import save_checkpoint
from runtime.networks import describe


def test_it_says_the_cost_of_a_preset_and_draws_it(tmp_path: Path) -> None:
    target = tmp_path / "density.png"
    said = succeed("train", "plan", "--config", "configs/sparsedit-xl-2-256-r61-86.yaml", "--output", target).out
    for words in (
        "69.04 GMACs per image and pass, the mean over timesteps",
        "10,9,8,7,6@0,363,574,761,925",
        "paper prints 68.05",
    ):
        assert words in said
    assert Image.open(target).size[0] > 500


def test_flags_win_and_the_codec_decides_the_map(tmp_path: Path) -> None:
    said = succeed("train", "plan", "--config", "configs/demo-sparsedit-dynamic.yaml", "--vae", "pixels", "--density", "2").out
    assert "token density 2: 2x2 = 4 of 16 tokens" in said
    assert "mean" not in said


def test_of_a_network_that_decides_while_it_runs_it_says_the_most_and_the_target() -> None:
    said = succeed("train", "plan", "--config", "configs/dydit-xl-2-256-f70.yaml").out
    for words in (
        "at most 119.2 GMACs per image and pass (100.5% of the dense backbone's 118.6)",
        "target 0.7 of attention and MLP, reached at step 5,000: 82.87 of 118.4 GMACs per image and pass",
        "two passes a training step throughout: the second one has everything on",
    ):
        assert words in said
    assert "mean" not in said
    assert "two passes" not in succeed("train", "plan", "--config", "configs/dydit-s-2-256-f50.yaml").out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--density", "17"], ["17x17", "16x16"]),
        (["--image-size", "250"], ["250", "multiple of 8"]),
        (["--method", "dense", "--output", "x.png"], ["--output", "--method dense"]),
        (["--densty", "8"], ["--densty", "--density"]),
        (["--model", "DiT-XL/3"], ["DiT-XL/3"]),
    ],
)
def test_wrong_input_is_answered_in_one_sentence(words: list[str], named: list[str], tmp_path: Path) -> None:
    result = call("train", "plan", *words)
    assert result.code == 2
    assert all(name in result.err for name in named)
    assert "Traceback" not in result.err


def test_a_checkpoint_to_start_from_is_followed(tmp_path: Path) -> None:
    network = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), num_classes=3), {"density": "4,3@0,500"})
    header = {"network": describe(network, "DiT-T/2"), "data": {}, "step": 1}
    save_checkpoint(tmp_path / "sparse.safetensors", network.state_dict(), header)
    start = ["plan", "--model", "DiT-T/2", "--image-size", "64", "--pretrained", tmp_path / "sparse.safetensors"]
    assert "token density 4,3@0,500" in succeed("train", *start).out
    assert "token density 2: 2x2" in succeed("train", *start, "--density", "2").out
    assert "2x2" in succeed("train", *start, "--density", "none").out
    save_checkpoint(tmp_path / "sparse.safetensors", network.state_dict(), {**header, "network": {"method": "sparsedit"}})
    damaged = call("train", *start)
    assert damaged.code == 2
    assert "sparse.safetensors: the checkpoint's header is damaged" in damaged.err
