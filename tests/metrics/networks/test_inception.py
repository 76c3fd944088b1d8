"""Inception from ADM's graph and from weights files: the golden activations, the layout, every key of a file accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_runs import write_small_graph
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks import inception_layout, operations
from metrics.networks.executor import GraphExecutor
from metrics.networks.graph import Node, read_graph, write_graph
from metrics.networks.inception import GraphInception, open_adm_graph, open_inception_weights
from metrics.networks.inception_layout import CONVOLUTIONS, LAYERS, layout_graph, nvidia_name, random_state, torchvision_names
from metrics.networks.weight_files import GRAPH_NAME, WeightsFile
from runtime.config import InputError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CPU = torch.device("cpu")
WIDTH = 1 / 16


def file(path: Path) -> WeightsFile:
    return WeightsFile(path, "0" * 64)


def pictures(count: int = 3, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).byte().numpy()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(WIDTH)


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def graph_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / GRAPH_NAME
    write_graph(layout_graph(state), path)
    return path


def nvidia_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """As NVIDIA names them; without gamma, which the frozen graph does not use."""
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    result = {
        f"{prefix}layers.{nvidia_name(layer.name)}.{part}": state[f"{layer.torchvision}.{theirs}"]
        for layer in CONVOLUTIONS
        for part, theirs in parts.items()
    }
    return {**result, f"{prefix}output.weight": state["fc.weight"], f"{prefix}output.bias": state["fc.bias"]}


def golden_error(folder: str) -> float:
    """The largest difference from the reference's activations, relative to their largest."""
    network, worst = open_adm_graph(file(GOLDEN / folder / GRAPH_NAME), CPU), 0.0
    with np.load(GOLDEN / folder / "activations_head.npz") as expected:
        for role, batch in (("ref", "ref.npz"), ("sample", "samples.npz")):
            with np.load(GOLDEN / folder / batch) as content:
                given = content["arr_0"][: len(expected[f"{role}_pool"])]
            for kind, ours in zip(("pool", "spatial"), network.activations(given), strict=True):
                reference = expected[f"{role}_{kind}"]
                worst = max(worst, float(np.abs(ours - reference).max() / np.abs(reference).max()))
    return worst


@pytest.mark.parametrize("folder", ["adm", "adm_layout"])
def test_golden_activations(folder: str) -> None:
    assert golden_error(folder) < 1e-5


@pytest.mark.parametrize(
    "bug", ["half-pixel resize", "averages count padding", "average in the last block", "gamma everywhere"]
)
def test_golden_activations_catch(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known-bad variants: what other reimplementations of this network have got wrong."""
    right = dict(operations.OPERATIONS)

    def changed(operation: str, node_of: Any) -> None:
        monkeypatch.setitem(operations.OPERATIONS, operation, lambda node, inputs: right[operation](node_of(node), inputs))

    def with_attributes(node: Node, **attributes: Any) -> Node:
        return Node(node.name, node.operation, node.inputs, {**node.attributes, **attributes})

    if bug == "half-pixel resize":
        changed("ResizeBilinear", lambda node: with_attributes(node, half_pixel_centers=True))
    elif bug == "averages count padding":
        average = torch.nn.functional.avg_pool2d
        monkeypatch.setattr(operations.F, "avg_pool2d", lambda *arguments, count_include_pad: average(*arguments))
    elif bug == "average in the last block":
        monkeypatch.setitem(operations.OPERATIONS, "MaxPool", lambda node, inputs: (
            right["AvgPool" if node.attributes["padding"] == "SAME" else "MaxPool"](node, inputs)))  # fmt: skip
    else:
        from metrics.networks import executor

        scale = operations.normalization_scale
        monkeypatch.setattr(executor, "normalization_scale", lambda node, inputs: (
            scale(with_attributes(node, scale_after_normalization=True), inputs)))  # fmt: skip
    assert golden_error("adm_layout") > 1e-3


def test_the_layout_is_that_of_the_frozen_graph(state: dict[str, Tensor]) -> None:
    """Names, sources, windows and order of channels, one by one, against the golden graph, which has the real file's."""
    theirs, ours = read_graph(GOLDEN / "adm_layout" / GRAPH_NAME), layout_graph(state)

    def source(nodes: Mapping[str, Node], name: str) -> str:
        while nodes[name].operation in ("Identity", "CheckNumerics"):
            name = nodes[name].inputs[0]
        return name

    compared = 0
    for name, node in theirs.items():
        if node.operation in ("Conv2D", "MaxPool", "AvgPool", "Concat", "Relu", "BatchNormWithGlobalNormalization", "MatMul"):
            compared += 1
            assert ours[name].operation == node.operation
            assert [source(ours, entry) for entry in ours[name].inputs] == [source(theirs, entry) for entry in node.inputs]
            for attribute in ("strides", "padding", "ksize", "N"):
                assert ours[name].attributes.get(attribute) == node.attributes.get(attribute)
        if node.operation == "Conv2D":
            kernels = [nodes[node.inputs[1]].attributes["value"].shape for nodes in (ours, theirs)]
            assert kernels[0][:2] == kernels[1][:2]
    assert compared == 94 * 3 + 5 + 9 + 11 + 1
    assert len(CONVOLUTIONS) == 94
    assert sum(node.operation in ("Conv2D", "MaxPool", "AvgPool", "Concat") for node in ours.values()) == 94 + 14 + 11


def test_full_width_has_inceptions_channels() -> None:
    """Input and output channels of some layers, and all parameters, as Szegedy et al.'s network of 1008 classes has them."""
    channels = {"Mul": 3}
    parameters = 0
    for layer in LAYERS:
        if isinstance(layer, inception_layout.Join):
            channels[layer.name] = sum(channels[source] for source in layer.sources)
        elif isinstance(layer, inception_layout.Pool):
            channels[layer.name] = channels[layer.source]
        else:
            channels[layer.name] = layer.channels
            parameters += layer.channels * (channels[layer.source] * layer.kernel[0] * layer.kernel[1] + 2)
    joins = [channels[layer.name] for layer in LAYERS if isinstance(layer, inception_layout.Join)]
    assert joins == [256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048, 2048]
    # torchvision's inception_v3 without its auxiliary classifier: 23,834,568 parameters, 2,049,000 of them in its 1000 classes.
    assert parameters == 23_834_568 - 2_049_000


def test_tensorflow_computes_the_same_from_the_graph_we_write(graph_file: Path) -> None:
    pytest.importorskip("tensorflow")
    from metrics.networks.tensorflow_inception import TensorFlowInception

    ours, theirs = open_adm_graph(file(graph_file), CPU), TensorFlowInception(file(graph_file))
    for given in (pictures(), pictures(2, 299, 299), pictures(2, 320, 310)):
        for one, other in zip(ours.activations(given), theirs.activations(given), strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    assert np.array_equal(ours.head, theirs.head)


def test_a_weights_file_computes_what_the_graph_does(weights: Path, graph_file: Path, state: dict[str, Tensor]) -> None:
    from_weights = open_inception_weights(file(weights), "torch-fidelity", CPU)
    from_graph = open_adm_graph(file(graph_file), CPU)
    for one, other in zip(from_weights.activations(pictures()), from_graph.activations(pictures()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)  # a graph file rounds its epsilon to float32
        assert one.std() > 0.01
    assert np.array_equal(from_weights.head, state["fc.weight"].T)
    assert from_weights.activations(pictures())[0].shape == (3, state["fc.weight"].shape[1])
    assert from_weights.activations(pictures())[1].shape == (3, 17 * 17 * 7)


def test_the_first_layers_are_torchs(state: dict[str, Tensor]) -> None:
    """Convolution, batch normalization with epsilon 0.001 and gamma, ReLU, as torchvision runs the same tensors."""
    ours, expected = (
        GraphExecutor(layout_graph(state), "ExpandDims", (name,))(torch.tensor(pictures()).float())[0].permute(0, 3, 1, 2)
        for name in ("conv_2", "Mul")
    )
    for name, stride, padding in (("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)):
        expected = torch.nn.functional.conv2d(expected, state[f"{name}.conv.weight"], None, stride, padding)
        statistics = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        expected = torch.nn.functional.batch_norm(expected, *statistics, eps=0.001).relu()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


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


def test_pictures_do_not_see_each_other(weights: Path) -> None:
    network, given = open_inception_weights(file(weights), "torch-fidelity", CPU), pictures(19)
    given.setflags(write=False)
    together = network.activations(given)
    for one, alone in zip(together, network.activations(given[17:18]), strict=True):
        assert one.shape[0] == 19
        np.testing.assert_allclose(one[17:18], alone, rtol=1e-4, atol=1e-5)


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


def without(nodes: dict[str, Node], name: str) -> dict[str, Node]:
    return {key: node for key, node in nodes.items() if key != name}


def test_graphs_that_are_not_inceptions_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    nodes = layout_graph(state)
    spoilt = {
        "has no node pool_3; ADM's": without(nodes, "pool_3"),
        "has no node mixed_6/conv, softmax/logits/MatMul": without(without(nodes, "mixed_6/conv"), "softmax/logits/MatMul"),
        "'mixed/conv/Conv2D' reads 'pool_1', which does not exist": without(nodes, "pool_1"),
        "the second input of softmax/logits/MatMul is no matrix": {
            **nodes, "softmax/weights": Node("softmax/weights", "Placeholder")},
        "'conv_4' uses the operation Elu, which this project cannot execute": {
            **nodes, "conv_4": Node("conv_4", "Elu", nodes["conv_4"].inputs)},
        "damaged: the node '.*' needs its own result": {**nodes, "pool": Node("pool", "Relu", ("conv_3",))},
        r"the node 'conv_3/Conv2D' \(Conv2D\) has 1 input, where 2 must be": {
            **nodes, "conv_3/Conv2D": replace(nodes["conv_3/Conv2D"], inputs=("pool",))},
        "the node 'mixed/join' .* cannot be computed": {
            **nodes, "mixed/join": Node("mixed/join", "Concat", ("mixed/join/concat_dim", "mixed/conv", "conv"))},
    }  # fmt: skip
    for message, graph in spoilt.items():
        write_graph(graph, tmp_path / GRAPH_NAME)
        with pytest.raises(InputError, match=rf"{GRAPH_NAME}.*{message}") as raised:
            open_adm_graph(file(tmp_path / GRAPH_NAME), CPU)
        assert "\n" not in str(raised.value)


def test_a_graph_cut_short_anywhere_is_named(graph_file: Path, tmp_path: Path) -> None:
    content = graph_file.read_bytes()
    path = tmp_path / GRAPH_NAME
    for length in [0, 1, 2, 50, *np.random.default_rng(0).integers(0, len(content) - 1, 40).tolist()]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=GRAPH_NAME):
            open_adm_graph(file(path), CPU)


def test_convolutions_keep_full_precision_and_the_switch_is_put_back(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions use TF32 unless told otherwise, whatever matrix products do."""
    network = open_inception_weights(file(weights), "torch-fidelity", CPU)
    seen: list[bool] = []
    right = operations.OPERATIONS["_FusedConv2D"]

    def watched(node: Node, inputs: Any) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return right(node, inputs)

    monkeypatch.setitem(operations.OPERATIONS, "_FusedConv2D", watched)
    before = torch.backends.cudnn.allow_tf32
    network.activations(pictures(1))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_full_gpu_is_one_sentence(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = open_inception_weights(file(weights), "torch-fidelity", CPU)

    def full(node: Node, inputs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(operations.OPERATIONS, "MaxPool", full)
    with pytest.raises(InputError, match=r"free memory for 5 pictures at once; lower --batch-size \(it is 5\)\.$"):
        network.activations(pictures(5))
    with pytest.raises(
        InputError, match=r"^the GPU has too little free memory for the feature network"
    ):  # not the file's fault
        open_inception_weights(file(weights), "torch-fidelity", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu(weights: Path) -> None:
    cuda = torch.device("cuda")
    here: GraphInception = open_inception_weights(file(weights), "torch-fidelity", CPU)
    there: GraphInception = open_inception_weights(file(weights), "torch-fidelity", cuda)
    assert there.backend == "PyTorch float32"
    for one, other in zip(there.activations(pictures()), here.activations(pictures()), strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()


def small_graph(folder: Path, *changed: Node) -> Path:
    nodes = dict(read_graph(write_small_graph(folder)))
    write_graph(nodes | {node.name: node for node in changed}, folder / GRAPH_NAME)
    return folder / GRAPH_NAME


def const(name: str, value: np.ndarray) -> Node:
    return Node(name, "Const", attributes={"dtype": value.dtype, "value": value})


ROWS_ARE_FIXED = (const("pool_3", np.zeros((5, 6), np.float32)),)
ROWS_ARE_MERGED = (
    const("merged/shape", np.array([1, 1, -1, 6], np.int32)),
    Node("pool_3", "Reshape", ("mixed", "merged/shape"), {"T": np.dtype(np.float32), "Tshape": np.dtype(np.int32)}),
)
NO_CLASSES = (const("softmax/weights", np.zeros((6, 0), np.float32)),)
NOT_FINITE = (const("softmax/weights", np.full((6, 10), np.nan, np.float32)),)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ROWS_ARE_FIXED, "two pictures give 5 rows of pool_3 and 2 of mixed_6/conv"),
        (ROWS_ARE_MERGED, "two pictures give 1 rows of pool_3"),
        (NO_CLASSES, r"class weights \(6, 0\) do not fit"),
        (NOT_FINITE, "class weights are not all finite"),
    ],
)
def test_rows_and_class_weights_are_tried(tmp_path: Path, changed: tuple[Node, ...], message: str) -> None:
    open_adm_graph(file(small_graph(tmp_path)), CPU)
    with pytest.raises(InputError, match=message):
        open_adm_graph(file(small_graph(tmp_path, *changed)), CPU)
