"""Our numbers against those measured from the published implementations (tests/golden/README.md)."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, adm_folders, keys, label, npz_files

from metrics import precision_recall as precision_recall_module
from metrics.features import Features, extract
from metrics.frechet import frechet_distance, statistics_of
from metrics.inception_score import inception_score
from metrics.networks import FeatureNetwork, open_network
from metrics.pictures import open_batch
from metrics.precision_recall import neighbour_radii, precision_recall
from metrics.scores import Scores, score

FEATURE_KEYS = {"ref", "samples", "ref_radii", "sample_radii", "precision", "recall", "frechet"}
ACTIVATION_KEYS = {"ref_pool", "ref_spatial", "sample_pool", "sample_spatial"}
BACKENDS = ("torch", "tensorflow")
TOLERANCES = {"fid": 1e-3, "sfid": 1e-3, "inception_score": 1e-3, "precision": 3e-3, "recall": 3e-3}

ADM_FOLDERS = [pytest.param(folder, id=label(folder)) for folder in adm_folders()]
ADM_FILES = [file for folder in adm_folders() for file in sorted(folder.glob("*.npz"))]
FEATURE_FILES = [pytest.param(file, id=label(file)) for file in ADM_FILES + npz_files() if keys(file) >= FEATURE_KEYS]
ACTIVATION_FILES = [pytest.param(file, id=label(file)) for file in ADM_FILES if keys(file) >= ACTIVATION_KEYS]


@dataclass(frozen=True)
class AdmRun:
    """One golden folder put through its graph."""

    network: FeatureNetwork
    reference: Features
    samples: Features
    scores: Scores


@cache
def feature_cache() -> Path:
    """A folder for features that goes with the process."""
    place = Path(tempfile.mkdtemp(prefix="golden-features-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@cache
def adm_run(folder: Path, backend: str = "torch") -> AdmRun:
    """Cached: the graph runs once over its pictures, however many tests look at the result."""
    if backend == "tensorflow":
        pytest.importorskip("tensorflow", reason="the cross-check needs TensorFlow: pip install -e .[tensorflow]")
    network = open_network("adm", str(folder), None, backend, torch.device("cpu"))
    reference, samples = (
        extract(open_batch(folder / name), network, feature_cache(), 64, name) for name in ("ref.npz", "samples.npz")
    )
    scores = score(reference, samples, network.head, tuple(TOLERANCES), 0, torch.device("cpu"))
    return AdmRun(network, reference, samples, scores)


def expected_scores(folder: Path) -> dict[str, float | None]:
    return json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", ADM_FOLDERS)
@pytest.mark.parametrize("name", TOLERANCES)
def test_adm_scores(folder: Path, name: str, backend: str) -> None:
    ours, reference = adm_run(folder, backend).scores.values[name], expected_scores(folder)[name]
    assert ours == (None if reference is None else pytest.approx(reference, rel=TOLERANCES[name], abs=0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ACTIVATION_FILES)
def test_adm_activations(file: Path, backend: str) -> None:
    network = adm_run(file.parent, backend).network
    with np.load(file) as expected:
        for role, batch in (("ref", "ref.npz"), ("sample", "samples.npz")):
            count = len(expected[f"{role}_pool"])
            pictures = next(open_batch(file.parent / batch).pictures.batches(count))
            for kind, ours in zip(("pool", "spatial"), network.activations(pictures), strict=True):
                reference = expected[f"{role}_{kind}"]
                assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("folder", ADM_FOLDERS)
def test_both_backends_agree(folder: Path) -> None:
    ours, theirs = (adm_run(folder, backend) for backend in BACKENDS)
    assert (ours.network.sha256, ours.network.name) == (theirs.network.sha256, theirs.network.name)
    np.testing.assert_array_equal(ours.network.head, theirs.network.head)
    for side, other in ((ours.reference, theirs.reference), (ours.samples, theirs.samples)):
        assert side.pool is not other.pool
        assert np.abs(side.pool - other.pool).max() <= 1e-4 * np.abs(other.pool).max()
        for mine, its in ((side.pool_statistics, other.pool_statistics), (side.spatial_statistics, other.spatial_statistics)):
            assert np.abs(mine.covariance - its.covariance).max() <= 1e-4 * np.abs(its.covariance).max()
    for name, tolerance in TOLERANCES.items():
        assert ours.scores.values[name] == pytest.approx(theirs.scores.values[name], rel=tolerance)


@pytest.mark.parametrize("file", FEATURE_FILES)
def test_adm_metrics_of_given_features(file: Path) -> None:
    with np.load(file) as golden:
        expected = {name: golden[name] for name in FEATURE_KEYS}
    for name, radii in (("ref", "ref_radii"), ("samples", "sample_radii")):
        np.testing.assert_allclose(neighbour_radii(expected[name]), expected[radii].reshape(-1), rtol=3e-3)
    ours = precision_recall(expected["ref"], expected["samples"])
    np.testing.assert_allclose(ours, (expected["precision"].item(), expected["recall"].item()), rtol=3e-3)
    distance = frechet_distance(statistics_of(expected["ref"]), statistics_of(expected["samples"]))
    assert distance == pytest.approx(expected["frechet"].item(), rel=1e-3)


def test_adm_vectors_catch_float32_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known-bad variant: distances in float32 throughout, as most reimplementations of ADM's evaluator have them."""
    run, expected = adm_run(GOLDEN / "adm"), expected_scores(GOLDEN / "adm")
    monkeypatch.setattr(precision_recall_module, "_finite_in_half", lambda rows, columns: False)
    wrong = precision_recall(run.reference.pool, run.samples.pool)
    assert abs(wrong.precision / expected["precision"] - 1) > 3e-3
    assert abs(wrong.recall / expected["recall"] - 1) > 3e-3


def test_adm_layout_vectors_catch_a_missing_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known-bad variant: half precision throughout. Squared norms above 65,504 overflow in this folder's features."""
    run, expected = adm_run(GOLDEN / "adm_layout"), expected_scores(GOLDEN / "adm_layout")
    monkeypatch.setattr(precision_recall_module, "_finite_in_half", lambda rows, columns: True)
    assert precision_recall(run.reference.pool, run.samples.pool).precision < 0.5 * expected["precision"]


def test_adm_vectors_catch_the_head_of_another_order() -> None:
    """The known-bad variant: class weights of other features. The score must depend on the head it is given."""
    run, expected = adm_run(GOLDEN / "adm"), expected_scores(GOLDEN / "adm")
    assert abs(inception_score(run.samples.pool, run.network.head[::-1]) / expected["inception_score"] - 1) > 1e-2
