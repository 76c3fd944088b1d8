"""The files that hold a feature network's weights: found, fetched, hashed, checked."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.config import InputError
from runtime.files import atomic_write, sha256

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights whose content has been hashed and, where a hash was on record, checked."""

    path: Path
    sha256: str


def inception_graph(given: str | os.PathLike[str] | None = None, pinned_sha256: str | None = None) -> WeightsFile:
    """ADM's Inception graph: `given` (a file, or a folder that holds it), else the cached one, else downloaded to the cache.

    This project does not know the true SHA-256 of the file its authors host. A download is checked against the length and
    the Content-MD5 that the server declares, its SHA-256 is written beside it, and every later use must find the same
    content: trust on first use. `pinned_sha256` replaces that trust by a hash you know, for any of the three sources.
    Raises InputError for a missing file, a failed download or another content.
    """
    pinned = _checked_hash(pinned_sha256) if pinned_sha256 else None
    if given is not None:
        path = Path(given) / GRAPH_NAME if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"{path}: no such file; --weights takes ADM's {GRAPH_NAME} or the folder that holds it.")
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


def weights_file(given: str | os.PathLike[str], pinned_sha256: str | None = None) -> WeightsFile:
    """A file that the user names, hashed.

    Checked against `pinned_sha256` and, where its name ends in -xxxxxxxx.pth or .pt (torch hub's way of naming files after
    the first 8 digits of their SHA-256), against its name. Raises InputError for a missing file or another content.
    """
    pinned = _checked_hash(pinned_sha256) if pinned_sha256 else None
    path = Path(given)
    if path.is_dir():
        raise InputError(f"{path} is a folder; --weights takes a file of weights here.")
    if not path.is_file():
        raise InputError(f"{path}: no such file; --weights takes a file of weights.")
    file = _verified(path, pinned)
    named = re.search(r"-([0-9a-f]{8})\.pth?$", path.name)
    if named and not file.sha256.startswith(named[1]):
        raise InputError(f"{path} should have a SHA-256 that begins with {named[1]}, as its name says, and has {file.sha256}; "
                         "fetch the file again, or rename it if its name is not meant so.")  # fmt: skip
    return file


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sparsedit`, or `~/.cache/sparsedit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedit"


def download(url: str, path: Path, pinned_sha256: str | None = None) -> None:
    """Fetches `url` to `path` with a progress bar; `path` appears only once length and hashes have been checked."""
    remedy = f"fetch {url} on another machine and give it with --weights PATH."
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, atomic_write(path) as temporary:
            _receive(response, temporary, path.name)
            problem = _difference(response.headers, temporary, pinned_sha256)
            if problem:
                raise InputError(f"the download of {url} is not usable: {problem}; run the command again, or {remedy}")
    except PermissionError:
        raise InputError(f"{path.parent} cannot be written to; set XDG_CACHE_HOME, or give the graph with --weights.") from None
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
        raise InputError(f"--weights-sha256 must be 64 hexadecimal digits, not {text!r}.")
    return value


def _verified(path: Path, pinned_sha256: str | None) -> WeightsFile:
    content = sha256(path)
    if pinned_sha256 and content != pinned_sha256:
        raise InputError(f"{path} has the SHA-256 {content}, not the pinned {pinned_sha256}; give the file that you mean.")
    return WeightsFile(path, content)
