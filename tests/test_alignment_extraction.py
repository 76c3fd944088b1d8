"""Alignment targets from pictures: what is stored, for any number of processes and after a kill; and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment_runs import WIDTH, SmallTransformer, stand_in
from extraction_runs import digests, extract, extract_in_turn, flags
from extraction_runs import pictures as pictures
from PIL import Image
from small_runs import metrics, state_at, succeed

import extract_features
from data import extraction
from data.images import load_picture, open_source
from metrics.networks.dino import stretched_positions
from runtime.config import InputError


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return stand_in(monkeypatch, tmp_path)


def aligning(weights: Path, *more: str) -> list[str]:
    return ["--vae", "pixels", "--alignment", "dinov2-s", "--alignment-weights", str(weights), *more]


def test_targets_are_what_the_encoder_says_of_the_picture_and_its_mirror(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(weights)))
    said = capsys.readouterr().out
    assert "dinov2-s features of 4 x 4 tokens" in said
    assert "MB" in said
    targets = np.load(tmp_path / "f" / "alignment.npy")
    assert (targets.shape, targets.dtype) == ((23, 2, 16, WIDTH), np.float16)
    encoder = SmallTransformer(56)
    state = torch.load(weights)
    encoder.load_state_dict(state | {"pos_embed": stretched_positions(state["pos_embed"], 4)})
    source = open_source(pictures)
    for index, name in enumerate(source.list_pictures().names[:6]):
        picture = load_picture(source, name, 8)
        for mirror, view in enumerate((picture, picture[:, ::-1])):
            large = np.asarray(Image.fromarray(view).resize((56, 56), Image.Resampling.BICUBIC))
            pixels = torch.tensor((large / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(2, 0, 1)
            with torch.no_grad():
                expected = encoder.forward_features(pixels[None])[0, 1:]
            np.testing.assert_allclose(targets[index, mirror], expected.numpy(), atol=4e-3)
        # The mirror image is seen anew: its features are not those of the picture, turned around.
        turned = targets[index, 0].reshape(4, 4, WIDTH)[:, ::-1].reshape(16, WIDTH)
        assert np.abs(turned.astype(np.float32) - targets[index, 1]).max() > 0.1


def test_training_takes_what_was_extracted(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(weights)))
    monkeypatch.delitem(sys.modules, "timm")
    words = ["--model", "DiT-16x4x2/2", "--method", "dense", "--objective", "flow", "--feature-path", tmp_path / "f",
             "--image-size", "8", "--global-batch-size", "8", "--lr", "3e-3", "--max-steps", "20", "--log-every", "5",
             "--alignment", "0.5", "--results-dir", tmp_path, "--run-name", "run"]  # fmt: skip
    said = succeed("train", *words).out
    assert "alignment: weight 0.5 behind block 2, with dinov2-s features of 4 x 4 tokens" in said
    assert state_at(tmp_path / "run")["alignment/projector.4.weight"].shape == (WIDTH, 2048)
    curve = [line["alignment"] for line in metrics(tmp_path / "run")]
    assert curve[-1] < curve[0] - 0.1


def test_latents_are_those_of_a_cache_without(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(weights)))
    extract(monkeypatch, *flags(pictures, tmp_path / "plain"))
    one, other = digests(tmp_path / "f"), digests(tmp_path / "plain")
    assert {name for name in one if one[name] != other.get(name)} == {"alignment.npy", "manifest.json"}
    with pytest.raises(InputError, match=r"alignment none, not dinov2-s; give another --features-path"):
        extract(monkeypatch, *flags(pictures, tmp_path / "plain", *aligning(weights)))


def test_the_bytes_are_the_same_for_any_number_of_processes(pictures: Path, weights: Path, tmp_path: Path) -> None:
    def config(name: str) -> extract_features.ExtractConfig:
        return extract_features.ExtractConfig(
            str(pictures), str(tmp_path / name), image_size=8, vae="pixels", batch_size=4, alignment="dinov2-s",
            alignment_weights=str(weights),
        )  # fmt: skip

    expected = extract_in_turn(config("1"), 1)
    assert "alignment.npy" in expected
    for processes in (2, 7):
        assert extract_in_turn(config(str(processes)), processes) == expected

    def other_weights(rank: int) -> None:
        changed = torch.load(weights)
        torch.save(changed | {"norm.bias": changed["norm.bias"] + rank}, weights)

    with pytest.raises(InputError, match="process 0 found"):
        extract_in_turn(config("other"), 2, other_weights)


@pytest.mark.parametrize("write", [1, 2, 3, 5, 8])
def test_killed_and_gone_on(pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """In the middle of a block's latents, of its targets, of its line in the journal."""
    words = flags(pictures, tmp_path / "f", *aligning(weights))
    real, calls = extraction._write_all, 0

    class Killed(BaseException):
        pass

    def interrupted(file: Any, data: bytes) -> None:
        nonlocal calls
        calls += 1
        real(file, data[: len(data) // 2] if calls == write else data)
        if calls == write:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_write_all", interrupted)
        with pytest.raises(Killed):
            extract(patch, *words)
    extract(monkeypatch, *words)
    extract(monkeypatch, *flags(pictures, tmp_path / "whole", *aligning(weights)))
    assert digests(tmp_path / "f") == digests(tmp_path / "whole")


def test_what_extraction_refuses(pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_features, "load_codec", lambda *arguments: pytest.fail("a codec was loaded"))
    (tmp_path / "no.pth").write_bytes(b"no weights")
    for more, message in [
        (["--vae", "pixels", "--alignment-weights", str(weights)], "--alignment-weights is for --alignment, which is none"),
        (["--vae", "pixels", "--alignment-patch", "4"], "--alignment-patch is for --alignment"),
        (["--vae", "pixels", "--alignment", "dinov2"], "did you mean 'dinov2-"),
        (aligning(weights, "--alignment-patch", "3"), "--alignment-patch is 3, which does not divide the latents' 8 x 8"),
        (aligning(weights, "--alignment-patch", "0"), "--alignment-patch is 0"),
        (aligning(tmp_path / "nowhere.pth"), r"no such file; give Meta's dinov2_vits14_pretrain\.pth"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            extract(monkeypatch, *flags(pictures, tmp_path / "f", *more))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "f").exists()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm"):
        extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(weights)))


def test_weights_of_another_network_are_refused(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"cannot be read as weights.*give Meta's dinov2_vits14"):
        extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(tmp_path / "no.pth")))
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "no.pth")
    with pytest.raises(InputError, match=r"is not DINOv2 ViT-S/14 without registers: it lacks norm\.bias"):
        extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(tmp_path / "no.pth")))
    extract(monkeypatch, *flags(pictures, tmp_path / "f", *aligning(weights)))  # nothing was lost
