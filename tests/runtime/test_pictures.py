"""PNGs and the packed npz: the same bytes as numpy's, whatever their number takes no more memory, damage is named."""

from __future__ import annotations

import contextlib
import errno
import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import runtime.files as files
from runtime.config import InputError
from runtime.pictures import PictureWriter, pack_pictures, picture_path

SIZE = (24, 32)


def pixels(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def write_all(folder: Path, content: np.ndarray) -> Path:
    with PictureWriter(folder) as writer:
        for index, picture in enumerate(content):
            writer.write(index, torch.from_numpy(picture))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_all(tmp_path / "pictures", pixels(10))


# Writing -------------------------------------------------------------------------------------------------------------


def test_pictures_are_read_back_unchanged(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [f"{index:06d}.png" for index in range(10)]
    for index, expected in enumerate(pixels(10)):
        with Image.open(picture_path(folder, index)) as image:
            assert image.mode == "RGB"
            assert (np.asarray(image) == expected).all()


def test_many_more_pictures_than_the_queue_holds(tmp_path: Path) -> None:
    content = pixels(400, size=(2, 2))
    write_all(tmp_path / "x", content)
    assert len(list((tmp_path / "x").iterdir())) == 400


@pytest.mark.parametrize("count", [1, 400])
def test_a_failed_write_is_raised_and_leaves_no_picture(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image.Image, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_all(tmp_path / "x", pixels(count, size=(2, 2)))
    assert list((tmp_path / "x").iterdir()) == []


def test_an_error_in_the_sampling_is_not_hidden_by_the_writer(tmp_path: Path) -> None:
    def sampling() -> None:
        with PictureWriter(tmp_path / "x") as writer:
            writer.write(0, torch.from_numpy(pixels(1)[0]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sampling()


# Packing -------------------------------------------------------------------------------------------------------------


def test_the_archive_holds_what_numpy_saves(folder: Path, tmp_path: Path) -> None:
    pack_pictures(folder, 10, SIZE, tmp_path / "ours.npz")
    np.savez(tmp_path / "theirs.npz", pixels(10))
    with np.load(tmp_path / "ours.npz") as ours:
        assert ours.files == ["arr_0"]
        assert ours["arr_0"].dtype == np.uint8
        assert (ours["arr_0"] == pixels(10)).all()
    members = []
    for name in ("ours", "theirs"):
        with zipfile.ZipFile(tmp_path / f"{name}.npz") as archive:
            assert archive.testzip() is None
            members.append((archive.namelist(), archive.read("arr_0.npy"), archive.getinfo("arr_0.npy").compress_type))
    assert members[0] == members[1]


def test_labels_are_packed_beside_the_pictures(folder: Path, tmp_path: Path) -> None:
    labels = np.arange(10, dtype=np.int64)[::-1].copy()
    pack_pictures(folder, 10, SIZE, tmp_path / "labelled.npz", labels)
    with np.load(tmp_path / "labelled.npz") as packed:
        assert packed.files == ["arr_0", "arr_1"]
        assert (packed["arr_0"] == pixels(10)).all()
        assert (packed["arr_1"] == labels).all()


def test_fewer_pictures_than_the_folder_holds(folder: Path, tmp_path: Path) -> None:
    pack_pictures(folder, 4, SIZE, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as packed:
        assert (packed["arr_0"] == pixels(10)[:4]).all()


def archive_bytes(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch, now: float) -> bytes:
    monkeypatch.setattr("time.time", lambda: now)
    pack_pictures(folder, 10, SIZE, target)
    return target.read_bytes()


def test_equal_pictures_are_equal_bytes_at_any_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (archive_bytes(folder, tmp_path / f"{now}.npz", monkeypatch, now) for now in (1e9, 1.5e9))
    assert first == second
    monkeypatch.setattr(files, "_EARLIEST", (2000, 1, 1, 0, 0, 0))  # known bad: the time of packing
    assert archive_bytes(folder, tmp_path / "x.npz", monkeypatch, 1e9) != first


def pack_from_a_list(folder: Path, count: int, size: tuple[int, int], target: Path) -> None:
    """The known-bad variant, and the usual one: all pictures in a list, then one array."""
    listed = [np.asarray(Image.open(picture_path(folder, index))) for index in range(count)]
    np.savez(target, np.stack(listed))


def extra_memory(pack: Callable[..., None], folder: Path, target: Path) -> int:
    """Bytes that packing 400 pictures takes beyond what packing 50 takes."""
    peaks = []
    for count in (50, 50, 400):  # the first for what is imported and cached on the way
        tracemalloc.start()
        pack(folder, count, SIZE, target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return peaks[2] - peaks[1]


def test_memory_does_not_grow_with_the_count(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "pictures", pixels(400))
    one = SIZE[0] * SIZE[1] * 3
    assert extra_memory(pack_pictures, folder, tmp_path / "x.npz") < 40 * one
    assert extra_memory(pack_from_a_list, folder, tmp_path / "x.npz") > 300 * one


# Damage --------------------------------------------------------------------------------------------------------------


def refusal(folder: Path, target: Path, count: int = 10) -> str:
    """The one sentence with which a folder is not packed; an older archive stays."""
    target.write_bytes(b"an older archive")
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(InputError) as caught:
        pack_pictures(folder, count, SIZE, target)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert target.read_bytes() == b"an older archive"
    assert sorted(path.name for path in target.parent.iterdir()) == before
    return message


def test_a_missing_picture_is_named(folder: Path, tmp_path: Path) -> None:
    picture_path(folder, 7).unlink()
    assert f"{picture_path(folder, 7)} is missing" in refusal(folder, tmp_path / "x.npz")
    assert "000010.png is missing" in refusal(write_all(folder, pixels(10)), tmp_path / "x.npz", count=11)


def png(size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, size=size)[0]).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"hello", png()[:-200], png()[:60], png()[:33], b"\0" * 100])
def test_a_damaged_picture_is_named(content: bytes, folder: Path, tmp_path: Path) -> None:
    picture_path(folder, 3).write_bytes(content)
    message = refusal(folder, tmp_path / "x.npz")
    assert f"{picture_path(folder, 3)} is damaged" in message
    assert "delete it" in message


def test_flipped_bytes_are_never_a_traceback(folder: Path, tmp_path: Path) -> None:
    whole, generator = png(), np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        content[generator.integers(8, 64)] = generator.integers(256)
        content[generator.integers(8, len(content))] = generator.integers(256)
        picture_path(folder, 0).write_bytes(bytes(content))
        with contextlib.suppress(InputError):
            pack_pictures(folder, 1, SIZE, tmp_path / "x.npz")


def test_a_picture_of_another_size_is_named(folder: Path, tmp_path: Path) -> None:
    picture_path(folder, 9).write_bytes(png((24, 24)))
    message = refusal(folder, tmp_path / "x.npz")
    assert f"{picture_path(folder, 9)} is 24 x 24, not 24 x 32" in message


def test_a_grey_picture_is_packed_as_rgb(folder: Path, tmp_path: Path) -> None:
    grey = pixels(1)[0, :, :, 0]
    Image.fromarray(grey).save(picture_path(folder, 2))
    pack_pictures(folder, 10, SIZE, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as packed:
        assert (packed["arr_0"][2] == grey[:, :, None]).all()
