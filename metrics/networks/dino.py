"""DINOv2's vision transformers: ViT-L/14 is the network of the Frechet DINO distance (FDD), any of them a network whose patch
features others align with.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; Stein et al. 2023, "Exposing flaws of
generative model evaluation metrics and their unfair treatment of diffusion models". timm brings the layers, an optional
extra: it imports torchvision, which does not install beside every torch, so nothing else here imports it.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from metrics.networks.numerics import backend_name, float32_products, room_for_batch, room_for_weights, uses_tf32
from metrics.networks.weight_files import WeightsFile, weights_file
from runtime.config import InputError

_HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class Variant:
    """One of DINOv2's networks, without registers."""

    name: str
    model: str  # timm's name
    width: int
    published: str  # Meta's file
    gigabytes: float

    @property
    def repository(self) -> str:
        return f"timm/{self.model}"

    @property
    def remedy(self) -> str:
        return f"give Meta's {self.published} or the {_HUB_FILE} of {self.repository}."


LARGE = Variant("DINOv2 ViT-L/14", "vit_large_patch14_dinov2.lvd142m", 1024, "dinov2_vitl14_pretrain.pth", 1.2)
VARIANTS = {
    "dinov2-s": Variant("DINOv2 ViT-S/14", "vit_small_patch14_dinov2.lvd142m", 384, "dinov2_vits14_pretrain.pth", 0.1),
    "dinov2-b": Variant("DINOv2 ViT-B/14", "vit_base_patch14_dinov2.lvd142m", 768, "dinov2_vitb14_pretrain.pth", 0.3),
    "dinov2-l": LARGE,
}

PATCH = 14
SIZE = 224
"""Pixels on a side of what the network sees: 16 x 16 patches of 14."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_POSITION_OFFSET = 0.1


class DinoV2:
    """DINOv2 ViT-L/14. Implements `metrics.networks.FeatureNetwork`; pictures of any size and shape.

    Features are the class token behind the last normalization, 1024 numbers. There is no classifier and no spatial part.
    The weights were published with positions for 37 x 37 patches; they are stretched to 16 x 16 as Meta's own model does
    (`stretched_positions`), because published FDD figures come from it. timm's loader would resample them otherwise.
    """

    name = LARGE.name
    protocol = (
        f"Pillow's bicubic resize of 8-bit pictures to {SIZE} x {SIZE} (antialiased), ImageNet mean and deviation; "
        "37 x 37 positions stretched to 16 x 16 by 16.1 / 37, bicubic"
    )
    distance_name = "FDD"
    head: NDArray[np.float32] | None = None

    def __init__(self, model: nn.Module, sha256: str, device: torch.device) -> None:
        """`model`: timm's vision transformer with its weights; `forward_features` gives tokens (N, 1 + patches, D)."""
        self.sha256 = sha256
        self._tf32 = uses_tf32(device)
        self.backend = backend_name(self._tf32)
        self._device = device
        with room_for_weights():
            self._model: Any = model.to(device).eval().requires_grad_(False)

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """As `FeatureNetwork.activations`: class tokens (N, 1024), no spatial features."""
        small = torch.from_numpy(resized(pictures))  # (N, 224, 224, 3) uint8
        with room_for_batch(len(pictures)), torch.inference_mode(), float32_products(self._tf32):
            tokens = self._model.forward_features(normalized(small.to(self._device)))  # (N, 1 + 256, 1024)
            return tokens[:, 0].cpu().numpy(), None


class PatchFeatures:
    """What a network of DINOv2 says of each patch of a picture, behind its last normalization; the class token is left out."""

    def __init__(self, model: nn.Module, side: int, device: torch.device) -> None:
        """`model` as of `load_transformer`, for pictures of `side` x `side` patches."""
        self._side, self._device = side, device
        with room_for_weights():
            self._model: Any = model.to(device).eval().requires_grad_(False)

    def __call__(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Pictures (N, H, W, 3), bicubically resized to 14 pixels a patch -> (N, patches, D) float32, on the CPU"""
        small = torch.from_numpy(resized(pictures, PATCH * self._side))  # (N, 14 side, 14 side, 3) uint8
        with room_for_batch(len(pictures)), torch.inference_mode(), float32_products(False):
            tokens = self._model.forward_features(normalized(small.to(self._device)))  # (N, 1 + patches, D)
            return tokens[:, 1:].cpu()


def normalized(pictures: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 by ImageNet's mean and deviation"""
    mean, deviation = (torch.tensor(values, device=pictures.device).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def resized(pictures: NDArray[np.uint8], size: int = SIZE) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3) -> (N, size, size, 3), bicubic, each side by its own factor.

    Pillow filters before it shrinks (antialiasing) and rounds and clips to 8 bits after each of the two directions, as the
    published figures do. torch's antialiased bicubic on floats differs by up to 23 grey levels on noise.
    """
    # Pillow lets go of Python's lock while it resizes; one thread would keep a GPU waiting.
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(partial(_resized, size=size), pictures)))


def _resized(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def stretched_positions(table: Tensor, side: int) -> Tensor:
    """Position table (1, 1 + M * M, D), the class token's entry first, -> (1, 1 + side * side, D).

    Bicubic without antialiasing, as in Meta's model: samples stand (side + 0.1) / M apart instead of side / M, an old
    safeguard against rounding that the published features contain.
    """
    places = math.isqrt(table.shape[1] - 1)
    if places == side:
        return table
    scale = (side + _POSITION_OFFSET) / places
    grid = table[:, 1:].float().reshape(1, places, places, -1).permute(0, 3, 1, 2)  # (1, D, M, M)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)  # (1, D, side, side)
    return torch.cat((table[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def open_dino(file: WeightsFile | None, device: torch.device) -> DinoV2:
    """The network of FDD with the weights of `file`, or timm's from the Hugging Face hub; see `load_transformer`."""
    timm = import_timm()
    file = file or published_weights()
    return DinoV2(load_transformer(timm, LARGE, file.path, SIZE // PATCH), file.sha256, device)


def load_transformer(timm: Any, variant: Variant, path: Path, side: int) -> nn.Module:
    """A network for pictures of `side` x `side` patches, with the weights of `path`: Meta's, or timm's .safetensors or .bin.

    Its `forward_features` gives tokens (N, 1 + patches, D), the class token first. Raises InputError where the file holds
    other weights; every name and shape must agree, but for Meta's `mask_token`, which serves training alone.
    """
    weights = _read(path, variant)
    model = timm.create_model(variant.model, pretrained=False, img_size=PATCH * side, num_classes=0)
    model.load_state_dict(_fitted(weights, model.state_dict(), path, variant))
    return model


def published_weights(pinned_sha256: str | None = None, variant: Variant = LARGE, flag: str = "--weights") -> WeightsFile:
    """timm's copy of Meta's weights, from the Hugging Face cache or else downloaded into it, hashed and checked.

    `flag` is what a user without a network can give a file with.
    """
    import huggingface_hub

    repository = variant.repository
    try:
        path = huggingface_hub.hf_hub_download(repository, _HUB_FILE, local_files_only=True)
    except Exception:  # not downloaded yet
        print(
            f"Downloading the weights of DINOv2 ({repository}, {variant.gigabytes} GB) from the Hugging Face hub, once.",
            file=sys.stderr,
        )
        try:
            path = huggingface_hub.hf_hub_download(repository, _HUB_FILE)
        except Exception:  # the hub's client reports a missing network in many ways, some of them misleading
            raise InputError(
                f"the weights of DINOv2 ({repository}) are not on this machine and the Hugging Face hub cannot be reached; "
                f"fetch its {_HUB_FILE} where there is a network, or Meta's {variant.published}, and give it with {flag} FILE."
            ) from None
    return weights_file(path, pinned_sha256)


def import_timm(flag: str = "--network dinov2") -> Any:
    """timm, or InputError where it is not installed or does not import; `flag` is what asked for it."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise InputError(f"{flag} builds the network with timm, which is not installed; run "
                             "`pip install -e .[dinov2]`.") from None  # fmt: skip
        raise _unusable_timm(error) from None
    except Exception as error:  # a torchvision built for another torch fails as ImportError, RuntimeError or OSError
        raise _unusable_timm(error) from None
    return timm


def _unusable_timm(error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"timm is installed but cannot be imported ({type(error).__name__}: {reason}); install a torchvision "
                      f"that fits torch {torch.__version__}.")  # fmt: skip


def _read(path: Path, variant: Variant) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # safetensors, torch, zipfile and pickle each have their own
        raise InputError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors; {variant.remedy}"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no plain table of weights; {variant.remedy}")
    return content


def _fitted(weights: dict[str, Tensor], expected: dict[str, Tensor], path: Path, variant: Variant) -> dict[str, Tensor]:
    """`weights` as the network with the state `expected` takes them; InputError where they are another network's."""
    fitted = {name: value for name, value in weights.items() if name != "mask_token"}
    lacking, foreign = sorted(expected.keys() - fitted.keys()), sorted(fitted.keys() - expected.keys())
    differences = [f"it lacks {_some(lacking)}"] if lacking else []
    differences += [f"it holds {_some(foreign)}, which has no place there"] if foreign else []
    if not differences:
        if _is_square_table(fitted["pos_embed"]):
            fitted["pos_embed"] = stretched_positions(fitted["pos_embed"], math.isqrt(expected["pos_embed"].shape[1] - 1))
        unlike = [name for name in expected if fitted[name].shape != expected[name].shape]
        differences = [f"its {name} is {tuple(fitted[name].shape)}, not {tuple(expected[name].shape)}" for name in unlike[:1]]
    if differences:
        raise InputError(f"{path} is not {variant.name} without registers: {' and '.join(differences)}; {variant.remedy}")
    return fitted


def _is_square_table(table: Tensor) -> bool:
    return table.ndim == 3 and table.shape[1] > 1 and math.isqrt(table.shape[1] - 1) ** 2 == table.shape[1] - 1


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
