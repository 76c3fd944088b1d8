"""Inception from ADM's graph: the golden activations, the layout, graphs that are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_runs import write_small_graph
from inception_runs import CPU, file, pictures
from torch import Tensor

from metrics.networks import inception_layout, operations
from metrics.networks.executor import GraphExecutor
from metrics.networks.graph import Node, read_graph, write_graph
from metrics.networks.inception import GraphInception, open_adm_graph, open_inception_weights
from metrics.networks.inception_layout import CONVOLUTIONS, LAYERS, layout_graph
from metrics.networks.weight_files import GRAPH_NAME
from runtime.config import InputError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


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


def test_pictures_do_not_see_each_other(weights: Path) -> None:
    network, given = open_inception_weights(file(weights), "torch-fidelity", CPU), pictures(19)
    given.setflags(write=False)
    together = network.activations(given)
    for one, alone in zip(together, network.activations(given[17:18]), strict=True):
        assert one.shape[0] == 19
        np.testing.assert_allclose(one[17:18], alone, rtol=1e-4, atol=1e-5)


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
