"""The vision encoder whose patch features are extracted beside the latents: targets of representation alignment.

REPA (Yu et al. 2024, "Representation Alignment for Generation", arXiv 2410.06940) takes DINOv2 ViT-B/14. The encoder sees the
picture at 14 pixels for each token of the map (256 pixels, latents of 32 x 32, patch 2: 16 x 16 tokens, 224 pixels), so that
every token has one patch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data.latents import CodecSpec
from data.manifest import AlignmentSpec
from metrics.networks.dino import VARIANTS, PatchFeatures, import_timm, load_transformer, published_weights
from metrics.networks.weight_files import WeightsFile, weights_file
from runtime.config import InputError

FLAG = "--alignment-weights"


def alignment_spec(encoder: str, weights: str | None, patch_size: int, codec: CodecSpec, image_size: int) -> AlignmentSpec:
    """What will be stored, from the flags. `weights` None: those of the Hugging Face hub, fetched where they are not here.

    InputError where tokens of `patch_size` latent places do not tile the latent, or timm or the weights are not to be had.
    """
    _, rows, columns = codec.latent_shape(image_size)
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        raise InputError(
            f"--alignment-patch is {patch_size}, which does not divide the latents' {rows} x {columns}; give the patch size of "
            "the network that is to be trained, the number behind the slash of its --model."
        )
    import_timm(f"--alignment {encoder}")
    file = _weights(encoder, weights)
    return AlignmentSpec(encoder, file.sha256, patch_size, (rows // patch_size, columns // patch_size), VARIANTS[encoder].width)


def open_encoder(spec: AlignmentSpec, weights: str | None, device: torch.device) -> PatchFeatures:
    """The encoder of `spec`, on `device`. InputError where this machine has other weights than the spec was made with."""
    variant, file = VARIANTS[spec.name], _weights(spec.name, weights)
    if file.sha256 != spec.sha256:
        raise InputError(
            f"{file.path} has the SHA-256 {file.sha256}, and process 0 found {spec.sha256}; give all machines the same file."
        )
    side = spec.grid[0]
    return PatchFeatures(load_transformer(import_timm(f"--alignment {spec.name}"), variant, file.path, side), side, device)


def _weights(encoder: str, given: str | None) -> WeightsFile:
    if given is None:
        return published_weights(variant=VARIANTS[encoder], flag=FLAG)
    if not Path(given).is_file():
        raise InputError(f"{FLAG} {given}: no such file; {VARIANTS[encoder].remedy}")
    return weights_file(given)
