"""Caches that are damaged, of something else, or on a full disk: nothing of them is believed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from feature_runs import SmallNetwork, Unused, direct, files_in, numbers, random_pictures, write

from metrics import features as features_module
from metrics.features import extract
from metrics.pictures import PictureBatch

pytestmark = pytest.mark.usefixtures("small_blocks")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pool cut": ("pool.npy", truncate, "pool.npy is missing or damaged"),
    "pool flipped": ("pool.npy", flip, "pool.npy is missing or damaged"),
    "pool gone": ("pool.npy", Path.unlink, "pool.npy is missing or damaged"),
    "statistics cut": ("statistics.npz", truncate, "statistics.npz is missing or damaged"),
    "statistics flipped": ("statistics.npz", flip, "statistics.npz is missing or damaged"),
    "record cut": ("entry.json", truncate, "entry.json is missing or damaged"),
    "record gone": ("entry.json", Path.unlink, "entry.json is missing or damaged"),
    "record of brackets": ("entry.json", lambda path: path.write_text("[" * 100_000), "entry.json is missing or damaged"),
    "record a list": ("entry.json", lambda path: path.write_text("[1]"), "entry.json is missing or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_computed_again(
    tmp_path: Path, batch: PictureBatch, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, harm, reason = DAMAGES[damage]
    first = numbers(extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples"))
    (file,) = (tmp_path / "cache").rglob(name)
    harm(file)
    network = SmallNetwork()
    capsys.readouterr()
    assert numbers(extract(batch, network, tmp_path / "cache", 4, "samples")) == first
    assert network.seen == 45
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "cannot be used" in printed[0]
    assert reason in printed[0]


@pytest.mark.parametrize("finished", [True, False])
def test_features_of_another_batch_under_this_name(tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hashes may begin alike; here a folder was renamed."""
    place = tmp_path / "cache"
    other = write(tmp_path / "other.npz", random_pictures(45, seed=1))
    if finished:
        extract(other, SmallNetwork(), place, 4, "samples")
    else:
        with pytest.raises(RuntimeError):
            extract(other, SmallNetwork(fails_at=41), place, 4, "samples")
    (wrong,) = place.glob("*-*/")
    batch = write(tmp_path / "samples.npz", random_pictures(45))
    with pytest.raises(RuntimeError):
        extract(batch, SmallNetwork(fails_at=0), place, 4, "samples")
    (right,) = (entry for entry in place.glob("*-*/") if entry != wrong)
    shutil.rmtree(right)
    wrong.rename(right)
    features = extract(batch, SmallNetwork(), place, 4, "samples")
    np.testing.assert_array_equal(features.pool, direct(random_pictures(45))[0])
    assert "they are of another batch or network" in capsys.readouterr().out


def test_the_record_tells_what_it_is_of(tmp_path: Path, batch: PictureBatch) -> None:
    extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    (file,) = (tmp_path / "cache").glob("*/entry.json")
    record = json.loads(file.read_text())
    assert record["description"]["name"] == "quarters"
    assert file.parent.name == f"{record['content'][:16]}-{record['network'][:16]}"


def test_a_full_disk_leaves_nothing_that_is_trusted(
    tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    savez, room = np.savez, [0]

    def full(file: io.BufferedWriter, **arrays: np.ndarray) -> None:
        room[0] -= 1
        if room[0] < 0:
            file.write(b"PK half a file")
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    expected = numbers(extract(batch, SmallNetwork(), tmp_path / "roomy", 4, "samples"))
    # The third block; then the statistics, when the other three blocks are there.
    for files in (2, 3):
        room[0] = files
        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            extract(batch, SmallNetwork(), tmp_path / "full", 4, "samples")
        assert not any(name.endswith(".partial") for name in files_in(tmp_path / "full"))
    monkeypatch.undo()
    monkeypatch.setattr(features_module, "BLOCK", 10)
    assert numbers(extract(batch, Unused(), tmp_path / "full", 4, "samples")) == expected


def test_what_follows_from_the_features_is_kept(tmp_path: Path, batch: PictureBatch) -> None:
    features = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    values, computed = np.arange(45, dtype=np.float32), []

    def compute() -> np.ndarray:
        computed.append(1)
        return values

    for _ in range(2):
        np.testing.assert_array_equal(features.kept("radii", compute), values)
    assert len(computed) == 1
    file = features.entry / "radii.npz"
    content = bytearray(file.read_bytes())
    content[content.index(values[10:14].tobytes()) + 3] ^= 1  # one bit of one number
    file.write_bytes(bytes(content))
    np.testing.assert_array_equal(features.kept("radii", compute), values)
    assert len(computed) == 2
    np.testing.assert_array_equal(features.kept("radii", compute), values)
    assert len(computed) == 2
