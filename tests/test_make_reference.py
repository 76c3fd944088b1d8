"""`evaluator.py make_reference`: what it writes is what a comparison then uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import SmallNetwork, random_pictures, refused, scores_in
from PIL import Image
from small_runs import Result, call, succeed

import evaluator
from data.images import center_crop
from metrics.frechet import statistics_of
from metrics.networks import description


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs make_reference in this process, with the small network."""
    monkeypatch.setattr(evaluator, "open_network", lambda *arguments: SmallNetwork())
    return lambda *words: succeed("evaluator", "make_reference", *words)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "source.npz", arr_0=random_pictures(70), arr_1=np.arange(70) % 7)
    return tmp_path / "source.npz"


def class_folders(folder: Path) -> list[np.ndarray]:
    """Two classes of pictures of several sizes; their crops to 8 x 8."""
    crops = []
    for index in range(12):
        picture = random_pictures(1, side=10 + index, seed=index)[0]
        place = folder / ("cat" if index < 5 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index:02}.png")
        crops.append(center_crop(Image.fromarray(picture), 8))
    return crops


def test_statistics_and_evenly_spaced_pictures(make: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    ended = make(source, tmp_path / "made" / "reference.npz", "--pictures", 10)
    pool, spatial = (statistics_of(features) for features in SmallNetwork().activations(random_pictures(70)))
    with np.load(tmp_path / "made" / "reference.npz") as written:
        for name, expected in (
            ("mu", pool.mean),
            ("sigma", pool.covariance),
            ("mu_s", spatial.mean),
            ("sigma_s", spatial.covariance),
        ):
            np.testing.assert_allclose(written[name], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(written["arr_0"], random_pictures(70)[::7])
        np.testing.assert_array_equal(written["arr_1"], np.arange(0, 70, 7) % 7)
        assert written["count"] == 70
        assert json.loads(str(written["network"])) == description(SmallNetwork())
    assert "reference.npz: mu, sigma, mu_s, sigma_s by ADM Inception (2015) of 70 pictures, 10 of them kept" in ended.out


def test_a_comparison_takes_the_whole_sets_statistics(make: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=random_pictures(50, seed=1))
    make(source, tmp_path / "reference.npz", "--pictures", 20)
    for reference, name in ((source, "of_source"), (tmp_path / "reference.npz", "of_reference")):
        succeed("evaluator", reference, tmp_path / "samples.npz", "--json", tmp_path / f"{name}.json")
    of_source, of_reference = (scores_in(tmp_path / f"{name}.json") for name in ("of_source", "of_reference"))
    for name in ("fid", "sfid", "inception_score"):
        assert of_reference[name] == pytest.approx(of_source[name], rel=1e-9)
    assert of_reference["density"] != of_source["density"]  # of the pictures that were kept


def test_statistics_in_the_source_are_not_passed_on(make: Callable[..., Result], tmp_path: Path) -> None:
    """They may be of another network, and would stand under this one's name."""
    other = {"mu": np.full(12, 7.0), "sigma": np.eye(12), "mu_s": np.full(12, 7.0), "sigma_s": np.eye(12)}
    np.savez(tmp_path / "source.npz", arr_0=random_pictures(70), **other)
    make(tmp_path / "source.npz", tmp_path / "reference.npz")
    expected = statistics_of(SmallNetwork().activations(random_pictures(70))[0])
    with np.load(tmp_path / "reference.npz") as written:
        np.testing.assert_allclose(written["mu"], expected.mean, rtol=1e-12)


def test_no_pictures_kept(make: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "reference.npz", "--pictures", 0)
    with np.load(tmp_path / "reference.npz") as written:
        assert set(written.files) == {"mu", "sigma", "mu_s", "sigma_s", "count", "network"}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_are_cropped(make: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    crops = class_folders(tmp_path / "pictures")
    place = tmp_path / "pictures"
    if kind == "zip":
        import shutil

        place = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "pictures"))
    make(place, tmp_path / "reference.npz", "--image-size", 8)
    with np.load(tmp_path / "reference.npz") as written:
        np.testing.assert_array_equal(written["arr_0"], np.stack(crops))
        np.testing.assert_array_equal(written["arr_1"], [0] * 5 + [1] * 7)
        np.testing.assert_allclose(written["mu"], SmallNetwork().activations(np.stack(crops))[0].mean(axis=0), rtol=1e-6)
    # Another size of the same pictures is another batch: nothing of the first may be taken from the cache.
    make(place, tmp_path / "larger.npz", "--image-size", 10)
    with np.load(tmp_path / "reference.npz") as small, np.load(tmp_path / "larger.npz") as large:
        assert np.abs(small["mu"] - large["mu"]).max() > 1e-3


def test_a_folder_of_pngs(make: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "pngs").mkdir()
    for index, picture in enumerate(random_pictures(12)):
        Image.fromarray(picture).save(tmp_path / "pngs" / f"{index}.png")
    make(tmp_path / "pngs", tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as written:
        np.testing.assert_array_equal(written["arr_0"], random_pictures(12))
        assert "arr_1" not in written.files


def test_bad_input(make: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    def sentence(*words: object) -> str:
        return refused(call("evaluator", "make_reference", *words))

    target = tmp_path / "reference.npz"
    np.savez(tmp_path / "alone.npz", mu=np.zeros(3), sigma=np.eye(3))
    class_folders(tmp_path / "pictures")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "0.png").write_text("no picture")
    assert "holds statistics alone" in sentence(tmp_path / "alone.npz", target)
    assert "missing.npz: no such file" in sentence(tmp_path / "missing.npz", target)
    assert "ends in .npz" in sentence(source, tmp_path / "reference.zip")
    assert "is the source itself" in sentence(source, source)
    assert "--pictures must not be negative" in sentence(source, target, "--pictures", -1)
    assert "--image-size must be at least 1" in sentence(source, target, "--image-size", 0)
    assert "holds no PNG files" in sentence(tmp_path / "pictures", target)
    assert "neither a folder nor a zip" in sentence(Path(__file__), target, "--image-size", 8)
    assert "the following arguments are required" in sentence(source)
    broken = call("evaluator", "make_reference", tmp_path / "broken", target, "--image-size", 8)
    assert broken.code == 2
    assert not target.exists()
