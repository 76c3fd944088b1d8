"""The executor: what it simplifies computes the same, memory goes as soon as it can, a bad graph is named in one sentence."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics.networks import executor
from metrics.networks.executor import GraphExecutor, simplified
from metrics.networks.graph import Node
from metrics.networks.operations import OPERATIONS
from runtime.config import InputError

WINDOW = {"strides": [1, 1, 1, 1], "padding": "SAME"}
OLD_NORMALIZATION = "BatchNormWithGlobalNormalization"
OLD = {"variance_epsilon": 0.01, "scale_after_normalization": True}


def graph(*nodes: tuple[str, str, tuple[str, ...]] | tuple[str, str, tuple[str, ...], Mapping[str, Any]]) -> dict[str, Node]:
    return {node[0]: Node(*node) for node in (("in", "Placeholder", ()), *nodes)}


def numbers(name: str, *shape: int, positive: bool = False) -> tuple[str, str, tuple[str, ...], Mapping[str, Any]]:
    value = np.random.default_rng(sum(name.encode())).normal(size=shape).astype(np.float32)
    return name, "Const", (), {"value": value**2 if positive else value}


def small_network(operation: str = "BatchNormWithGlobalNormalization", attributes: Mapping[str, Any] = OLD) -> dict[str, Node]:
    """in -> convolution -> normalization -> (checked) identity -> ReLU -> convolution."""
    vectors = ("mean", "variance", "beta", "gamma") if operation.startswith("Batch") else ("gamma", "beta", "mean", "variance")
    return graph(
        numbers("kernel", 3, 3, 2, 4), numbers("mean", 4), numbers("variance", 4, positive=True), numbers("beta", 4),
        numbers("gamma", 4), numbers("kernel_2", 1, 1, 4, 3),
        ("conv", "Conv2D", ("in", "kernel"), WINDOW),
        ("norm", operation, ("conv", *vectors), attributes),
        ("check", "CheckNumerics", ("norm",)),
        ("identity", "Identity", ("check",)),
        ("relu", "Relu", ("identity",)),
        ("out", "Conv2D", ("relu", "kernel_2"), WINDOW),
    )  # fmt: skip


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def plainly(nodes: Mapping[str, Node], fetches: tuple[str, ...], value: Tensor) -> list[Tensor]:
    """The graph without any simplification, node by node, as its definition says."""
    values: dict[str, Tensor] = {"in": value}

    def of(name: str) -> Tensor:
        if name not in values:
            node = nodes[name]
            if node.operation == "Const":
                values[name] = torch.tensor(node.attributes["value"])
            else:
                values[name] = OPERATIONS[node.operation](node, [of(entry) for entry in node.inputs])
        return values[name]

    return [of(name).clone() for name in fetches]


def assert_same(nodes: Mapping[str, Node], *fetches: str, shape: tuple[int, ...] = (2, 5, 6, 2)) -> None:
    value = picture(*shape)
    before = value.clone()
    ours, expected = GraphExecutor(nodes, "in", fetches)(value), plainly(nodes, fetches, value)
    for one, other in zip(ours, expected, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(value, before)


VARIANTS = [
    ("BatchNormWithGlobalNormalization", OLD),
    ("BatchNormWithGlobalNormalization", {**OLD, "scale_after_normalization": False}),
    ("FusedBatchNorm", {"is_training": False}),
    ("FusedBatchNormV3", {"is_training": False, "epsilon": 0.01}),
]


@pytest.mark.parametrize(("operation", "attributes"), VARIANTS)
def test_folding_computes_the_same_in_fewer_steps(operation: str, attributes: Mapping[str, Any]) -> None:
    nodes = small_network(operation, attributes)
    ordered, _ = simplified(nodes, "in", ("out",))
    assert [node.operation for node in ordered if node.operation != "Const"] == ["_FusedConv2D", "Conv2D"]
    assert_same(nodes, "out")


@pytest.mark.parametrize(
    "fetches", [("conv", "out"), ("norm", "out"), ("identity", "relu"), ("relu", "check", "in"), ("out", "out")]
)
def test_what_is_fetched_on_the_way_is_what_the_graph_says(fetches: tuple[str, ...]) -> None:
    assert_same(small_network(), *fetches)


@pytest.mark.parametrize("read", ["conv", "norm", "identity"])
def test_what_another_node_reads_too_is_left_alone(read: str) -> None:
    """Folding, or a ReLU in place, would change what the second reader sees."""
    nodes = small_network()
    nodes["side"] = Node("side", "Relu6", (read,))
    assert_same(nodes, "out", "side")


def test_statistics_that_are_not_constant_are_not_folded() -> None:
    nodes = small_network()
    nodes["mean_2"] = Node("mean_2", "Add", ("mean", "mean"))
    nodes["norm"] = Node("norm", nodes["norm"].operation, ("conv", "mean_2", *nodes["norm"].inputs[2:]), OLD)
    assert_same(nodes, "out")


def test_channels_that_lie_elsewhere_are_not_folded() -> None:
    """A convolution of (N, C, H, W), and a normalization over the last dimension, here as long as there are channels."""
    nodes = small_network()
    nodes["conv"] = Node("conv", "Conv2D", ("in", "kernel"), {**WINDOW, "data_format": "NCHW"})
    assert_same(nodes, "relu", shape=(2, 2, 5, 4))


def test_a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the mean is folded without its scale."""
    right = executor.normalization_scale

    def wrong(node: Node, inputs: Any) -> Any:
        scale, _ = right(node, inputs)
        return scale, inputs[3] - inputs[1]

    monkeypatch.setattr(executor, "normalization_scale", wrong)
    with pytest.raises(AssertionError):
        assert_same(small_network(), "out")


def test_values_go_when_their_last_reader_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def recorded(node: Node, inputs: Any) -> Tensor:
        nonlocal most
        result = inputs[0] + 1
        made.append(weakref.ref(result))
        most = max(most, sum(reference() is not None for reference in made))
        return result

    monkeypatch.setitem(OPERATIONS, "Relu6", recorded)
    chain = [(f"n{place}", "Relu6", (f"n{place - 1}" if place else "in",)) for place in range(8)]
    nodes = graph(*chain, ("sum", "Add", ("n7", "n0")))
    (result,) = GraphExecutor(nodes, "in", ("sum",))(torch.zeros(3))
    assert result.tolist() == [9.0] * 3
    # One that is read at the end, one that is read, one that is made. `inputs` of the call before holds none.
    assert most <= 3
    monkeypatch.setattr(executor, "_with_lifetimes", lambda nodes, fetches: [executor._Step(node, ()) for node in nodes])
    made.clear()
    most = 0
    GraphExecutor(nodes, "in", ("sum",))(torch.zeros(3))
    assert most == 8  # the planted bug: nothing is let go


def test_a_chain_longer_than_pythons_stack() -> None:
    chain = [(f"n{place}", "Relu", (f"n{place - 1}" if place else "in",)) for place in range(3_000)]
    (result,) = GraphExecutor(graph(*chain), "in", ("n2999",))(torch.tensor([-1.0, 2.0]))
    assert result.tolist() == [0.0, 2.0]


def test_only_what_is_needed_is_looked_at() -> None:
    nodes = graph(("jpeg", "Const", (), {"value": None}), ("decode", "DecodeJpeg", ("jpeg",)), ("fed", "Cast", ("decode",)),
                  ("a.b", "Relu", ("fed",)), ("other", "Unheard", ("a.b",)))  # fmt: skip
    (result,) = GraphExecutor(nodes, "fed", ("a.b",))(torch.tensor([-1.0, 1.0]))
    assert result.tolist() == [0.0, 1.0]


def test_constants_follow_the_module_and_shapes_stay() -> None:
    nodes = graph(("a.c", "Const", (), {"value": np.ones(2, np.float32)}), ("shape", "Const", (), {"value": np.array([2, 1])}),
                  ("sum", "Add", ("in", "a.c")), ("out", "Reshape", ("sum", "shape")))  # fmt: skip
    moved = GraphExecutor(nodes, "in", ("out",)).to("meta")
    (result,) = moved(torch.zeros(2, device="meta"))
    assert result.device.type == "meta"
    assert result.shape == (2, 1)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            graph(("out", "Foo", ("in",))),
            "the node 'out' uses the operation Foo, which this project cannot execute; it knows Add",
        ),
        (graph(("out", "Relu", ("lost",))), "the node 'out' reads 'lost', which does not exist"),
        (graph(("out", "Relu", ("in:1",))), "the node 'out' reads 'in:1', of which first outputs alone"),
        (graph(("out", "Relu", ("b",)), ("b", "Relu", ("out",))), "damaged: the node 'out' needs its own result"),
        (graph(("out", "Relu", ("out",))), "damaged: the node 'out' needs its own result"),
        (graph(("out", "Add", ("in", "b")), ("b", "Placeholder", ())), "'b' is a placeholder .* 'in' alone is fed"),
        (graph(("out", "Relu", ())), r"'out' \(Relu\) has no input, where 1 must be; the graph is damaged"),
        (graph(("out", "Conv2D", ("in",), WINDOW)), r"'out' \(Conv2D\) has 1 input, where 2 must be"),
        (graph(("out", "Concat", ("in",))), r"'out' \(Concat\) has 1 input, where 2 must be"),
        (
            graph(("out", "FusedBatchNorm", ("conv", "in")), ("conv", "Conv2D", ("in", "in"), WINDOW)),
            r"'out' \(FusedBatchNorm\) has 2 inputs, where 5 must be",
        ),
        (graph(("out", OLD_NORMALIZATION, ("in",) * 6, OLD)), r"has 6 inputs, where 5 must be"),
        (graph(("out", "Add", ("in",) * 3)), r"'out' \(Add\) has 3 inputs, where 2 must be"),
        (graph(("out", "Add", ("in", "c")), ("c", "Const", (), {"value": None})), "'c' holds no numbers"),
        (graph(("elsewhere", "Relu", ("in",))), "has no node 'out'"),
    ],
)
def test_a_graph_that_cannot_be_run_is_named(nodes: dict[str, Node], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphExecutor(nodes, "in", ("out",))


def reads_what_is_not_there(operation: str, count: int) -> bool:
    """A node of so many inputs behind a convolution, which it may be folded into."""
    inputs = ("conv", *["kernel"] * (count - 1))
    nodes = graph(numbers("kernel", 1, 1, 2, 2), ("conv", "Conv2D", ("in", "kernel"), WINDOW), ("out", operation, inputs))
    try:
        GraphExecutor(nodes, "in", ("out",))(picture(1, 3, 3, 2))
    except IndexError:
        return True
    except (InputError, RuntimeError) as error:
        return isinstance(error.__cause__, IndexError)
    return False


def test_no_operation_reads_an_input_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name in OPERATIONS for count in range(1, 5) if reads_what_is_not_there(name, count)]
    monkeypatch.setattr(executor, "check_inputs", lambda node: None)
    assert all(reads_what_is_not_there(name, 1) for name in ("BiasAdd", "Conv2D", "ExpandDims", "Mul", "_FusedConv2D"))


def test_shapes_that_do_not_fit_name_the_node() -> None:
    nodes = graph(numbers("kernel", 3, 3, 7, 4), ("conv", "Conv2D", ("in", "kernel"), WINDOW))
    with pytest.raises(RuntimeError, match=r"the node 'conv' \(Conv2D\) cannot be computed"):
        GraphExecutor(nodes, "in", ("conv",))(picture(2, 5, 6, 2))
