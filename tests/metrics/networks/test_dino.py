"""DINOv2: pictures, positions and weights as Meta's model takes them, on a small vision transformer in timm's place."""

from __future__ import annotations

import builtins
import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.networks.dino import LARGE, SIZE, open_dino, published_weights, resized, stretched_positions
from metrics.networks.weight_files import WeightsFile, weights_file
from runtime.config import InputError

CPU = torch.device("cpu")
WIDTH = 8


class SmallTransformer(nn.Module):
    """timm's names and shapes for the parts that matter here, one attention layer deep."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // 14) ** 2, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 14, 14)})
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1) + self.pos_embed
        return self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool, img_size: int, num_classes: int) -> nn.Module:
        assert (name, pretrained, img_size, num_classes) == (LARGE.model, False, SIZE, 0)
        return SmallTransformer(img_size)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))


@pytest.fixture
def published() -> dict[str, Tensor]:
    """Weights as they are published, for 518 pixels."""
    torch.manual_seed(0)
    return {name: value.clone() for name, value in SmallTransformer(518).state_dict().items()}


def saved(path: Path, weights: Any) -> WeightsFile:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return weights_file(path)


def some_pictures(height: int = 60, width: int = 40) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 500), (64, 64), (224, 224)])
def test_pictures_are_resized_as_pillow_does(height: int, width: int) -> None:
    pictures = some_pictures(height, width)
    pillow = [Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
    result = resized(pictures)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, [np.asarray(picture) for picture in pillow])


def test_shrinking_filters_first() -> None:
    """A chequered picture becomes grey; without antialiasing its squares would come through."""
    board = np.indices((448, 448)).sum(0) % 2 * 255
    picture = np.repeat(board[None, :, :, None], 3, axis=-1).astype(np.uint8)
    assert np.ptp(resized(picture)[:, 8:-8, 8:-8].astype(int)) < 8
    nearest = np.asarray(Image.fromarray(picture[0]).resize((150, 150), Image.Resampling.NEAREST))
    assert np.ptp(nearest) == 255


def test_positions_are_stretched_as_metas_model_does() -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 1 + 37 * 37, WIDTH)
    result = stretched_positions(table, 16)
    assert torch.equal(result[:, :1], table[:, :1])
    grid = table[:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / 37
    expected = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(result[:, 1:], expected)
    for options in ({"size": 16}, {"size": 16, "antialias": True}):
        other = F.interpolate(grid, mode="bicubic", **options).flatten(2).transpose(1, 2)
        assert (other - expected).abs().max() > 0.05
    assert stretched_positions(table, 37) is table


def test_stretched_positions_keep_rows_and_columns() -> None:
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    table = torch.cat((torch.zeros(1, 1, 2), torch.stack((rows, columns), -1).reshape(1, -1, 2)), dim=1)
    grid = stretched_positions(table, 16)[0, 1:].reshape(16, 16, 2)
    # Place i of 16 stands at (i + 0.5) * 37 / 16.1 - 0.5 of 37. torch's cubic (a = -0.75) bends a straight line by 0.05.
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(grid[2:-2, 5, 0], places[2:-2], atol=0.06, rtol=0)
    torch.testing.assert_close(grid[5, 2:-2, 1], places[2:-2], atol=0.06, rtol=0)


@pytest.mark.parametrize("name", ["dinov2_vitl14_pretrain.pth", "model.safetensors", "pytorch_model.bin"])
def test_class_tokens_of_either_file(tmp_path: Path, published: dict[str, Tensor], name: str) -> None:
    extra = {"mask_token": torch.zeros(1, WIDTH)} if name.endswith(".pth") else {}
    file = saved(tmp_path / name, published | extra)
    network = open_dino(file, CPU)
    pictures = some_pictures()
    pool, spatial = network.activations(pictures)
    assert spatial is None
    assert pool.dtype == np.float32

    plain = SmallTransformer(SIZE)
    plain.load_state_dict(published | {"pos_embed": stretched_positions(published["pos_embed"], 16)})
    pixels = torch.from_numpy(resized(pictures)).permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = plain.forward_features((pixels - mean) / deviation)
    np.testing.assert_allclose(pool, tokens[:, 0].numpy(), atol=1e-5)
    assert np.abs(pool - tokens[:, 1].numpy()).max() > 0.1
    assert np.abs(pool[0] - pool[1]).max() > 1e-3
    alone = np.concatenate([network.activations(pictures[i : i + 1])[0] for i in range(3)])
    np.testing.assert_allclose(alone, pool, atol=1e-5)

    assert (network.name, network.distance_name, network.sha256, network.backend, network.head) == (
        "DINOv2 ViT-L/14", "FDD", hashlib.sha256(file.path.read_bytes()).hexdigest(), "PyTorch float32", None,
    )  # fmt: skip


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, published: dict[str, Tensor]) -> None:
    file = saved(tmp_path / "half.safetensors", {name: value.half() for name, value in published.items()})
    assert open_dino(file, CPU).activations(some_pictures())[0].dtype == np.float32


def test_neither_products_nor_convolutions_drop_to_tf32(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever moved torch's switches after the network was named as one of float32."""
    seen = []
    forward = SmallTransformer.forward_features

    def watched(self: SmallTransformer, x: Tensor) -> Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return forward(self, x)

    monkeypatch.setattr(SmallTransformer, "forward_features", watched)
    network = open_dino(saved(tmp_path / "weights.pth", published), CPU)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        network.activations(some_pictures())
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False)]


def test_a_full_gpu_asks_for_smaller_batches(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = open_dino(saved(tmp_path / "weights.pth", published), CPU)

    def full(self: SmallTransformer, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SmallTransformer, "forward_features", full)
    with pytest.raises(InputError, match=r"lower --batch-size \(it is 3\)"):
        network.activations(some_pictures())


def changed(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls_token": None}, "it lacks cls_token; give"),
        ({"cls_token": None, "norm.bias": None}, "it lacks cls_token and 1 more; give"),
        ({"register_tokens": torch.zeros(1, 4, WIDTH)}, "it holds register_tokens, which has no place there; give"),
        ({"norm.bias": None, "extra": torch.zeros(1)}, "it lacks norm.bias and it holds extra"),
        ({"norm.bias": torch.zeros(3)}, r"its norm.bias is \(3,\), not \(8,\)"),
        ({"pos_embed": torch.zeros(1, 1371, WIDTH)}, r"its pos_embed is \(1, 1371, 8\), not \(1, 257, 8\)"),
        ({"pos_embed": torch.zeros(0)}, r"its pos_embed is \(0,\)"),
        ({"pos_embed": torch.zeros(1, 1, WIDTH)}, r"its pos_embed is \(1, 1, 8\)"),
        ({"pos_embed": torch.zeros(1, 1370, 4)}, r"its pos_embed is \(1, 257, 4\)"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, published: dict[str, Tensor], changes: dict, message: str) -> None:
    file = saved(tmp_path / "weights.pth", changed(published, **changes))
    with pytest.raises(InputError, match=message):
        open_dino(file, CPU)


def test_damaged_files(tmp_path: Path, published: dict[str, Tensor]) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        whole = saved(tmp_path / name, published).path
        whole.write_bytes(whole.read_bytes()[:1000])
        with pytest.raises(InputError, match=f"{name} cannot be read as weights"):
            open_dino(weights_file(whole), CPU)
    for content in (SimpleNamespace(), {"teacher": published}, [1]):
        with pytest.raises(InputError, match=r"cannot be read as weights|no plain table of weights"):
            open_dino(saved(tmp_path / "other.pth", content), CPU)


def test_the_hubs_copy(tmp_path: Path, published: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = saved(tmp_path / "model.safetensors", published)
    asked, cached, reachable = [], True, True

    def hf_hub_download(repository: str, name: str, local_files_only: bool = False) -> str:
        asked.append((repository, name))
        if not (cached if local_files_only else reachable):
            raise OSError("cannot find the requested files in the local cache")
        return str(file.path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert published_weights() == published_weights(file.sha256) == file
    assert capsys.readouterr().err == ""
    assert open_dino(None, CPU).sha256 == file.sha256
    cached = False
    assert published_weights() == file
    assert "Downloading the weights of DINOv2" in capsys.readouterr().err
    assert set(asked) == {("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors")}
    with pytest.raises(InputError, match="not the pinned"):
        published_weights("0" * 64)
    reachable = False
    with pytest.raises(InputError, match=r"hub cannot be reached; fetch its model\.safetensors .* --weights FILE\."):
        published_weights()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ModuleNotFoundError("No module", name="timm"), r"timm, which is not installed; run `pip install -e \.\[dinov2\]`"),
        (
            ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
            r"timm is installed but cannot be imported \(ModuleNotFoundError: No module named 'torchvision'\); install a torch",
        ),
        (
            RuntimeError("operator torchvision::nms\n does not exist"),
            r"cannot be imported \(RuntimeError: operator torchvision::nms does not exist\)",
        ),
    ],
)
def test_timm_missing_or_broken(monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str) -> None:
    monkeypatch.delitem(sys.modules, "timm")
    whole = builtins.__import__

    def importing(name: str, *arguments: Any) -> Any:
        if name == "timm":
            raise failure
        return whole(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", importing)
        with pytest.raises(InputError, match=message):
            open_dino(WeightsFile(Path("never read"), ""), CPU)
