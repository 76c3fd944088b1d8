"""What the evaluator's speed rests on, each beside what one would write without it: distance, neighbours, network.

`frechet`: the Fréchet distance of 2,048 dimensions against the same through scipy.linalg.sqrtm. `distances`: precision and
recall against a plain implementation with torch.cdist. `network`: ADM's Inception graph run by torch and by TensorFlow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from benchmarks.memory import CPU
from benchmarks.options import CommonSettings, recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.timing import interleaved
from metrics.frechet import Statistics, frechet_distance, statistics_of
from metrics.networks import FeatureNetwork, check_network, open_network
from metrics.networks.graph import write_graph
from metrics.networks.inception_layout import layout_graph, random_state
from metrics.networks.weight_files import GRAPH_NAME, cache_folder
from metrics.precision_recall import NEIGHBOURS, precision_recall
from runtime.config import InputError, option


@dataclass(frozen=True)
class EvaluationSettings(CommonSettings):
    rounds: int = option(3, "measured rounds, after one of warm-up; in a round all run in turn")
    only: Literal["frechet", "distances", "network"] | None = option(None, "one part alone; none: all")
    count: int = option(10_000, "vectors a side, of distances")
    dimensions: int = option(2048, "numbers in a vector, of frechet and distances")
    batch_size: int = option(64, "pictures at once, of network")
    image_size: int = option(256, "picture side, of network")
    weights: str | None = option(
        None,
        "ADM's Inception graph; none: the cached one, else random weights in its layout",
        flags=("--inception",),
    )


QUICK: Mapping[str, Any] = {"rounds": 2, "count": 2000, "dimensions": 1024, "batch_size": 16}


def measure_frechet(dimensions: int, rounds: int) -> dict[str, Any]:
    """Seconds of our Fréchet distance and of the one through `sqrtm`, of two covariances of full rank, and what they give."""
    first, second = (statistics_of(features(2 * dimensions, dimensions, seed)) for seed in (0, 1))
    runs = {
        "ours, eigenvalues": lambda: frechet_distance(first, second),
        "scipy.linalg.sqrtm": lambda: through_matrix_root(first, second),
    }
    values: dict[str, Any] = {}
    timings = interleaved({name: keeping(values, name, run) for name, run in runs.items()}, rounds, CPU)
    ours, baseline = values.values()
    return {
        "title": f"Fréchet distance, {dimensions} dimensions",
        "rows": rows_of(timings, dict.fromkeys(timings, Work()), "scipy.linalg.sqrtm"),
        "values": values,
        "notes": [f"the distances are {ours:.8g} and {baseline:.8g}, {abs(ours / baseline - 1):.1e} apart"],
    }


def through_matrix_root(first: Statistics, second: Statistics) -> float:
    """The Fréchet distance as it is usually written, with a general matrix root."""
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root).real)


def measure_distances(count: int, dimensions: int, rounds: int) -> dict[str, Any]:
    """Seconds and added memory of precision and recall, `count` vectors a side, against `torch.cdist`."""
    reference, samples = (features(count, dimensions, seed) for seed in (0, 1))
    devices = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()
    values: dict[str, Any] = {}
    runs: dict[str, Callable[[], None]] = {}
    for device in devices:
        ours, plain = f"ours, {device}", f"torch.cdist, {device}"
        runs[ours] = keeping(values, ours, lambda device=device: precision_recall(reference, samples, device=device))  # type: ignore[misc]
        runs[plain] = keeping(values, plain, lambda device=device: through_cdist(reference, samples, device))  # type: ignore[misc]
    timings = interleaved(runs, rounds, CPU)
    rows = rows_of(timings, dict.fromkeys(timings, Work(memory_gib=0.0)), "torch.cdist, cpu")
    shown = "; ".join(f"{name}: {precision:.4f} and {recall:.4f}" for name, (precision, recall) in values.items())
    return {
        "title": f"precision and recall, {count} x {count} vectors of {dimensions}",
        "rows": rows,
        "values": {name: list(pair) for name, pair in values.items()},
        "notes": [
            f"precision and recall are {shown}",
            "ours rounds distances to half precision, as ADM does; cdist gives them in float32",
        ],
    }


def through_cdist(reference: NDArray[np.float32], samples: NDArray[np.float32], device: torch.device) -> tuple[float, float]:
    """Precision and recall as plainly as torch allows. `topk` finds the radii many times faster than `kthvalue` would."""
    real, fake = (torch.from_numpy(side).to(device) for side in (reference, samples))
    radii = [torch.cdist(side, side).topk(NEIGHBOURS + 1, largest=False).values[:, -1] for side in (real, fake)]
    between = torch.cdist(real, fake)
    precision = (between <= radii[0][:, None]).any(dim=0).double().mean()
    recall = (between <= radii[1][None]).any(dim=1).double().mean()
    return float(precision), float(recall)


def measure_network(graph: str | None, batch: int, side: int, rounds: int, width: float = 1.0) -> dict[str, Any]:
    """Pictures per second of ADM's graph under torch and under TensorFlow, `batch` pictures of `side` x `side` at a time.

    `graph`: the file, or the folder that holds it; without it the one in the cache, or else one of random weights and the
    same layout, `width` times as many channels.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    notes = []
    with graph_file(graph, width) as (path, kind):
        networks: dict[str, FeatureNetwork] = {"torch, cpu": open_network("adm", path, None, "torch", CPU)}
        try:
            check_network("adm", "tensorflow")
            networks["tensorflow"] = open_network("adm", path, None, "tensorflow", CPU)
        except InputError as error:
            notes.append(f"no row for TensorFlow: {error}")
        if torch.cuda.is_available():
            networks["torch, cuda"] = open_network("adm", path, None, "torch", torch.device("cuda"))
        pools: dict[str, NDArray[np.float32]] = {}
        runs = {
            name: keeping(pools, name, lambda network=network: network.activations(pictures)[0])  # type: ignore[misc]
            for name, network in networks.items()
        }
        timings = interleaved(runs, rounds, CPU)
        rows = rows_of(timings, dict.fromkeys(timings, Work(images=batch)), "tensorflow")
    first = pools.pop("torch, cpu")
    differences = {name: float(np.abs(pool - first).max() / np.abs(first).max()) for name, pool in pools.items()}
    notes += [
        f"features of {name} differ from those of torch, cpu by {d:.1e} of the largest" for name, d in differences.items()
    ]
    return {
        "title": f"Inception, {batch} pictures of {side} x {side}; {kind}",
        "rows": rows,
        "values": differences,
        "notes": notes,
    }


@contextmanager
def graph_file(given: str | None, width: float) -> Iterator[tuple[str, str]]:
    """(a graph's path, what it is in words). Nothing is downloaded."""
    cached = cache_folder() / GRAPH_NAME
    if given or cached.is_file():
        path = given or str(cached)
        yield path, f"graph {path}"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, GRAPH_NAME))
        write_graph(layout_graph(random_state(width)), path)
        yield path, f"a graph of ADM's layout with random weights{'' if width == 1 else f', {width:g} x its width'}"


def measure(settings: EvaluationSettings) -> dict[str, Any]:
    """All parts, or the one named `only`. A part's rows are named "PART: CONTESTANT"."""
    rounds = settings.rounds
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "frechet": lambda: measure_frechet(settings.dimensions, rounds),
        "distances": lambda: measure_distances(settings.count, settings.dimensions, rounds),
        "network": lambda: measure_network(settings.weights, settings.batch_size, settings.image_size, rounds),
    }
    found = {name: run() for name, run in parts.items() if settings.only in (None, name)}
    rows = {f"{part}: {name}": row for part, one in found.items() for name, row in one.pop("rows").items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"settings": recorded(settings, device=device), "scipy": scipy.__version__, "parts": found, "rows": rows}


def show(result: Mapping[str, Any]) -> str:
    """The result as a table per part; a ratio above 1 is faster than the baseline, whose own is 1."""
    lines = [*heading(result), f"SciPy {result['scipy']}"]
    for part, found in result["parts"].items():
        prefix = f"{part}: "
        rows = {name.removeprefix(prefix): row for name, row in result["rows"].items() if name.startswith(prefix)}
        titles = {"images_per_second": "pictures/s", "peak_memory_gib": "adds, GiB"}
        lines += ["", found["title"], *table(rows, titles), *found["notes"]]
    return "\n".join(lines)


def keeping(results: dict[str, Any], name: str, run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, its last result kept under `name`."""

    def kept() -> None:
        results[name] = run()

    return kept


def features(count: int, dimensions: int, seed: int) -> NDArray[np.float32]:
    """Vectors in the manner of Inception's pool features: not negative, the variances of their directions far apart."""
    generator = np.random.default_rng(seed)
    spread = np.exp(-np.linspace(0.0, 3.0, dimensions)).astype(np.float32)
    return np.abs(generator.standard_normal((count, dimensions), dtype=np.float32) * spread)
