"""What tests of the evaluator share: a network that takes no time, pictures, a graph with ADM's node names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from small_runs import Result

from metrics.networks.adm import ADM_NAME
from metrics.networks.graph import Node, write_graph
from metrics.networks.weight_files import GRAPH_NAME

NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "density", "coverage")


class SmallNetwork:
    """Mean colours of the four quarters as pool features (12), the first row's pixels as spatial ones."""

    name, protocol, backend, distance_name = ADM_NAME, "no preparation", "NumPy float32", "FID"
    sha256 = "5" * 64
    head = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)

    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, height, width, _ = pictures.shape
        quarters = pictures.reshape(count, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4)) / 16
        return quarters.reshape(count, -1).astype(np.float32), pictures[:, 0, :4].reshape(count, -1).astype(np.float32)


def random_pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    base = generator.integers(20, 200, (count, 1, 1, 3))
    return (base + generator.integers(0, 50, (count, side, side, 3))).astype(np.uint8)


def scores_in(path: Path, names: tuple[str, ...] = NAMES) -> dict[str, float | None]:
    record = json.loads(path.read_text())
    return {name: record[name] for name in names if name in record}


def refused(result: Result) -> str:
    """The one sentence of a command that ended with exit code 2."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("evaluator.py: error: ")
    return lines[0]


def write_small_graph(folder: Path) -> Path:
    """A graph with ADM's node names that takes a moment to run: 6 pool numbers, 3 x 3 spatial positions of 8 channels."""
    generator = np.random.default_rng(0)

    def constant(name: str, value: np.ndarray) -> Node:
        return Node(name, "Const", attributes={"dtype": value.dtype, "value": value})

    def weights(name: str, *shape: int) -> Node:
        return constant(name, generator.standard_normal(shape).astype(np.float32))

    real = {"T": np.dtype(np.float32)}
    valid = {**real, "padding": "VALID"}
    nodes = [
        Node("picture", "Placeholder", attributes={"dtype": np.dtype(np.float32)}),
        constant("axis", np.array(0, np.int32)),
        Node("ExpandDims", "ExpandDims", ("picture", "axis"), real),
        constant("size", np.array([9, 9], np.int32)),
        Node("resized", "ResizeBilinear", ("ExpandDims", "size"), real),
        constant("scale", np.array(1 / 128, np.float32)),
        Node("scaled", "Mul", ("resized", "scale"), real),
        weights("kernel", 3, 3, 3, 8),
        Node("mixed_6/conv", "Conv2D", ("scaled", "kernel"), {**valid, "strides": [1, 3, 3, 1]}),
        weights("mixer", 1, 1, 8, 6),
        Node("mixed", "Conv2D", ("mixed_6/conv", "mixer"), {**valid, "strides": [1, 1, 1, 1]}),
        Node("pool_3", "AvgPool", ("mixed",), {**valid, "ksize": [1, 3, 3, 1], "strides": [1, 1, 1, 1]}),
        constant("shape", np.array([-1, 6], np.int32)),
        Node("flat", "Reshape", ("pool_3", "shape"), real),
        weights("softmax/weights", 6, 10),
        Node("softmax/logits/MatMul", "MatMul", ("flat", "softmax/weights"), real),
    ]
    write_graph({node.name: node for node in nodes}, folder / GRAPH_NAME)
    return folder / GRAPH_NAME
