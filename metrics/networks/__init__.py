"""Feature networks: uint8 pictures -> the activations that metrics are computed from.

The network of most published figures is the Inception graph of 2015 as ADM runs it (`adm`). pytorch-fid and torch-fidelity
run a PyTorch copy of the same weights, each with its own preparation of the pictures; `dinov2` gives the Frechet DINO
distance. Numbers of different networks cannot be compared: `network_key` tells them apart.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.networks.weight_files import inception_graph, weights_file
from runtime.config import InputError, nearest

NETWORKS = ("adm", "torch-fidelity", "pytorch-fid", "dinov2")
BACKENDS = ("torch", "tensorflow")

FEATURES_VERSION = 1
"""Of the code between pictures and features: preparation, operations, DINOv2's positions. Raise it with every change after
which the same file of weights gives other features, beyond rounding: features cached before are then computed anew."""


class FeatureNetwork(Protocol):
    """What the metrics ask of a network."""

    name: str
    protocol: str
    """How pictures are prepared, in words: size, resampling, scale."""
    sha256: str
    """Of the file that holds the weights."""
    backend: str
    """What computes, and in which precision: "PyTorch float32"."""
    distance_name: str
    """What the Frechet distance between its features is called: "FID", "FDD"."""
    head: NDArray[np.float32] | None
    """Pool features (D,) -> class logits without bias, for the Inception Score. (D, classes); None without a classifier."""

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Pictures (N, H, W, 3) uint8 -> pool features (N, D) and spatial features (N, S), or None where it has none."""
        ...


def check_network(name: str, backend: str) -> None:
    """Raises InputError for what cannot run here: an unknown name, an impossible pair, a package that is not installed."""
    for flag, value, choices in (("--network", name, NETWORKS), ("--backend", backend, BACKENDS)):
        if value not in choices:
            raise InputError(f"{flag}: there is no {value!r}{nearest(value, choices)}")
    if backend == "tensorflow":
        if name != "adm":
            raise InputError(f"--backend tensorflow runs ADM's Inception graph alone, not --network {name}; leave one of the "
                             "two flags out.")  # fmt: skip
        from metrics.networks.tensorflow_inception import require_tensorflow

        require_tensorflow()
    if name == "dinov2":
        from metrics.networks.dino import import_timm

        import_timm()


def open_network(
    name: str, weights: str | None, pinned_sha256: str | None, backend: str, device: torch.device
) -> FeatureNetwork:
    """Finds or fetches the weights and loads them onto `device` (TensorFlow chooses its own).

    `weights`: a file, for `adm` also the folder that holds the graph; `adm` and `dinov2` fetch theirs where it is None.
    Raises InputError as `check_network`, and where the weights are missing or are not such a network's.
    """
    check_network(name, backend)
    if name == "adm":
        graph = inception_graph(weights, pinned_sha256)
        if backend == "tensorflow":
            from metrics.networks.tensorflow_inception import TensorFlowInception

            return TensorFlowInception(graph)
        from metrics.networks.inception import open_adm_graph

        return open_adm_graph(graph, device)
    if name == "dinov2":
        from metrics.networks.dino import open_dino, published_weights

        return open_dino(weights_file(weights, pinned_sha256) if weights else published_weights(pinned_sha256), device)
    if not weights:
        raise InputError(f"--network {name} needs --weights FILE: pt_inception-2015-12-05-6726825d.pth from pytorch-fid's "
                         "releases, weights-inception-2015-12-05-6726825d.pth from torch-fidelity's (the same file), or "
                         "NVIDIA's inception-2015-12-05.pt.")  # fmt: skip
    from metrics.networks.inception import open_inception_weights

    protocol: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity" if name == "torch-fidelity" else "pytorch-fid"
    return open_inception_weights(weights_file(weights, pinned_sha256), protocol, device)


def description(network: FeatureNetwork) -> dict[str, str]:
    """What the numbers of a network depend on, in words and a hash; stored with them."""
    return {
        "name": network.name,
        "protocol": network.protocol,
        "sha256": network.sha256,
        "backend": network.backend,
        "distance": network.distance_name,
    }


def network_key(network: FeatureNetwork) -> str:
    """SHA-256 over `description` and `FEATURES_VERSION`: two numbers are comparable where it agrees."""
    told = description(network) | {"features_version": str(FEATURES_VERSION)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
