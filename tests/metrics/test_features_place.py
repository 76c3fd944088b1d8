"""Where features are kept: finished ones of others, room on the disk, what is known of what they are of."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_runs import SmallNetwork, random_pictures, write

from metrics import features as features_module
from metrics.content import content_hash
from metrics.features import Features, Share, cache_place, extract
from metrics.pictures import PictureBatch, open_batch
from runtime.config import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def shared(batch: PictureBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder beside the batch with a colleague's finished features; this user may not write there."""
    beside = cache_place(batch, None)
    extract(batch, SmallNetwork(), beside, 4, "samples")
    for note in beside.glob("content-*"):
        note.unlink()
    check_writable = features_module.check_writable

    def not_there(folder: str | os.PathLike[str], flag: str) -> None:
        if Path(folder) == beside:
            raise InputError(f"{flag}: {folder} cannot be written (Permission denied); give another place.")
        check_writable(folder, flag)

    # A folder's permissions would not keep tests out that run as root.
    monkeypatch.setattr(features_module, "check_writable", not_there)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return beside


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(folder.rglob("*"))}


def equal(first: Features, second: Features) -> bool:
    return (
        np.array_equal(first.pool, second.pool)
        and np.array_equal(first.pool_statistics.covariance, second.pool_statistics.covariance)
        and np.array_equal(first.spatial_statistics.mean, second.spatial_statistics.mean)
    )


def test_finished_features_of_a_colleague(batch: PictureBatch, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(shared)
    capsys.readouterr()
    place = cache_place(batch, None)
    assert place != shared
    network = SmallNetwork()
    found = extract(batch, network, place, 4, "samples")
    assert network.seen == 0
    assert str(shared) in capsys.readouterr().out.splitlines()[-1]
    values = np.arange(45, dtype=np.float32)
    np.testing.assert_array_equal(found.kept("radii", lambda: values), values)
    assert state_of(shared) == before
    for share in (Share(0, 2), Share(1, 2)):  # the links are what every process finds
        assert equal(extract(batch, network, place, 4, "samples", share), found)
    assert network.seen == 0

    # The colleague tidies up: nothing of it may be missed, and nothing be written there.
    shutil.rmtree(shared)
    again = extract(batch, network, place, 4, "samples")
    assert network.seen == 45
    assert equal(again, extract(batch, SmallNetwork(), place, 4, "samples"))
    assert not shared.exists()
    assert not any(path.is_symlink() for path in place.rglob("*"))


def test_an_entry_of_another_user_in_a_folder_for_all(
    tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "for all"
    first = extract(batch, SmallNetwork(), place, 4, "samples")

    def denied(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        for name in ("lock", "atomic_write"):
            patched.setattr(features_module, name, denied)
        found = extract(batch, SmallNetwork(fails_at=0), place, 4, "samples")
        assert equal(found, first)
        values = np.ones(45, np.float32)
        np.testing.assert_array_equal(found.kept("radii", lambda: values), values)

    # One that the other user has not finished can be neither read nor filled; nobody is waited for.
    (first.entry / "entry.json").write_text('{"files": {}}')
    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(InputError, match=f"--cache: {first.entry} cannot be written"):
        extract(batch, SmallNetwork(fails_at=0), place, 4, "samples")


@pytest.mark.parametrize("harm", ["damaged", "unfinished", "of another batch"])
def test_features_of_a_colleague_that_cannot_be_used(batch: PictureBatch, shared: Path, harm: str) -> None:
    (entry,) = (path.parent for path in shared.glob("*/entry.json"))
    if harm == "damaged":
        content = bytearray((entry / "pool.npy").read_bytes())
        content[-1] ^= 1
        (entry / "pool.npy").write_bytes(content)
    elif harm == "unfinished":
        (entry / "entry.json").write_text('{"files": {}}')
    else:
        record = (entry / "entry.json").read_text()
        (entry / "entry.json").write_text(record.replace(content_hash(batch), "0" * 64))
    before = state_of(shared)
    network = SmallNetwork()
    extract(batch, network, cache_place(batch, None), 4, "samples")
    assert network.seen == 45
    assert state_of(shared) == before


def test_blocks_of_one_own_give_way_to_finished_features(batch: PictureBatch, shared: Path) -> None:
    place, hidden = cache_place(batch, None), shared.with_name("hidden")
    shared.rename(hidden)
    with pytest.raises(RuntimeError, match="killed"):
        extract(batch, SmallNetwork(fails_at=27), place, 4, "samples")
    hidden.rename(shared)
    network = SmallNetwork()
    extract(batch, network, place, 4, "samples")
    assert network.seen == 0
    assert not list(place.rglob("blocks"))


def test_a_folder_that_cannot_be_written_is_told_once(
    batch: PictureBatch, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for _ in range(3):
        cache_place(batch, None)
    assert capsys.readouterr().out.count("cannot be written: features are kept in") == 1


def test_the_hash_is_of_what_was_scored(tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, hashed = content_hash(batch), []

    def counted(*arguments: Any) -> str:
        hashed.append(arguments)
        return content_hash(*arguments)

    monkeypatch.setattr(features_module, "content_hash", counted)
    first = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    found = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    assert len(hashed) == 2
    write(batch.path, random_pictures(45, seed=1))
    assert first.content == found.content == scored != content_hash(open_batch(batch.path))
    np.savez(tmp_path / "alone.npz", mu=np.zeros(3), sigma=np.eye(3))
    alone = open_batch(tmp_path / "alone.npz")
    assert extract(alone, SmallNetwork(), tmp_path / "cache", 4, "reference").content == content_hash(alone)


def test_a_disk_without_room(tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    # 45 pictures of 2,048 numbers twice and 2,023 once; two means and covariances.
    needed = 45 * (2 * 2_048 + 2_023) * 4 + (2_048 * 2_049 + 2_023 * 2_024) * 8
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**12, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free, network = needed - 1, SmallNetwork()
    with pytest.raises(InputError) as refused:
        extract(batch, network, tmp_path / "cache", 4, "samples")
    assert str(refused.value) == (
        f"{tmp_path / 'cache'} has 0.1 GB free, but the features of 45 pictures take up to 0.1 GB while they are "
        "computed; make room or name a folder on another disk with --cache."
    )
    assert network.seen == 0
    assert (tmp_path / "cache") in asked[0].parents
    free = needed
    with pytest.raises(RuntimeError, match="killed"):
        extract(batch, SmallNetwork(fails_at=27), tmp_path / "cache", 4, "samples")
    # Twenty pictures stand in blocks already: what they take is not asked for again.
    free = needed - 20 * (2_048 + 2_023) * 4
    extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    free = 0
    extract(batch, network, tmp_path / "cache", 4, "samples")
    assert network.seen == 0


@pytest.mark.parametrize(
    "wrong", [np.zeros(44, np.float32), np.zeros((45, 1), np.float32), np.float32(0), np.zeros(45, np.float64)]
)
def test_kept_values_that_do_not_fit_are_computed_again(tmp_path: Path, batch: PictureBatch, wrong: np.ndarray) -> None:
    features = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    values = np.arange(45, dtype=np.float32)
    np.savez(features.entry / "radii.npz", values=wrong)
    for compute in (lambda: values, lambda: pytest.fail("computed again although it was put there")):
        found = features.kept("radii", compute)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == np.float32
