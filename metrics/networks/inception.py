"""The Inception network of 2015 run by torch: from ADM's frozen graph, or from the weights files of PyTorch's FID packages."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.networks.adm import ADM_NAME, INPUT, LEGACY_PROTOCOL, LOGITS, POOL, SPATIAL, SPATIAL_CHANNELS, check_nodes
from metrics.networks.executor import GraphExecutor
from metrics.networks.graph import Node, constant, read_graph
from metrics.networks.inception_layout import Protocol, layout_graph, torchvision_names
from metrics.networks.numerics import backend_name, float32_products, room_for_batch, room_for_weights, uses_tf32
from metrics.networks.torchscript import is_archive, read_state
from metrics.networks.weight_files import GRAPH_NAME, WeightsFile
from runtime.config import InputError

_PICTURES_AT_ONCE_ON_CPU = 16
"""More at once is no faster there, and every 16 take another 180 MB."""
_PROTOCOLS: dict[Protocol, str] = {
    "torch-fidelity": LEGACY_PROTOCOL,
    "pytorch-fid": "x / 255, half-pixel bilinear resize without antialiasing to 299 x 299, 2 x - 1",
}


class GraphInception:
    """Inception in the layout of ADM's graph. Implements `metrics.networks.FeatureNetwork`; pictures of any size.

    Pool features are the output of `pool_3`; spatial features are the first 7 channels of `mixed_6/conv`, 17 x 17 each
    (Nash et al. 2021, as ADM takes them).
    """

    distance_name = "FID"

    def __init__(
        self, name: str, protocol: str, file: WeightsFile, nodes: Mapping[str, Node], head: NDArray[np.float32] | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Puts the network on `device` and tries it on two small pictures.

        Raises InputError, naming the file, where the nodes are not such a network's.
        """
        self.name, self.protocol, self.sha256, self.head = name, protocol, file.sha256, head
        self._device = device
        self._tf32 = uses_tf32(device)
        self.backend = backend_name(self._tf32)
        with room_for_weights():
            try:
                self._executor = GraphExecutor(nodes, INPUT, (POOL, SPATIAL)).to(device)
                self._try()
            except InputError as error:
                raise InputError(f"{file.path} cannot be run: {error}") from None

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `FeatureNetwork.activations`: pool features (N, 2048), spatial features (N, 2023)."""
        size = _PICTURES_AT_ONCE_ON_CPU if self._device.type == "cpu" else max(len(pictures), 1)
        with room_for_batch(len(pictures)):
            parts = [self._run(pictures[start : start + size]) for start in range(0, len(pictures), size)]
        return np.concatenate([pool for pool, _ in parts]), np.concatenate([spatial for _, spatial in parts])

    def _run(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode(), float32_products(self._tf32):
            # As bytes they cross to the device four times as fast.
            pool, spatial = self._executor(torch.tensor(pictures).to(self._device).float())
            return _rows(pool), _rows(spatial[..., :SPATIAL_CHANNELS])

    def _try(self) -> None:
        """A graph of shapes that do not fit is found before the first of many pictures is read.

        Two pictures: a fixed number of rows, or pictures that become one row, would fit one.
        """
        try:
            pool, spatial = self._run(np.zeros((2, 32, 48, 3), dtype=np.uint8))
        except (InputError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            raise InputError(f"{' '.join(str(error).split())}; the file is damaged or of another network.") from None
        if not len(pool) == len(spatial) == 2:
            raise InputError(f"two pictures give {len(pool)} rows of {POOL} and {len(spatial)} of {SPATIAL}; the file is "
                             "damaged or of another network.")  # fmt: skip
        if self.head is not None and (self.head.shape[:1] != pool.shape[1:] or self.head.size == 0):
            raise InputError(f"its class weights {self.head.shape} do not fit the {pool.shape[1]} features of {POOL}.")
        if self.head is not None and not np.isfinite(self.head).all():
            raise InputError("its class weights are not all finite numbers; the file is damaged.")


def open_adm_graph(file: WeightsFile, device: torch.device) -> GraphInception:
    """ADM's frozen graph. Raises InputError, naming the file, where it is damaged or another graph."""
    nodes = read_graph(file.path)
    check_nodes(file.path, nodes)
    head = _head(nodes)
    if head is None:
        raise InputError(f"{file.path}: the second input of {LOGITS} is no matrix of numbers; ADM's {GRAPH_NAME} is needed.")
    return GraphInception(ADM_NAME, LEGACY_PROTOCOL, file, nodes, head, device)


def open_inception_weights(file: WeightsFile, protocol: Protocol, device: torch.device) -> GraphInception:
    """The weights file of pytorch-fid, of torch-fidelity or of NVIDIA's scripts (.pth, .pt, .safetensors).

    `protocol` says how pictures are prepared, which no such file does. Without a classifier in the file `head` is None.
    Raises InputError, naming the file, where it is no such file or a tensor is missing or not known.
    """
    try:
        nodes = layout_graph(torchvision_names(_state(file.path)), protocol)
    except InputError as error:
        raise InputError(f"{file.path} {error}") from None
    name = f"Inception weights file, {protocol} protocol"
    return GraphInception(name, _PROTOCOLS[protocol], file, nodes, _head(nodes), device)


def _head(nodes: Mapping[str, Node]) -> NDArray[np.float32] | None:
    """(D, classes), without the bias: ADM's Inception Score leaves it out. None where the graph has no classifier."""
    inputs = nodes[LOGITS].inputs if LOGITS in nodes else ()
    weights = constant(nodes, inputs[1]) if len(inputs) == 2 else None
    if weights is None or weights.ndim != 2:
        return None
    return np.array(weights.T if nodes[LOGITS].attributes.get("transpose_b", False) else weights, dtype=np.float32)


def _rows(values: Tensor) -> NDArray[np.float32]:
    return values.reshape(len(values), -1).cpu().numpy()


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file. Raises InputError, worded as the end of a sentence about the file."""
    try:
        content = _load(path)
    except pickle.UnpicklingError:
        # torch's own message advises to let the file run code.
        raise InputError("holds no PyTorch weights, or something beside them; give a file of tensors by name "
                         "(ADM's graph is for --network adm).") from None  # fmt: skip
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"cannot be read as PyTorch weights ({reason}); is it complete, and the right file?") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError("holds something else than a state dict; a file of tensors by name is needed.")
    return dict(content)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # torch.jit.load would run code that the archive brings.
    if is_archive(path):
        return read_state(path)
    return torch.load(path, map_location="cpu", weights_only=True)
