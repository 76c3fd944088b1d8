"""What the evaluator's speed rests on, each beside what one would write without it: distance, neighbours, network.

`frechet`: the Fréchet distance of 2,048 dimensions against the same through scipy.linalg.sqrtm. `distances`: precision and
recall against a plain implementation with torch.cdist. `network`: ADM's Inception graph run by torch and by TensorFlow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from benchmarks.memory import watch_memory
from benchmarks.timing import Timing, interleaved
from metrics.frechet import Statistics, frechet_distance, statistics_of
from metrics.networks import FeatureNetwork, check_network, open_network
from metrics.networks.graph import write_graph
from metrics.networks.inception_layout import layout_graph, random_state
from metrics.networks.weight_files import GRAPH_NAME, cache_folder
from metrics.precision_recall import NEIGHBOURS, precision_recall
from runtime.config import InputError

CPU = torch.device("cpu")


def measure_frechet(dimensions: int, rounds: int) -> dict[str, Any]:
    """Seconds of our Fréchet distance and of the one through `sqrtm`, of two covariances of full rank, and what they give."""
    first, second = (statistics_of(features(2 * dimensions, dimensions, seed)) for seed in (0, 1))
    runs = {
        "ours, eigenvalues": lambda: frechet_distance(first, second),
        "scipy.linalg.sqrtm": lambda: through_matrix_root(first, second),
    }
    values: dict[str, Any] = {}
    timings = interleaved({name: keeping(values, name, run) for name, run in runs.items()}, rounds)
    ours, baseline = values.values()
    return {
        "title": f"Fréchet distance, {dimensions} dimensions",
        "rows": rows_of(timings, "scipy.linalg.sqrtm"),
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
    megabytes: dict[str, float] = {}

    def watched(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        def measured() -> None:
            with watch_memory() as added:
                values[name] = run()
            megabytes[name] = max(megabytes.get(name, 0.0), added.megabytes)

        return measured

    runs: dict[str, Callable[[], None]] = {}
    for device in devices:
        ours, plain = f"ours, {device}", f"torch.cdist, {device}"
        runs[ours] = watched(ours, lambda device=device: precision_recall(reference, samples, device=device))  # type: ignore[misc]
        runs[plain] = watched(plain, lambda device=device: through_cdist(reference, samples, device))  # type: ignore[misc]
    rows = rows_of(interleaved(runs, rounds), "torch.cdist, cpu")
    for name, row in rows.items():
        row["added_mb"] = megabytes[name]
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
        rows = rows_of(interleaved(runs, rounds), "tensorflow")
    for row in rows.values():
        row["pictures_per_second"] = batch / row["seconds"]
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


def measure(
    only: str | None, graph: str | None, count: int, dimensions: int, batch: int, side: int, rounds: int
) -> dict[str, Any]:
    """All parts, or the one named `only`."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "frechet": lambda: measure_frechet(dimensions, rounds),
        "distances": lambda: measure_distances(count, dimensions, rounds),
        "network": lambda: measure_network(graph, batch, side, rounds),
    }
    return {
        "measured": "eval",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "rounds": rounds,
        "parts": {name: run() for name, run in parts.items() if only in (None, name)},
    }


def show(result: Mapping[str, Any]) -> str:
    """The result as a table per part; a ratio above 1 is faster than the baseline, whose own is 1."""
    lines = [f"{result['device']}, {result['threads']} threads, torch {result['torch']}, SciPy {result['scipy']}, "
             f"median of {result['rounds']} rounds"]  # fmt: skip
    for part in result["parts"].values():
        extra = [key for key in ("added_mb", "pictures_per_second") if key in next(iter(part["rows"].values()))]
        titles = {"added_mb": "adds, MB", "pictures_per_second": "pictures/s"}
        lines += ["", part["title"]]
        lines.append(
            f"{'':<22}{'seconds':>10}{'fastest':>10}{'slowest':>10}{'speed':>9}" + "".join(f"{titles[k]:>12}" for k in extra)
        )
        for name, row in part["rows"].items():
            speed = "" if row["speed"] is None else f"{row['speed']:.2f} x"
            lines.append(f"{name:<22}{row['seconds']:>10.3f}{row['fastest']:>10.3f}{row['slowest']:>10.3f}{speed:>9}"
                         + "".join(f"{row[key]:>12.1f}" for key in extra))  # fmt: skip
        lines += part["notes"]
    return "\n".join(lines)


def rows_of(timings: Mapping[str, Timing], baseline: str) -> dict[str, dict[str, Any]]:
    """Per contestant its seconds and its speed against `baseline`, None where that did not run."""
    base = timings.get(baseline)
    return {
        name: {
            "seconds": timing.median,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "speed": base.median / timing.median if base else None,
        }
        for name, timing in timings.items()
    }


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
