"""The graph's file: found, fetched, checked. What the graph computes is tested against the golden vectors."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from metrics import networks
from metrics.networks import GRAPH_NAME, GraphFile, TensorFlowInception, download, inception_graph
from runtime.config import InputError

GOLDEN_GRAPH = Path(__file__).resolve().parents[1] / "golden" / "adm" / GRAPH_NAME
CONTENT = bytes(range(256)) * 5_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """A web server on this machine that can be told to misbehave."""

    url: str
    md5: str | None = field(default_factory=lambda: base64.b64encode(hashlib.md5(CONTENT).digest()).decode())
    sent: bytes = CONTENT
    requests: int = 0


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            self.send_response(200 if self.path == "/graph" else 404)
            self.send_header("Content-Length", str(len(CONTENT)))
            if state.md5:
                self.send_header("Content-MD5", state.md5)
            self.end_headers()
            self.wfile.write(state.sent)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Site(f"http://127.0.0.1:{server.server_port}/graph")
    monkeypatch.setattr(networks, "GRAPH_URL", state.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads_once_and_records_the_hash(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    graph = inception_graph()
    assert graph == GraphFile(networks.cache_folder() / GRAPH_NAME, SHA256)
    assert graph.path.read_bytes() == CONTENT
    assert SHA256 in (graph.path.parent / f"{GRAPH_NAME}.sha256").read_text()
    assert f"downloading {GRAPH_NAME}" in capsys.readouterr().err
    assert inception_graph() == inception_graph(pinned_sha256=SHA256.upper()) == graph
    assert site.requests == 1
    assert sorted(file.name for file in graph.path.parent.iterdir()) == [GRAPH_NAME, f"{GRAPH_NAME}.sha256"]


def test_a_cached_file_that_changed_is_refused(site: Site) -> None:
    path = inception_graph().path
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(InputError, match="has changed since it was first used"):
        inception_graph()
    (path.parent / f"{GRAPH_NAME}.sha256").write_text("")
    with pytest.raises(InputError, match="says nothing"):
        inception_graph()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"sent": CONTENT[:-7]}, f"{len(CONTENT) - 7} of {len(CONTENT)} bytes arrived"),
        ({"sent": CONTENT[:-1] + b"!"}, "its MD5 is not the one the server declares"),
        ({"sent": CONTENT[:-1] + b"!", "md5": None}, "not the pinned"),
    ],
)
def test_a_damaged_download_leaves_nothing_behind(site: Site, damage: dict, message: str) -> None:
    for name, value in damage.items():
        setattr(site, name, value)
    with pytest.raises(InputError, match=message):
        inception_graph(pinned_sha256=SHA256)
    assert not list(networks.cache_folder().iterdir())


def test_offline_and_missing_pages_name_the_remedy(site: Site, tmp_path: Path) -> None:
    for url, reason in ((site.url + "-gone", "Not Found"), ("http://127.0.0.1:9/graph", "refused")):
        with pytest.raises(InputError, match=rf"could not be downloaded .*{reason}.*--inception PATH"):
            download(url, tmp_path / GRAPH_NAME)
    assert not (tmp_path / GRAPH_NAME).exists()


def test_a_given_graph(tmp_path: Path) -> None:
    (tmp_path / GRAPH_NAME).write_bytes(CONTENT)
    assert inception_graph(tmp_path) == inception_graph(tmp_path / GRAPH_NAME) == GraphFile(tmp_path / GRAPH_NAME, SHA256)
    with pytest.raises(InputError, match="no such file; --inception takes"):
        inception_graph(tmp_path / "missing.pb")
    with pytest.raises(InputError, match="not the pinned"):
        inception_graph(tmp_path, "0" * 64)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        inception_graph(tmp_path, "abc")


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
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e \.\[evaluator\]"):
        TensorFlowInception(GraphFile(GOLDEN_GRAPH, "0" * 64))
