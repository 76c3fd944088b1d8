from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metrics.pictures import open_batch
from runtime.config import InputError

SAVE = {"stored": np.savez, "compressed": np.savez_compressed}


def random_pictures(count: int, height: int = 6, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_folder(folder: Path, pictures: np.ndarray, name: Callable[[int], str] = "{}.png".format) -> Path:
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / name(index))
    return folder


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


def test_statistics_are_read_when_present(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "both.npz", arr_0=random_pictures(4), mu=mean.astype(np.float32), sigma=covariance)
    np.savez(tmp_path / "alone.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2])
    both, alone = open_batch(tmp_path / "both.npz"), open_batch(tmp_path / "alone.npz")
    assert both.pictures is not None
    assert both.spatial is None
    assert alone.pictures is None
    for statistics in (both.pool, alone.pool):
        assert statistics.mean.dtype == np.float64
        np.testing.assert_array_equal(statistics.mean, mean)
        np.testing.assert_array_equal(statistics.covariance, covariance)
    np.testing.assert_array_equal(alone.spatial.mean, mean[:2])


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


def test_flipped_bytes_are_noticed_while_reading(tmp_path: Path) -> None:
    np.savez(tmp_path / "flipped.npz", arr_0=random_pictures(400, 20, 20))
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[200_000] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"flipped\.npz is damaged after picture"):
        list(open_batch(tmp_path / "flipped.npz").pictures.batches(8))


def test_bad_statistics(tmp_path: Path) -> None:
    cases: dict[str, dict] = {
        "holds mu without sigma": {"mu": np.zeros(3)},
        "holds sigma_s without mu_s": {"sigma_s": np.eye(3)},
        r"mu has the shape \(3,\) and sigma the shape \(2, 2\)": {"mu": np.zeros(3), "sigma": np.eye(2)},
        "mu or sigma holds numbers that are not finite": {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        "mu or sigma cannot be read": {"mu": np.array([None, 1]), "sigma": np.eye(2)},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", arr_0=random_pictures(4), **arrays)
        with pytest.raises(InputError, match=message):
            open_batch(tmp_path / "bad.npz")


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
