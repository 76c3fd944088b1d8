"""TensorFlow's graph files, whole and damaged. What the graph computes is tested against the golden vectors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

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
