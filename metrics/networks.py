"""Feature networks: uint8 pictures -> the activations that metrics are computed from.

The network of the published figures is the Inception graph of 2015, frozen in `classify_image_graph_def.pb`. ADM's authors
host it; `inception_graph` finds or fetches the file, `TensorFlowInception` runs it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.util
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from runtime.config import InputError
from runtime.files import atomic_write, sha256

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
_TIMEOUT_SECONDS = 30

_INPUT, _POOL, _SPATIAL, _LOGITS = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class GraphFile:
    """A graph file whose content has been hashed and, where a hash was on record, checked."""

    path: Path
    sha256: str


class FeatureNetwork(Protocol):
    """What the metrics ask of a network. Two numbers are comparable where `name` and `sha256` agree."""

    name: str
    sha256: str
    backend: str
    head: NDArray[np.float32]
    """Pool features (D,) -> class logits without bias, for the Inception Score. (D, classes)"""

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pictures (N, H, W, 3) uint8 -> pool features (N, 2048) and spatial features (N, 2023), for ADM's Inception."""
        ...


class TensorFlowInception:
    """ADM's frozen Inception graph, run by TensorFlow. Implements `FeatureNetwork`; pictures of any size.

    Pool features are the output of `pool_3`; spatial features are the first 7 channels of `mixed_6/conv`, 17 x 17 each.
    """

    name = "ADM Inception (2015)"

    def __init__(self, graph: GraphFile) -> None:
        """Loads the graph. Raises InputError where TensorFlow is missing or the file is not such a graph."""
        self.sha256 = graph.sha256
        require_tensorflow()
        with _silenced_standard_error():
            # Level 3 leaves fatal messages alone; TensorFlow reads it at import.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            import tensorflow

            self._open(tensorflow, graph.path)
        self.backend = f"TensorFlow {tensorflow.__version__}"

    def _open(self, tensorflow: Any, path: Path) -> None:
        definition = _graph_definition(tensorflow, path)
        tensorflow.config.experimental.enable_tensor_float_32_execution(False)
        v1 = tensorflow.compat.v1
        with tensorflow.Graph().as_default() as graph:
            # The graph's own input is one JPEG. Feeding the node behind it a batch is ADM's way, and resizing stays inside.
            self._input = v1.placeholder(tensorflow.float32, (None, None, None, 3))
            wanted = [f"{name}:0" for name in (_POOL, _SPATIAL, _LOGITS)]
            try:
                pool, spatial, logits = v1.import_graph_def(
                    definition, input_map={f"{_INPUT}:0": self._input}, return_elements=wanted
                )
            except (ValueError, TypeError) as error:
                raise InputError(f"{path} cannot be run by TensorFlow: {' '.join(str(error).split())}") from None
            self._outputs = (pool, spatial[..., :_SPATIAL_CHANNELS])
            config = v1.ConfigProto(gpu_options=v1.GPUOptions(allow_growth=True))
            self._session = v1.Session(graph=graph, config=config)
            self.head = self._session.run(logits.op.inputs[1])

    def activations(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `FeatureNetwork.activations`."""
        pool, spatial = self._session.run(self._outputs, {self._input: pictures.astype(np.float32)})
        return pool.reshape(len(pictures), -1), spatial.reshape(len(pictures), -1)  # (N, 2048), (N, 17 * 17 * 7)


def require_tensorflow() -> None:
    """Raises InputError, without importing TensorFlow, where it is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError("the evaluator runs ADM's Inception graph with TensorFlow, which is not installed; "
                         "run `pip install -e .[evaluator]`.")  # fmt: skip


def _graph_definition(tensorflow: Any, path: Path) -> Any:
    from google.protobuf.message import DecodeError

    definition = tensorflow.compat.v1.GraphDef()
    try:
        definition.ParseFromString(path.read_bytes())
    except DecodeError:
        raise InputError(f"{path} is not a TensorFlow graph, or is cut short; delete it and fetch it again.") from None
    present = {node.name for node in definition.node}
    missing = [name for name in (_INPUT, _POOL, _SPATIAL, _LOGITS) if name not in present]
    if missing:
        raise InputError(f"{path} has no node {', '.join(missing)}; ADM's {GRAPH_NAME} is needed.")
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


def inception_graph(given: str | os.PathLike[str] | None = None, pinned_sha256: str | None = None) -> GraphFile:
    """The Inception graph: `given` (a file, or a folder that holds it), else the cached one, else downloaded to the cache.

    This project does not know the true SHA-256 of the file its authors host. A download is checked against the length and
    the Content-MD5 that the server declares, its SHA-256 is written beside it, and every later use must find the same
    content: trust on first use. `pinned_sha256` replaces that trust by a hash you know, for any of the three sources.
    Raises InputError for a missing file, a failed download or another content.
    """
    pinned = _checked_hash(pinned_sha256) if pinned_sha256 else None
    if given is not None:
        path = Path(given) / GRAPH_NAME if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"{path}: no such file; --inception takes ADM's {GRAPH_NAME} or the folder that holds it.")
        return _verified(path, pinned)
    path = cache_folder() / GRAPH_NAME
    if not path.is_file():
        download(GRAPH_URL, path, pinned)
    record = path.with_name(path.name + ".sha256")
    graph = _verified(path, pinned)
    if not record.is_file():
        with atomic_write(record) as temporary:
            temporary.write_text(f"{graph.sha256}  {path.name}\n", encoding="utf-8")
    recorded = record.read_text(encoding="utf-8").split()
    if recorded[:1] != [graph.sha256]:
        raise InputError(f"{path} has changed since it was first used (its SHA-256 is {graph.sha256}, {record.name} says "
                         f"{' '.join(recorded[:1]) or 'nothing'}); delete both files to fetch it again.")  # fmt: skip
    return graph


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sparsedit`, or `~/.cache/sparsedit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedit"


def download(url: str, path: Path, pinned_sha256: str | None = None) -> None:
    """Fetches `url` to `path` with a progress bar; `path` appears only once length and hashes have been checked."""
    remedy = f"fetch {url} on another machine and give it with --inception PATH."
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, atomic_write(path) as temporary:
            _receive(response, temporary, path.name)
            problem = _difference(response.headers, temporary, pinned_sha256)
            if problem:
                raise InputError(f"the download of {url} is not usable: {problem}; run the command again, or {remedy}")
    except PermissionError:
        raise InputError(
            f"{path.parent} cannot be written to; set XDG_CACHE_HOME, or give the graph with --inception."
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{path.name} could not be downloaded ({' '.join(str(reason).split())}); {remedy}") from None


def _receive(response: Any, temporary: Path, name: str) -> None:
    length = int(response.headers.get("Content-Length") or 0)
    bar = tqdm(total=length or None, unit="B", unit_scale=True, unit_divisor=1024, desc=f"downloading {name}")
    with bar, open(temporary, "wb") as file:
        while piece := response.read(1 << 18):
            file.write(piece)
            bar.update(len(piece))


def _difference(headers: Any, received: Path, pinned_sha256: str | None) -> str | None:
    length, declared_md5 = headers.get("Content-Length"), headers.get("Content-MD5")
    if length and received.stat().st_size != int(length):
        return f"{received.stat().st_size} of {length} bytes arrived"
    if declared_md5:
        digest = hashlib.md5(received.read_bytes(), usedforsecurity=False).digest()
        if base64.b64encode(digest).decode() != declared_md5.strip():
            return "its MD5 is not the one the server declares"
    if pinned_sha256 and sha256(received) != pinned_sha256:
        return f"its SHA-256 is {sha256(received)}, not the pinned {pinned_sha256}"
    return None


def _checked_hash(text: str) -> str:
    value = text.strip().lower()
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise InputError(f"--inception-sha256 must be 64 hexadecimal digits, not {text!r}.")
    return value


def _verified(path: Path, pinned_sha256: str | None) -> GraphFile:
    content = sha256(path)
    if pinned_sha256 and content != pinned_sha256:
        raise InputError(f"{path} has the SHA-256 {content}, not the pinned {pinned_sha256}; give the file that you mean.")
    return GraphFile(path, content)
