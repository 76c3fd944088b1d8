"""The hash of a batch's content, what is remembered of it, and what tells that it is out of date."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_batches import SAVE, not_again, random_pictures, sha256_of, write_any, write_folder

from metrics import content as content_module
from metrics.content import content_hash, content_state
from metrics.pictures import FolderPictures, NpzPictures, open_batch
from runtime.config import InputError


@pytest.mark.parametrize("form", [*SAVE, "folder"])
def test_a_hash_is_remembered_until_the_content_changes(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_SETTLED_SECONDS", -60.0)
    pictures, memory = random_pictures(8), tmp_path / "memory"
    path = write_any(form, tmp_path, pictures)
    first = content_hash(open_batch(path), memory)
    with monkeypatch.context() as patched:
        for kind in (NpzPictures, FolderPictures):
            patched.setattr(kind, "digest", not_again)
        assert content_hash(open_batch(path), memory) == first
        with pytest.raises(AssertionError, match="read again"):
            content_hash(open_batch(path))

    # The same size and modification time, as `cp -p` leaves them: the change time tells.
    file = path / "3.png" if form == "folder" else path
    before = file.stat()
    time.sleep(0.02)  # beyond the granularity of a file system's clock
    write_any(form, tmp_path, pictures[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = content_hash(open_batch(path), memory)
    assert changed != first
    assert content_hash(open_batch(path), memory) == changed == content_hash(open_batch(path))

    for note in memory.iterdir():
        note.write_text("{half a note")
    assert content_hash(open_batch(path), memory) == changed


def test_what_was_written_just_now_is_not_believed(tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", arr_0=random_pictures(4))
    content_hash(open_batch(tmp_path / "batch.npz"), tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_note_that_another_user_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_SETTLED_SECONDS", -60.0)
    np.savez(tmp_path / "batch.npz", arr_0=random_pictures(4))

    def denied(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(content_module, "write_json", denied)
    assert content_hash(open_batch(tmp_path / "batch.npz"), tmp_path) == sha256_of(tmp_path / "batch.npz")


def test_the_hash_of_a_folder_is_of_its_pngs(tmp_path: Path) -> None:
    pictures = random_pictures(4)
    folder = write_folder(tmp_path / "folder", pictures)
    first = content_hash(open_batch(folder))
    (folder / "protocol.json").write_text("{}")
    assert content_hash(open_batch(write_folder(tmp_path / "copy", pictures))) == first == content_hash(open_batch(folder))
    (folder / "3.png").rename(folder / "30.png")
    assert content_hash(open_batch(folder)) != first
    (folder / "30.png").rename(folder / "3.png")
    shutil.copy(folder / "2.png", folder / "3.png")
    assert content_hash(open_batch(folder)) != first


@pytest.mark.parametrize("form", ["stored", "folder"])
def test_a_change_while_hashing(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_any(form, tmp_path, random_pictures(4))
    for kind in (NpzPictures, FolderPictures):

        def digest(self: object, kind_digest: Callable = kind.digest) -> str:
            result = kind_digest(self)
            if form == "folder":
                (path / "2.png").unlink()
            else:
                os.truncate(path, 100)
            return result

        monkeypatch.setattr(kind, "digest", digest)
    with pytest.raises(InputError, match="changed while it was read; start again when it is complete"):
        content_hash(open_batch(path), tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_statistics_alone_have_a_hash(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert content_hash(open_batch(tmp_path / "statistics.npz")) == sha256_of(tmp_path / "statistics.npz")


def test_a_folder_that_grows_is_another_state_and_is_not_hashed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_pictures(3))
    batch = open_batch(folder)
    before = content_state(batch)
    write_folder(folder, random_pictures(1), "9{}.png".format)
    assert content_state(batch) != before
    # The state of a batch opened now is another one: what is noted of four pictures must not stand for these three.
    assert content_state(open_batch(folder)) != content_state(batch)
    with pytest.raises(InputError, match="changed while it was read"):
        content_hash(batch)
    assert [len(piece) for piece in batch.pictures.batches(8)] == [3]


@pytest.mark.parametrize("field", ["sha256", "state", "checksum", "deep", "short"])
def test_a_note_that_was_damaged_is_not_believed(tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_SETTLED_SECONDS", -60.0)
    np.savez(tmp_path / "batch.npz", arr_0=random_pictures(4))
    batch = open_batch(tmp_path / "batch.npz")
    content = content_hash(batch, tmp_path / "memory")
    (note,) = (tmp_path / "memory").iterdir()
    known = json.loads(note.read_text())
    if field == "deep":
        note.write_text("[" * 100_000)
    elif field == "short":
        note.write_text(json.dumps({**known, "sha256": "../.."}))
    else:
        note.write_text(json.dumps({**known, field: ("0" if known[field][0] != "0" else "1") + known[field][1:]}))
    assert content_hash(batch, tmp_path / "memory") == content
