"""Codecs: what turns pictures into the latents that a model sees, and back.

A codec is named by `ema`, `mse` (the two fine-tuned SD 1.x autoencoders), `taesd` (their tiny stand-in), `pixels` (no
compression) or a local folder in diffusers' layout. Its facts are known before its weights are read (`resolve_codec`), and
its latents are always scaled for the model (Rombach et al. 2022, section 4.3.2 and appendix D.1: z * scale).
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.config import InputError, nearest

_HUB = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse", "taesd": "madebyollin/taesd"}


@dataclass(frozen=True)
class CodecSpec:
    """What a codec does to shapes and numbers; the manifest of a feature cache holds it."""

    name: str  # ema, mse, taesd, pixels or the absolute path of a folder
    architecture: str  # AutoencoderKL, AutoencoderTiny or pixels
    channels: int  # of a latent
    factor: int  # picture side / latent side
    scale: float  # model latent = (codec latent - shift) * scale
    shift: float = 0.0

    @property
    def has_posterior(self) -> bool:
        """Whether a picture is encoded as a distribution (mean and standard deviation) rather than one latent."""
        return self.architecture == "AutoencoderKL"

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(channels, height, width) of a latent; InputError where `image_size` is no multiple of the factor."""
        if image_size < self.factor or image_size % self.factor:
            near = max(self.factor, round(image_size / self.factor) * self.factor)
            raise InputError(
                f"image size {image_size} is not a multiple of {self.factor}, by which codec {self.name!r} shrinks pictures; "
                f"use {near}."
            )
        return self.channels, image_size // self.factor, image_size // self.factor


PIXELS = CodecSpec("pixels", "pixels", channels=3, factor=1, scale=1.0)
SD_VAE = CodecSpec("ema", "AutoencoderKL", channels=4, factor=8, scale=0.18215)
_KNOWN = {
    "ema": SD_VAE,
    "mse": CodecSpec("mse", "AutoencoderKL", channels=4, factor=8, scale=0.18215),
    "taesd": CodecSpec("taesd", "AutoencoderTiny", channels=4, factor=8, scale=1.0),
    "pixels": PIXELS,
}


def resolve_codec(name: str) -> CodecSpec:
    """The facts of the codec called `name`, or of the one in the folder `name`; reads no weights. Raises InputError."""
    if name in _KNOWN:
        return _KNOWN[name]
    if not os.path.isdir(name):
        if os.sep in name:
            raise InputError(
                f"codec folder {name} does not exist; give the folder of a diffusers autoencoder, or ema, mse, taesd."
            )
        raise InputError(f"codec {name!r} is neither known nor a folder{nearest(name, list(_KNOWN))}")
    return _folder_spec(Path(name).resolve())


def _folder_spec(folder: Path) -> CodecSpec:
    if not (folder / "config.json").is_file():
        inner = next((name for name in ("vae", "taesd") if (folder / name / "config.json").is_file()), None)
        hint = f"give {folder / inner}" if inner else "give the folder of a diffusers AutoencoderKL or AutoencoderTiny"
        raise InputError(f"{folder} holds no config.json, so it is no codec; {hint}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config.get("_class_name")
        if architecture == "AutoencoderKL":
            stages, default_scale = config["block_out_channels"], SD_VAE.scale
        elif architecture == "AutoencoderTiny":
            stages, default_scale = config["encoder_block_out_channels"], 1.0
        else:
            raise InputError(f"{folder} holds {architecture!r}; codecs are AutoencoderKL and AutoencoderTiny.")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise InputError(f"{folder} normalizes its latents per channel, which is not supported; use another codec.")
        return CodecSpec(
            name=str(folder),
            architecture=architecture,
            channels=int(config.get("latent_channels", 4)),
            factor=2 ** (len(stages) - 1),
            scale=float(config.get("scaling_factor") or default_scale),
            shift=float(config.get("shift_factor") or 0.0),
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be read as a codec's configuration ({error!r}); copy it again."
        ) from None


class Codec(ABC):
    """Encodes pixels and decodes latents. Pixels are float32 RGB in [-1, 1], (N, 3, S, S); see `pixels_from_bytes`."""

    spec: CodecSpec

    @abstractmethod
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled for the model; the deviation is 0 where the codec is
        deterministic. -> two tensors (N, channels, S / factor, S / factor) float32
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """The most likely latents, scaled for the model. -> (N, channels, S / factor, S / factor) float32"""
        return self.encode_moments(pixels)[0]

    @abstractmethod
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """(N, channels, s, s), scaled for the model -> (N, 3, s * factor, s * factor) float32, about [-1, 1]"""

    def decode(self, latents: Tensor) -> Tensor:
        """(N, channels, s, s), scaled for the model -> (N, s * factor, s * factor, 3) uint8 RGB"""
        return bytes_from_pixels(self.decode_pixels(latents))


class PixelCodec(Codec):
    """The pixels themselves as latents."""

    spec = PIXELS

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, torch.zeros_like(pixels)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return latents.float()


class AutoencoderCodec(Codec):
    """A diffusers autoencoder on one device, in float32."""

    def __init__(self, spec: CodecSpec, model: Any, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self._model.encode(pixels.to(self._device))
        if self.spec.has_posterior:
            mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std  # (N, C, s, s) each
        else:
            mean, deviation = encoded.latents, torch.zeros_like(encoded.latents)  # (N, C, s, s) each
        return (mean - self.spec.shift) * self.spec.scale, deviation * self.spec.scale

    @torch.inference_mode()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents.to(self._device).float() / self.spec.scale + self.spec.shift).sample


def load_codec(spec: CodecSpec, device: str | torch.device = "cpu") -> Codec:
    """Reads the weights of `spec` onto `device`; what comes from the Hugging Face hub is downloaded once.

    Raises InputError when the weights are neither here nor reachable.
    """
    if spec.architecture == "pixels":
        return PixelCodec()
    import diffusers

    architecture = getattr(diffusers, spec.architecture)
    model = _from_hub(architecture, spec) if spec.name in _HUB else _from_folder(architecture, spec)
    return AutoencoderCodec(spec, model, torch.device(device))


def _from_folder(architecture: Any, spec: CodecSpec) -> Any:
    try:
        return _read_weights(architecture, spec.name, local_files_only=True)
    except Exception as error:  # diffusers, safetensors and torch each have their own for a missing or damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the weights in {spec.name} cannot be read ({reason}); copy the folder again.") from None


def _from_hub(architecture: Any, spec: CodecSpec) -> Any:
    repository = _HUB[spec.name]
    try:
        return _read_weights(architecture, repository, local_files_only=True)
    except Exception:  # not downloaded yet
        print(f"Downloading the weights of codec {spec.name!r} ({repository}) from the Hugging Face hub, once.", flush=True)
    try:
        return _read_weights(architecture, repository, local_files_only=False)
    except Exception:  # the hub's client reports a missing network in many ways, some of them misleading
        raise InputError(
            f"the weights of codec {spec.name!r} ({repository}) are not on this machine and the Hugging Face hub cannot be "
            f"reached; run `hf download {repository} --local-dir FOLDER` where there is a network and give that folder instead."
        ) from None


def _read_weights(architecture: Any, where: str, local_files_only: bool) -> Any:
    """The model in float32. What diffusers merely logs, weights that it had to invent, is a ValueError here."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    model, report = architecture.from_pretrained(
        where, local_files_only=local_files_only, torch_dtype=torch.float32, output_loading_info=True
    )
    if invented := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{invented[0]} is missing or has another shape than config.json promises")
    return model


def pixels_from_bytes(pictures: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 RGB -> (N, 3, S, S) float32 in [-1, 1]"""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def bytes_from_pixels(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) float, about [-1, 1] -> (N, S, S, 3) uint8 RGB, rounded to the nearest grey level."""
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
