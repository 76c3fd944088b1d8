from __future__ import annotations

import os
import struct
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_batches import SAVE, not_again, random_pictures, sha256_of, write_any, write_folder
from PIL import Image

from metrics import content as content_module
from metrics import pictures as pictures_module
from metrics.content import content_hash
from metrics.npz import find_member
from metrics.pictures import FolderPictures, open_batch, spans
from runtime.config import InputError


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
@pytest.mark.parametrize("size", [1, 4, 11, 64])
def test_npz_in_pieces_equals_the_whole(tmp_path: Path, save: Callable, size: int) -> None:
    pictures = random_pictures(11)
    save(tmp_path / "batch.npz", arr_0=pictures, other=np.arange(4))
    batch = open_batch(tmp_path / "batch.npz").pictures
    assert (batch.count, batch.height, batch.width) == (11, 6, 5)
    for _ in range(2):
        pieces = list(batch.batches(size))
        assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
        np.testing.assert_array_equal(np.concatenate(pieces), pictures)


def test_folder_is_in_numeric_order_and_takes_png_files_alone(tmp_path: Path) -> None:
    pictures = random_pictures(12)
    folder = write_folder(tmp_path / "samples", pictures)
    (folder / "protocol.json").write_text("{}")
    (folder / ".12.png.77.partial").write_text("half a picture")
    (folder / "grids").mkdir()
    batch = open_batch(folder).pictures
    assert (batch.count, batch.height, batch.width) == (12, 6, 5)
    read = np.concatenate(list(batch.batches(5)))
    np.testing.assert_array_equal(read, pictures)
    # The known-bad variant: text order, which puts 10 before 2.
    assert (read != pictures[sorted(range(12), key=str)]).any()


def peak_while_reading(path: Path, keep: bool) -> int:
    tracemalloc.start()
    try:
        kept = [piece for piece in open_batch(path).pictures.batches(32) if keep]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(kept) in (0, -(-open_batch(path).pictures.count // 32))
    return peak


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_memory_does_not_grow_with_the_count(tmp_path: Path, save: Callable) -> None:
    peaks = {}
    for count in (200, 2_000):
        save(tmp_path / f"{count}.npz", arr_0=np.zeros((count, 64, 64, 3), np.uint8))
        peaks[count] = peak_while_reading(tmp_path / f"{count}.npz", keep=False)
    assert peaks[2_000] - peaks[200] < 1_000_000  # of 22 MB more
    # The known-bad variant: all pieces kept.
    assert peak_while_reading(tmp_path / "2000.npz", keep=True) - peaks[200] > 20_000_000


BAD_ARRAYS = {
    "is float32; pictures must be uint8": np.zeros((4, 6, 6, 3), np.float32),
    "is object; pictures must be uint8": np.array([None]),
    "move the channels last": np.zeros((4, 3, 6, 6), np.uint8),
    r"has the shape \(4, 6, 6, 1\).*store RGB": np.zeros((4, 6, 6, 1), np.uint8),
    r"has the shape \(4, 6, 6, 4\).*store RGB": np.zeros((4, 6, 6, 4), np.uint8),
    r"has the shape \(4, 6, 6\)": np.zeros((4, 6, 6), np.uint8),
    "holds no pictures": np.zeros((0, 6, 6, 3), np.uint8),
    "Fortran order": np.asfortranarray(random_pictures(4)),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, message: str) -> None:
    np.savez(tmp_path / "bad.npz", arr_0=BAD_ARRAYS[message])
    with pytest.raises(InputError, match=message):
        open_batch(tmp_path / "bad.npz")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_batch(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("not an archive\n" * 50)
    with pytest.raises(InputError, match="not a readable npz"):
        open_batch(tmp_path / "text.npz")
    np.savez(tmp_path / "whole.npz", arr_0=random_pictures(40))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-300])
    with pytest.raises(InputError, match="not a readable npz"):
        open_batch(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", images=random_pictures(4), labels=np.arange(4))
    with pytest.raises(InputError, match="holds images, labels, but neither pictures"):
        open_batch(tmp_path / "other.npz")
    with zipfile.ZipFile(tmp_path / "no_array.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"hello, this is no array")
    with pytest.raises(InputError, match="arr_0 cannot be read"):
        open_batch(tmp_path / "no_array.npz")


def test_a_shorter_array_than_its_header_says(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", arr_0=random_pictures(40))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        short.writestr("arr_0.npy", archive.read("arr_0.npy")[:-90])
    with pytest.raises(InputError, match="cut short"):
        open_batch(tmp_path / "short.npz")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("position", [200_000, 480_100], ids=["inside", "last row"])
def test_a_damaged_stored_array_is_noticed_by_its_hash(tmp_path: Path, position: int) -> None:
    np.savez(tmp_path / "flipped.npz", arr_0=random_pictures(400, 20, 20), other=np.arange(300))
    assert content_hash(open_batch(tmp_path / "flipped.npz")) == sha256_of(tmp_path / "flipped.npz")
    flip(tmp_path / "flipped.npz", position)
    with pytest.raises(InputError, match=r"flipped\.npz is damaged \(arr_0 does not agree with its checksum\)"):
        content_hash(open_batch(tmp_path / "flipped.npz"))
    # The known-bad variant: reading alone, which passes by the checksum.
    list(open_batch(tmp_path / "flipped.npz").pictures.batches(8))


def test_a_damaged_compressed_array_is_noticed_while_reading(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "flipped.npz", arr_0=random_pictures(400, 20, 20))
    flip(tmp_path / "flipped.npz", 200_000)
    with pytest.raises(InputError, match=r"flipped\.npz is damaged after picture"):
        list(open_batch(tmp_path / "flipped.npz").pictures.batches(8))


def test_an_array_cut_behind_our_back(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", arr_0=random_pictures(400, 20, 20))
    batch = open_batch(tmp_path / "cut.npz")
    os.truncate(tmp_path / "cut.npz", 300_000)
    with pytest.raises(InputError, match=r"cut\.npz is cut short after picture 2"):
        list(batch.pictures.batches(8))


@pytest.mark.parametrize("form", [*SAVE, "folder"])
def test_any_part_in_any_form(tmp_path: Path, form: str) -> None:
    pictures = random_pictures(23)
    batch = open_batch(write_any(form, tmp_path, pictures)).pictures
    for start, stop in ((0, None), (5, None), (5, 17), (22, 23), (7, 7)):
        pieces = list(batch.batches(4, start, stop))
        np.testing.assert_array_equal(np.concatenate([pictures[:0], *pieces]), pictures[start:stop])
    ranges = [(2, 5), (5, 6), (11, 20)]
    for (first, stop), piece in zip(ranges, batch.pieces(ranges), strict=True):
        np.testing.assert_array_equal(piece, pictures[first:stop])
    for indices in ([4, 22, 0, 4, 4, 9], np.array([22]), range(23), []):
        np.testing.assert_array_equal(batch.take(indices), pictures[np.asarray(indices, dtype=int)])
    for indices in ([0, 23], [-1]):
        with pytest.raises(IndexError, match="were asked for, of 23"):
            batch.take(indices)


def test_extra_fields_of_the_archive_are_skipped(tmp_path: Path) -> None:
    pictures = random_pictures(9)
    np.savez(tmp_path / "plain.npz", arr_0=pictures)
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(tmp_path / "extra.npz", "w") as extra:
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = b"\x99\x99\x05\x00hello"
        extra.writestr(info, plain.read("arr_0.npy"))
    np.testing.assert_array_equal(open_batch(tmp_path / "extra.npz").pictures.take(range(9)), pictures)
    # The known-bad variant takes the length of the extra field for zero.
    member = find_member(tmp_path / "extra.npz", "arr_0")
    wrong = 30 + len("arr_0.npy") + member.header_size
    assert (tmp_path / "extra.npz").read_bytes()[wrong : wrong + 90] != pictures[0].tobytes()


def test_compressed_pictures_are_decompressed_once_per_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.zeros((60, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "batch.npz", arr_0=pictures)
    batch = open_batch(tmp_path / "batch.npz").pictures
    produced = []
    read = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        content = read(self, size)
        produced.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    list(batch.pieces(spans(10, 60, 5)))
    once = sum(produced)
    assert once < 1.5 * pictures.nbytes  # numpy's header reader reads a little twice
    # The known-bad variant: a pass for each piece.
    for first, stop in spans(10, 60, 5):
        list(batch.pieces([(first, stop)]))
    assert sum(produced) - once > 3 * pictures.nbytes


def test_a_folder_is_decoded_ahead_across_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, ahead = random_pictures(200), 64
    batch = open_batch(write_folder(tmp_path / "folder", pictures)).pictures
    decoded: list[Path] = []
    decode = pictures_module._decode

    def counted(file: Path) -> np.ndarray:
        decoded.append(file)
        return decode(file)

    monkeypatch.setattr(pictures_module, "_decode", counted)
    pieces = batch.pieces([(index, index + 1) for index in range(0, 200, 2)])
    for index, piece in enumerate(pieces):
        np.testing.assert_array_equal(piece, pictures[2 * index : 2 * index + 1])
        assert len(decoded) <= index + 1 + ahead
    assert len(decoded) == 100


def test_folder_ranges_are_decoded_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = open_batch(write_folder(tmp_path / "folder", random_pictures(4))).pictures
    both = threading.Barrier(2, timeout=30)
    decode = pictures_module._decode

    def together(file: Path) -> np.ndarray:
        both.wait()
        return decode(file)

    monkeypatch.setattr(pictures_module, "_decode", together)
    assert len(list(batch.pieces([(index, index + 1) for index in range(4)]))) == 4


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no PNG files"):
        open_batch(tmp_path / "empty")

    mixed = write_folder(tmp_path / "mixed", random_pictures(3))
    Image.fromarray(random_pictures(1, 6, 7)[0]).save(mixed / "3.png")
    with pytest.raises(InputError, match=r"mixes sizes: 0\.png is 5 x 6, 3\.png is 7 x 6 pixels"):
        open_batch(mixed)

    for mode in ("L", "RGBA", "P"):
        folder = write_folder(tmp_path / mode, random_pictures(2))
        Image.fromarray(random_pictures(1)[0]).convert(mode).save(folder / "2.png")
        with pytest.raises(InputError, match=rf"2\.png is not an RGB picture \(its mode is {mode}\)"):
            open_batch(folder)

    text = write_folder(tmp_path / "text", random_pictures(2))
    (text / "2.png").write_text("no picture")
    with pytest.raises(InputError, match=r"2\.png is not a readable PNG"):
        open_batch(text)

    jpeg = write_folder(tmp_path / "jpeg", random_pictures(2))
    Image.fromarray(random_pictures(1)[0]).save(jpeg / "2.jpg")
    with pytest.raises(InputError, match=r"holds 2\.jpg, which is no PNG"):
        open_batch(jpeg)

    cut = write_folder(tmp_path / "cut", random_pictures(4, 40, 40))
    (cut / "2.png").write_bytes((cut / "2.png").read_bytes()[:-2_000])
    with pytest.raises(InputError, match=r"2\.png cannot be decoded"):
        list(open_batch(cut).pictures.batches(2))


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_pictures(3))
    (folder / "3.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(InputError, match=r"3\.png is not a readable PNG"):
        open_batch(folder)


def test_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_SETTLED_SECONDS", -60.0)
    folder = write_folder(tmp_path / os.fsdecode(b"folder\xff"), random_pictures(2), (os.fsdecode(b"\xfe") + "{}.png").format)
    content = content_hash(open_batch(folder), tmp_path / "memory")
    monkeypatch.setattr(FolderPictures, "digest", not_again)
    assert content_hash(open_batch(folder), tmp_path / "memory") == content


def with_header(content: bytes, start: int, length: int, width: int, height: int) -> bytes:
    """A PNG whose first chunk is cut to `length` bytes and says another size, with a checksum that fits."""
    header = b"IHDR" + (struct.pack(">II", width, height) + content[start + 16 : start + 21])[:length]
    return content[:8] + struct.pack(">I", length) + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def test_headers_that_pillow_refuses_by_other_errors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_pictures(3))
    content = (folder / "1.png").read_bytes()
    for length, width in ((4, 5), (13, 60_000)):
        (folder / "1.png").write_bytes(with_header(content, 8, length, width, 60_000))
        with pytest.raises(InputError, match=r"1\.png is not a readable PNG"):
            open_batch(folder)


@pytest.mark.parametrize("change", ["L", "size"])
def test_a_picture_that_becomes_another_after_opening(tmp_path: Path, change: str) -> None:
    folder = write_folder(tmp_path / "folder", random_pictures(3))
    batch = open_batch(folder).pictures
    other = Image.fromarray(random_pictures(1)[0]).convert("L") if change == "L" else Image.new("RGB", (7, 7))
    other.save(folder / "1.png")
    for read in (lambda: list(batch.batches(3)), lambda: batch.take([1])):
        with pytest.raises(InputError, match=r"1\.png is no RGB picture of 5 x 6 pixels any more"):
            read()
