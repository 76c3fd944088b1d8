"""Class folders and zips as one batch of cropped pictures."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import cropped as cropped_module
from data.cropped import CroppedPictures
from data.images import center_crop
from metrics.content import content_hash
from metrics.pictures import PictureBatch, Pictures
from runtime.config import InputError

NAMES = ["cat/10.png", "cat/2.png", "cat/more/1.jpg", "dog/a.png", "dog/b.png", "emu/x.webp"]
LABELS = [0, 0, 0, 1, 1, 2]


def picture(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (20 + 3 * index, 41 - 2 * index, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_classes(folder: Path, names: list[str] = NAMES) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / name)
    return folder


def write_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "pictures")


def crops(folder: Path, size: int) -> np.ndarray:
    """One at a time, in the order of the names."""
    return np.stack([center_crop(Image.open(folder / name).convert("RGB"), size) for name in NAMES])


@pytest.mark.parametrize("form", [Path, write_zip], ids=["folder", "zip"])
def test_crops_in_listing_order(folder: Path, form: Callable[[Path], Path]) -> None:
    pictures: Pictures = CroppedPictures(form(folder), 16)
    expected = crops(folder, 16)
    assert (pictures.count, pictures.height, pictures.width) == (6, 16, 16)
    assert len({crop.tobytes() for crop in expected}) == 6
    np.testing.assert_array_equal(pictures.labels(), LABELS)
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(4))), expected)
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(2, 1, 4))), expected[1:4])
    ranges = [(0, 1), (2, 5), (5, 6)]
    for (first, stop), piece in zip(ranges, pictures.pieces(ranges), strict=True):
        np.testing.assert_array_equal(piece, expected[first:stop])
    for indices in ([5, 0, 0, 3], np.array([2]), []):
        np.testing.assert_array_equal(pictures.take(indices), expected[np.asarray(indices, dtype=int)])
    with pytest.raises(IndexError):
        pictures.take([6])


def test_names_are_the_files_whose_times_tell_of_a_change(folder: Path) -> None:
    assert list(CroppedPictures(folder, 8).names) == NAMES
    assert list(CroppedPictures(write_zip(folder), 8).names) == [""]


def digest(path: Path, size: int = 16) -> str:
    return CroppedPictures(path, size).digest()


@pytest.mark.parametrize("form", [Path, write_zip], ids=["folder", "zip"])
def test_the_digest_tells_everything_apart(folder: Path, form: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest(form(folder))
    assert digest(form(folder)) == first
    assert digest(form(folder), 17) != first
    with monkeypatch.context() as patched:
        patched.setattr(cropped_module, "CROP_VERSION", cropped_module.CROP_VERSION + 1)
        assert digest(form(folder)) != first
    (folder / "dog/b.png").rename(folder / "dog/c.png")
    renamed = digest(form(folder))
    assert renamed != first
    (folder / "dog/c.png").rename(folder / "dog/b.png")
    # Two pictures exchanged: the same names, the same contents.
    (folder / "dog/a.png").rename(folder / "kept")
    (folder / "dog/b.png").rename(folder / "dog/a.png")
    (folder / "kept").rename(folder / "dog/b.png")
    assert digest(form(folder)) not in (first, renamed)


def test_a_zip_of_a_folder_is_the_same_batch(folder: Path) -> None:
    assert digest(folder) == digest(write_zip(folder))


def test_every_picture_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    pictures = CroppedPictures(folder, 16)
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.relative_to(folder).as_posix())
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    pictures.digest()
    assert sorted(read) == NAMES


def test_a_crop_of_another_version_is_not_remembered(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`content_hash` believes its notes while the files are untouched, and they are when our own rule changes."""
    for name in NAMES:
        os.utime(folder / name, (1e9, 1e9))
    monkeypatch.setattr("metrics.content._SETTLED_SECONDS", -60.0)

    def content(size: int = 16) -> str:
        return content_hash(PictureBatch(folder, CroppedPictures(folder, size), None, None), tmp_path / "memory")

    first = content()
    assert content(17) != first
    assert content() == first
    with monkeypatch.context() as patched:
        patched.setattr(CroppedPictures, "digest", lambda self: pytest.fail("the content was read again"))
        content()
    monkeypatch.setattr(cropped_module, "CROP_VERSION", cropped_module.CROP_VERSION + 1)
    assert content() != first


def test_the_crop_is_the_one_of_this_version() -> None:
    """Fails when `center_crop` gives other pixels than it did: then raise CROP_VERSION and put the new hash here."""
    digest = hashlib.sha256()
    for index in range(6):
        digest.update(center_crop(picture(index), 12).tobytes())
    assert (cropped_module.CROP_VERSION, digest.hexdigest()[:16]) == (1, "419253ec8e8d34a9")


def test_the_check_has_a_bar_in_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest(folder)
    assert "pictures: checking: 100%" in (printed := capsys.readouterr().err)
    assert "6/6 [" in printed
    assert "pictures/s" in printed


@pytest.mark.parametrize("form", [Path, write_zip], ids=["folder", "zip"])
def test_broken_pictures_are_found_with_the_digest(folder: Path, form: Callable[[Path], Path]) -> None:
    # Cut within its pixels: the header alone would not tell.
    whole = (folder / "dog/a.png").read_bytes()
    (folder / "dog/a.png").write_bytes(whole[: len(whole) // 2])
    place = form(folder)
    with pytest.raises(InputError) as refused:
        digest(place)
    assert str(refused.value).startswith(f"{place}: 1 of 6 pictures cannot be used: dog/a.png (")
    assert str(refused.value).endswith("); mend them or move them elsewhere.")
    for name in ("cat/10.png", "dog/b.png", "emu/x.webp"):
        (folder / name).write_bytes(b"")
    place = form(folder)
    with pytest.raises(InputError) as refused:
        digest(place)
    sentence = str(refused.value)
    assert sentence.startswith(f"{place}: 4 of 6 pictures cannot be used: cat/10.png (the file is empty), dog/a.png (")
    assert sentence.endswith(", dog/b.png (the file is empty), ...; mend them or move them elsewhere.")
    assert "\n" not in sentence


def test_a_picture_that_breaks_later(folder: Path) -> None:
    pictures = CroppedPictures(folder, 16)
    (folder / "dog/a.png").write_text("no picture")
    (folder / "dog/b.png").unlink()
    for read in (lambda: list(pictures.batches(4)), lambda: pictures.take([3])):
        with pytest.raises(InputError, match=r"dog/a\.png cannot be used \(not a JPEG, PNG, .*; mend it or move it elsewhere"):
            read()
    with pytest.raises(InputError, match=r"2 of 6 .* dog/b\.png \(No such file or directory\)"):
        pictures.digest()


def test_bad_sources(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="--image-size must be at least 1 and at most 4,096, not 0"):
        CroppedPictures(folder, 0)
    with pytest.raises(InputError, match="at most 4,096, not 200,000"):
        CroppedPictures(folder, 200_000)
    with pytest.raises(InputError, match="no such folder or zip file"):
        CroppedPictures(tmp_path / "missing", 8)
    with pytest.raises(InputError, match="but no class folders"):
        CroppedPictures(folder / "dog", 8)
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(InputError, match="holds no pictures"):
        CroppedPictures(tmp_path / "bare.zip", 8)


def test_a_picture_in_memory_counts_as_one_of_a_file(folder: Path) -> None:
    """Greyscale and palette pictures are converted as everywhere in this project."""
    grey = picture(0).convert("L")
    content = io.BytesIO()
    grey.save(content, "png")
    (folder / "cat/10.png").write_bytes(content.getvalue())
    np.testing.assert_array_equal(CroppedPictures(folder, 16).take([0])[0], center_crop(grey.convert("RGB"), 16))


@pytest.mark.parametrize("harm", [(8, 1), (10, 99), (16, 7)], ids=["encrypted", "method", "checksum"])
def test_members_of_a_zip_that_cannot_be_unpacked(folder: Path, harm: tuple[int, int]) -> None:
    path = write_zip(folder)
    content = bytearray(path.read_bytes())
    for entry in re.finditer(rb"PK\x01\x02", bytes(content)):  # in the archive's directory
        content[entry.start() + harm[0]] ^= harm[1]
    path.write_bytes(bytes(content))
    batch = CroppedPictures(path, 8)
    for read in (batch.digest, lambda: list(batch.batches(4))):
        with pytest.raises(InputError, match="cannot be used"):
            read()
