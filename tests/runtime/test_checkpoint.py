"""Checkpoints are whole or not there, and say what they are. What else is in a file is refused and never executed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import runtime.checkpoint as checkpoint
from runtime.checkpoint import (
    checkpoint_path,
    checkpoints,
    keep_last,
    read_header,
    read_tensors,
    read_weights,
    remove_leftovers,
    save_checkpoint,
)
from runtime.config import InputError
from runtime.files import atomic_write, sha256, write_json
from tests.models.random_networks import network, tiny
from tests.models.random_networks import one_thread as one_thread
from tests.models.weight_files import Writer, as_fast_dit, as_old_pt, as_pt, as_safetensors

ROOT = Path(__file__).resolve().parents[2]
HEADER = {
    "step": 12,
    "network": {"model": "DiT-T/2", "latent_size": [16, 16], "name": "Bär"},
    "scaler": None,
    "rate": 1e-4,
}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    state = {"a": torch.full((3, 2), value), "b.bias": torch.full((4,), value, dtype=torch.bfloat16)}
    moments = {"optimizer/a/exp_avg": torch.full((3, 2), value / 4), "optimizer/a/step": torch.tensor(12.0)}
    return {**{f"model/{k}": v for k, v in state.items()}, **{f"ema/{k}": v + 1 for k, v in state.items()}, **moments}


def folder_content(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# Round trips ---------------------------------------------------------------------------------------------------------


def test_tensors_and_header_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "0000012.safetensors"
    save_checkpoint(path, tensors(), HEADER)
    assert read_header(path) == HEADER
    assert folder_content(path.parent) == [path.name]
    for prefix in ("model/", "ema/", "optimizer/", ""):
        expected = {key.removeprefix(prefix): value for key, value in tensors().items() if key.startswith(prefix)}
        found = read_tensors(path, prefix)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)


def test_views_and_gradients_are_saved_as_plain_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_checkpoint(tmp_path / "x.safetensors", {"turned": parameter.t(), "whole": parameter}, {})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors", "")["turned"], torch.arange(6.0).reshape(2, 3).t())


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", tensors(), HEADER)
    with safe_open(str(tmp_path / "x.safetensors"), framework="numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["header"]) == HEADER
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "y.safetensors", tensors(), {"object": object()})
    assert folder_content(tmp_path) == ["x.safetensors"]


def test_the_average_is_chosen_where_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors(), HEADER)
    averaged, raw = read_weights(str(path)), read_weights(str(path), averaged=False)
    assert set(averaged.state) == set(raw.state) == {"a", "b.bias"}
    assert torch.equal(averaged.state["a"], torch.full((3, 2), 2.0))
    assert torch.equal(raw.state["a"], torch.full((3, 2), 1.0))
    assert averaged.origin == f"{path} (EMA of step 12)"
    assert raw.origin == f"{path} (raw weights of step 12)"
    assert averaged.header == raw.header == HEADER


def test_an_export_is_read_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "export.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"network": {}})
    weights = read_weights(str(path))
    assert (list(weights.state), weights.origin, weights.header) == (["a"], str(path), {"network": {}})


def test_a_foreign_file_has_no_header(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {"header": "{}"}):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
        assert read_header(tmp_path / "x.safetensors") is None
        assert read_weights(str(tmp_path / "x.safetensors")).header is None


# Whole or not there --------------------------------------------------------------------------------------------------


def failing_in_the_middle(state: Any, path: Any, metadata: Any) -> None:
    Path(path).write_bytes(b"half of a checkpoint")
    raise RuntimeError("planted")


@contextmanager
def writing_in_place(path: Path) -> Iterator[Path]:
    """The known-bad variant of `atomic_write`: the target itself."""
    yield Path(path)


def survives_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the old checkpoint is still whole, and alone, after writing the new one failed half way."""
    save_checkpoint(path, tensors(1.0), HEADER)
    monkeypatch.setattr(checkpoint, "save_file", failing_in_the_middle)
    with pytest.raises(RuntimeError, match="planted"):
        save_checkpoint(path, tensors(2.0), HEADER)
    try:
        return torch.equal(read_tensors(path, "model/")["a"], torch.ones(3, 2)) and folder_content(path.parent) == [path.name]
    except InputError:
        return False


def test_a_failure_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert survives_a_failure(tmp_path / "x.safetensors", monkeypatch)


def test_the_failure_test_catches_writing_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "atomic_write", writing_in_place)
    assert not survives_a_failure(tmp_path / "x.safetensors", monkeypatch)


def test_a_failure_leaves_no_file_where_there_was_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failing_in_the_middle)
    with pytest.raises(RuntimeError, match="planted"):
        save_checkpoint(tmp_path / "x.safetensors", tensors(), HEADER)
    assert folder_content(tmp_path) == []


def test_a_kill_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A real process, killed while the new file is half written; the next run removes what it left."""
    run = tmp_path / "run"
    path = checkpoint_path(run, 1)
    save_checkpoint(path, {"a": torch.ones(2)}, HEADER)
    code = (
        "import os, signal, sys; from runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == -9
    assert torch.equal(read_tensors(path, "")["a"], torch.ones(2))
    assert len(folder_content(path.parent)) == 2
    assert checkpoints(run) == [path]
    (path.parent / ".tmpAbC123").touch()  # safetensors' own temporary file
    remove_leftovers(run)
    assert folder_content(path.parent) == [path.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_systems_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own for it; `run_script` answers the system's."""

    def full(state: Any, path: Any, metadata: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: Os {{ code: {code} }}: no space (os error {code})")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space") as caught:
        save_checkpoint(tmp_path / "x.safetensors", tensors(), HEADER)
    assert caught.value.errno == code
    assert caught.value.filename == str(tmp_path / "x.safetensors")


def test_safetensors_names_the_systems_error_in_its_text(tmp_path: Path) -> None:
    """A real failing write (a limit on the size of files), so that the text looked for above is not our invention."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_checkpoint(tmp_path / "x.safetensors", {"a": torch.zeros(1_000_000)}, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert folder_content(tmp_path) == []


def test_other_errors_of_safetensors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(state: Any, path: Any, metadata: Any) -> None:
        raise SafetensorError("a bug")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(SafetensorError, match="a bug"):
        save_checkpoint(tmp_path / "x.safetensors", tensors(), HEADER)


# The checkpoints of a run --------------------------------------------------------------------------------------------


def test_checkpoints_are_ordered_by_step_and_strangers_are_ignored(tmp_path: Path) -> None:
    steps = (9_999_999, 10_000_000, 7, 100)
    for step in steps:
        save_checkpoint(checkpoint_path(tmp_path, step), {"a": torch.ones(1)}, {"step": step})
    for stranger in ("best.safetensors", ".0000008.safetensors.1.partial", "0000009.pt", "notes.txt"):
        (tmp_path / "checkpoints" / stranger).write_text("x")
    assert [int(path.stem) for path in checkpoints(tmp_path)] == sorted(steps)
    assert checkpoints(tmp_path / "no such run") == []
    assert checkpoint_path(tmp_path, 7).name == "0000007.safetensors"


@pytest.mark.parametrize(("count", "left"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_keep_last_removes_the_oldest(count: int, left: list[int], tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(checkpoint_path(tmp_path, step), {"a": torch.ones(1)}, {"step": step})
    (tmp_path / "checkpoints" / "best.safetensors").write_text("mine")
    keep_last(tmp_path, count)
    assert [int(path.stem) for path in checkpoints(tmp_path)] == left
    assert (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_a_runs_folder_gives_its_newest_average(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(checkpoint_path(tmp_path, step), tensors(step), {"step": step})
    weights = read_weights(str(tmp_path))
    assert weights.header == {"step": 2}
    assert torch.equal(weights.state["a"], torch.full((3, 2), 3.0))


@pytest.mark.parametrize("read", [read_header, lambda path: read_tensors(path, ""), lambda path: read_weights(str(path))])
def test_broken_files_are_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "0000001.safetensors"
    with pytest.raises(InputError, match="no such checkpoint"):
        read(path)
    save_checkpoint(path, tensors(), HEADER)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], whole[:4], b"", b"\xff" * 64, b"hello, this is a text file"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="truncated or no safetensors file") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


# Files ---------------------------------------------------------------------------------------------------------------


def test_json_is_written_whole_and_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"name": "Bär", "values": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Bär", "values": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert folder_content(path.parent) == ["x.json"]
    assert "Bär" in path.read_text(encoding="utf-8")


def test_a_target_that_vanished_folder_and_all_is_made_again(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("x")
        assert str(os.getpid()) in temporary.name
        assert temporary.parent == tmp_path / "a"
    assert (tmp_path / "a" / "b.txt").read_text() == "x"


def test_sha256_is_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Files that are not what they seem -----------------------------------------------------------------------------------


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def unreadable(source: Path | str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(InputError) as caught:
        read_weights(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert Path(source).name in message
    return message


@pytest.mark.parametrize(
    "wrap", [lambda trap: trap, lambda trap: {"model": {"x": trap}}, lambda trap: {"ema": {}, "args": trap}]
)
@pytest.mark.parametrize("old", [True, False], ids=["old", "zip"])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_pickled_code_is_not_executed(wrap: Callable[[Trap], Any], old: bool, suffix: str, tmp_path: Path) -> None:
    path, witness = tmp_path / f"trap{suffix}", tmp_path / "executed"
    torch.save(wrap(Trap(witness)), path, _use_new_zipfile_serialization=not old)
    assert "run code" in unreadable(path)
    assert not witness.exists()
    # The known-bad variant: an unguarded load runs it.
    torch.load(path, weights_only=False)
    assert witness.exists()


def test_a_plain_pickle_is_not_executed(tmp_path: Path) -> None:
    path, witness = tmp_path / "trap.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Trap(witness)))
    unreadable(path)
    assert not witness.exists()


def test_a_pickled_network_is_named_and_refused(tmp_path: Path) -> None:
    torch.save(network("dense", tiny()), tmp_path / "whole.pt")
    assert "models.dit.DiT" in unreadable(tmp_path / "whole.pt")


@pytest.mark.parametrize("write", [as_pt, as_old_pt, as_safetensors, as_fast_dit])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(write: Writer, share: float, tmp_path: Path) -> None:
    path = write(dict(network("dense", tiny()).state_dict()), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated" in unreadable(path)


@pytest.mark.parametrize(
    "text", ["{}", "", "hello world", "accuracy 0.9", "<html>404 Not Found</html>", "0", "(.", "version https://git-lfs"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_text_files_are_refused(text: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text(text)
    assert "truncated or no" in unreadable(path)


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"a": 1}, {"model": {}}, {"ema": {"x": "y"}}], ids=str)
def test_files_without_weights_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "no dictionary of weights" in unreadable(tmp_path / "other.pt")


@pytest.mark.parametrize("source", ["no/such/file.pt", "nothing.safetensors", "DiT-XL-2-512x512.pt", "a b", "/no/such/folder"])
def test_missing_files_are_refused(source: str) -> None:
    assert "no such checkpoint" in unreadable(source)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no diffusers-layout weights" in unreadable(tmp_path / "empty")


def test_a_hub_id_without_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = unreadable("facebook/DiT-XL-2-256")
    assert "cannot be had from the hub" in message
    assert "give their path" in message


@pytest.mark.parametrize("header", [[], "x", {"step": "x"}, {"step": -1}, {"step": 1.5}, {"step": None}, {"network": "x"},
                                    {"step": 1, "settings": []}, {"data": [1]}])  # fmt: skip
def test_a_header_of_another_kind_is_damaged(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"model/a": torch.ones(1)}, header)
    for read in (read_header, lambda path: read_weights(str(path))):
        with pytest.raises(InputError, match=r"x\.safetensors: the checkpoint's header is damaged; copy the file again"):
            read(path)
    save_checkpoint(path, {"model/a": torch.ones(1)}, {"step": 0, "settings": {}, "network": {}, "data": {}})
    assert read_weights(str(path)).header is not None
