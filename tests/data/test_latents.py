"""Codecs: facts before weights, scaling, round trips, one sentence for whatever is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data import latents
from data.latents import bytes_from_pixels, load_codec, pixels_from_bytes, resolve_codec
from runtime.config import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kl/ and tiny/: random autoencoders that shrink by 2 and 4."""
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("codecs")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(root / "kl")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(root / "tiny")
    return root


@pytest.mark.parametrize(("name", "channels", "factor", "scale"), [
    ("ema", 4, 8, 0.18215), ("mse", 4, 8, 0.18215), ("taesd", 4, 8, 1.0), ("pixels", 3, 1, 1.0),
])  # fmt: skip
def test_known_codecs(name: str, channels: int, factor: int, scale: float) -> None:
    spec = resolve_codec(name)
    assert (spec.channels, spec.factor, spec.scale, spec.shift) == (channels, factor, scale, 0.0)
    assert spec.latent_shape(64) == (channels, 64 // factor, 64 // factor)
    assert spec.has_posterior == (name in ("ema", "mse"))


def test_pixels_come_back_even_from_float16() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    codec = load_codec(resolve_codec("pixels"))
    stored = codec.encode(pixels_from_bytes(levels)).half()
    assert stored.min() == -1
    assert stored.max() == 1
    assert torch.equal(codec.decode(stored), levels)
    assert not torch.equal(codec.decode(stored * 0.99), levels)


def test_decoded_pixels_are_clamped() -> None:
    assert bytes_from_pixels(torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1)).flatten().tolist() == [0, 255]


def test_folders_tell_their_kind(autoencoders: Path) -> None:
    kl, tiny = resolve_codec(str(autoencoders / "kl")), resolve_codec(str(autoencoders / "tiny"))
    assert (kl.architecture, kl.factor, kl.scale, kl.shift, kl.has_posterior) == ("AutoencoderKL", 2, 0.5, 0.25, True)
    assert (tiny.architecture, tiny.factor, tiny.scale, tiny.has_posterior) == ("AutoencoderTiny", 4, 1.0, False)


def test_autoencoder_scales_as_the_model_expects(autoencoders: Path) -> None:
    from diffusers import AutoencoderKL

    codec = load_codec(resolve_codec(str(autoencoders / "kl")))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model = AutoencoderKL.from_pretrained(autoencoders / "kl")
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, deviation = codec.encode_moments(pixels)
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(deviation, posterior.std * 0.5)
    torch.testing.assert_close(codec.decode_pixels(mean), decoded)
    assert codec.decode(mean).shape == (2, 16, 16, 3)
    assert mean.shape == (2, 4, 8, 8)


def test_deterministic_autoencoder_has_no_deviation(autoencoders: Path) -> None:
    codec = load_codec(resolve_codec(str(autoencoders / "tiny")))
    mean, deviation = codec.encode_moments(torch.rand(1, 3, 16, 16))
    assert mean.shape == (1, 4, 4, 4)
    assert deviation.abs().max() == 0


@pytest.mark.parametrize(("name", "message"), [
    ("emaa", "did you mean 'ema'"), ("sdxl", "choose from ema, mse, taesd, pixels"), ("no/such/folder", "does not exist"),
])  # fmt: skip
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_codec(name)


@pytest.mark.parametrize(("config", "message"), [
    (None, "holds no config.json"),
    ("{", "cannot be read"),
    ("[]", "cannot be read"),
    (json.dumps({"_class_name": "UNet2DModel"}), "'UNet2DModel'"),
    (json.dumps({"_class_name": "AutoencoderKL"}), "cannot be read"),
    (json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [1], "latents_mean": [0]}), "per channel"),
])  # fmt: skip
def test_odd_folders(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        resolve_codec(str(tmp_path))


def test_pipeline_folder_points_at_its_autoencoder(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"give .*vae"):
        resolve_codec(str(tmp_path))


@pytest.mark.parametrize("size", [0, 4, 250, -8])
def test_sizes_must_divide(size: int) -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        resolve_codec("ema").latent_shape(size)


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncate_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def drop_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    del weights["quant_conv.weight"]
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize("damage", [remove_weights, truncate_weights, drop_one_weight])
def test_damaged_weights_are_refused(tmp_path: Path, autoencoders: Path, damage) -> None:
    shutil.copytree(autoencoders / "kl", tmp_path / "kl")
    damage(tmp_path / "kl")
    with pytest.raises(InputError, match="cannot be read"):
        load_codec(resolve_codec(str(tmp_path / "kl")))


def test_without_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(latents, "_read_weights", unreachable)
    with pytest.raises(InputError, match="hf download stabilityai/sd-vae-ft-mse"):
        load_codec(resolve_codec("mse"))
