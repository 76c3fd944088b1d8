"""The evaluator as a command. Its numbers are tested in test_golden.py; here a small network stands in for Inception."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluator
from metrics.frechet import frechet_distance, statistics_of
from metrics.inception_score import inception_score
from metrics.networks import GraphFile
from metrics.pictures import open_batch
from metrics.precision_recall import precision_recall
from runtime.config import InputError, run_script

ROOT = Path(__file__).resolve().parents[1]
GRAPH = GraphFile(Path("graph.pb"), "5" * 64)


class SmallNetwork:
    """Mean colours of the four quarters as pool features (12), the first row's pixels as spatial ones."""

    name, backend = "quarters", "NumPy"
    head = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)

    def __init__(self, graph: GraphFile = GRAPH) -> None:
        self.sha256 = graph.sha256

    def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, height, width, _ = pictures.shape
        quarters = pictures.reshape(count, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4)) / 16
        return quarters.reshape(count, -1).astype(np.float32), pictures[:, 0, :4].reshape(count, -1).astype(np.float32)


def random_pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    base = generator.integers(20, 200, (count, 1, 1, 3))
    return (base + generator.integers(0, 50, (count, side, side, 3))).astype(np.uint8)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command in this process, with the small network."""
    monkeypatch.setattr(evaluator, "require_tensorflow", lambda: None)
    monkeypatch.setattr(evaluator, "inception_graph", lambda path, pinned: GRAPH)
    monkeypatch.setattr(evaluator, "TensorFlowInception", SmallNetwork)

    def command(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, words)])
        evaluator.main()

    return command


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, expects exit code 2 and one line before the network is touched, and returns the line."""

    def too_late(*arguments: object) -> None:
        raise AssertionError("the network was reached")

    for name in ("require_tensorflow", "inception_graph", "TensorFlowInception"):
        monkeypatch.setattr(evaluator, name, too_late)

    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            run_script(evaluator.main)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("evaluator.py: error: ")
        return lines[0]

    return command


@pytest.fixture
def batches(tmp_path: Path) -> tuple[Path, Path]:
    np.savez(tmp_path / "reference.npz", arr_0=random_pictures(70, seed=0))
    np.savez(tmp_path / "samples.npz", arr_0=random_pictures(50, seed=1))
    return tmp_path / "reference.npz", tmp_path / "samples.npz"


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


def scores_in(path: Path) -> dict[str, float | None]:
    record = json.loads(path.read_text())
    return {name: record[name] for name in ("fid", "sfid", "inception_score", "precision", "recall")}


def test_both_ways_to_name_the_batches(
    run: Callable[..., None], batches: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, samples = batches
    run("--ref_batch", reference, "--sample_batch", samples, "--json", tmp_path / "new" / "flags.json", "--batch-size", 16)
    screen = capsys.readouterr()
    run(reference, samples, "--json", tmp_path / "plain.json")
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    for name in ("new/flags.json", "plain.json"):
        assert scores_in(tmp_path / name) == pytest.approx(expected, rel=1e-6)
    # The known-bad variant: the batches exchanged.
    run(samples, reference, "--json", tmp_path / "exchanged.json")
    assert scores_in(tmp_path / "exchanged.json") != pytest.approx(expected, rel=1e-2)

    record = json.loads((tmp_path / "plain.json").read_text())
    assert record["network"] == {"name": "quarters", "backend": "NumPy", "sha256": GRAPH.sha256}
    assert (record["reference"]["count"], record["samples"]["count"]) == (70, 50)
    for text in ("FID", "sFID", "Inception Score", "Precision", "Recall", GRAPH.sha256, f"{expected['fid']:.4f}"):
        assert text in screen.out
    assert "FID: the sample batch holds 50 pictures, too few for a covariance over 2,048" in screen.err


def test_folders_of_pngs_give_the_same_scores(run: Callable[..., None], batches: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(random_pictures(50, seed=1)):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{index}.png")
    (tmp_path / "folder" / "protocol.json").write_text('{"cfg_scale": 1.5, "seed": 0}')
    run(batches[0], batches[1], "--json", tmp_path / "npz.json")
    run(batches[0], tmp_path / "folder", "--json", tmp_path / "png.json")
    assert scores_in(tmp_path / "png.json") == pytest.approx(scores_in(tmp_path / "npz.json"), rel=1e-9)
    assert json.loads((tmp_path / "png.json").read_text())["protocol"] == {"cfg_scale": 1.5, "seed": 0}


@pytest.mark.parametrize("name", ["samples.json", "samples.npz.json", "protocol.json"])
def test_protocol_record_beside_the_file(
    run: Callable[..., None], batches: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text('{"sampler": "ddpm", "labels": [1, 2]}')
    run(*batches)
    screen = capsys.readouterr().out
    assert "sampler: ddpm" in screen
    assert "labels: [1, 2]" in screen


def test_statistics_in_the_file_replace_computed_ones(
    run: Callable[..., None], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    reference, samples = random_pictures(70, seed=0), random_pictures(50, seed=1)
    other = [statistics_of(features) for features in SmallNetwork().activations(random_pictures(300, seed=2))]
    arrays = {"mu": other[0].mean, "sigma": other[0].covariance, "mu_s": other[1].mean, "sigma_s": other[1].covariance}
    np.savez(tmp_path / "with.npz", arr_0=reference, **arrays)
    run(tmp_path / "with.npz", batches[1], "--json", tmp_path / "scores.json")
    expected = direct_scores(reference, samples) | {
        name: direct_scores(random_pictures(300, seed=2), samples)[name] for name in ("fid", "sfid")
    }
    assert scores_in(tmp_path / "scores.json") == pytest.approx(expected, rel=1e-6)
    # The known-bad variant: statistics of the pictures although the file brings its own.
    assert scores_in(tmp_path / "scores.json") != pytest.approx(direct_scores(reference, samples), rel=1e-3)


def assert_scores(path: Path, expected: dict[str, float], absent: set[str]) -> None:
    ours = scores_in(path)
    assert (
        {name for name, value in ours.items() if value is None} == absent == set(json.loads(path.read_text())["not_computed"])
    )
    for name in expected.keys() - absent:
        assert ours[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_reference_of_statistics_alone(
    run: Callable[..., None], batches: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, spatial = (statistics_of(features) for features in SmallNetwork().activations(random_pictures(70, seed=0)))
    np.savez(tmp_path / "alone.npz", mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    np.savez(tmp_path / "pool_alone.npz", mu=pool.mean, sigma=pool.covariance)
    expected = direct_scores(random_pictures(70, seed=0), random_pictures(50, seed=1))
    run(tmp_path / "alone.npz", batches[1], "--json", tmp_path / "scores.json")
    assert_scores(tmp_path / "scores.json", expected, absent={"precision", "recall"})
    assert "Precision        not computed: the reference batch holds statistics alone" in capsys.readouterr().out
    run(tmp_path / "pool_alone.npz", batches[1], "--json", tmp_path / "scores.json")
    assert_scores(tmp_path / "scores.json", expected, absent={"sfid", "precision", "recall"})
    assert "sFID             not computed: a batch holds neither pictures nor mu_s and sigma_s" in capsys.readouterr().out


def test_two_batches_of_statistics_need_no_network(refuse: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, mean in (("first", 0.0), ("second", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, mean), sigma=np.eye(4))
    words = [tmp_path / "first.npz", tmp_path / "second.npz", "--json", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, words)])
    evaluator.main()
    assert scores_in(tmp_path / "scores.json")["fid"] == pytest.approx(16)


def test_bad_input_is_one_sentence_before_the_network(
    refuse: Callable[..., str], batches: tuple[Path, Path], tmp_path: Path
) -> None:
    good, _ = batches
    (tmp_path / "text.npz").write_text("some words")
    np.savez(tmp_path / "other.npz", images=random_pictures(8))
    np.savez(tmp_path / "few.npz", arr_0=random_pictures(3))
    np.savez(tmp_path / "large.npz", arr_0=random_pictures(8, side=16))
    np.savez(tmp_path / "float.npz", arr_0=random_pictures(8).astype(np.float32))
    np.savez(tmp_path / "grey.npz", arr_0=random_pictures(8)[..., :1])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing.npz": "no such file or folder",
        "text.npz": "is not a readable npz file",
        "other.npz": "holds images, but neither pictures (arr_0) nor statistics",
        "few.npz": "holds 3 pictures; precision and recall need at least 4",
        "large.npz": "the reference's pictures are 8 x 8 pixels",
        "float.npz": "arr_0 is float32; pictures must be uint8",
        "grey.npz": "store RGB pictures",
        "empty": "holds no PNG files",
    }.items():
        sentence = refuse("--ref_batch", good, "--sample_batch", tmp_path / name)
        assert message in sentence
        assert name in sentence
    assert "few.npz holds 3 pictures" in refuse(tmp_path / "few.npz", good)


def test_bad_command_lines(refuse: Callable[..., str], batches: tuple[Path, Path], tmp_path: Path) -> None:
    reference, samples = batches
    assert "--ref_batch is missing" in refuse()
    assert "--sample_batch is missing" in refuse("--ref_batch", reference)
    assert "2 batches" in refuse(reference).replace("two", "2")
    assert "not both ways" in refuse(reference, samples, "--ref_batch", reference)
    assert "--batch-size must be at least 1" in refuse(reference, samples, "--batch-size", 0)
    assert "is a folder; name a file" in refuse(reference, samples, "--json", tmp_path)
    assert "its folder cannot be made" in refuse(reference, samples, "--json", samples / "inside" / "scores.json")
    assert "did you mean '--json'" in refuse(reference, samples, "--jsn", "scores.json")
    (tmp_path / "samples.json").write_text("{broken")
    assert "cannot be read as the samples' protocol record" in refuse(reference, samples)
    (tmp_path / "samples.json").write_text("[1]")
    assert "is no protocol record" in refuse(reference, samples)


def test_features_that_are_not_finite(batches: tuple[Path, Path]) -> None:
    class Broken(SmallNetwork):
        def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            pool, spatial = super().activations(pictures)
            return pool * np.nan, spatial

    with pytest.raises(InputError, match="not finite"):
        evaluator.extract(open_batch(batches[0]), Broken(), 64, "reference")


def peak_of_extraction(path: Path, network: SmallNetwork) -> int:
    batch = open_batch(path)
    tracemalloc.start()
    try:
        evaluator.extract(batch, network, 64, "samples")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_count(tmp_path: Path) -> None:
    class Hoarding(SmallNetwork):
        """The known-bad variant: something holds on to every batch."""

        def activations(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            self.kept = [*getattr(self, "kept", []), pictures.copy()]
            return super().activations(pictures)

    for count in (700, 3_000):
        np.savez(tmp_path / f"{count}.npz", arr_0=np.zeros((count, 32, 32, 3), np.uint8))
    small = peak_of_extraction(tmp_path / "700.npz", SmallNetwork())
    assert peak_of_extraction(tmp_path / "3000.npz", SmallNetwork()) - small < 500_000  # of 7 MB more; features take 0.2
    assert peak_of_extraction(tmp_path / "3000.npz", Hoarding()) - small > 5_000_000


def write_small_graph(folder: Path) -> None:
    """A graph with ADM's node names that takes a moment to run: 6 pool numbers, 3 x 3 spatial positions of 8 channels."""
    tensorflow = pytest.importorskip("tensorflow")
    v1, generator = tensorflow.compat.v1, np.random.default_rng(0)
    with tensorflow.Graph().as_default() as graph:
        tensorflow.expand_dims(v1.placeholder(tensorflow.float32, (None, None, 3)), 0, name="ExpandDims")
        picture = v1.image.resize_bilinear(graph.get_tensor_by_name("ExpandDims:0"), (9, 9)) / 128.0
        weights = generator.standard_normal((3, 3, 3, 8)).astype(np.float32)
        spatial = tensorflow.nn.conv2d(picture, weights, 3, "VALID", name="mixed_6/conv")
        weights = generator.standard_normal((1, 1, 8, 6)).astype(np.float32)
        pool = tensorflow.nn.avg_pool2d(tensorflow.nn.conv2d(spatial, weights, 1, "VALID"), 3, 3, "VALID", name="pool_3")
        head = generator.standard_normal((6, 10)).astype(np.float32)
        tensorflow.matmul(tensorflow.reshape(pool, (-1, 6)), head, name="softmax/logits/MatMul")
        (folder / "classify_image_graph_def.pb").write_bytes(graph.as_graph_def().SerializeToString())


def command_line(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "evaluator.py"), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_command_with_tensorflow(batches: tuple[Path, Path], tmp_path: Path) -> None:
    write_small_graph(tmp_path)
    done = command_line(
        tmp_path, "--ref_batch", "reference.npz", "--sample_batch", "samples.npz", "--inception", ".", "--json", "s.json"
    )
    assert done.returncode == 0, done.stderr
    assert all(value is not None and np.isfinite(value) for value in scores_in(tmp_path / "s.json").values())
    # Nothing on the error stream but progress bars and our own warnings: TensorFlow's messages are kept away.
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    strange = [
        line for line in lines if not line.startswith(("warning: ", "reference: ", "samples: ", "precision and recall: "))
    ]
    assert not strange


def test_the_command_on_bad_input(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("some words")
    done = command_line(tmp_path, "text.npz", "text.npz")
    assert done.returncode == 2
    assert done.stderr.startswith("evaluator.py: error: text.npz is not a readable npz file")
    assert len(done.stderr.splitlines()) == 1
