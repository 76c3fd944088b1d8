"""Files that are whole or not there, folders that one process holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_runs import ROOT, call

from runtime.config import InputError
from runtime.files import atomic_write, check_new_file, check_writable, lock, read_ahead

BUSY = "it is held"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fail(path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_files_get_the_permissions_of_the_user(tmp_path: Path) -> None:
    """safetensors writes files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_held_folder_is_refused_to_another_process_until_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runtime.files import lock\n"
        "held = lock(Path(sys.argv[1]), 'busy'); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=BUSY):
        lock(tmp_path, BUSY)
    other.kill()
    other.wait()
    lock(tmp_path, BUSY).close()


@pytest.mark.parametrize("script", ["train", "sample_ddp"])
def test_a_second_run_in_the_same_folder_is_refused(
    script: str, features: Path, pretrained: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    words: dict[str, list[object]] = {
        "train": ["--model", "DiT-T/2", "--feature-path", features, "--image-size", "64", "--max-steps", "1",
                  "--global-batch-size", "2", "--results-dir", tmp_path, "--run-name", "x"],
        "sample_ddp": ["--ckpt", pretrained, "--model", "DiT-T/2", "--vae", tiny_vae, "--num-fid-samples", "1",
                       "--num-sampling-steps", "1", "--sample-dir", tmp_path, "--sample-name", "x"],
    }  # fmt: skip
    (tmp_path / "x").mkdir()
    held = lock(tmp_path / "x", BUSY)
    refused = call(script, *words[script])
    assert (refused.code, "by another process" in refused.err) == (2, True), refused.err
    held.close()
    assert call(script, *words[script]).code == 0


def test_a_probe_that_another_process_tidied_away_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a run removes leftovers while the others still try the folder."""
    touch = Path.touch

    def touched_and_gone(path: Path) -> None:
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", touched_and_gone)
    check_writable(tmp_path, "--flag")


@pytest.mark.parametrize("place", ["file/below", "/proc/nope"])
def test_a_place_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--flag: .* cannot be written"):
        check_writable(tmp_path / place, "--flag")
    with pytest.raises(InputError, match=r"^--flag: .* is a folder"):
        check_new_file(tmp_path, "--flag")
    check_new_file(tmp_path / "new" / "file.txt", "--flag")
    assert list((tmp_path / "new").iterdir()) == []


def test_reading_ahead_is_in_order_in_threads_and_bounded() -> None:
    both = threading.Barrier(2, timeout=30)
    started: list[str] = []

    def together(name: str) -> str:
        started.append(name)
        both.wait()  # passes when two run at a time
        return name

    names = [str(index) for index in range(12)]
    for index, name in enumerate(read_ahead(together, iter(names), 3)):
        assert name == names[index]
        assert len(started) <= index + 4
    assert sorted(started) == sorted(names)
