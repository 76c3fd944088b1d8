"""What the evaluator refuses, in one sentence and before the network runs, and what of the user's it must not touch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evaluation_runs import NAMES, random_pictures, refused, scores_in, write_small_graph
from PIL import Image
from small_runs import ROOT, Result, call, run

import evaluator


def test_statistics_of_other_dimensions_are_refused_before_the_work(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    sentence = refused(call("evaluator", tmp_path / "other.npz", batches[1]))
    assert "mu and sigma are of 7 dimensions, where ADM Inception (2015) has 12" in sentence
    assert not (tmp_path / "samples.npz.features").exists()


def test_nothing_of_the_users_is_replaced(refuse: Callable[..., str], batches: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "pngs").mkdir()
    Image.fromarray(random_pictures(1)[0]).save(tmp_path / "pngs" / "0.png")
    Image.fromarray(random_pictures(1)[0]).save(tmp_path / "pngs" / "1.png")
    (tmp_path / "samples.json").write_text('{"sampler": "ddpm"}')
    for target in (*batches, tmp_path / "samples.json"):
        content = target.read_bytes()
        assert "it would be replaced" in refuse(*batches, "--json", target)
        assert target.read_bytes() == content
    assert "holds the pictures themselves" in refuse(batches[0], tmp_path / "pngs", "--report", tmp_path / "pngs")


def test_a_protocol_with_numbers_json_does_not_know(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "samples.json").write_text('\ufeff{"loss": NaN, "note": "a\\nFID              0.0001"}', encoding="utf-8")
    ended = evaluate(*batches, "--json", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["protocol"]["loss"] == "NaN"
    assert not re.search(r"^FID +0.0001", ended.out, re.MULTILINE)


def test_bad_input_is_one_sentence_before_the_network(
    refuse: Callable[..., str], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    good, _ = batches
    (tmp_path / "text.npz").write_text("some words")
    np.savez(tmp_path / "other.npz", images=random_pictures(8))
    np.savez(tmp_path / "one.npz", arr_0=random_pictures(1))
    np.savez(tmp_path / "large.npz", arr_0=random_pictures(8, side=16))
    np.savez(tmp_path / "float.npz", arr_0=random_pictures(8).astype(np.float32))
    np.savez(tmp_path / "grey.npz", arr_0=random_pictures(8)[..., :1])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing.npz": "no such file or folder",
        "text.npz": "is not a readable npz file",
        "other.npz": "holds images, but neither pictures (arr_0) nor statistics",
        "one.npz": "holds one picture",
        "large.npz": "the reference's pictures are 8 x 8 pixels",
        "float.npz": "arr_0 is float32; pictures must be uint8",
        "grey.npz": "store RGB pictures",
        "empty": "holds no PNG files",
    }.items():
        sentence = refuse("--ref_batch", good, "--sample_batch", tmp_path / name)
        assert message in sentence
        assert name in sentence
    assert "one.npz holds one picture" in refuse(tmp_path / "one.npz", good)


def test_few_pictures_cost_only_the_scores_that_need_more(
    evaluate: Callable[..., Result], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "few.npz", arr_0=random_pictures(5))
    ended = evaluate(tmp_path / "few.npz", batches[1], "--json", tmp_path / "scores.json")
    scores = scores_in(tmp_path / "scores.json")
    assert [name for name in NAMES if scores[name] is None] == ["density", "coverage"]
    assert re.search(r"^Density +not computed: ", ended.out, re.MULTILINE)


def test_bad_command_lines(refuse: Callable[..., str], batches: tuple[Path, Path], tmp_path: Path) -> None:
    reference, samples = batches
    assert "--ref_batch is missing" in refuse()
    assert "--sample_batch is missing" in refuse("--ref_batch", reference)
    assert "2 batches" in refuse(reference).replace("two", "2")
    assert "not both ways" in refuse(reference, samples, "--ref_batch", reference)
    assert "--batch-size must be at least 1" in refuse(reference, samples, "--batch-size", 0)
    assert "is a folder; name a file" in refuse(reference, samples, "--json", tmp_path)
    assert "--json: " in refuse(reference, samples, "--json", samples / "inside" / "scores.json")
    assert "--report: " in refuse(reference, samples, "--report", samples / "inside")
    assert "did you mean '--json'" in refuse(reference, samples, "--jsn", "scores.json")
    assert "choose from adm, torch-fidelity" in refuse(reference, samples, "--network", "inception")
    assert "--backend tensorflow runs ADM's" in refuse(
        reference, samples, "--network", "pytorch-fid", "--backend", "tensorflow"
    )
    assert "leave --tf32 out" in refuse(reference, samples, "--tf32", "--backend", "tensorflow")
    assert "adm gives no score 'fdd'; did you mean 'fid'" in refuse(reference, samples, "--metrics", "fdd")
    assert "--bootstrap must be" in refuse(reference, samples, "--bootstrap", 1)
    assert f"2 to {evaluator.MOST_RESAMPLINGS}" in refuse(reference, samples, "--bootstrap", 10**9)
    assert "name its folder with --report" in refuse(reference, samples, "--compare", samples)
    assert "cannot be read as scores" in refuse("--compare", samples, reference, samples, "--report", tmp_path / "r")
    (tmp_path / "odd.json").write_text("[1]")
    assert "odd.json cannot be read as scores (it holds list" in refuse(
        reference, samples, "--report", tmp_path / "r", "--compare", tmp_path / "odd.json"
    )
    (tmp_path / "samples.json").write_text("{broken")
    assert "cannot be read as the samples' protocol record" in refuse(reference, samples)
    (tmp_path / "samples.json").write_text("[1]")
    assert "protocol record (it holds list" in refuse(reference, samples)


def test_wrong_weights_are_one_sentence(batches: tuple[Path, Path], tmp_path: Path) -> None:
    graph = write_small_graph(tmp_path)
    content = graph.read_bytes()
    (tmp_path / "cut.pb").write_bytes(content[: len(content) // 2])
    (tmp_path / "renamed.pb").write_bytes(content.replace(b"pool_3", b"pool_4"))
    (tmp_path / "strange.pb").write_bytes(content.replace(b"AvgPool", b"AvgWhat"))
    for name, message in {
        "missing.pb": "no such file",
        "cut.pb": "cut short",
        "renamed.pb": "pool_3",
        "strange.pb": "AvgWhat",
    }.items():
        sentence = refused(call("evaluator", *batches, "--weights", tmp_path / name))
        assert message in sentence
        assert name in sentence
    assert "not the pinned" in refused(call("evaluator", *batches, "--weights", graph, "--weights-sha256", "0" * 64))
    assert "--weights" in refused(call("evaluator", *batches, "--network", "torch-fidelity"))


def test_weights_that_give_nan_are_one_sentence(batches: tuple[Path, Path], tmp_path: Path) -> None:
    graph = write_small_graph(tmp_path)
    value = np.float32(1 / 128).tobytes()
    assert value in graph.read_bytes()
    graph.write_bytes(graph.read_bytes().replace(value, np.float32(np.nan).tobytes()))
    result = call("evaluator", *batches, "--weights", graph)
    assert result.code == 2
    assert re.search(r"error: .*reference\.npz.* not finite", result.err)


def test_the_command_on_bad_input(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("some words")
    done = run([ROOT / "evaluator.py", "text.npz", "text.npz"], tmp_path)
    assert done.code == 2
    assert done.err.startswith("evaluator.py: error: text.npz is not a readable npz file")
    assert len(done.err.splitlines()) == 1
