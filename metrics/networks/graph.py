"""TensorFlow's frozen graph files, read and written without TensorFlow.

A GraphDef is a list of nodes: a name, an operation, the names of its inputs, and attributes. TensorBoard's package ships the
protobuf messages; this module turns them into plain Python objects, and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.config import InputError
from runtime.files import atomic_write

_DATA_TYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(name)
    for number, name in {
        1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64", 10: "bool", 17: "uint16",
        19: "float16", 22: "uint32", 23: "uint64",
    }.items()
}  # fmt: skip
"""TensorFlow's numbers for data types (tensorflow/core/framework/types.proto), without text, resources and the like."""
_VALUE_FIELDS = {
    "float32": "float_val", "float64": "double_val", "float16": "half_val", "int64": "int64_val", "bool": "bool_val",
    "uint32": "uint32_val", "uint64": "uint64_val",
}  # fmt: skip
"""The list in a tensor message that holds values of a type; `int_val` holds those of all others."""
_LARGEST = 1 << 29
"""Numbers in a tensor: no protobuf file, two gigabytes at most, holds more."""
_LAST_VERSION_WITH_OLD_OPERATIONS = 8
"""TensorFlow refuses BatchNormWithGlobalNormalization in graphs of version 9 and above."""


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    inputs: names of the nodes whose first output is read ("name:1" where it is another one), without control inputs.
    attributes: integers, floats, truth values, text, lists of those; a data type is a numpy dtype, a tensor a numpy array, a
    shape a tuple (-1: any size). What this project has no use for, such as tensors of text, is None.
    """

    name: str
    operation: str
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


def read_graph(path: str | os.PathLike[str]) -> dict[str, Node]:
    """The nodes of a GraphDef file by name. Raises InputError where it is no such file, or damaged."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    definition = GraphDef()
    try:
        definition.ParseFromString(Path(path).read_bytes())
    except DecodeError:
        raise InputError(
            f"{path} is not a TensorFlow graph, or is cut short; fetch it again, or name its network with --network."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if not definition.node:
        raise InputError(f"{path} holds no graph; fetch it again.")
    nodes: dict[str, Node] = {}
    for message in definition.node:
        if not message.name or not message.op or message.name in nodes:
            raise InputError(f"{path} is damaged: the node {message.name!r} is there twice or incomplete; fetch it again.")
        try:
            nodes[message.name] = _node(message)
        except ValueError as error:
            raise InputError(f"{path} is damaged: the node {message.name!r} {error}; fetch it again.") from None
    return nodes


def write_graph(nodes: Mapping[str, Node], path: str | os.PathLike[str]) -> None:
    """Writes nodes as a GraphDef file, atomically, under a version that TensorFlow still runs 2015's operations in."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    definition = GraphDef()
    definition.versions.producer = _LAST_VERSION_WITH_OLD_OPERATIONS
    for node in nodes.values():
        message = definition.node.add(name=node.name, op=node.operation, input=list(node.inputs))
        for name, value in node.attributes.items():
            _encode(value, message.attr[name])
    with atomic_write(path) as temporary:
        temporary.write_bytes(definition.SerializeToString(deterministic=True))


def constant(nodes: Mapping[str, Node], name: str) -> NDArray[Any] | None:
    """The tensor of a Const node, looked for through Identity nodes; None where `name` is something else."""
    seen = set()
    while name in nodes and nodes[name].operation == "Identity" and nodes[name].inputs and name not in seen:
        seen.add(name)
        name = nodes[name].inputs[0]
    value = nodes[name].attributes.get("value") if name in nodes and nodes[name].operation == "Const" else None
    return value if isinstance(value, np.ndarray) else None


def _node(message: Any) -> Node:
    # A control input only says what must run before, and nothing here has an effect that another node could miss.
    inputs = tuple(name.removesuffix(":0") for name in message.input if not name.startswith("^"))
    return Node(message.name, message.op, inputs, {name: _decode(value) for name, value in message.attr.items()})


def _decode(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "list":
        # A list message has one field per type, and all but one are empty.
        filled = [entries for _, entries in value.list.ListFields()]
        return [_plain(entry) for entry in filled[0]] if filled else []
    if kind == "type":
        return _DATA_TYPES.get(value.type)
    if kind == "shape":
        return None if value.shape.unknown_rank else tuple(dimension.size for dimension in value.shape.dim)
    if kind == "tensor":
        return _tensor(value.tensor)
    return _plain(getattr(value, kind)) if kind in ("s", "i", "f", "b") else None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, (bool, int, float)) else None


def _tensor(message: Any) -> NDArray[Any] | None:
    """The array of a tensor message. Raises ValueError, worded as the end of a sentence, where it contradicts itself."""
    dtype = _DATA_TYPES.get(message.dtype)
    if dtype is None:
        return None
    shape = tuple(dimension.size for dimension in message.tensor_shape.dim)
    count = int(np.prod(shape, dtype=np.int64))
    if message.tensor_shape.unknown_rank or not all(0 <= size <= _LARGEST for size in shape) or not 0 <= count <= _LARGEST:
        raise ValueError("holds a tensor of no usable shape")
    if message.tensor_content:
        if len(message.tensor_content) != count * dtype.itemsize:
            raise ValueError(f"holds {len(message.tensor_content)} bytes for a tensor of {count} numbers")
        return np.frombuffer(message.tensor_content, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    listed = getattr(message, _VALUE_FIELDS.get(dtype.name, "int_val"))
    if len(listed) > count:
        raise ValueError(f"holds {len(listed)} values for a tensor of {count} numbers")
    # float16 travels as the integers of its bits. Where the list ends early its last value fills the rest, zero an empty one.
    values = np.array(listed, dtype=np.uint16).view(dtype) if dtype == np.float16 else np.array(listed, dtype=dtype)
    padding = np.full(count - len(values), values[-1] if len(values) else 0, dtype=dtype)
    return np.concatenate([values, padding]).reshape(shape)


def _encode(value: Any, message: Any) -> None:
    if isinstance(value, bool):
        message.b = value
    elif isinstance(value, int):
        message.i = value
    elif isinstance(value, float):
        message.f = value
    elif isinstance(value, str):
        message.s = value.encode()
    elif isinstance(value, np.dtype):
        message.type = _number(value)
    elif isinstance(value, tuple):
        message.shape.SetInParent()
        for size in value:
            message.shape.dim.add(size=size)
    elif isinstance(value, list):
        message.list.i.extend(value)
    elif isinstance(value, np.ndarray):
        message.tensor.dtype = _number(value.dtype)
        for size in value.shape:
            message.tensor.tensor_shape.dim.add(size=size)
        message.tensor.tensor_content = value.astype(value.dtype.newbyteorder("<")).tobytes()
    else:
        raise TypeError(f"an attribute of the type {type(value).__name__} cannot be written")


def _number(dtype: np.dtype[Any]) -> int:
    return next(number for number, known in _DATA_TYPES.items() if known == dtype)
