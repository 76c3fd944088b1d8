"""TensorFlow's graph operations in torch: what each node of a frozen network computes.

Every function takes a node and the values of its inputs and returns the value of its first output. Values have the shapes
they have in TensorFlow (pictures N, H, W, C; kernels H, W, in, out); torch's convolutions and pools see a permuted view of
them, whose memory order is torch's channels_last, so that nothing is copied. Attributes that a file lacks have TensorFlow's
default. Source: the op definitions of TensorFlow's API documentation, "tf.raw_ops".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.networks.graph import Node
from runtime.config import InputError

_LARGEST_SIDE = 4096
"""Of a resized picture, in pixels. Networks take some hundreds; a damaged number could ask for more than the memory."""

Operation = Callable[[Node, Sequence[Tensor]], Tensor]


class Window(NamedTuple):
    """How a kernel moves over a picture, (rows, columns) each; padding is (before, after) of each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    @property
    def symmetric(self) -> tuple[int, int] | None:
        """The padding that torch's own arguments can express, None where before and after differ."""
        (top, bottom), (left, right) = self.padding
        return (top, left) if top == bottom and left == right else None

    def pad(self, value: Tensor, fill: float) -> Tensor:
        """(N, C, H, W) with the padding written out."""
        (top, bottom), (left, right) = self.padding
        return F.pad(value, (left, right, top, bottom), value=fill)


def unusable(node: Node, what: str) -> InputError:
    """The error for a node that is known but asks for something this project cannot compute."""
    return InputError(f"the node {node.name!r} ({node.operation}) {what}, which this project cannot execute.")


def required(node: Node, name: str) -> Any:
    """An attribute that has no default."""
    if node.attributes.get(name) is None:
        raise InputError(f"the node {node.name!r} ({node.operation}) lacks its attribute {name}; the file is damaged.")
    return node.attributes[name]


def channels_first(node: Node) -> bool:
    """Whether the node's pictures are (N, C, H, W), not (N, H, W, C)."""
    layout = node.attributes.get("data_format", "NHWC")
    if layout not in ("NHWC", "NCHW"):
        raise unusable(node, f"has the data format {layout}")
    return bool(layout == "NCHW")


def convolution(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Conv2D. Picture, kernel (H, W, in, out)."""
    return _convolve(node, inputs[0], inputs[1], None)


def fused_convolution(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """_FusedConv2D, TensorFlow's own name for a convolution with what follows it: a bias (out,), and perhaps a ReLU."""
    value = _convolve(node, inputs[0], inputs[1], inputs[2])
    following = required(node, "fused_ops")
    if following not in (["BiasAdd"], ["BiasAdd", "Relu"]):
        raise unusable(node, f"is followed by {following}")
    return value.relu_() if "Relu" in following else value


def _convolve(node: Node, picture: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    value = _to_torch(node, picture)  # (N, C, H, W)
    window = _window(node, value, (kernel.shape[0], kernel.shape[1]))
    weight = kernel.permute(3, 2, 0, 1)  # (out, in, H, W)
    padding = window.symmetric
    if padding is None:
        value, padding = window.pad(value, 0.0), (0, 0)
    return _from_torch(node, F.conv2d(value, weight, bias, window.stride, padding, window.dilation))


def maximum_pool(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """MaxPool."""
    value = _to_torch(node, inputs[0])
    window = _window(node, value, _in_space(node, "ksize", None))
    padding = window.symmetric
    # torch's own padding may be half the kernel at most.
    if padding is None or 2 * padding[0] > window.kernel[0] or 2 * padding[1] > window.kernel[1]:
        value, padding = window.pad(value, float("-inf")), (0, 0)
    return _from_torch(node, F.max_pool2d(value, window.kernel, window.stride, padding))


def average_pool(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """AvgPool. Padding is excluded: at a border the divisor is the number of pixels that the window really covers."""
    value = _to_torch(node, inputs[0])
    window = _window(node, value, _in_space(node, "ksize", None))
    if window.symmetric is not None:
        pooled = F.avg_pool2d(value, window.kernel, window.stride, window.symmetric, count_include_pad=False)
        return _from_torch(node, pooled)
    inside = window.pad(value.new_ones(1, 1, *value.shape[2:]), 0.0)
    counts = F.avg_pool2d(inside, window.kernel, window.stride, divisor_override=1)  # (1, 1, H', W')
    sums = F.avg_pool2d(window.pad(value, 0.0), window.kernel, window.stride, divisor_override=1)
    return _from_torch(node, sums / counts)


def _to_torch(node: Node, picture: Tensor) -> Tensor:
    if picture.ndim != 4:
        raise InputError(f"the node {node.name!r} ({node.operation}) needs pictures, not {picture.ndim} dimensions.")
    return picture if channels_first(node) else picture.permute(0, 3, 1, 2)


def _from_torch(node: Node, value: Tensor) -> Tensor:
    return value if channels_first(node) else value.permute(0, 2, 3, 1)


def _in_space(node: Node, name: str, default: list[int] | None) -> tuple[int, int]:
    """Rows and columns of an attribute that has one number for each of the four dimensions."""
    values = required(node, name) if default is None else node.attributes.get(name) or default
    channel = 1 if channels_first(node) else 3
    if len(values) != 4 or values[0] != 1 or values[channel] != 1 or min(values) < 1:
        raise unusable(node, f"has {name} {values}")
    rows, columns = (2, 3) if channel == 1 else (1, 2)
    return values[rows], values[columns]


def _window(node: Node, value: Tensor, kernel: tuple[int, int]) -> Window:
    stride, dilation = _in_space(node, "strides", None), _in_space(node, "dilations", [1, 1, 1, 1])
    scheme = required(node, "padding")
    if scheme == "VALID":
        rows, columns = (0, 0), (0, 0)
    elif scheme == "SAME":
        rows, columns = (
            same_padding(*sizes) for sizes in zip((value.shape[2], value.shape[3]), kernel, stride, dilation, strict=True)
        )
    elif scheme == "EXPLICIT":
        rows, columns = _explicit_padding(node)
    else:
        raise unusable(node, f"has the padding {scheme}")
    return Window(kernel, stride, dilation, (rows, columns))


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after) of TensorFlow's SAME scheme: the output has ceil(size / stride) places, and the odd pixel comes after."""
    places = -(-size // stride)
    total = max((places - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _explicit_padding(node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    values = required(node, "explicit_paddings")
    pairs = list(zip(values[::2], values[1::2], strict=True)) if len(values) == 8 else []
    channel = 1 if channels_first(node) else 3
    if not pairs or any(pairs[0]) or any(pairs[channel]) or min(values) < 0:
        raise unusable(node, f"has the explicit padding {values}")
    return (pairs[2], pairs[3]) if channel == 1 else (pairs[1], pairs[2])


def normalization_scale(node: Node, inputs: Sequence[Any]) -> tuple[Any, Any]:
    """Scale and shift that a batch normalization with known statistics comes to, from its inputs (tensors or arrays).

    FusedBatchNorm has x, scale, offset, mean, variance; the older operation x, mean, variance, beta, gamma, and its gamma
    counts only under `scale_after_normalization`.
    """
    if node.operation == "BatchNormWithGlobalNormalization":
        _, mean, variance, beta, gamma = inputs
        scale = (variance + required(node, "variance_epsilon")) ** -0.5
        scale = scale * gamma if required(node, "scale_after_normalization") else scale
    else:
        if node.attributes.get("is_training", True):
            raise unusable(node, "normalizes by the statistics of the batch it is given")
        _, gamma, beta, mean, variance = inputs
        scale = gamma * (variance + node.attributes.get("epsilon", 1e-4)) ** -0.5
    return scale, beta - mean * scale


def batch_normalization(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """BatchNormWithGlobalNormalization, FusedBatchNorm, FusedBatchNormV2, FusedBatchNormV3, in inference."""
    scale, shift = normalization_scale(node, inputs)
    return inputs[0] * _per_channel(node, scale) + _per_channel(node, shift)


def bias_addition(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """BiasAdd. A bias for every channel, which comes last unless the data format says otherwise."""
    return inputs[0] + _per_channel(node, inputs[1])


def _per_channel(node: Node, vector: Tensor) -> Tensor:
    return vector[:, None, None] if channels_first(node) else vector


def resize_bilinear(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """ResizeBilinear. Pictures (N, H, W, C), size (2,) -> (N, H', W', C) float32.

    Without attributes it is TensorFlow's old resize: output row i reads at i * H / H', so that pixel corners, not centres,
    coincide; published Inception features depend on it.
    """
    pictures, (height, width) = inputs[0].float(), inputs[1].tolist()
    if not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
        raise unusable(node, f"asks for pictures of {width} x {height} pixels")
    # Columns first, then rows: TensorFlow's order, and its rounding with it.
    return _interpolate(node, _interpolate(node, pictures, 2, width), 1, height)


def _interpolate(node: Node, pictures: Tensor, dimension: int, size: int) -> Tensor:
    present = pictures.shape[dimension]
    if size == present:
        return pictures  # every variant reads each pixel where it is
    lower, upper, fraction = _sources(node, present, size)
    shape = [1] * pictures.ndim
    shape[dimension] = size
    start = pictures.index_select(dimension, lower.to(pictures.device))
    end = pictures.index_select(dimension, upper.to(pictures.device))
    return end.sub_(start).mul_(fraction.to(pictures.device).view(shape)).add_(start)


def _sources(node: Node, present: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` places: the pixels before and after it, of `present`, and how far it lies between them."""
    corners, centres = node.attributes.get("align_corners", False), node.attributes.get("half_pixel_centers", False)
    if corners and centres:
        raise unusable(node, "asks for aligned corners and half-pixel centres at once")
    places = torch.arange(size, dtype=torch.float32)
    if corners and size > 1:
        places = places * float(np.float32(present - 1) / np.float32(size - 1))
    elif centres:
        places = (places + 0.5) * float(np.float32(present) / np.float32(size)) - 0.5
    else:
        places = places * float(np.float32(present) / np.float32(size))
    whole = places.floor()
    lower = whole.long().clamp(0, present - 1)
    # Before the first centre and behind the last, both ends are the same pixel, and the fraction has no effect.
    upper = (whole.long() + 1).clamp(0, present - 1)
    return lower, upper, places - whole


def concatenation(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Concat, whose axis comes first, and ConcatV2, whose axis comes last."""
    values, axis = (inputs[1:], inputs[0]) if node.operation == "Concat" else (inputs[:-1], inputs[-1])
    return torch.cat(list(values), dim=int(axis))


def matrix_product(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """MatMul, of two matrices."""
    first, second = inputs
    first = first.T if node.attributes.get("transpose_a", False) else first
    return first @ (second.T if node.attributes.get("transpose_b", False) else second)


def squeeze(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Squeeze: the named dimensions of size 1, or all of them where none is named."""
    dimensions = node.attributes.get("squeeze_dims") or [place for place, size in enumerate(inputs[0].shape) if size == 1]
    if any(inputs[0].shape[place] != 1 for place in dimensions):
        raise unusable(node, f"drops dimensions {dimensions} of a tensor of the shape {tuple(inputs[0].shape)}")
    return inputs[0].squeeze(tuple(dimensions))


def cast(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Cast to the data type DstT."""
    target = required(node, "DstT")
    if not isinstance(target, np.dtype):
        raise unusable(node, f"has the data type {target!r}")
    return inputs[0].to(getattr(torch, target.name))


def unchanged(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Identity; CheckNumerics too: asking a GPU whether a tensor is finite waits for it, 94 times a batch in Inception. What is
    not finite here is not finite in the features, and those are checked once, where their statistics are gathered."""
    return inputs[0]


OPERATIONS: dict[str, Operation] = {
    "Add": lambda node, inputs: inputs[0] + inputs[1],
    "AddV2": lambda node, inputs: inputs[0] + inputs[1],
    "AvgPool": average_pool,
    "BatchNormWithGlobalNormalization": batch_normalization,
    "BiasAdd": bias_addition,
    "Cast": cast,
    "CheckNumerics": unchanged,
    "Concat": concatenation,
    "ConcatV2": concatenation,
    "Conv2D": convolution,
    "ExpandDims": lambda node, inputs: inputs[0].unsqueeze(int(inputs[1])),
    "FusedBatchNorm": batch_normalization,
    "FusedBatchNormV2": batch_normalization,
    "FusedBatchNormV3": batch_normalization,
    "Identity": unchanged,
    "MatMul": matrix_product,
    "MaxPool": maximum_pool,
    "Mul": lambda node, inputs: inputs[0] * inputs[1],
    "RealDiv": lambda node, inputs: inputs[0] / inputs[1],
    "Relu": lambda node, inputs: inputs[0].relu(),
    "Relu6": lambda node, inputs: inputs[0].clamp(0, 6),
    "Reshape": lambda node, inputs: inputs[0].reshape(inputs[1].tolist()),
    "ResizeBilinear": resize_bilinear,
    "Softmax": lambda node, inputs: inputs[0].softmax(-1),
    "Squeeze": squeeze,
    "Sub": lambda node, inputs: inputs[0] - inputs[1],
    "_FusedConv2D": fused_convolution,
}
"""By TensorFlow's name. Const and Placeholder are the executor's: they compute nothing."""

NORMALIZATIONS = ("BatchNormWithGlobalNormalization", "FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
_TWO_INPUTS = (
    "Add", "AddV2", "BiasAdd", "Concat", "ConcatV2", "Conv2D", "ExpandDims", "MatMul", "Mul", "RealDiv", "Reshape",
    "ResizeBilinear", "Sub",
)  # fmt: skip
_INPUTS = {**dict.fromkeys(_TWO_INPUTS, 2), **dict.fromkeys(NORMALIZATIONS, 5), "_FusedConv2D": 3}
"""How many inputs an operation reads, where it is not one. Concat and ConcatV2 may have more."""


def check_inputs(node: Node) -> None:
    """Raises InputError where a node of a known operation has fewer inputs than that reads, or more."""
    given, needed = len(node.inputs), _INPUTS.get(node.operation, 1)
    if given < needed or (given > needed and not node.operation.startswith("Concat")):
        inputs = "no input" if not given else "1 input" if given == 1 else f"{given} inputs"
        raise InputError(f"the node {node.name!r} ({node.operation}) has {inputs}, where {needed} must be; "
                         "the graph is damaged.")  # fmt: skip
