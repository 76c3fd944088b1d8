"""ADM's frozen Inception graph run by TensorFlow: the cross-check of our own executor."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metrics.networks.adm import ADM_NAME, INPUT, LEGACY_PROTOCOL, LOGITS, POOL, SPATIAL, SPATIAL_CHANNELS, check_nodes
from metrics.networks.weight_files import WeightsFile
from runtime.config import InputError


class TensorFlowInception:
    """ADM's Inception graph (2015). Implements `metrics.networks.FeatureNetwork`; pictures of any size.

    Pool features are the output of `pool_3`; spatial features are the first 7 channels of `mixed_6/conv`, 17 x 17 each.
    """

    name = ADM_NAME
    protocol = LEGACY_PROTOCOL
    backend = "TensorFlow float32"
    distance_name = "FID"
    head: NDArray[np.float32] | None

    def __init__(self, graph: WeightsFile) -> None:
        """Loads the graph. Raises InputError where TensorFlow is missing or the file is not such a graph."""
        self.sha256 = graph.sha256
        self._path = graph.path
        require_tensorflow()
        with _silenced_standard_error():
            # Level 3 leaves fatal messages alone; TensorFlow reads it at import.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            import tensorflow

            self._errors = (ValueError, TypeError, IndexError, tensorflow.errors.OpError)
            try:
                self._open(tensorflow)
                self._try()
            except InputError:
                raise
            except self._errors as error:
                raise self._cannot_run(error) from None

    def _open(self, tensorflow: Any) -> None:
        definition = _graph_definition(tensorflow, self._path)
        tensorflow.config.experimental.enable_tensor_float_32_execution(False)
        v1 = tensorflow.compat.v1
        with tensorflow.Graph().as_default() as graph:
            # The graph's own input is one JPEG. Feeding the node behind it a batch is ADM's way, and resizing stays inside.
            self._input = v1.placeholder(tensorflow.float32, (None, None, None, 3))
            wanted = [f"{name}:0" for name in (POOL, SPATIAL, LOGITS)]
            pool, spatial, logits = v1.import_graph_def(
                definition, input_map={f"{INPUT}:0": self._input}, return_elements=wanted
            )
            self._outputs = (pool, spatial[..., :SPATIAL_CHANNELS])
            config = v1.ConfigProto(gpu_options=v1.GPUOptions(allow_growth=True))
            self._session = v1.Session(graph=graph, config=config)
            self.head = self._session.run(logits.op.inputs[1])

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """As `FeatureNetwork.activations`: pool features (N, 2048), spatial features (N, 2023)."""
        try:
            pool, spatial = self._session.run(self._outputs, {self._input: pictures.astype(np.float32)})
        except self._errors as error:
            raise self._cannot_run(error) from None
        if pool.shape[:1] != (len(pictures),) or spatial.shape[:1] != (len(pictures),):
            raise InputError(f"{self._path}: {len(pictures)} pictures give {POOL} of the shape {pool.shape} and {SPATIAL} of "
                             f"the shape {spatial.shape}; the file is damaged or of another network.")  # fmt: skip
        return pool.reshape(len(pictures), -1), spatial.reshape(len(pictures), -1)  # (N, 2048), (N, 17 * 17 * 7)

    def _try(self) -> None:
        """A graph of shapes that do not fit is found before the first of many pictures is read."""
        pool, _ = self.activations(np.zeros((2, 32, 48, 3), np.uint8))
        head = np.asarray(self.head)
        if head.ndim != 2 or len(head) != pool.shape[1] or head.size == 0 or not np.isfinite(head).all():
            raise InputError(f"{self._path}: its class weights {head.shape} do not fit the {pool.shape[1]} features of {POOL}, "
                             "or are not finite; the file is damaged or of another network.")  # fmt: skip

    def _cannot_run(self, error: Exception) -> InputError:
        # What follows the first line of TensorFlow's message are its own addresses and a trace.
        reason = str(getattr(error, "message", error)).strip().partition("\n")[0]
        return InputError(f"{self._path} cannot be run by TensorFlow: {reason}; fetch the file again, or lower --batch-size "
                          "where memory is short.")  # fmt: skip


def require_tensorflow() -> None:
    """Raises InputError, without importing TensorFlow, where it is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError("--backend tensorflow runs ADM's Inception graph with TensorFlow, which is not installed; run "
                         "`pip install -e .[tensorflow]`, or leave the flag out.")  # fmt: skip


def _graph_definition(tensorflow: Any, path: Path) -> Any:
    from google.protobuf.message import DecodeError

    definition = tensorflow.compat.v1.GraphDef()
    try:
        definition.ParseFromString(path.read_bytes())
    except DecodeError:
        raise InputError(
            f"{path} is not a TensorFlow graph, or is cut short; fetch it again, or name its network with --network."
        ) from None
    check_nodes(path, {node.name for node in definition.node})
    return definition


@contextmanager
def _silenced_standard_error() -> Iterator[None]:
    """Keeps native code's messages from the screen; where the block fails otherwise than by InputError, shows them."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except InputError:
            raise
        except BaseException:
            captured.seek(0)
            os.write(saved, captured.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
