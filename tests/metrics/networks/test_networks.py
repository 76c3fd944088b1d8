"""The registry: which network a name opens, with which file, and how its numbers are told from another's."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metrics import networks
from metrics.networks import (
    NETWORKS,
    check_network,
    description,
    dino,
    network_key,
    open_network,
    operations,
    tensorflow_inception,
)
from metrics.networks.weight_files import GRAPH_NAME, WeightsFile, weights_file
from runtime.config import InputError

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Described:
    name: str = "ADM Inception (2015)"
    protocol: str = "legacy bilinear resize to 299 x 299, (x - 128) / 128"
    sha256: str = "5" * 64
    backend: str = "PyTorch float32"
    distance_name: str = "FID"
    head: None = None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are what they were opened with."""
    inception = SimpleNamespace(
        open_adm_graph=lambda file, device: ("torch", file, device),
        open_inception_weights=lambda file, protocol, device: (protocol, file, device),
    )
    monkeypatch.setitem(sys.modules, "metrics.networks.inception", inception)
    monkeypatch.setattr(tensorflow_inception, "TensorFlowInception", lambda file: ("tensorflow", file))
    monkeypatch.setattr(tensorflow_inception, "require_tensorflow", lambda: None)
    monkeypatch.setattr(dino, "import_timm", lambda: None)
    monkeypatch.setattr(dino, "open_dino", lambda file, device: ("dino", file, device))
    monkeypatch.setattr(dino, "published_weights", lambda pinned: WeightsFile(Path("hub"), pinned or "unpinned"))


@pytest.mark.usefixtures("opened")
def test_a_name_opens_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / GRAPH_NAME
    path.write_bytes(b"weights")
    file, pinned = weights_file(path), weights_file(path).sha256
    calls: list[tuple[Any, ...]] = [
        (("adm", str(path), pinned, "torch", CPU), ("torch", file, CPU)),
        (("adm", str(tmp_path), None, "tensorflow", CPU), ("tensorflow", file)),
        (("torch-fidelity", str(path), pinned, "torch", CPU), ("torch-fidelity", file, CPU)),
        (("pytorch-fid", str(path), None, "torch", CPU), ("pytorch-fid", file, CPU)),
        (("dinov2", str(path), pinned, "torch", CPU), ("dino", file, CPU)),
        (("dinov2", None, pinned, "torch", CPU), ("dino", WeightsFile(Path("hub"), pinned), CPU)),
    ]
    for arguments, expected in calls:
        assert open_network(*arguments) == expected
    assert {arguments[0] for arguments, _ in calls} == set(NETWORKS)
    for name in NETWORKS:
        with pytest.raises(InputError, match="not the pinned"):
            open_network(name, str(path), "0" * 64, "torch", CPU)
    monkeypatch.setattr(networks, "inception_graph", lambda given, pinned: (given, pinned))
    assert open_network("adm", None, pinned, "torch", CPU) == ("torch", (None, pinned), CPU)


@pytest.mark.parametrize("name", ["torch-fidelity", "pytorch-fid"])
def test_inception_weights_are_asked_for_by_name(name: str) -> None:
    for weights in (None, ""):
        with pytest.raises(InputError, match=rf"--network {name} needs --weights FILE: pt_inception-2015-12-05-6726825d\.pth"):
            open_network(name, weights, None, "torch", CPU)


def test_what_cannot_run_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_network("adm", "torch")
    cases = [
        ("adn", "torch", "--network: there is no 'adn'; did you mean 'adm'"),
        ("adm", "torhc", "--backend: there is no 'torhc'; did you mean 'torch'"),
        ("pytorch-fid", "tensorflow", "--backend tensorflow runs ADM's Inception graph alone, not --network pytorch-fid"),
        ("dinov2", "tensorflow", "not --network dinov2"),
        ("dinov2", "torch", r"pip install -e \.\[dinov2\]"),
        ("adm", "tensorflow", r"pip install -e \.\[tensorflow\]"),
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    for name, backend, message in cases:
        with pytest.raises(InputError, match=message):
            check_network(name, backend)
        with pytest.raises(InputError, match=message):
            open_network(name, "missing", None, backend, CPU)


def test_the_key_tells_apart_whatever_changes_a_number() -> None:
    first = Described()
    fields = {key: key for key in ("name", "protocol", "sha256", "backend")} | {"distance": "distance_name"}
    assert description(first) == {key: getattr(first, field) for key, field in fields.items()}
    assert network_key(first) == network_key(Described())
    assert len(network_key(first)) == 64
    others = [dataclasses.replace(first, **{field: "another"}) for field in fields.values()]
    # Run together without their names, these two would be one text.
    others += [dataclasses.replace(first, name="a", protocol="bc"), dataclasses.replace(first, name="ab", protocol="c")]
    assert len({network_key(network) for network in [first, *others]}) == len(others) + 1


def adm_error() -> float:
    """Of four golden pictures' features, relative to the largest."""
    folder = ROOT / "tests" / "golden" / "adm"
    network = open_network("adm", str(folder), None, "torch", CPU)
    with np.load(folder / "activations_head.npz") as expected, np.load(folder / "samples.npz") as given:
        pairs = zip(("pool", "spatial"), network.activations(given["arr_0"][:4]), strict=True)
        references = {name: expected[f"sample_{name}"][:4] for name in ("pool", "spatial")}
        return max(float(np.abs(ours - references[name]).max() / np.abs(references[name]).max()) for name, ours in pairs)


def test_the_features_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other features under the same version would be mixed with those in people's caches."""
    assert networks.FEATURES_VERSION == 1, "pin the features of the new version here"
    assert adm_error() < 1e-5, (
        "the same file now gives other features: if that is meant, raise FEATURES_VERSION in metrics/networks/__init__.py, "
        "or features that were cached before will be read as if they were these"
    )
    resize = operations.OPERATIONS["ResizeBilinear"]
    monkeypatch.setitem(operations.OPERATIONS, "ResizeBilinear", lambda node, inputs: (
        resize(dataclasses.replace(node, attributes={**node.attributes, "half_pixel_centers": True}), inputs)))  # fmt: skip
    assert adm_error() > 1e-4


def test_another_version_of_the_features_is_another_key_and_no_other_description(monkeypatch: pytest.MonkeyPatch) -> None:
    key, told = network_key(Described()), description(Described())
    monkeypatch.setattr(networks, "FEATURES_VERSION", networks.FEATURES_VERSION + 1)
    assert network_key(Described()) != key
    assert description(Described()) == told


def test_listing_the_networks_imports_none_of_them() -> None:
    heavy = ("tensorflow", "tensorboard", "timm", "huggingface_hub", "metrics.networks.inception", "metrics.networks.dino")
    program = f"import sys, metrics.networks; sys.exit(', '.join(n for n in {heavy} if n in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.strip() == ""


def test_both_backends_of_adms_graph_say_the_same_of_themselves() -> None:
    graph = ROOT / "tests" / "golden" / "adm" / GRAPH_NAME
    ours = open_network("adm", str(graph), None, "torch", CPU)
    theirs = tensorflow_inception.TensorFlowInception
    assert (ours.name, ours.protocol, ours.distance_name) == (theirs.name, theirs.protocol, theirs.distance_name)
