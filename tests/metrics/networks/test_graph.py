"""Graph files: what is read is what was written, by us or by TensorFlow, and a damaged file is named as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto.graph_pb2 import GraphDef

from metrics.networks.graph import Node, constant, read_graph, write_graph
from runtime.config import InputError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
FLOAT, DOUBLE, INT32, STRING, INT64, BOOL, HALF = 1, 2, 3, 7, 9, 10, 19


def saved(definition: GraphDef, folder: Path) -> Path:
    path = folder / "graph.pb"
    path.write_bytes(definition.SerializeToString())
    return path


def tensor_node(folder: Path, dtype: int, shape: tuple[int, ...], **content: Any) -> Node:
    definition = GraphDef()
    tensor = definition.node.add(name="numbers", op="Const").attr["value"].tensor
    tensor.dtype = dtype
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    for name, value in content.items():
        if name == "tensor_content":
            tensor.tensor_content = value
        else:
            getattr(tensor, name).extend(value)
    return read_graph(saved(definition, folder))["numbers"]


def test_nodes_survive_writing_and_reading(tmp_path: Path) -> None:
    attributes = {
        "strides": [1, 2, 2, 1], "padding": "SAME", "epsilon": 0.25, "N": 3, "flag": True, "off": False, "none": [],
        "T": np.dtype(np.float32), "shape": (-1, 3), "value": np.arange(6, dtype=np.float32).reshape(2, 3),
        "axis": np.array(3, dtype=np.int32), "half": np.array([1.5], dtype=np.float16),
    }  # fmt: skip
    nodes = {"a": Node("a", "Const", (), attributes), "b/c": Node("b/c", "Relu", ("a", "a"), {})}
    write_graph(nodes, tmp_path / "graph.pb")
    back = read_graph(tmp_path / "graph.pb")
    assert list(back) == ["a", "b/c"]
    assert back["b/c"] == nodes["b/c"]
    for name, value in attributes.items():
        ours = back["a"].attributes[name]
        assert type(ours) is type(value)
        assert np.array_equal(ours, value)
        assert not isinstance(value, np.ndarray) or (ours.dtype, ours.shape) == (value.dtype, value.shape)


def test_control_inputs_and_first_outputs_are_plain(tmp_path: Path) -> None:
    definition = GraphDef()
    definition.node.add(name="a", op="Relu", input=["x:0", "^y", "z:1", "w"])
    assert read_graph(saved(definition, tmp_path))["a"].inputs == ("x", "z:1", "w")


@pytest.mark.parametrize(
    ("dtype", "shape", "content", "expected"),
    [
        (FLOAT, (2, 2), {"float_val": [1.5]}, [[1.5, 1.5], [1.5, 1.5]]),
        (FLOAT, (3,), {"float_val": [1.0, 2.0]}, [1.0, 2.0, 2.0]),
        (FLOAT, (), {"float_val": [0.25]}, 0.25),
        (FLOAT, (2,), {}, [0.0, 0.0]),
        (FLOAT, (0, 3), {}, np.zeros((0, 3))),
        (FLOAT, (2,), {"tensor_content": np.array([3, 4], "<f4").tobytes()}, [3.0, 4.0]),
        (INT32, (2,), {"int_val": [299, 298]}, [299, 298]),
        (INT64, (1,), {"int64_val": [2**40]}, [2**40]),
        (BOOL, (2,), {"bool_val": [True]}, [True, True]),
        (DOUBLE, (1,), {"double_val": [0.1]}, [0.1]),
        (HALF, (2,), {"half_val": [0x3C00, 0xC000]}, [1.0, -2.0]),
    ],
)
def test_every_way_a_file_writes_numbers(
    tmp_path: Path, dtype: int, shape: tuple[int, ...], content: dict[str, Any], expected: Any
) -> None:
    value = tensor_node(tmp_path, dtype, shape, **content).attributes["value"]
    assert value.shape == shape
    assert np.array_equal(value, expected)


def test_text_is_no_tensor_of_numbers(tmp_path: Path) -> None:
    """The real graph file holds a JPEG as text, in front of everything that is used."""
    node = tensor_node(tmp_path, STRING, (), string_val=[b"JPEG"])
    assert node.attributes["value"] is None
    assert constant({"numbers": node}, "numbers") is None


@pytest.mark.parametrize(
    ("shape", "content"),
    [((3,), {"tensor_content": b"1234"}), ((1,), {"float_val": [1.0, 2.0]}), ((-1,), {}), ((2**40,), {}), ((2**20, 2**20), {})],
)
def test_a_tensor_that_contradicts_itself_is_refused(tmp_path: Path, shape: tuple[int, ...], content: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"graph\.pb is damaged: the node 'numbers' holds"):
        tensor_node(tmp_path, FLOAT, shape, **content)


def test_constants_are_found_through_identities() -> None:
    value = np.ones(2)
    nodes = {
        "c": Node("c", "Const", (), {"value": value}),
        "i": Node("i", "Identity", ("c",)),
        "j": Node("j", "Identity", ("i",)),
    }
    assert constant(nodes, "j") is value
    assert constant(nodes, "missing") is None
    assert constant({**nodes, "c": Node("c", "Identity", ("j",))}, "j") is None  # a circle has no value


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>", b"\x00" * 64]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"graph\.pb (is not a TensorFlow graph|holds no graph|is damaged)"):
        read_graph(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.pb"):
        with pytest.raises(InputError, match="cannot be read"):
            read_graph(path)


def test_a_node_given_twice_is_refused(tmp_path: Path) -> None:
    definition = GraphDef()
    for _ in range(2):
        definition.node.add(name="same", op="Relu")
    with pytest.raises(InputError, match="'same' is there twice"):
        read_graph(saved(definition, tmp_path))


def test_the_golden_graph_is_read_as_the_messages_have_it() -> None:
    path = GOLDEN / "adm_layout" / "classify_image_graph_def.pb"
    nodes, definition = read_graph(path), GraphDef()
    definition.ParseFromString(path.read_bytes())
    assert list(nodes) == [message.name for message in definition.node]
    convolution = nodes["conv/Conv2D"]
    assert convolution.operation == "Conv2D"
    assert convolution.attributes["strides"] == [1, 2, 2, 1]
    assert convolution.attributes["padding"] == "VALID"
    assert nodes["conv/batchnorm"].attributes["scale_after_normalization"] is False
    assert nodes["conv/control_dependency"].inputs == ("conv/batchnorm",)
    assert nodes["softmax/weights"].attributes["value"].shape == (2048, 1008)


def test_tensorflow_reads_what_we_write(tmp_path: Path) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    nodes = {
        "c": Node("c", "Const", (), {"dtype": np.dtype(np.float32), "value": value}),
        "r": Node("r", "Relu", ("c",), {"T": np.dtype(np.float32)}),
    }
    write_graph(nodes, tmp_path / "graph.pb")
    definition = tensorflow.compat.v1.GraphDef.FromString((tmp_path / "graph.pb").read_bytes())
    assert definition.versions.producer < 9
    assert np.array_equal(tensorflow.make_ndarray(definition.node[0].attr["value"].tensor), value)
    with tensorflow.Graph().as_default() as graph, tensorflow.compat.v1.Session(graph=graph) as session:
        (result,) = tensorflow.import_graph_def(definition, return_elements=["r:0"])
        assert np.array_equal(session.run(result), value)
