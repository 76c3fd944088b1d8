"""The evaluator as a command. Its numbers are tested in test_golden.py; here a small network stands in for Inception."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import NAMES, SmallNetwork, random_pictures, refused, scores_in, write_small_graph
from PIL import Image
from small_runs import ROOT, Result, call, run, succeed, torchrun

import evaluator
from metrics.frechet import frechet_distance, statistics_of
from metrics.inception_score import inception_score
from metrics.networks import description
from metrics.precision_recall import precision_recall
from runtime.files import sha256

ADM = ("fid", "sfid", "inception_score", "precision", "recall")


def direct_scores(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    (pool, spatial), (sample_pool, sample_spatial) = (SmallNetwork().activations(side) for side in (reference, samples))
    precision, recall = precision_recall(pool, sample_pool)
    return {
        "fid": frechet_distance(statistics_of(pool), statistics_of(sample_pool)),
        "sfid": frechet_distance(statistics_of(spatial), statistics_of(sample_spatial)),
        "inception_score": inception_score(sample_pool, SmallNetwork.head),
        "precision": precision,
        "recall": recall,
    }


def test_both_ways_to_name_the_batches(evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path) -> None:
    reference, samples = batches
    ended = evaluate(
        "--ref_batch", reference, "--sample_batch", samples, "--json", tmp_path / "new" / "flags.json", "--batch-size", 16
    )
    evaluate(reference, samples, "--json", tmp_path / "plain.json")
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    for name in ("new/flags.json", "plain.json"):
        assert scores_in(tmp_path / name, ADM) == pytest.approx(expected, rel=1e-6)
    # The known-bad variant: the batches exchanged.
    evaluate(samples, reference, "--json", tmp_path / "exchanged.json")
    assert scores_in(tmp_path / "exchanged.json", ADM) != pytest.approx(expected, rel=1e-2)

    record = json.loads((tmp_path / "plain.json").read_text())
    assert record["network"] == description(SmallNetwork())
    assert (record["reference"]["count"], record["samples"]["count"]) == (70, 50)
    assert [record[role]["sha256"] for role in ("reference", "samples")] == [sha256(file) for file in batches]
    for text in ("FID", "sFID", "Inception Score", "Precision", "Recall", "KID", "Density", "Coverage", SmallNetwork.sha256):
        assert text in ended.out
    assert f"{expected['fid']:.4f}" in ended.out


def test_folders_of_pngs_give_the_same_scores(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(random_pictures(50, seed=1)):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{index}.png")
    (tmp_path / "folder" / "protocol.json").write_text('{"cfg_scale": 1.5, "seed": 0}')
    evaluate(batches[0], batches[1], "--json", tmp_path / "npz.json")
    evaluate(batches[0], tmp_path / "folder", "--json", tmp_path / "png.json")
    assert scores_in(tmp_path / "png.json") == pytest.approx(scores_in(tmp_path / "npz.json"), rel=1e-9)
    assert json.loads((tmp_path / "png.json").read_text())["protocol"] == {"cfg_scale": 1.5, "seed": 0}


@pytest.mark.parametrize("name", ["samples.json", "samples.npz.json", "protocol.json"])
def test_protocol_record_beside_the_file(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text('{"sampler": "ddpm", "labels": [1, 2]}')
    screen = evaluate(*batches).out
    assert "sampler: ddpm" in screen
    assert "labels: [1, 2]" in screen


def test_statistics_in_the_file_replace_computed_ones(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    reference, samples = random_pictures(70, seed=0), random_pictures(50, seed=1)
    other = [statistics_of(features) for features in SmallNetwork().activations(random_pictures(300, seed=2))]
    arrays = {"mu": other[0].mean, "sigma": other[0].covariance, "mu_s": other[1].mean, "sigma_s": other[1].covariance}
    np.savez(tmp_path / "with.npz", arr_0=reference, **arrays)
    evaluate(tmp_path / "with.npz", batches[1], "--json", tmp_path / "scores.json")
    expected = direct_scores(reference, samples) | {
        name: direct_scores(random_pictures(300, seed=2), samples)[name] for name in ("fid", "sfid")
    }
    assert scores_in(tmp_path / "scores.json", ADM) == pytest.approx(expected, rel=1e-6)
    # The known-bad variant: statistics of the pictures although the file brings its own.
    assert scores_in(tmp_path / "scores.json", ADM) != pytest.approx(direct_scores(reference, samples), rel=1e-3)


def assert_scores(path: Path, expected: dict[str, float], absent: set[str]) -> None:
    ours = scores_in(path)
    assert (
        {name for name, value in ours.items() if value is None} == absent == set(json.loads(path.read_text())["not_computed"])
    )
    for name in expected.keys() - absent:
        assert ours[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_reference_of_statistics_alone(evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path) -> None:
    pool, spatial = (statistics_of(features) for features in SmallNetwork().activations(random_pictures(70, seed=0)))
    np.savez(tmp_path / "alone.npz", mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez(tmp_path / "pool_alone.npz", mu=pool.mean, sigma=pool.covariance)
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    ended = evaluate(tmp_path / "alone.npz", batches[1], "--json", tmp_path / "scores.json")
    of_pictures = set(NAMES) - {"fid", "sfid", "inception_score"}
    assert_scores(tmp_path / "scores.json", expected, absent=of_pictures)
    assert "Precision        not computed: the reference batch holds statistics alone" in ended.out
    ended = evaluate(tmp_path / "pool_alone.npz", batches[1], "--json", tmp_path / "scores.json")
    assert_scores(tmp_path / "scores.json", expected, absent=of_pictures | {"sfid"})
    assert "sFID             not computed: a batch holds neither pictures nor mu_s and sigma_s" in ended.out


def test_two_batches_of_statistics_need_no_network(refuse: Callable[..., str], tmp_path: Path) -> None:
    for name, mean in (("first", 0.0), ("second", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, mean), sigma=np.eye(4))
    succeed("evaluator", tmp_path / "first.npz", tmp_path / "second.npz", "--json", tmp_path / "scores.json")
    assert scores_in(tmp_path / "scores.json")["fid"] == pytest.approx(16)


@pytest.mark.parametrize("stamp", [{"name": "another"}, {"sha256": "6" * 64}, {"protocol": "another size"}])
def test_statistics_of_another_network_are_not_used(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, stamp: dict[str, str]
) -> None:
    other = [statistics_of(features) for features in SmallNetwork().activations(random_pictures(300, seed=2))]
    network = json.dumps(description(SmallNetwork()) | stamp)
    of_other = {"mu": other[0].mean, "sigma": other[0].covariance, "mu_s": other[1].mean, "sigma_s": other[1].covariance}
    np.savez(tmp_path / "both.npz", arr_0=random_pictures(70, seed=0), network=network, **of_other)
    np.savez(tmp_path / "alone.npz", network=network, **of_other)
    ended = evaluate(tmp_path / "both.npz", batches[1], "--json", tmp_path / "scores.json")
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    assert scores_in(tmp_path / "scores.json", ADM) == pytest.approx(expected, rel=1e-6)
    assert "so the statistics were computed anew" in ended.out
    sentence = refused(call("evaluator", tmp_path / "alone.npz", batches[1]))
    assert re.search(r"alone.npz holds nothing but statistics of .*, which do not compare with ADM Inception", sentence)
    # The samples' side no less than the reference's.
    evaluate(batches[0], tmp_path / "both.npz", "--json", tmp_path / "scores.json")
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(70, seed=0))
    assert scores_in(tmp_path / "scores.json", ADM) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_statistics_without_a_name_are_adms(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published references do not say what made them: another network must not be compared with them."""
    np.savez(tmp_path / "published.npz", mu=np.zeros(12), sigma=np.eye(12))
    assert "taken to be of ADM Inception" in evaluate(tmp_path / "published.npz", batches[1]).out  # mu_s is missing
    monkeypatch.setattr(SmallNetwork, "name", "another Inception")
    sentence = refused(call("evaluator", tmp_path / "published.npz", batches[1]))
    assert "a network that the file does not name" in sentence
    assert "--trust-statistics" in sentence
    evaluate(tmp_path / "published.npz", batches[1], "--trust-statistics")


def statistics_file(path: Path, **entries: object) -> Path:
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12), **entries)
    return path


def test_two_files_of_statistics_must_be_of_one_network(refuse: Callable[..., str], tmp_path: Path) -> None:
    inception = description(SmallNetwork())
    dino = inception | {"name": "DINOv2 ViT-L/14", "distance": "FDD"}
    stamped = {name: statistics_file(tmp_path / f"{name}.npz", network=json.dumps(stamp)) for name, stamp in
               {"adm": inception, "dino": dino, "other": inception | {"sha256": "6" * 64}}.items()}  # fmt: skip
    unnamed = statistics_file(tmp_path / "unnamed.npz")
    for pair in ((stamped["adm"], stamped["dino"]), (stamped["adm"], stamped["other"]), (unnamed, stamped["dino"])):
        sentence = refuse(*pair)
        assert "of different networks" in sentence
        assert "DINOv2" in sentence or "6666" in sentence
    ended = succeed("evaluator", stamped["dino"], stamped["dino"], "--json", tmp_path / "scores.json")
    assert re.search(r"^FDD +0.0000$", ended.out, re.MULTILINE)
    assert json.loads((tmp_path / "scores.json").read_text())["network"] == dino
    succeed("evaluator", stamped["adm"], unnamed)


def test_the_hash_is_of_what_was_scored(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, score = sha256(batches[1]), evaluator.score

    def meanwhile(*arguments: object) -> object:
        np.savez(batches[1], arr_0=random_pictures(50, seed=9))
        return score(*arguments)

    monkeypatch.setattr(evaluator, "score", meanwhile)
    words = (*batches, "--json", tmp_path / "scores.json")
    evaluate(*words)
    assert json.loads((tmp_path / "scores.json").read_text())["samples"]["sha256"] == before != sha256(batches[1])
    np.savez(batches[1], arr_0=random_pictures(50, seed=1))
    assert "changed while it was evaluated" in call("evaluator", *words, "--report", tmp_path / "report").err
    assert not (tmp_path / "report" / "index.html").exists()


def test_statistics_that_suffice_spare_the_reference_the_network(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "with.npz", arr_0=random_pictures(70), mu=np.zeros(12), sigma=np.eye(12))
    evaluate(tmp_path / "with.npz", batches[1], "--metrics", "fid,is")
    assert not (tmp_path / "with.npz.features").exists()
    evaluate(tmp_path / "with.npz", batches[1], "--metrics", "fid,prc")
    assert (tmp_path / "with.npz.features").exists()


def test_the_current_folder_is_a_batch(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pngs").mkdir()
    for index, picture in enumerate(random_pictures(12)):
        Image.fromarray(picture).save(tmp_path / "pngs" / f"{index}.png")
    monkeypatch.chdir(tmp_path / "pngs")
    assert "12 pictures of 8 x 8" in evaluate(batches[0], ".").out


def test_a_chosen_score_alone_is_computed(evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate(*batches, "--metrics", "sfid,precision", "--json", tmp_path / "some.json")
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    assert scores_in(tmp_path / "some.json") == pytest.approx({key: expected[key] for key in ("sfid", "precision")})


def test_intervals_stand_with_the_scores(evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path) -> None:
    ended = evaluate(*batches, "--bootstrap", 20, "--json", tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert {"fid", "inception_score", "precision", "density"} <= set(record["intervals"])
    assert not {"sfid", "recall", "coverage"} & set(record["intervals"])
    for name, (low, high) in record["intervals"].items():
        assert low <= record[name] <= high
        assert low < high or record[name] == 1
    assert ended.out.count("95 % interval") == len(record["intervals"])


def test_a_second_evaluation_runs_no_network(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(self: SmallNetwork, pictures: np.ndarray) -> None:
        raise AssertionError("the network ran")

    evaluate(*batches, "--json", tmp_path / "first.json")
    monkeypatch.setattr(SmallNetwork, "activations", too_late)
    ended = evaluate(*batches, "--json", tmp_path / "second.json")
    assert scores_in(tmp_path / "first.json") == scores_in(tmp_path / "second.json")
    assert ended.out.count("features found in") == 2
    # The known-bad variant: features found by their place alone, whatever network computed them.
    monkeypatch.setattr(SmallNetwork, "sha256", "6" * 64)
    with pytest.raises(AssertionError, match="the network ran"):
        call("evaluator", *batches)


def test_the_report_shows_what_was_evaluated(evaluate: Callable[..., Result], tmp_path: Path) -> None:
    for name, count in (("reference", 70), ("samples", 50)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_pictures(count, seed=count), arr_1=np.arange(count) % 5)
    batches = tmp_path / "reference.npz", tmp_path / "samples.npz"
    evaluate(*batches, "--json", tmp_path / "earlier.json")
    ended = evaluate(
        *batches, "--json", tmp_path / "s.json", "--report", tmp_path / "report", "--compare", tmp_path / "earlier.json"
    )
    assert f"report: {tmp_path / 'report' / 'index.html'}" in ended.out
    text = (tmp_path / "report" / "index.html").read_text()
    for part in ("Nearest real", SmallNetwork.sha256, f"{scores_in(tmp_path / 's.json')['fid']:.2f}", "class"):
        assert part in text
    for name in ("grid.png", "neighbours.png"):
        assert np.asarray(Image.open(tmp_path / "report" / name)).std() > 0


def test_a_report_without_pictures_of_the_reference(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "alone.npz", mu=np.zeros(12), sigma=np.eye(12))
    evaluate(tmp_path / "alone.npz", batches[1], "--report", tmp_path / "report")
    assert (tmp_path / "report" / "grid.png").exists()
    assert not (tmp_path / "report" / "neighbours.png").exists()


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_the_command(batches: tuple[Path, Path], tmp_path: Path, backend: str) -> None:
    if backend == "tensorflow":
        pytest.importorskip("tensorflow")
    write_small_graph(tmp_path)
    words = ["--ref_batch", "reference.npz", "--sample_batch", "samples.npz", "--inception", ".", "--json", "s.json"]
    done = run([ROOT / "evaluator.py", *words, "--backend", backend], tmp_path, timeout=120)
    assert done.code == 0, done.err
    assert all(value is not None and np.isfinite(value) for value in scores_in(tmp_path / "s.json").values())
    assert json.loads((tmp_path / "s.json").read_text())["network"]["backend"].lower() == f"{backend} float32".replace(
        "torch", "pytorch"
    )
    # Nothing on the error stream but progress bars: TensorFlow's messages are kept away.
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if line.strip()]
    bars = ("reference: ", "samples: ", "precision and recall: ", "kernel distance: ", "density and coverage: ")
    assert not [line for line in lines if not line.startswith(bars)]


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """2,100 pictures are three blocks, dealt to two processes."""
    for name, count in (("reference", 2_100), ("samples", 1_200)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_pictures(count, seed=count))
    write_small_graph(tmp_path)
    words = ["reference.npz", "samples.npz", "--weights", ".", "--metrics", "fid,sfid,inception_score,precision"]
    alone = run([ROOT / "evaluator.py", *words, "--cache", "one", "--json", "one.json"], tmp_path, timeout=120)
    pair = run(torchrun(2, ROOT / "evaluator.py", *words, "--cache", "two", "--json", "two.json"), tmp_path, timeout=120)
    assert alone.code == 0, alone.err
    assert pair.code == 0, pair.err
    assert scores_in(tmp_path / "one.json") == scores_in(tmp_path / "two.json")
    assert pair.out.count("Inception Score") == 1
    one, two = (next((tmp_path / place).glob("*/pool.npy")).read_bytes() for place in ("one", "two"))
    assert one == two
