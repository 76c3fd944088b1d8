"""Runs the nodes of a frozen graph with torch: any network whose operations `metrics.networks.operations` knows.

Before the first run the graph is simplified, as TensorFlow's own optimizer does: identities vanish, and a batch
normalization with constant statistics, and a ReLU, become part of the convolution before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from metrics.networks.graph import Node, constant
from metrics.networks.operations import NORMALIZATIONS, OPERATIONS, channels_first, check_inputs, normalization_scale
from runtime.config import InputError

_CONVOLUTIONS = ("Conv2D", "_FusedConv2D")


@dataclass(frozen=True)
class _Step:
    node: Node
    finished: tuple[str, ...]
    """Values that nothing reads after this step."""


class GraphExecutor(torch.nn.Module):
    """The part of a graph that leads from one node to some others.

    Numbers are float32 (or what the graph says); float constants are buffers and follow `.to(device)`. Integers are shapes and
    axes, which torch wants in the CPU's memory, and stay there.
    """

    def __init__(self, nodes: Mapping[str, Node], feed: str, fetches: Sequence[str]) -> None:
        """`feed`: the node whose value `forward` is given; `fetches`: those it returns.

        Raises InputError where a named node is missing, an operation on the way is not known or lacks inputs, or there is a
        cycle.
        """
        super().__init__()
        for name in (feed, *fetches):
            if name not in nodes:
                raise InputError(f"the graph has no node {name!r}.")
        ordered, aliases = simplified(nodes, feed, fetches)
        self._feed = feed
        self._fetches = tuple(aliases.get(name, name) for name in fetches)
        kernels = {node.inputs[1] for node in ordered if node.operation in _CONVOLUTIONS}
        self._integers: dict[str, Tensor] = {}
        self._buffer_names: dict[str, str] = {}
        for node in ordered:
            if node.operation == "Const":
                self._keep(node, node.name in kernels)
        self._steps = _with_lifetimes([node for node in ordered if node.operation != "Const"], self._fetches)

    def forward(self, value: Tensor) -> tuple[Tensor, ...]:
        """`value` stands for the output of the fed node. Returns the fetched values, in the order they were asked for."""
        values = {self._feed: value, **self._integers}
        values.update((name, self.get_buffer(buffer)) for name, buffer in self._buffer_names.items())
        for step in self._steps:
            node = step.node
            try:
                values[node.name] = OPERATIONS[node.operation](node, [values[name] for name in node.inputs])
            except (InputError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise RuntimeError(f"the node {node.name!r} ({node.operation}) cannot be computed: {error}") from error
            for name in step.finished:
                del values[name]
        return tuple(values[name] for name in self._fetches)

    def _keep(self, node: Node, is_kernel: bool) -> None:
        array = node.attributes.get("value")
        if not isinstance(array, np.ndarray):
            raise InputError(f"the node {node.name!r} holds no numbers, and numbers are needed there.")
        tensor = torch.from_numpy(np.array(array))
        if not tensor.is_floating_point():
            self._integers[node.name] = tensor
            return
        if is_kernel and tensor.ndim == 4:
            # Still (H, W, in, out), but in memory as torch's channels_last wants (out, in, H, W): convolutions copy nothing.
            tensor = tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        # A module's buffer may have no dot in its name, a node may.
        self._buffer_names[node.name] = f"constant_{len(self._buffer_names)}"
        self.register_buffer(self._buffer_names[node.name], tensor, persistent=False)


def simplified(nodes: Mapping[str, Node], feed: str, fetches: Sequence[str]) -> tuple[list[Node], dict[str, str]]:
    """The needed nodes, inputs before readers, that compute the same fetches in fewer steps; and new names of some fetches.

    Raises InputError as `GraphExecutor`.
    """
    needed = {node.name: node for node in _ordered(nodes, feed, fetches)}
    aliases: dict[str, str] = {}
    for node in list(needed.values()):
        if node.operation in ("Identity", "CheckNumerics"):
            aliases[node.name] = aliases.get(node.inputs[0], node.inputs[0])
            del needed[node.name]
        else:
            needed[node.name] = replace(node, inputs=tuple(aliases.get(name, name) for name in node.inputs))
    kept = [aliases.get(name, name) for name in fetches]
    readers = Counter(name for node in needed.values() for name in node.inputs) + Counter(kept)
    for node in list(needed.values()):
        before = needed.get(node.inputs[0]) if node.inputs else None
        if before is None or readers[before.name] != 1:
            continue
        if node.operation in NORMALIZATIONS and before.operation == "Conv2D":
            _fold_normalization(needed, before, node)
        elif node.operation == "Relu" and before.attributes.get("fused_ops") == ["BiasAdd"]:
            attributes = {**before.attributes, "fused_ops": ["BiasAdd", "Relu"]}
            needed[node.name] = replace(before, name=node.name, attributes=attributes)
            del needed[before.name]
    return _ordered(needed, feed, kept), aliases


def _fold_normalization(nodes: dict[str, Node], convolution: Node, normalization: Node) -> None:
    """Replaces both, where all but the picture is constant, by one convolution: scaling its output is scaling its kernel."""
    arrays = [constant(nodes, name) for name in (*normalization.inputs[1:], convolution.inputs[1])]
    if any(array is None or array.dtype != np.float32 for array in arrays):
        return
    if channels_first(convolution) != channels_first(normalization):
        return
    *statistics, kernel = (array.astype(np.float64) for array in arrays if array is not None)
    scale, shift = normalization_scale(normalization, [None, *statistics])
    if kernel.ndim != 4 or kernel.shape[3:] != scale.shape:
        return
    name = normalization.name
    for suffix, array in (("kernel", kernel * scale), ("bias", shift)):
        value = {"value": array.astype(np.float32)}
        nodes[f"{name}/folded {suffix}"] = Node(f"{name}/folded {suffix}", "Const", (), value)
    inputs = (convolution.inputs[0], f"{name}/folded kernel", f"{name}/folded bias")
    nodes[name] = Node(name, "_FusedConv2D", inputs, {**convolution.attributes, "fused_ops": ["BiasAdd"]})
    del nodes[convolution.name]


def _ordered(nodes: Mapping[str, Node], feed: str, fetches: Sequence[str]) -> list[Node]:
    """The nodes that the fetches need, without the fed one, each after its inputs."""
    done: dict[str, Node | None] = {feed: None}
    open_: set[str] = set()
    # Depth first, with a stack of its own: a chain of nodes may be longer than Python's.
    stack = list(reversed(fetches))
    while stack:
        name = stack[-1]
        if name in done:
            stack.pop()
            continue
        node = nodes[name]
        _check_known(nodes, node, feed)
        waiting = [entry for entry in node.inputs if entry not in done]
        if waiting and name in open_:
            raise InputError(f"the graph is damaged: the node {name!r} needs its own result.")
        if waiting:
            open_.add(name)
            stack.extend(reversed(waiting))
        else:
            done[name] = node
            stack.pop()
    return [node for node in done.values() if node is not None]


def _check_known(nodes: Mapping[str, Node], node: Node, feed: str) -> None:
    if node.operation == "Placeholder":
        raise InputError(f"the node {node.name!r} is a placeholder whose value nobody gives: {feed!r} alone is fed.")
    if node.operation != "Const" and node.operation not in OPERATIONS:
        raise InputError(
            f"the node {node.name!r} uses the operation {node.operation}, which this project cannot execute; "
            f"it knows {', '.join(name for name in OPERATIONS if not name.startswith('_'))}."
        )
    for name in node.inputs:
        if name not in nodes and name != feed:
            reason = "of which first outputs alone can be read" if name.partition(":")[0] in nodes else "which does not exist"
            raise InputError(f"the node {node.name!r} reads {name!r}, {reason}.")
    if node.operation != "Const":
        check_inputs(node)


def _with_lifetimes(nodes: Sequence[Node], fetches: Sequence[str]) -> list[_Step]:
    """Steps that know which values nobody reads any more: the memory of a picture's features goes as soon as it can."""
    last = {name: place for place, node in enumerate(nodes) for name in node.inputs}
    last.update({node.name: place for place, node in enumerate(nodes) if node.name not in last})
    finished: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in fetches:
            finished.setdefault(place, []).append(name)
    return [_Step(node, tuple(finished.get(place, ()))) for place, node in enumerate(nodes)]
