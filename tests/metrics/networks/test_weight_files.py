"""Files of weights: found, fetched, checked."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from metrics.networks import weight_files
from metrics.networks.weight_files import GRAPH_NAME, WeightsFile, download, inception_graph, weights_file
from runtime.config import InputError

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
            if self.path != "/graph":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            if state.md5:
                self.send_header("Content-MD5", state.md5)
            self.end_headers()
            self.wfile.write(state.sent)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Site(f"http://127.0.0.1:{server.server_port}/graph")
    monkeypatch.setattr(weight_files, "GRAPH_URL", state.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads_once_and_records_the_hash(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    graph = inception_graph()
    assert graph == WeightsFile(weight_files.cache_folder() / GRAPH_NAME, SHA256)
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
    assert not list(weight_files.cache_folder().iterdir())


def test_offline_and_missing_pages_name_the_remedy(site: Site, tmp_path: Path) -> None:
    for url, reason in ((site.url + "-gone", "Not Found"), ("http://127.0.0.1:9/graph", "refused")):
        with pytest.raises(InputError, match=rf"could not be downloaded .*{reason}.*--weights PATH"):
            download(url, tmp_path / GRAPH_NAME)
    assert not (tmp_path / GRAPH_NAME).exists()


def test_a_given_graph(tmp_path: Path) -> None:
    (tmp_path / GRAPH_NAME).write_bytes(CONTENT)
    assert inception_graph(tmp_path) == inception_graph(tmp_path / GRAPH_NAME) == WeightsFile(tmp_path / GRAPH_NAME, SHA256)
    with pytest.raises(InputError, match="no such file; --weights takes"):
        inception_graph(tmp_path / "missing.pb")
    with pytest.raises(InputError, match="not the pinned"):
        inception_graph(tmp_path, "0" * 64)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        inception_graph(tmp_path, "abc")


def test_a_given_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    path.write_bytes(CONTENT)
    assert weights_file(path) == weights_file(str(path), SHA256.upper()) == WeightsFile(path, SHA256)
    with pytest.raises(InputError, match="not the pinned"):
        weights_file(path, "0" * 64)
    with pytest.raises(InputError, match=r"missing\.pth: no such file; --weights takes"):
        weights_file(tmp_path / "missing.pth")
    with pytest.raises(InputError, match="is a folder; --weights takes a file"):
        weights_file(tmp_path)


@pytest.mark.parametrize("name", ["weights-{}.pth", "pt_inception-2015-12-05-{}.pt"])
def test_a_name_that_holds_the_beginning_of_the_hash(tmp_path: Path, name: str) -> None:
    right, wrong = tmp_path / name.format(SHA256[:8]), tmp_path / name.format("6726825d")
    for path in (right, wrong):
        path.write_bytes(CONTENT)
    assert weights_file(right).sha256 == SHA256
    with pytest.raises(InputError, match=f"begins with 6726825d, as its name says, and has {SHA256}"):
        weights_file(wrong)
    unnamed = wrong.rename(tmp_path / "weights-6726825d.bin")
    assert weights_file(unnamed).sha256 == SHA256
