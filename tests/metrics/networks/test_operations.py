"""Every operation against a formula written out in loops, and against TensorFlow itself where it is installed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metrics.networks import operations
from metrics.networks.graph import Node
from metrics.networks.operations import OPERATIONS
from runtime.config import InputError

GENERATOR = np.random.default_rng(0)
GEOMETRIES = list(itertools.product((5, 6, 7), (1, 2, 3, 4), (1, 2, 3), ("SAME", "VALID")))
POOLS = {"MaxPool": np.max, "AvgPool": np.mean}


def compute(operation: str, *inputs: Any, **attributes: Any) -> NDArray[Any]:
    node = Node("node", operation, ("x",) * len(inputs), attributes)
    return OPERATIONS[operation](node, [torch.tensor(np.array(value)) for value in inputs]).numpy()


def normal(*shape: int) -> NDArray[np.float32]:
    return GENERATOR.normal(size=shape).astype(np.float32)


def places(size: int, kernel: int, stride: int, scheme: str) -> list[list[int]]:
    """For each output place the input index under each tap; None outside. From TensorFlow's guide to its padding schemes."""
    if scheme == "VALID":
        count, before = (size - kernel) // stride + 1, 0
    else:
        count = -(-size // stride)
        rest = size % stride or stride
        before = max(kernel - rest, 0) // 2
    taps = [[place * stride - before + tap for tap in range(kernel)] for place in range(count)]
    return [[index if 0 <= index < size else None for index in row] for row in taps]


def convolved(picture: NDArray[np.float32], kernel: NDArray[np.float32], stride: int, scheme: str) -> NDArray[np.float64]:
    rows = places(picture.shape[1], kernel.shape[0], stride, scheme)
    columns = places(picture.shape[2], kernel.shape[1], stride, scheme)
    result = np.zeros((len(picture), len(rows), len(columns), kernel.shape[3]))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        for (a, y), (b, x) in itertools.product(enumerate(row), enumerate(column)):
            if y is not None and x is not None:
                result[:, i, j] += picture[:, y, x].astype(np.float64) @ kernel[a, b]
    return result


def pooled(picture: NDArray[np.float32], size: int, stride: int, scheme: str, reduce: Any) -> NDArray[np.float64]:
    rows, columns = (places(side, size, stride, scheme) for side in picture.shape[1:3])
    result = np.zeros((len(picture), len(rows), len(columns), picture.shape[3]))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        inside = [picture[:, y, x] for y, x in itertools.product(row, column) if y is not None and x is not None]
        result[:, i, j] = reduce(np.stack(inside), axis=0)
    return result


def window(stride: int, scheme: str, kernel: int | None = None) -> dict[str, Any]:
    size = {} if kernel is None else {"ksize": [1, kernel, kernel, 1]}
    return {"strides": [1, stride, stride, 1], "padding": scheme, **size}


def convolution_errors(geometries: Sequence[tuple[int, int, int, str]] = GEOMETRIES) -> float:
    worst = 0.0
    for size, kernel_size, stride, scheme in geometries:
        picture, kernel = normal(2, size, size + 1, 3), normal(kernel_size, kernel_size, 3, 4)
        ours, expected = (
            compute("Conv2D", picture, kernel, **window(stride, scheme)),
            convolved(picture, kernel, stride, scheme),
        )
        if ours.shape != expected.shape:
            return float("inf")
        worst = max(worst, float(np.abs(ours - expected).max()))
    return worst


def pool_errors(operation: str) -> float:
    worst = 0.0
    for size, kernel, stride, scheme in GEOMETRIES:
        picture = normal(2, size, size + 1, 3) - 5  # a padding of zeros would win every maximum
        expected = pooled(picture, kernel, stride, scheme, POOLS[operation])
        worst = max(worst, float(np.abs(compute(operation, picture, **window(stride, scheme, kernel)) - expected).max()))
    return worst


def test_convolution() -> None:
    assert convolution_errors() < 1e-5


@pytest.mark.parametrize("operation", POOLS)
def test_pools(operation: str) -> None:
    assert pool_errors(operation) < 1e-5


def test_padding_on_the_wrong_side_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the odd pixel of SAME padding before, as torch users often pad, instead of after."""
    right = operations.same_padding
    monkeypatch.setattr(operations, "same_padding", lambda *sizes: right(*sizes)[::-1])
    assert convolution_errors() > 0.1
    assert pool_errors("MaxPool") > 0.1
    assert pool_errors("AvgPool") > 0.1


def test_averages_that_count_their_padding_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: torchvision's Inception divides by the whole window at borders, the frozen graph does not."""
    right = torch.nn.functional.avg_pool2d

    def counting(*arguments: Any, count_include_pad: bool = True, **options: Any) -> torch.Tensor:
        return right(*arguments, **options)

    monkeypatch.setattr(operations.F, "avg_pool2d", counting)
    assert pool_errors("AvgPool") > 0.1


def test_dilated_and_explicitly_padded_convolution() -> None:
    picture, kernel = normal(2, 9, 8, 3), normal(3, 2, 3, 4)
    spread = np.zeros((5, 4, 3, 4), dtype=np.float32)
    spread[::2, ::3] = kernel
    expected = convolved(picture, spread, 1, "SAME")
    ours = compute("Conv2D", picture, kernel, strides=[1, 1, 1, 1], padding="SAME", dilations=[1, 2, 3, 1])
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    padded = np.pad(picture, ((0, 0), (1, 0), (0, 3), (0, 0)))
    explicit = {"padding": "EXPLICIT", "explicit_paddings": [0, 0, 1, 0, 0, 3, 0, 0]}
    ours = compute("Conv2D", picture, kernel, strides=[1, 2, 2, 1], **explicit)
    np.testing.assert_allclose(ours, convolved(padded, kernel, 2, "VALID"), atol=1e-5)


@pytest.mark.parametrize("operation", ["Conv2D", "MaxPool", "AvgPool", "BiasAdd", "FusedBatchNormV3"])
def test_channels_first_is_the_same_computation(operation: str) -> None:
    picture = normal(2, 6, 5, 3)
    others: list[NDArray[np.float32]] = []
    attributes, moved = {}, {}
    if operation in ("Conv2D", "MaxPool", "AvgPool"):
        attributes, moved = window(2, "SAME"), {"strides": [1, 1, 2, 2], "padding": "SAME"}
    if operation in POOLS:
        attributes, moved = {**attributes, "ksize": [1, 2, 3, 1]}, {**moved, "ksize": [1, 1, 2, 3]}
    if operation == "Conv2D":
        others = [normal(2, 3, 3, 4)]
    if operation == "BiasAdd":
        others = [normal(3)]
    if operation == "FusedBatchNormV3":
        others, attributes, moved = [*normal(3, 3), normal(3) ** 2], {"is_training": False}, {"is_training": False}
    last = compute(operation, picture, *others, **attributes)
    first = compute(operation, picture.transpose(0, 3, 1, 2), *others, data_format="NCHW", **moved)
    np.testing.assert_allclose(first.transpose(0, 2, 3, 1), last, atol=1e-6)


def resized(picture: NDArray[np.float32], size: tuple[int, int], variant: str) -> NDArray[np.float64]:
    """Bilinear resizing in double precision: weights of the two nearest source pixels of each axis."""

    def weights(present: int, wanted: int) -> NDArray[np.float64]:
        matrix = np.zeros((wanted, present))
        for place in range(wanted):
            source = place * present / wanted
            if variant == "half_pixel_centers":
                source = min(max((place + 0.5) * present / wanted - 0.5, 0), present - 1)
            if variant == "align_corners" and wanted > 1:
                source = place * (present - 1) / (wanted - 1)
            lower = min(int(source), present - 1)
            matrix[place, lower] += 1 - (source - lower)
            matrix[place, min(lower + 1, present - 1)] += source - lower
        return matrix

    rows, columns = weights(picture.shape[1], size[0]), weights(picture.shape[2], size[1])
    return np.einsum("ay,bx,nyxc->nabc", rows, columns, picture.astype(np.float64))


SIZES = [((5, 7), (13, 8)), ((13, 8), (5, 7)), ((6, 6), (6, 6)), ((4, 9), (9, 4)), ((1, 3), (2, 1)), ((64, 48), (37, 51))]
VARIANTS = ["", "half_pixel_centers", "align_corners"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("present", "wanted"), SIZES)
def test_resize(present: tuple[int, int], wanted: tuple[int, int], variant: str) -> None:
    picture = normal(2, *present, 3)
    ours = compute("ResizeBilinear", picture, np.array(wanted, np.int32), **({variant: True} if variant else {}))
    np.testing.assert_allclose(ours, resized(picture, wanted, variant), atol=2e-5)


def test_the_variants_of_resizing_differ() -> None:
    """The planted bug would be one variant for another; the published features are those of the old one."""
    picture, size = normal(1, 32, 32, 3), (75, 75)
    ours = compute("ResizeBilinear", picture, np.array(size, np.int32))
    for variant in VARIANTS[1:]:
        assert np.abs(ours - resized(picture, size, variant)).max() > 0.1


def test_a_resize_of_both_kinds_is_refused() -> None:
    with pytest.raises(InputError, match="aligned corners and half-pixel centres at once"):
        compute("ResizeBilinear", normal(1, 4, 4, 3), np.array([5, 5]), align_corners=True, half_pixel_centers=True)


@pytest.mark.parametrize("scaled", [True, False])
def test_old_batch_normalization(scaled: bool) -> None:
    picture, (mean, beta, gamma), variance = normal(2, 3, 3, 4), normal(3, 4), normal(4) ** 2
    attributes = {"variance_epsilon": 0.001, "scale_after_normalization": scaled}
    ours = compute("BatchNormWithGlobalNormalization", picture, mean, variance, beta, gamma, **attributes)
    expected = (picture - mean) / np.sqrt(variance + 0.001) * (gamma if scaled else 1) + beta
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    wrong = (picture - mean) / np.sqrt(variance + 0.001) * (1 if scaled else gamma) + beta
    assert np.abs(ours - wrong).max() > 0.1


def test_fused_batch_normalization() -> None:
    picture, (gamma, beta, mean), variance = normal(2, 3, 3, 4), normal(3, 4), normal(4) ** 2
    inputs = (picture, gamma, beta, mean, variance)
    expected = (picture - mean) / np.sqrt(variance + 1e-4) * gamma + beta
    ours = compute("FusedBatchNormV3", *inputs, is_training=False)  # epsilon's default is 1e-4
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="statistics of the batch"):
        compute("FusedBatchNormV3", *inputs)  # and is_training's is true


def test_operations_on_single_values() -> None:
    first, second = normal(3, 4), normal(3, 4)
    arithmetic = {"Add": np.add, "AddV2": np.add, "Sub": np.subtract, "Mul": np.multiply, "RealDiv": np.divide}
    for operation, reference in arithmetic.items():
        np.testing.assert_allclose(compute(operation, first, second), reference(first, second), rtol=1e-6)
    assert np.array_equal(compute("Relu", first), np.maximum(first, 0))
    assert np.array_equal(compute("Relu6", 5 * first), np.clip(5 * first, 0, 6))
    exponentials = np.exp(first.astype(np.float64))
    np.testing.assert_allclose(compute("Softmax", first), exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-5)
    assert compute("Cast", np.array([1, 255], np.uint8), DstT=np.dtype(np.float32)).tolist() == [1.0, 255.0]
    assert compute("CheckNumerics", first).tolist() == compute("Identity", first).tolist() == first.tolist()


def test_operations_on_shapes() -> None:
    value = normal(2, 3, 4)
    assert np.array_equal(compute("ExpandDims", value, np.array(0, np.int32)), value[None])
    assert np.array_equal(compute("ExpandDims", value, np.array(-1, np.int32)), value[..., None])
    assert np.array_equal(compute("Reshape", value, np.array([-1, 6], np.int32)), value.reshape(4, 6))
    assert compute("Squeeze", value[None, :, None]).shape == (2, 3, 4)
    assert compute("Squeeze", value[None, :, None], squeeze_dims=[2]).shape == (1, 2, 3, 4)
    with pytest.raises(InputError, match="drops dimensions"):
        compute("Squeeze", value, squeeze_dims=[0])
    other, axis = normal(2, 5, 4), np.array(1, np.int32)
    assert np.array_equal(compute("Concat", axis, value, other), np.concatenate([value, other], axis=1))
    assert np.array_equal(compute("ConcatV2", value, other, axis), np.concatenate([value, other], axis=1))


@pytest.mark.parametrize(("transpose_a", "transpose_b"), list(itertools.product((True, False), repeat=2)))
def test_matrix_product(transpose_a: bool, transpose_b: bool) -> None:
    first, second = normal(3, 5), normal(5, 2)
    given = (first.T if transpose_a else first, second.T if transpose_b else second)
    ours = compute("MatMul", *given, transpose_a=transpose_a, transpose_b=transpose_b)
    np.testing.assert_allclose(ours, first @ second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_format": "NCHW_VECT_C"}, "has the data format NCHW_VECT_C"),
        ({"strides": [2, 1, 1, 1]}, r"has strides \[2, 1, 1, 1\]"),
        ({"strides": None}, "lacks its attribute strides"),
        ({"padding": "CAUSAL"}, "has the padding CAUSAL"),
        ({"padding": "EXPLICIT", "explicit_paddings": [0, 0, 1, 1]}, "has the explicit padding"),
        ({"padding": "EXPLICIT"}, "lacks its attribute explicit_paddings"),
    ],
)
def test_attributes_that_cannot_be_used_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"the node 'node' \(Conv2D\) {message}"):
        compute("Conv2D", normal(1, 5, 5, 2), normal(3, 3, 2, 2), **{**window(1, "SAME"), **changed})


@pytest.fixture(scope="module")
def raw() -> Any:
    return pytest.importorskip("tensorflow").raw_ops


def test_windows_equal_tensorflow(raw: Any) -> None:
    for size, kernel, stride, scheme in GEOMETRIES:
        picture, weights = normal(2, size, size + 1, 3), normal(kernel, kernel, 3, 4)
        attributes = window(stride, scheme)
        expected = raw.Conv2D(input=picture, filter=weights, **attributes).numpy()
        np.testing.assert_allclose(compute("Conv2D", picture, weights, **attributes), expected, atol=1e-5)
        attributes = window(stride, scheme, kernel)
        expected = raw.MaxPool(input=picture, **attributes).numpy()
        assert np.array_equal(compute("MaxPool", picture, **attributes), expected)
        expected = raw.AvgPool(value=picture, **attributes).numpy()
        np.testing.assert_allclose(compute("AvgPool", picture, **attributes), expected, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resize_equals_tensorflow(raw: Any, variant: str) -> None:
    for present, wanted in [*SIZES, ((256, 256), (299, 299)), ((512, 100), (299, 299))]:
        picture, size = normal(1, *present, 3), np.array(wanted, np.int32)
        attributes = {variant: True} if variant else {}
        expected = raw.ResizeBilinear(images=picture, size=size, **attributes).numpy()
        # Not bit for bit: TensorFlow's compiler fuses a product and a sum here and there.
        np.testing.assert_allclose(compute("ResizeBilinear", picture, size, **attributes), expected, atol=2e-6)


def test_other_operations_equal_tensorflow(raw: Any) -> None:
    picture, (gamma, beta, mean), variance = normal(2, 3, 3, 4), normal(3, 4), normal(4) ** 2
    expected = raw.FusedBatchNormV3(x=picture, scale=gamma, offset=beta, mean=mean, variance=variance, is_training=False)
    ours = compute("FusedBatchNormV3", picture, gamma, beta, mean, variance, is_training=False)
    np.testing.assert_allclose(ours, expected[0].numpy(), rtol=1e-5, atol=1e-5)
    first, second = normal(3, 5), normal(2, 5)
    expected = raw.MatMul(a=first, b=second, transpose_b=True).numpy()
    np.testing.assert_allclose(compute("MatMul", first, second, transpose_b=True), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compute("Softmax", first), raw.Softmax(logits=first).numpy(), rtol=1e-5)
    assert np.array_equal(compute("Concat", np.array(1), first, first), raw.Concat(concat_dim=1, values=[first, first]).numpy())
    assert np.array_equal(compute("Squeeze", first[None], squeeze_dims=[0]), raw.Squeeze(input=first[None], axis=[0]).numpy())


def test_numbers_out_of_reach_and_types_that_are_none() -> None:
    for size in ([100_000, 9], [9, 4_097], [0, 9]):
        with pytest.raises(InputError, match=r"asks for pictures of .* pixels"):
            compute("ResizeBilinear", normal(1, 2, 2, 3), np.array(size, np.int32))
    with pytest.raises(InputError, match="has the data type 'float'"):
        compute("Cast", normal(2), DstT="float")
