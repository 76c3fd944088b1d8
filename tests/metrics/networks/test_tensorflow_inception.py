"""TensorFlow's graph files, whole and damaged. What the graph computes is tested against the golden vectors."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import write_small_graph

from metrics.networks.graph import Node, read_graph, write_graph
from metrics.networks.tensorflow_inception import TensorFlowInception
from metrics.networks.weight_files import GRAPH_NAME, WeightsFile, inception_graph
from runtime.config import InputError

GOLDEN_GRAPH = Path(__file__).resolve().parents[2] / "golden" / "adm" / GRAPH_NAME


def test_files_that_are_not_the_graph(tmp_path: Path) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    content = GOLDEN_GRAPH.read_bytes()
    other = tensorflow.compat.v1.GraphDef()
    other.ParseFromString(content)
    del other.node[next(place for place, node in enumerate(other.node) if node.name == "mixed_6/conv") :]
    cases = {
        "is not a TensorFlow graph, or is cut short": content[: len(content) // 2],
        "has no node ExpandDims, pool_3, mixed_6/conv, softmax/logits/MatMul": b"",
        "has no node pool_3, mixed_6/conv, softmax/logits/MatMul": other.SerializeToString(),
    }
    for message, damaged in cases.items():
        (tmp_path / GRAPH_NAME).write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            TensorFlowInception(inception_graph(tmp_path))


def test_missing_tensorflow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e \.\[tensorflow\]"):
        TensorFlowInception(WeightsFile(GOLDEN_GRAPH, "0" * 64))


def test_graphs_that_tensorflow_cannot_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    nodes = read_graph(write_small_graph(tmp_path))
    TensorFlowInception(inception_graph(tmp_path))

    def constant(name: str, value: np.ndarray) -> Node:
        return Node(name, "Const", attributes={"dtype": value.dtype, "value": value})

    cases = {
        "cannot be run by TensorFlow": replace(nodes["scaled"], operation="NoSuchOperation"),
        "cannot be run by TensorFlow: ": constant("shape", np.array([-1, 7], np.int32)),
        "2 pictures give pool_3 of the shape": constant("pool_3", np.zeros((1, 1, 1, 6), np.float32)),
        r"class weights \(6, 0\)": constant("softmax/weights", np.zeros((6, 0), np.float32)),
    }
    for message, node in cases.items():
        write_graph(nodes | {node.name: node}, tmp_path / GRAPH_NAME)
        if node.name == "shape":  # only the features are computed: the damage must be on their way
            flat = replace(
                nodes["pool_3"],
                name="pool_3",
                operation="Reshape",
                inputs=("mixed", "shape"),
                attributes={"T": np.dtype(np.float32)},
            )
            write_graph(nodes | {"shape": node, "pool_3": flat}, tmp_path / GRAPH_NAME)
        with pytest.raises(InputError, match=message) as raised:
            TensorFlowInception(inception_graph(tmp_path))
        assert "\n" not in str(raised.value)
