from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from feature_runs import FINISHED, SmallNetwork, Unused, blocks_in, direct, files_in, numbers, random_pictures, write
from PIL import Image

from metrics import features as features_module
from metrics.features import Features, Share, cache_place, extract
from metrics.frechet import Statistics, statistics_of
from metrics.pictures import PictureBatch, open_batch
from runtime.config import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


class WithoutSpatial(SmallNetwork):
    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, None]:
        return super().activations(pictures)[0], None


class NanInSpatial(SmallNetwork):
    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pool, spatial = super().activations(pictures)
        spatial[-1, -1] = np.inf
        return pool, spatial


@pytest.mark.parametrize("form", ["stored", "compressed", "folder"])
def test_equal_to_a_direct_computation(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = random_pictures(45)
    if form == "folder":
        (tmp_path / "samples").mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / "samples" / f"{index}.png")
        batch = open_batch(tmp_path / "samples")
    else:
        batch = write(tmp_path / "samples.npz", pictures, {"stored": np.savez, "compressed": np.savez_compressed}[form])
    place = cache_place(batch, None)
    assert place == batch.path.with_name(batch.path.name + ".features")
    assert place.is_dir()
    features = extract(batch, SmallNetwork(), place, 4, "samples")
    assert "samples: features: 100%" in capsys.readouterr().err
    pool, spatial = direct(pictures)
    assert features.pool.dtype == np.float32
    np.testing.assert_array_equal(features.pool, pool)
    for found, rows in ((features.pool_statistics, pool), (features.spatial_statistics, spatial)):
        expected = statistics_of(rows)
        assert found.count == 45
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-8)
    # The known-bad variant: one picture left out.
    assert np.abs(statistics_of(pool[1:]).mean - features.pool_statistics.mean).max() > 1e-3

    again = extract(open_batch(batch.path), Unused(), place, 32, "samples")
    assert numbers(again) == numbers(features)
    assert f"samples: features found in {place}" in capsys.readouterr().out
    assert files_in(place) == FINISHED
    assert not features.pool.flags.writeable


def simulate(
    batch: PictureBatch, place: Path, networks: list[SmallNetwork], batch_size: int = 4, label: str = "samples"
) -> list[Features]:
    """A launch of len(networks) processes, as threads."""
    barrier = threading.Barrier(len(networks), timeout=30)

    def process(index: int) -> Features:
        try:
            return extract(batch, networks[index], place, batch_size, label, Share(index, len(networks), barrier.wait))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(networks)) as threads:
        return [run.result() for run in [threads.submit(process, index) for index in range(len(networks))]]


def test_any_number_of_processes_gives_the_same_bits(
    tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = numbers(extract(batch, SmallNetwork(), tmp_path / "one", 4, "samples"))
    for count in (2, 3, 7):
        networks = [SmallNetwork() for _ in range(count)]
        results = simulate(batch, tmp_path / f"{count}", networks)
        assert {numbers(result) for result in results} == {alone}
        assert [network.seen for network in networks[:2]] == {2: [25, 20], 3: [20, 15], 7: [10, 10]}[count]
        assert files_in(tmp_path / f"{count}") == FINISHED
        again = simulate(batch, tmp_path / f"{count}", [Unused() for _ in range(count)])
        assert {numbers(result) for result in again} == {alone}
    # The known-bad variants: batches that do not start anew in each block, and blocks joined in another order.
    monkeypatch.setattr(features_module, "BLOCK", 45)
    assert numbers(extract(batch, SmallNetwork(), tmp_path / "uncut", 4, "samples")) != alone
    monkeypatch.setattr(features_module, "BLOCK", 10)
    read_block = features_module._read_block

    def exchanged(path: Path, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        other = {0: 10, 10: 0}.get(block[0], block[0])
        return read_block(path.with_name(f"{other:09d}.npz"), block)

    monkeypatch.setattr(features_module, "_read_block", exchanged)
    assert numbers(extract(batch, SmallNetwork(), tmp_path / "exchanged", 4, "samples")) != alone


def test_processes_that_fail_end_the_launch(tmp_path: Path, batch: PictureBatch) -> None:
    with pytest.raises((RuntimeError, threading.BrokenBarrierError)):
        simulate(batch, tmp_path / "cache", [SmallNetwork(), SmallNetwork(fails_at=12)])
    finished = blocks_in(tmp_path / "cache")
    assert "000000010.npz" in finished
    assert "000000030.npz" not in finished
    networks = [SmallNetwork() for _ in range(3)]
    results = simulate(batch, tmp_path / "cache", networks)
    assert sum(network.seen for network in networks) == 45 - sum({"000000040.npz": 5}.get(name, 10) for name in finished)
    assert numbers(results[0]) == numbers(extract(batch, SmallNetwork(), tmp_path / "undisturbed", 4, "samples"))


def test_a_restart_computes_what_is_missing(tmp_path: Path, batch: PictureBatch, capsys: pytest.CaptureFixture[str]) -> None:
    killed = SmallNetwork(fails_at=27)
    with pytest.raises(RuntimeError, match="killed"):
        extract(batch, killed, tmp_path / "cache", 4, "samples")
    assert killed.seen == 24
    blocks = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(blocks) == 2
    # One of the finished blocks was damaged on the disk meanwhile.
    blocks[1].write_bytes(blocks[1].read_bytes()[:-100])
    (blocks[1].parent.parent / ".pool.npy.77.partial").write_text("half a file")
    capsys.readouterr()
    network = SmallNetwork()
    restarted = extract(batch, network, tmp_path / "cache", 4, "samples")
    assert network.seen == 35
    bar = capsys.readouterr().err
    assert "| 10/45 [" in bar
    assert "| 45/45 [" in bar
    assert files_in(tmp_path / "cache") == FINISHED
    assert numbers(restarted) == numbers(extract(batch, SmallNetwork(), tmp_path / "undisturbed", 4, "samples"))


def test_other_content_and_another_network_are_other_entries(tmp_path: Path, batch: PictureBatch) -> None:
    place = tmp_path / "cache"
    first = extract(batch, SmallNetwork(), place, 4, "samples")
    other = write(batch.path, random_pictures(45, seed=1))
    network = SmallNetwork()
    assert numbers(extract(other, network, place, 4, "samples")) != numbers(first)
    assert network.seen == 45
    network = SmallNetwork("6" * 64)
    extract(other, network, place, 4, "samples")
    assert network.seen == 45
    network.protocol = "another preparation"
    extract(other, network, place, 4, "samples")
    assert network.seen == 90
    assert len(list(place.glob("*/entry.json"))) == 4
    write(batch.path, random_pictures(45))
    assert numbers(extract(open_batch(batch.path), Unused(), place, 4, "samples")) == numbers(first)


def test_a_batch_that_changes_meanwhile(tmp_path: Path, batch: PictureBatch) -> None:
    class Writer(SmallNetwork):
        def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
            if self.seen == 0:
                write(batch.path, random_pictures(45, seed=1))
            return super().activations(pictures)

    with pytest.raises(InputError, match=r"samples\.npz changed while its features were computed; start again"):
        extract(batch, Writer(), tmp_path / "cache", 4, "samples")
    assert files_in(tmp_path / "cache") == {".lock", "entry.json"}


def test_statistics_of_the_file_take_precedence(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.eye(3)
    ready = {"mu": mean, "sigma": covariance, "count": 50}
    np.savez(tmp_path / "both.npz", arr_0=random_pictures(12), **ready)
    np.savez(tmp_path / "all.npz", arr_0=random_pictures(12), mu_s=mean[:2], sigma_s=covariance[:2, :2], **ready)
    np.savez(tmp_path / "alone.npz", mu=mean, sigma=covariance)
    for network in (SmallNetwork(), Unused()):
        features = extract(open_batch(tmp_path / "both.npz"), network, tmp_path / "cache", 4, "reference")
        assert features.pool.shape == (12, 12)
        np.testing.assert_array_equal(features.pool_statistics.mean, mean)
        assert features.pool_statistics.count == 50
        assert features.spatial_statistics.count == 12
    every = extract(open_batch(tmp_path / "all.npz"), SmallNetwork(), tmp_path / "cache", 4, "reference")
    np.testing.assert_array_equal(every.spatial_statistics.mean, mean[:2])
    alone = open_batch(tmp_path / "alone.npz")
    for network in (Unused(), None):
        features = extract(alone, network, cache_place(alone, None), 4, "reference")
        assert (features.pool, features.spatial_statistics) == (None, None)
        np.testing.assert_array_equal(features.pool_statistics.mean, mean)
    assert not (tmp_path / "alone.npz.features").exists()


def test_a_network_without_spatial_features(tmp_path: Path, batch: PictureBatch) -> None:
    for network in (WithoutSpatial(), Unused()):
        features = extract(batch, network, tmp_path / "cache", 4, "samples")
        assert features.spatial_statistics is None
        np.testing.assert_array_equal(features.pool, direct(random_pictures(45))[0])


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds one picture, and statistics of features need two"):
        extract(write(tmp_path / "one.npz", random_pictures(1)), Unused(), tmp_path / "cache", 4, "samples")


@pytest.mark.parametrize("count", [1, 2])
def test_features_that_are_not_finite(tmp_path: Path, batch: PictureBatch, count: int) -> None:
    # Of two processes the second one computes pictures 10 to 19 first.
    networks = {1: [SmallNetwork(nan_at=17)], 2: [SmallNetwork(fails_at=12), SmallNetwork(nan_at=7)]}[count]
    with pytest.raises((InputError, RuntimeError, threading.BrokenBarrierError)) as stopped:
        simulate(batch, tmp_path / "cache", networks)
    if count == 1:
        assert str(stopped.value) == (
            f"{batch.path}: the features of picture 17 are not finite numbers; check the weights of the network (quarters)."
        )
        assert files_in(tmp_path / "cache") == {".lock", "entry.json"}
    finished = blocks_in(tmp_path / "cache")
    assert finished <= {"000000000.npz"}
    network = SmallNetwork()
    assert np.isfinite(extract(batch, network, tmp_path / "cache", 4, "samples").pool).all()
    assert network.seen == 45 - 10 * len(finished)


def test_spatial_features_that_are_not_finite(tmp_path: Path, batch: PictureBatch) -> None:
    with pytest.raises(InputError, match="the features of picture 3 are not finite numbers"):
        extract(batch, NanInSpatial(), tmp_path / "cache", 4, "samples")


def test_two_evaluations_at_once(
    tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started, waiting, go_on = threading.Event(), threading.Event(), threading.Event()
    sleep = time.sleep

    def between_looks(seconds: float) -> None:
        waiting.set()
        sleep(0.01)

    # What is printed is read at the end: taking it while another thread prints may lose the line.
    monkeypatch.setattr(features_module.time, "sleep", between_looks)

    class Slow(SmallNetwork):
        def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
            started.set()
            assert go_on.wait(30)
            return super().activations(pictures)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(extract, batch, Slow(), tmp_path / "cache", 4, "samples")
        assert started.wait(30)
        second = threads.submit(extract, batch, Unused(), tmp_path / "cache", 4, "samples")
        assert waiting.wait(30)
        go_on.set()
        assert numbers(first.result()) == numbers(second.result())
    assert capsys.readouterr().out.count("waiting for another evaluation") == 1


def test_nodes_that_do_not_share_the_folder(tmp_path: Path, batch: PictureBatch) -> None:
    barrier = threading.Barrier(2, timeout=30)

    def process(index: int) -> Features:
        try:
            return extract(batch, SmallNetwork(), tmp_path / f"{index}", 4, "samples", Share(index, 2, barrier.wait))
        except InputError:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(process, index) for index in range(2)]
        with pytest.raises(InputError, match="lacks 2 of 5 blocks of features; every process must see the same folder"):
            runs[0].result()
        assert isinstance(runs[1].exception(), threading.BrokenBarrierError)


def test_the_place_given(
    tmp_path: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_place(batch, str(tmp_path / "new" / "cache")) == tmp_path / "new" / "cache"
    assert (tmp_path / "new" / "cache").is_dir()
    with pytest.raises(InputError, match=r"--cache: .*samples\.npz/cache cannot be written \(Not a directory\)"):
        cache_place(batch, str(batch.path / "cache"))
    assert capsys.readouterr().out == ""

    # Beside the batch stands a file of that name: the nearest that a test as root comes to a folder it may not write.
    batch.path.with_name("samples.npz.features").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_place(batch, None) == tmp_path / "home" / "sparsedit" / "features"
    assert "samples.npz.features cannot be written: features are kept in" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    cache_place(batch, None)
    assert capsys.readouterr().out == ""


def test_a_link_and_a_relative_folder_have_their_cache_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    Image.fromarray(random_pictures(1)[0]).save(tmp_path / "store" / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert cache_place(open_batch(tmp_path / "link"), None) == tmp_path / "link.features"
    monkeypatch.chdir(tmp_path / "store")
    assert cache_place(open_batch("."), None) == tmp_path / "store.features"


def test_one_piece_is_read_ahead() -> None:
    produced = []

    def pieces() -> Iterator[np.ndarray]:
        for index in range(6):
            produced.append(index)
            yield np.full(1, index)

    for index, piece in enumerate(features_module._read_ahead(pieces())):
        assert piece[0] == index
        assert len(produced) <= index + 2
    assert len(produced) == 6

    def damaged() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        raise InputError("is damaged")

    with pytest.raises(InputError, match="is damaged"):
        list(features_module._read_ahead(damaged()))


def test_statistics_have_the_type_metrics_expect(tmp_path: Path, batch: PictureBatch) -> None:
    features = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    assert isinstance(features.pool_statistics, Statistics)
    assert features.pool_statistics.covariance.dtype == np.float64


def test_what_was_kept_and_is_no_number_is_computed_again(tmp_path: Path, batch: PictureBatch) -> None:
    features = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
    values = np.arange(45, dtype=np.float32)
    file = features.entry / "radii.npz"
    np.savez(file, values=np.full(45, np.nan, np.float32))
    np.testing.assert_array_equal(features.kept("radii", lambda: values), values)
    content = file.read_bytes()
    for offset, value in ((8, 1), (10, 99)):  # encrypted; packed by an unknown method
        start = content.rindex(b"PK\x01\x02") + offset
        file.write_bytes(content[:start] + bytes([value, 0]) + content[start + 2 :])
        np.testing.assert_array_equal(features.kept("radii", lambda: values), values)
        assert file.read_bytes() == content
    file.unlink()
    file.mkdir()
    np.testing.assert_array_equal(features.kept("radii", lambda: values), values)


def test_a_file_in_the_place_of_the_entry(tmp_path: Path, batch: PictureBatch) -> None:
    entry = extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples").entry
    shutil.rmtree(entry)
    entry.write_text("")
    with pytest.raises(InputError, match=r"--cache: .* cannot be written"):
        extract(batch, SmallNetwork(), tmp_path / "cache", 4, "samples")
