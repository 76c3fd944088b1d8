"""Weights files of PyTorch's FID packages: every scheme of names, every key accounted for, each preparation of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_runs import CPU, WIDTH, file, nvidia_state, pictures
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks.executor import GraphExecutor
from metrics.networks.inception import open_adm_graph, open_inception_weights
from metrics.networks.inception_layout import CONVOLUTIONS, layout_graph, nvidia_name, random_state, torchvision_names
from metrics.networks.weight_files import WeightsFile
from runtime.config import InputError


def test_a_weights_file_computes_what_the_graph_does(weights: Path, graph_file: Path, state: dict[str, Tensor]) -> None:
    from_weights = open_inception_weights(file(weights), "torch-fidelity", CPU)
    from_graph = open_adm_graph(file(graph_file), CPU)
    for one, other in zip(from_weights.activations(pictures()), from_graph.activations(pictures()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)  # a graph file rounds its epsilon to float32
        assert one.std() > 0.01
    assert np.array_equal(from_weights.head, state["fc.weight"].T)
    assert from_weights.activations(pictures())[0].shape == (3, state["fc.weight"].shape[1])
    assert from_weights.activations(pictures())[1].shape == (3, 17 * 17 * 7)


def test_names_and_protocols(weights: Path, graph_file: Path) -> None:
    adm = open_adm_graph(WeightsFile(graph_file, "ab" * 32), CPU)
    assert (adm.name, adm.backend, adm.sha256) == ("ADM Inception (2015)", "PyTorch float32", "ab" * 32)
    assert adm.distance_name == "FID"
    assert adm.protocol == "legacy bilinear resize to 299 x 299, (x - 128) / 128"
    for protocol in ("torch-fidelity", "pytorch-fid"):
        network = open_inception_weights(file(weights), protocol, CPU)
        assert network.name == f"Inception weights file, {protocol} protocol"
        assert (network.protocol == adm.protocol) == (protocol == "torch-fidelity")


def prepared(protocol: Any, given: NDArray[np.uint8]) -> Tensor:
    """What the first convolution sees. (N, 299, 299, 3)"""
    nodes = layout_graph(random_state(WIDTH), protocol)
    return GraphExecutor(nodes, "ExpandDims", ("Mul",))(torch.tensor(given).float())[0]


@pytest.mark.parametrize("side", [40, 299, 350])
def test_preparation_of_pytorch_fid(side: int) -> None:
    given = pictures(2, side, side + 3)
    values = torch.tensor(given).permute(0, 3, 1, 2) / 255
    expected = 2 * torch.nn.functional.interpolate(values, (299, 299), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(prepared("pytorch-fid", given).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [40, 299, 350])
def test_preparation_of_torch_fidelity(side: int) -> None:
    """Sampled at i * side / 299: grid_sample places its samples by pixel centres, so half a pixel is added."""
    given = pictures(2, side, side)
    axis = (torch.arange(299, dtype=torch.float64) * side / 299 + 0.5) / side * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(2, -1, -1, -1)
    values = torch.tensor(given).permute(0, 3, 1, 2).double()
    sampled = torch.nn.functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
    expected = ((sampled - 128) / 128).float().permute(0, 2, 3, 1)
    torch.testing.assert_close(prepared("torch-fidelity", given), expected, rtol=0, atol=1e-5)


def test_the_protocols_differ(weights: Path) -> None:
    """The planted bug would be one protocol for the other."""
    first, second = (open_inception_weights(file(weights), name, CPU) for name in ("torch-fidelity", "pytorch-fid"))
    noise = np.random.default_rng(0).integers(0, 256, (2, 150, 150, 3)).astype(np.uint8)
    one, other = first.activations(noise)[0], second.activations(noise)[0]
    assert np.abs(one - other).max() > 2e-3 * np.abs(one).max()


class Tree(torch.nn.Module):
    """Modules nested as dotted names say, which compute nothing: what a TorchScript archive of such names is."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = value
            else:
                self.register_buffer(first, value.clone())
        for name, content in children.items():
            self.add_module(name, Tree(content))

    def forward(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_archives(state: dict[str, Tensor], weights: Path, tmp_path: Path) -> None:
    ones = {name: torch.ones_like(value) if name.endswith("bn.weight") else value for name, value in state.items()}
    torch.save(ones, tmp_path / "plain.pth")
    expected = open_inception_weights(file(tmp_path / "plain.pth"), "torch-fidelity", CPU).activations(pictures())
    for prefix in ("", "net."):
        path = tmp_path / f"inception-{prefix}2015-12-05.pt"
        torch.jit.trace(Tree(nvidia_state(state, prefix)), torch.zeros(1)).save(path)
        network = open_inception_weights(file(path), "torch-fidelity", CPU)
        for one, other in zip(network.activations(pictures()), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert np.array_equal(network.head, state["fc.weight"].T)


def test_safetensors_and_half_precision(state: dict[str, Tensor], weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.half() for name, value in state.items()}, tmp_path / "inception.safetensors")
    ours = open_inception_weights(file(tmp_path / "inception.safetensors"), "torch-fidelity", CPU).activations(pictures())
    exact = open_inception_weights(file(weights), "torch-fidelity", CPU).activations(pictures())
    assert ours[0].dtype == np.float32
    assert 0 < np.abs(ours[0] - exact[0]).max() < 0.05 * np.abs(exact[0]).max()


def test_names_of_the_schemes_meet() -> None:
    """Some of each kind, from the published files."""
    pairs = {layer.torchvision: nvidia_name(layer.name) for layer in CONVOLUTIONS}
    assert len(pairs) == len(set(pairs.values())) == 94
    for torchvision, nvidia in {
        "Conv2d_2b_3x3": "conv_2", "Mixed_5b.branch5x5_2": "mixed.tower.conv_1", "Mixed_6a.branch3x3": "mixed_3.conv",
        "Mixed_6d.branch7x7dbl_5": "mixed_6.tower_1.conv_4", "Mixed_7a.branch7x7x3_4": "mixed_8.tower_1.conv_3",
        "Mixed_7b.branch3x3_2b": "mixed_9.tower_mixed_conv_1", "Mixed_7c.branch3x3dbl_3a": "mixed_10.tower_1_mixed_conv",
        "Mixed_7c.branch_pool": "mixed_10.tower_2_conv",
    }.items():  # fmt: skip
        assert pairs[torchvision] == nvidia


@pytest.mark.parametrize("scheme", ["torchvision", "nvidia", "fid-helper"])
def test_every_key_is_accounted_for(scheme: str, state: dict[str, Tensor]) -> None:
    given = dict(state) if scheme == "torchvision" else nvidia_state(state, "net." if scheme == "fid-helper" else "")
    renamed = torchvision_names(given)
    assert {name for name in state if name not in renamed} <= {name for name in state if name.endswith("bn.weight")}
    assert all(renamed[name] is state[name] for name in renamed)
    leftovers = {"AuxLogits.fc.weight": torch.zeros(2), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(1)}
    assert torchvision_names({**given, **leftovers}).keys() == renamed.keys()
    with pytest.raises(InputError, match=r"holds 1 tensors that Inception does not have, Mixed_8a\.conv\.weight"):
        torchvision_names({**given, "Mixed_8a.conv.weight": torch.zeros(1)})
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        if name.endswith("bn.weight") or name.startswith(("fc.", "output.", "net.output.")):
            torchvision_names(rest)
        elif name in ("Conv2d_1a_3x3.conv.weight", "layers.conv.weight", "net.layers.conv.weight"):
            with pytest.raises(InputError, match="holds no Inception weights"):
                torchvision_names(rest)
        else:
            with pytest.raises(InputError, match=rf"lacks 1 of Inception's tensors, {name} among them"):
                torchvision_names(rest)


def test_a_file_without_classifier_has_no_head(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "headless.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, path)
    network = open_inception_weights(file(path), "torch-fidelity", CPU)
    assert network.head is None
    assert network.activations(pictures())[0].shape[0] == 3


def changed_state(change: str, state: dict[str, Tensor]) -> Any:
    if change == "no state dict":
        return {"model": state}
    if change == "another network":
        return {"blocks.0.weight": torch.zeros(2)}
    name, shape = {
        "kernel": ("Mixed_5b.branch5x5_2.conv.weight", (4, 3, 3, 3)),
        "normalization": ("Mixed_6c.branch1x1.bn.bias", (99,)),
        "channels": ("Mixed_7a.branch3x3_1.conv.weight", (12, 5, 1, 1)),
        "classifier": ("fc.weight", (1008, 77)),
    }[change]
    return {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no state dict", "holds something else than a state dict"),
        ("another network", "holds no Inception weights: neither Conv2d_1a_3x3.conv.weight"),
        ("kernel", r"holds a Mixed_5b.branch5x5_2.conv.weight of the shape \(4, 3, 3, 3\); that convolution is 5 x 5"),
        ("normalization", r"holds a batch normalization of \(99,\) numbers for the 12 channels of Mixed_6c.branch1x1"),
        ("channels", "cannot be run: the node 'mixed_8/tower/conv'"),
        ("classifier", r"cannot be run: its class weights \(77, 1008\) do not fit the 128 features"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: str, message: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(changed_state(change, state), tmp_path / "inception.pth")
    with pytest.raises(InputError, match=rf"inception\.pth {message}"):
        open_inception_weights(file(tmp_path / "inception.pth"), "torch-fidelity", CPU)


@pytest.mark.parametrize("damage", ["cut short", "text", "empty", "pickled", "safetensors"])
def test_damaged_weights_are_named(damage: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / ("inception.safetensors" if damage == "safetensors" else "inception.pth")
    if damage == "pickled":
        torch.save({"weight": torch.nn.Linear(1, 1)}, path)
    else:
        content = weights.read_bytes()
        path.write_bytes({"cut short": content[: len(content) // 2], "empty": b""}.get(damage, b"<html>not found</html>"))
    with pytest.raises(InputError, match=r"inception\.\w+ (cannot be read as|holds no) PyTorch weights") as raised:
        open_inception_weights(file(path), "torch-fidelity", CPU)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)
