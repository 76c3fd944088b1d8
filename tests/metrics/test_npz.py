"""What an npz holds beside the pictures, and archives that are damaged."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from picture_batches import random_pictures, write_folder

from metrics.pictures import open_batch
from runtime.config import InputError


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


def test_labels(tmp_path: Path) -> None:
    labels = np.array([3, 1, 2, 3])
    for stored in (labels, labels.astype(np.uint8), labels.astype(np.float32)):
        np.savez(tmp_path / "batch.npz", arr_0=random_pictures(4), arr_1=stored)
        read = open_batch(tmp_path / "batch.npz").labels
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, labels)
    np.savez(tmp_path / "without.npz", arr_0=random_pictures(4))
    assert open_batch(tmp_path / "without.npz").labels is None
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2), arr_1=np.zeros((3, 3)))
    assert open_batch(tmp_path / "statistics.npz").labels is None
    assert open_batch(write_folder(tmp_path / "folder", random_pictures(2))).labels is None


def test_count_and_network_of_the_statistics(tmp_path: Path) -> None:
    both = {"mu": np.zeros(2), "sigma": np.eye(2)}
    network = {"name": "ADM Inception (2015)", "sha256": "5" * 64}
    np.savez(tmp_path / "stamped.npz", **both, count=np.array(50_000), network=np.array(json.dumps(network)))
    np.savez(tmp_path / "plain.npz", **both)
    stamped, plain = open_batch(tmp_path / "stamped.npz"), open_batch(tmp_path / "plain.npz")
    assert (stamped.pool.count, stamped.network) == (50_000, network)
    assert (plain.pool.count, plain.network) == (None, None)


BAD_ENTRIES = {
    r"arr_1 \(int64 of the shape \(5,\)\) must be the class of each picture, 4 integers": {"arr_1": np.arange(5)},
    r"arr_1 \(int64 of the shape \(3,\)\)": {"arr_1": np.arange(3)},
    r"arr_1 \(int64 of the shape \(4, 1\)\)": {"arr_1": np.zeros((4, 1), np.int64)},
    r"arr_1 \(<U1 of": {"arr_1": np.array(list("abcd"))},
    r"arr_1 \(float64 of": {"arr_1": np.array([0, 1, 2.5, 3])},
    r"arr_1 \(float32 of": {"arr_1": np.array([0, np.nan, 1, 2], np.float32)},
    "arr_1 cannot be read": {"arr_1": np.array([None] * 4)},
    r"count \(float64 of the shape \(\)\) must be one whole number": {"count": np.array(5.0)},
    r"count \(int64 of the shape \(2,\)\)": {"count": np.arange(2)},
    r"count \(int64 of the shape \(\)\)": {"count": np.array(0)},
    r"network \(<U5 of the shape \(\)\) must be JSON text": {"network": np.array("hello")},
    r"network \(int64 of": {"network": np.array(5)},
    r"network \(<U10 of": {"network": np.array('{"name":5}')},
    r"network \(<U1 of the shape \(3,\)\)": {"network": np.array(list("abc"))},
}


@pytest.mark.parametrize("message", BAD_ENTRIES)
def test_bad_entries_beside_the_pictures(tmp_path: Path, message: str) -> None:
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), **BAD_ENTRIES[message]}
    np.savez(tmp_path / "bad.npz", arr_0=random_pictures(4), **arrays)
    with pytest.raises(InputError, match=message):
        open_batch(tmp_path / "bad.npz")


def test_bad_statistics(tmp_path: Path) -> None:
    cases: dict[str, dict] = {
        "holds mu without sigma": {"mu": np.zeros(3)},
        "holds sigma_s without mu_s": {"sigma_s": np.eye(3)},
        r"mu has the shape \(3,\) and sigma the shape \(2, 2\)": {"mu": np.zeros(3), "sigma": np.eye(2)},
        "mu or sigma holds numbers that are not finite": {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        r"mu \(object of the shape \(2,\)\) must be numbers": {"mu": np.array([None, 1]), "sigma": np.eye(2)},
        r"sigma \(complex128 of": {"mu": np.zeros(2), "sigma": np.eye(2) + 0j},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", arr_0=random_pictures(4), **arrays)
        with pytest.raises(InputError, match=message):
            open_batch(tmp_path / "bad.npz")


def write_declared(path: Path, mean: tuple[int, ...], covariance: tuple[int, ...]) -> None:
    """An npz whose headers declare arrays of these shapes, and which holds a few numbers of them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("mu", mean), ("sigma", covariance)):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
                member.write(bytes(8 * min(abs(math.prod(shape)), 100)))


def test_declared_statistics_are_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        r"mu has the shape \(3,\) and sigma the shape \(10, 10\)": ((3,), (10, 10)),
        r"mu has the shape \(10, 10\) and sigma": ((10, 10), (10, 10)),
        "sigma is cut short; write the file again": ((100,), (10**6, 10**6)),
        r"/bad\.npz: sigma is cut short": ((3,), (10**6, 10**6)),
        "mu is cut short; write the file again": ((10**6,), (10**6, 10**6)),
    }

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(np, "load", never)
    for message, shapes in cases.items():
        write_declared(tmp_path / "bad.npz", *shapes)
        with pytest.raises(InputError, match=message):
            open_batch(tmp_path / "bad.npz")
    write_declared(tmp_path / "small.npz", (10,), (10, 10))
    with pytest.raises(AssertionError, match="values were read"):
        open_batch(tmp_path / "small.npz")


def patch_directory(path: Path, name: str, offset: int, value: int) -> None:
    """Writes two bytes into the archive's directory entry of `name` (PKWARE's APPNOTE.TXT, 4.3.12)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    while content[start + 46 : start + 46 + len(name)] != name.encode():
        start = content.index(b"PK\x01\x02", start + 4)
    content[start + offset : start + offset + 2] = struct.pack("<H", value)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [(6, 99), (8, 1), (10, 99)], ids=["version", "encrypted", "method"])
@pytest.mark.parametrize("name", ["arr_0", "arr_1", "mu", "network"])
def test_archives_that_cannot_be_unpacked(tmp_path: Path, name: str, harm: tuple[int, int]) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, arr_0=random_pictures(2), arr_1=np.arange(2), mu=np.zeros(2), sigma=np.eye(2), network=np.array("{}"))
    open_batch(path)
    patch_directory(path, f"{name}.npy", *harm)
    with pytest.raises(InputError, match=r"bad\.npz.*(cannot be read|is not a readable npz)"):
        open_batch(path)


@pytest.mark.parametrize("header", ["{'descr': " + "(" * 400, "{'descr': '<f8", "x = 1", ""])
def test_headers_of_arrays_that_are_damaged(tmp_path: Path, header: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        text = header.encode() + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(InputError, match="arr_0 cannot be read"):
        open_batch(tmp_path / "bad.npz")


def test_shapes_and_statistics_that_nothing_has(tmp_path: Path) -> None:
    write_declared(tmp_path / "bad.npz", (-1,), (-1, -1))
    with pytest.raises(InputError, match="mu cannot be read"):
        open_batch(tmp_path / "bad.npz")
    skewed = np.eye(3)
    skewed[0, 1] = 0.5
    for message, mean, covariance in (
        (r"mu has the shape \(0,\)", np.zeros(0), np.zeros((0, 0))),
        ("sigma is not symmetric", np.zeros(3), skewed),
        (r"mu .* must be numbers", np.zeros(3, bool), np.eye(3)),
    ):
        np.savez(tmp_path / "bad.npz", mu=mean, sigma=covariance)
        with pytest.raises(InputError, match=message):
            open_batch(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3), network=np.array("[" * 100_000))
    with pytest.raises(InputError, match=r"network .* must be JSON text"):
        open_batch(tmp_path / "bad.npz")
