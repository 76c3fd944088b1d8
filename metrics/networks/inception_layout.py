"""The Inception network of 2015 as a table, and a graph made from it and from weights in PyTorch's name schemes.

pytorch-fid, torch-fidelity and NVIDIA publish the weights of the frozen graph under names of their own. The table says which
layer is which; `layout_graph` gives the same nodes that the graph file has, and the same executor runs them.
Architecture: Szegedy et al. 2015, "Rethinking the Inception architecture for computer vision", section 6; what the frozen
graph does otherwise: average pools leave their padding out, and the last block's pool takes the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks.graph import Node
from runtime.config import InputError

Protocol = Literal["torch-fidelity", "pytorch-fid"]

CLASSES = 1008
SIZE = 299
_EPSILON = 0.001


class Convolution(NamedTuple):
    """A convolution without bias, batch normalization, ReLU. Within a block: the names of layer and source are relative."""

    name: str
    """The node of its output in the frozen graph."""
    torchvision: str
    channels: int
    kernel: tuple[int, int]
    source: str
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """A pool of 3 x 3."""

    name: str
    operation: str
    source: str
    stride: int = 1
    padding: str = "SAME"


class Join(NamedTuple):
    """A concatenation of channels."""

    name: str
    sources: tuple[str, ...]


Layer = Convolution | Pool | Join

_STEM: tuple[Layer, ...] = (
    Convolution("conv", "Conv2d_1a_3x3", 32, (3, 3), "Mul", 2, "VALID"),
    Convolution("conv_1", "Conv2d_2a_3x3", 32, (3, 3), "conv", 1, "VALID"),
    Convolution("conv_2", "Conv2d_2b_3x3", 64, (3, 3), "conv_1"),
    Pool("pool", "MaxPool", "conv_2", 2, "VALID"),
    Convolution("conv_3", "Conv2d_3b_1x1", 80, (1, 1), "pool", 1, "VALID"),
    Convolution("conv_4", "Conv2d_4a_3x3", 192, (3, 3), "conv_3", 1, "VALID"),
    Pool("pool_1", "MaxPool", "conv_4", 2, "VALID"),
)
_BEFORE = ""
"""In a block: the output of the block before it."""


def _block_35(pooled: int) -> tuple[Layer, ...]:
    """35 x 35. `pooled`: channels of the pool's branch."""
    return (
        Convolution("conv", "branch1x1", 64, (1, 1), _BEFORE),
        Convolution("tower/conv", "branch5x5_1", 48, (1, 1), _BEFORE),
        Convolution("tower/conv_1", "branch5x5_2", 64, (5, 5), "tower/conv"),
        Convolution("tower_1/conv", "branch3x3dbl_1", 64, (1, 1), _BEFORE),
        Convolution("tower_1/conv_1", "branch3x3dbl_2", 96, (3, 3), "tower_1/conv"),
        Convolution("tower_1/conv_2", "branch3x3dbl_3", 96, (3, 3), "tower_1/conv_1"),
        Pool("tower_2/pool", "AvgPool", _BEFORE),
        Convolution("tower_2/conv", "branch_pool", pooled, (1, 1), "tower_2/pool"),
        Join("join", ("conv", "tower/conv_1", "tower_1/conv_2", "tower_2/conv")),
    )


def _block_17(inner: int) -> tuple[Layer, ...]:
    """17 x 17. `inner`: channels between the factors of the 7 x 7 convolutions."""
    return (
        Convolution("conv", "branch1x1", 192, (1, 1), _BEFORE),
        Convolution("tower/conv", "branch7x7_1", inner, (1, 1), _BEFORE),
        Convolution("tower/conv_1", "branch7x7_2", inner, (1, 7), "tower/conv"),
        Convolution("tower/conv_2", "branch7x7_3", 192, (7, 1), "tower/conv_1"),
        Convolution("tower_1/conv", "branch7x7dbl_1", inner, (1, 1), _BEFORE),
        Convolution("tower_1/conv_1", "branch7x7dbl_2", inner, (7, 1), "tower_1/conv"),
        Convolution("tower_1/conv_2", "branch7x7dbl_3", inner, (1, 7), "tower_1/conv_1"),
        Convolution("tower_1/conv_3", "branch7x7dbl_4", inner, (7, 1), "tower_1/conv_2"),
        Convolution("tower_1/conv_4", "branch7x7dbl_5", 192, (1, 7), "tower_1/conv_3"),
        Pool("tower_2/pool", "AvgPool", _BEFORE),
        Convolution("tower_2/conv", "branch_pool", 192, (1, 1), "tower_2/pool"),
        Join("join", ("conv", "tower/conv_2", "tower_1/conv_4", "tower_2/conv")),
    )


def _block_8(pool: str) -> tuple[Layer, ...]:
    """8 x 8. `pool`: the operation of the pool's branch."""
    return (
        Convolution("conv", "branch1x1", 320, (1, 1), _BEFORE),
        Convolution("tower/conv", "branch3x3_1", 384, (1, 1), _BEFORE),
        Convolution("tower/mixed/conv", "branch3x3_2a", 384, (1, 3), "tower/conv"),
        Convolution("tower/mixed/conv_1", "branch3x3_2b", 384, (3, 1), "tower/conv"),
        Convolution("tower_1/conv", "branch3x3dbl_1", 448, (1, 1), _BEFORE),
        Convolution("tower_1/conv_1", "branch3x3dbl_2", 384, (3, 3), "tower_1/conv"),
        Convolution("tower_1/mixed/conv", "branch3x3dbl_3a", 384, (1, 3), "tower_1/conv_1"),
        Convolution("tower_1/mixed/conv_1", "branch3x3dbl_3b", 384, (3, 1), "tower_1/conv_1"),
        Pool("tower_2/pool", pool, _BEFORE),
        Convolution("tower_2/conv", "branch_pool", 192, (1, 1), "tower_2/pool"),
        Join("join", ("conv", "tower/mixed/conv", "tower/mixed/conv_1", "tower_1/mixed/conv", "tower_1/mixed/conv_1",
                      "tower_2/conv")),
    )  # fmt: skip


_TO_17: tuple[Layer, ...] = (
    Convolution("conv", "branch3x3", 384, (3, 3), _BEFORE, 2, "VALID"),
    Convolution("tower/conv", "branch3x3dbl_1", 64, (1, 1), _BEFORE),
    Convolution("tower/conv_1", "branch3x3dbl_2", 96, (3, 3), "tower/conv"),
    Convolution("tower/conv_2", "branch3x3dbl_3", 96, (3, 3), "tower/conv_1", 2, "VALID"),
    Pool("pool", "MaxPool", _BEFORE, 2, "VALID"),
    Join("join", ("conv", "tower/conv_2", "pool")),
)
_TO_8: tuple[Layer, ...] = (
    Convolution("tower/conv", "branch3x3_1", 192, (1, 1), _BEFORE),
    Convolution("tower/conv_1", "branch3x3_2", 320, (3, 3), "tower/conv", 2, "VALID"),
    Convolution("tower_1/conv", "branch7x7x3_1", 192, (1, 1), _BEFORE),
    Convolution("tower_1/conv_1", "branch7x7x3_2", 192, (1, 7), "tower_1/conv"),
    Convolution("tower_1/conv_2", "branch7x7x3_3", 192, (7, 1), "tower_1/conv_1"),
    Convolution("tower_1/conv_3", "branch7x7x3_4", 192, (3, 3), "tower_1/conv_2", 2, "VALID"),
    Pool("pool", "MaxPool", _BEFORE, 2, "VALID"),
    Join("join", ("tower/conv_1", "tower_1/conv_3", "pool")),
)
_BLOCKS = (
    ("mixed", "Mixed_5b", _block_35(32)),
    ("mixed_1", "Mixed_5c", _block_35(64)),
    ("mixed_2", "Mixed_5d", _block_35(64)),
    ("mixed_3", "Mixed_6a", _TO_17),
    ("mixed_4", "Mixed_6b", _block_17(128)),
    ("mixed_5", "Mixed_6c", _block_17(160)),
    ("mixed_6", "Mixed_6d", _block_17(160)),
    ("mixed_7", "Mixed_6e", _block_17(192)),
    ("mixed_8", "Mixed_7a", _TO_8),
    ("mixed_9", "Mixed_7b", _block_8("AvgPool")),
    ("mixed_10", "Mixed_7c", _block_8("MaxPool")),
)


def _layers() -> Iterator[Layer]:
    yield from _STEM
    before = "pool_1"
    for block, torchvision, layers in _BLOCKS:
        for layer in layers:
            name = f"{block}/{layer.name}"
            if isinstance(layer, Join):
                yield Join(name, tuple(f"{block}/{source}" for source in layer.sources))
                continue
            source = f"{block}/{layer.source}" if layer.source else before
            if isinstance(layer, Pool):
                yield layer._replace(name=name, source=source)
            else:
                yield layer._replace(name=name, source=source, torchvision=f"{torchvision}.{layer.torchvision}")
        before = f"{block}/join"


LAYERS: tuple[Layer, ...] = tuple(_layers())
"""All layers, each after its sources, under the names of the frozen graph."""
CONVOLUTIONS = tuple(layer for layer in LAYERS if isinstance(layer, Convolution))


def nvidia_name(node: str) -> str:
    """What NVIDIA's scripts call a convolution, without `layers.`: the two last blocks are flat, the others nested."""
    block, _, rest = node.partition("/")
    return f"{block}.{rest.replace('/', '_')}" if block in ("mixed_9", "mixed_10") else node.replace("/", ".")


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of one of the known name schemes under torchvision's names, with every key accounted for.

    Of each convolution: `.conv.weight`, `.bn.bias`, `.bn.running_mean`, `.bn.running_var`, and `.bn.weight` where there is one;
    `fc.weight` and perhaps `fc.bias` where there is a classifier.
    Raises InputError, worded as the end of a sentence about the file, where a tensor is missing or not known.
    """
    if "Conv2d_1a_3x3.conv.weight" in state:
        parts = {f".{name}": f".{name}" for name in ("conv.weight", "bn.weight", *_NORMALIZATION_PARTS)}
        names = {layer.torchvision: layer.torchvision for layer in CONVOLUTIONS}
        head = "fc"
    else:
        prefix = next((prefix for prefix in ("", "net.") if f"{prefix}layers.conv.weight" in state), None)
        if prefix is None:
            raise InputError("holds no Inception weights: neither Conv2d_1a_3x3.conv.weight, as pytorch-fid and torch-fidelity "
                             "name their first layer, nor layers.conv.weight, as NVIDIA does.")  # fmt: skip
        parts = {".weight": ".conv.weight", ".beta": ".bn.bias", ".mean": ".bn.running_mean", ".var": ".bn.running_var"}
        names = {f"{prefix}layers.{nvidia_name(layer.name)}": layer.torchvision for layer in CONVOLUTIONS}
        head = f"{prefix}output"
    wanted = {old + old_part: new + part for old, new in names.items() for old_part, part in parts.items()}
    wanted |= {f"{head}.{part}": f"fc.{part}" for part in ("weight", "bias")}
    unknown = [key for key in state if key not in wanted and not key.startswith("AuxLogits.")
               and not key.endswith(".num_batches_tracked")]  # fmt: skip
    if unknown:
        raise InputError(f"holds {len(unknown)} tensors that Inception does not have, {unknown[0]} among them.")
    optional = (".bn.weight", "fc.weight", "fc.bias")
    missing = [key for key, name in wanted.items() if key not in state and not name.endswith(optional)]
    if missing:
        raise InputError(f"lacks {len(missing)} of Inception's tensors, {missing[0]} among them.")
    return {name: state[key] for key, name in wanted.items() if key in state}


_NORMALIZATION_PARTS = ("bn.bias", "bn.running_mean", "bn.running_var")


def random_state(width: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under torchvision's names, with a classifier, for tests and for measuring speed.

    `width` scales every layer's channels, at least two; 1 is Inception. Activations keep their size from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state: dict[str, Tensor] = {}
    channels = {"Mul": 3}
    for layer in LAYERS:
        if isinstance(layer, Join):
            channels[layer.name] = sum(channels[source] for source in layer.sources)
        elif isinstance(layer, Pool):
            channels[layer.name] = channels[layer.source]
        else:
            count, inputs = max(round(width * layer.channels), 2), channels[layer.source]
            fan_in = inputs * layer.kernel[0] * layer.kernel[1]
            channels[layer.name] = count
            state[f"{layer.torchvision}.conv.weight"] = normal(count, inputs, *layer.kernel) * (2 / fan_in) ** 0.5
            state[f"{layer.torchvision}.bn.weight"] = 1 + 0.1 * normal(count)
            state[f"{layer.torchvision}.bn.bias"] = 0.1 * normal(count)
            state[f"{layer.torchvision}.bn.running_mean"] = 0.1 * normal(count)
            state[f"{layer.torchvision}.bn.running_var"] = 1 + 0.2 * normal(count).abs()
    state["fc.weight"] = normal(CLASSES, channels[LAYERS[-1].name]) * 0.05
    state["fc.bias"] = 0.1 * normal(CLASSES)
    return state


def layout_graph(state: Mapping[str, Tensor], protocol: Protocol = "torch-fidelity") -> dict[str, Node]:
    """The nodes of the network: names, operations and attributes of the frozen graph; to be fed at `ExpandDims`.

    state: as `torchvision_names` returns it. protocol: how pictures (N, H, W, 3) of 0 ... 255 are prepared.
    Raises InputError, worded as the end of a sentence about the file, where a tensor has another shape than its layer needs.
    """
    graph = _Nodes()
    graph.add("Cast", "Placeholder", (), dtype=np.dtype(np.float32))
    graph.constant("ExpandDims/dim", np.array(0, dtype=np.int32))
    graph.add("ExpandDims", "ExpandDims", ("Cast", "ExpandDims/dim"), T=_FLOAT, Tdim=_INTEGER)
    _add_preparation(graph, protocol)
    for layer in LAYERS:
        if isinstance(layer, Join):
            graph.constant(f"{layer.name}/concat_dim", np.array(3, dtype=np.int32))
            graph.add(layer.name, "Concat", (f"{layer.name}/concat_dim", *layer.sources), T=_FLOAT, N=len(layer.sources))
        elif isinstance(layer, Pool):
            _add_pool(graph, layer, 3)
        else:
            _add_convolution(graph, layer, state)
    _add_pool(graph, Pool("pool_3", "AvgPool", LAYERS[-1].name, 1, "VALID"), 8)
    if "fc.weight" in state:
        _add_classifier(graph, state)
    return graph.nodes


_FLOAT, _INTEGER = np.dtype(np.float32), np.dtype(np.int32)


class _Nodes:
    """Nodes in the making."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, operation: str, inputs: tuple[str, ...], **attributes: Any) -> None:
        self.nodes[name] = Node(name, operation, inputs, attributes)

    def constant(self, name: str, value: NDArray[Any]) -> None:
        self.add(name, "Const", (), dtype=value.dtype, value=value)


def _add_preparation(graph: _Nodes, protocol: Protocol) -> None:
    """Resize and scale. Centres of pixels coincide in pytorch-fid's resize, corners in TensorFlow's old one."""
    graph.constant("ResizeBilinear/size", np.array([SIZE, SIZE], dtype=np.int32))
    source, centres, shift, scale = "ExpandDims", False, 128.0, 1 / 128
    if protocol == "pytorch-fid":
        # 2 x / 255 - 1, with the resize between the division and the rest.
        graph.constant("RealDiv/y", np.array(255, dtype=np.float32))
        graph.add("RealDiv", "RealDiv", ("ExpandDims", "RealDiv/y"), T=_FLOAT)
        source, centres, shift, scale = "RealDiv", True, 0.5, 2.0
    inputs = (source, "ResizeBilinear/size")
    graph.add("ResizeBilinear", "ResizeBilinear", inputs, T=_FLOAT, align_corners=False, half_pixel_centers=centres)
    graph.constant("Sub/y", np.array(shift, dtype=np.float32))
    graph.add("Sub", "Sub", ("ResizeBilinear", "Sub/y"), T=_FLOAT)
    graph.constant("Mul/y", np.array(scale, dtype=np.float32))
    graph.add("Mul", "Mul", ("Sub", "Mul/y"), T=_FLOAT)


def _add_pool(graph: _Nodes, pool: Pool, size: int) -> None:
    strides = [1, pool.stride, pool.stride, 1]
    graph.add(
        pool.name, pool.operation, (pool.source,), T=_FLOAT, ksize=[1, size, size, 1], strides=strides, padding=pool.padding
    )


def _add_convolution(graph: _Nodes, layer: Convolution, state: Mapping[str, Tensor]) -> None:
    name, kernel = layer.name, state[f"{layer.torchvision}.conv.weight"]
    if kernel.shape[2:] != layer.kernel:
        raise InputError(f"holds a {layer.torchvision}.conv.weight of the shape {tuple(kernel.shape)}; that convolution is "
                         f"{layer.kernel[0]} x {layer.kernel[1]}.")  # fmt: skip
    gamma = state.get(f"{layer.torchvision}.bn.weight")
    vectors = {
        "beta": state[f"{layer.torchvision}.bn.bias"],
        "gamma": torch.ones(len(kernel)) if gamma is None else gamma,
        "moving_mean": state[f"{layer.torchvision}.bn.running_mean"],
        "moving_variance": state[f"{layer.torchvision}.bn.running_var"],
    }
    for part, vector in vectors.items():
        if vector.shape != kernel.shape[:1]:
            raise InputError(f"holds a batch normalization of {tuple(vector.shape)} numbers for the {len(kernel)} channels of "
                             f"{layer.torchvision}.")  # fmt: skip
        graph.constant(f"{name}/batchnorm/{part}", _array(vector))
    graph.constant(f"{name}/conv2d_params", _array(kernel.permute(2, 3, 1, 0)))  # (H, W, in, out)
    strides = [1, layer.stride, layer.stride, 1]
    graph.add(f"{name}/Conv2D", "Conv2D", (layer.source, f"{name}/conv2d_params"), T=_FLOAT, strides=strides,
              padding=layer.padding)  # fmt: skip
    inputs = [f"{name}/batchnorm/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")]
    graph.add(f"{name}/batchnorm", "BatchNormWithGlobalNormalization", (f"{name}/Conv2D", *inputs), T=_FLOAT,
              variance_epsilon=_EPSILON, scale_after_normalization=gamma is not None)  # fmt: skip
    graph.add(name, "Relu", (f"{name}/batchnorm",), T=_FLOAT)


def _add_classifier(graph: _Nodes, state: Mapping[str, Tensor]) -> None:
    weight = state["fc.weight"]
    if weight.ndim != 2:
        raise InputError(f"holds a classifier of the shape {tuple(weight.shape)}; classes x features are needed.")
    graph.constant("pool_3/_reshape/shape", np.array([-1, weight.shape[1]], dtype=np.int32))
    graph.add("pool_3/_reshape", "Reshape", ("pool_3", "pool_3/_reshape/shape"), T=_FLOAT, Tshape=_INTEGER)
    graph.constant("softmax/weights", _array(weight.T))
    inputs = ("pool_3/_reshape", "softmax/weights")
    graph.add("softmax/logits/MatMul", "MatMul", inputs, T=_FLOAT, transpose_a=False, transpose_b=False)
    if "fc.bias" in state:
        graph.constant("softmax/biases", _array(state["fc.bias"]))
        graph.add("softmax/logits", "BiasAdd", ("softmax/logits/MatMul", "softmax/biases"), T=_FLOAT)
        graph.add("softmax", "Softmax", ("softmax/logits",), T=_FLOAT)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
