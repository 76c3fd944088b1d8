"""Scores a batch of samples against a reference batch: FID, sFID, Inception Score, precision, recall, as ADM computes them.

    python evaluator.py --ref_batch REF.npz --sample_batch SAMPLES.npz
    python evaluator.py REF SAMPLES --json scores.json

Each batch is an npz with `arr_0` (N, H, W, 3) uint8 and perhaps `mu, sigma, mu_s, sigma_s`, or a folder of PNGs. The numbers
are those of ADM's evaluator: its frozen Inception graph run by TensorFlow, statistics from the file where it holds them,
half-precision distances. Pictures are read a batch at a time; what stays in memory is 8 KB of features per picture.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.frechet import MeanAndCovariance, Statistics, frechet_distance, statistics_of
from metrics.inception_score import SPLIT_SIZE, inception_score
from metrics.networks import FeatureNetwork, TensorFlowInception, inception_graph, require_tensorflow
from metrics.pictures import PictureBatch, Pictures, open_batch
from metrics.precision_recall import NEIGHBOURS, pair_count, precision_recall
from runtime.config import ArgumentParser, InputError, from_mapping, option, run_script
from runtime.files import write_json

EPILOG = """\
The Inception graph is looked for in --inception, else in $XDG_CACHE_HOME/sparsedit (~/.cache/sparsedit), else downloaded
there once. This project does not know the file's true SHA-256: a download is checked against the length and MD5 that the
server declares, its SHA-256 is kept beside it, and a file that changes later is refused (trust on first use). Pin a hash
you know with --inception-sha256. The hash is printed with the scores: numbers from different graphs cannot be compared.

A reference without pictures (statistics alone) gives FID, sFID and Inception Score; precision and recall need pictures.
A protocol record beside the samples (SAMPLES.json or protocol.json) is printed and stored with the scores.
"""


@dataclass(frozen=True)
class Options:
    """The evaluator's flags."""

    ref_batch: str | None = option(None, "the reference: an npz, or a folder of PNGs")
    sample_batch: str | None = option(None, "the samples: an npz, or a folder of PNGs")
    inception: str | None = option(None, "ADM's classify_image_graph_def.pb, or the folder that holds it")
    inception_sha256: str | None = option(None, "refuse an Inception graph whose SHA-256 is another")
    batch_size: int = option(64, "pictures per run of the network; ADM's value, of no consequence but for speed and rounding")
    json: str | None = option(None, "also write the scores, their settings and their protocol to this file")


@dataclass(frozen=True)
class Features:
    """What the metrics need of one batch; None where the batch cannot give it."""

    pool: NDArray[np.float32] | None
    pool_statistics: Statistics | None
    spatial_statistics: Statistics | None


@dataclass(frozen=True)
class Scores:
    """The five numbers, None where one could not be computed, and in words why not."""

    fid: float | None
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None
    not_computed: dict[str, str]


def main() -> None:
    options = parse_options()
    reference, samples = open_batch(str(options.ref_batch)), open_batch(str(options.sample_batch))
    check_pair(reference, samples)
    protocol = protocol_record(samples.path)
    network = None
    if reference.pictures or samples.pictures:
        require_tensorflow()
        network = TensorFlowInception(inception_graph(options.inception, options.inception_sha256))
    warnings = rank_warnings(reference, samples)
    for sentence in warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    started = time.perf_counter()
    scores = score(
        extract(reference, network, options.batch_size, "reference"),
        extract(samples, network, options.batch_size, "samples"),
        network.head if network else None,
    )
    record = report(reference, samples, scores, network, options.batch_size, protocol, time.perf_counter() - started)
    record["warnings"] = warnings
    print(table(record))
    if options.json:
        write_json(options.json, record)


def parse_options() -> Options:
    """The command line, with the two positional batches folded in. Raises InputError for what cannot work."""
    parser = ArgumentParser(__doc__ or "", epilog=EPILOG)
    parser.add_argument("batches", nargs="*", metavar="REF SAMPLES", help="the two batches, instead of the flags")
    parser.add_config(Options)
    given = vars(parser.parse_args())
    positional = given.pop("batches")
    options = from_mapping(Options, given, "command line")
    if positional and (options.ref_batch or options.sample_batch):
        raise InputError("give the batches as --ref_batch and --sample_batch or as two plain arguments, not both ways.")
    if positional and len(positional) != 2:
        raise InputError(f"two batches are compared, REF and SAMPLES, but {len(positional)} were given.")
    if positional:
        options = from_mapping(
            Options, given | dict(zip(("ref_batch", "sample_batch"), positional, strict=True)), "command line"
        )
    if not options.ref_batch or not options.sample_batch:
        missing = "--sample_batch" if options.ref_batch else "--ref_batch"
        raise InputError(f"{missing} is missing; try `python evaluator.py --ref_batch REF.npz --sample_batch SAMPLES.npz`.")
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {options.batch_size}.")
    if options.json:
        check_writable(Path(options.json))
    return options


def check_writable(path: Path) -> None:
    """Raises InputError where no file can be written at `path`; its folder is made where it is missing."""
    if path.is_dir():
        raise InputError(f"--json {path} is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--json {path}: its folder cannot be made ({error.strerror}); name another place.") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--json {path}: its folder cannot be written to; name another place.")


def check_pair(reference: PictureBatch, samples: PictureBatch) -> None:
    """Raises InputError where two batches, each good by itself, cannot be compared."""
    for batch in (reference, samples):
        if batch.pictures and batch.pictures.count <= NEIGHBOURS:
            raise InputError(f"{batch.path} holds {batch.pictures.count} pictures; precision and recall need at least "
                             f"{NEIGHBOURS + 1}, and useful scores thousands.")  # fmt: skip
    if reference.pictures and samples.pictures and _size(reference.pictures) != _size(samples.pictures):
        raise InputError(f"the reference's pictures are {_size(reference.pictures)} pixels ({reference.path}), the samples' "
                         f"{_size(samples.pictures)} ({samples.path}); compare batches of one size.")  # fmt: skip


def rank_warnings(reference: PictureBatch, samples: PictureBatch) -> list[str]:
    """A sentence per batch that is too small for a covariance of full rank over Inception's features."""
    sentences = []
    for role, batch in (("reference", reference), ("sample", samples)):
        needed = [("FID", 2_048, batch.pool), ("sFID", 2_023, batch.spatial)]
        count = batch.pictures.count if batch.pictures else sys.maxsize
        for name, dimensions, ready in needed:
            if ready is None and count <= dimensions:
                sentences.append(
                    f"{name}: the {role} batch holds {count:,} pictures, too few for a covariance over {dimensions:,} feature "
                    "dimensions; the value is biased upwards and not comparable with published ones (50,000 samples)."
                )
    return sentences


def extract(batch: PictureBatch, network: FeatureNetwork | None, batch_size: int, label: str) -> Features:
    """Runs the network over a batch's pictures, if it has any; statistics that stand in its file take precedence."""
    if batch.pictures is None or network is None:
        return Features(None, batch.pool, batch.spatial)
    pool: NDArray[np.float32] | None = None
    spatial = MeanAndCovariance()
    done = 0
    with tqdm(total=batch.pictures.count, unit="picture", desc=f"{label}: features") as bar:
        for pictures in batch.pictures.batches(batch_size):
            pool_rows, spatial_rows = network.activations(pictures)
            if pool is None:
                pool = np.empty((batch.pictures.count, pool_rows.shape[1]), dtype=np.float32)
            pool[done : done + len(pictures)] = pool_rows
            # Spatial features are summed up at once: kept, they would double the memory.
            if batch.spatial is None:
                spatial.update(spatial_rows)
            done += len(pictures)
            bar.update(len(pictures))
    assert pool is not None
    return Features(pool, batch.pool or statistics_of(pool), batch.spatial or spatial.statistics())


def score(reference: Features, samples: Features, head: NDArray[np.float32] | None) -> Scores:
    """The five numbers from two batches' features. `head` (D, classes) gives class logits, for the Inception Score."""
    reasons: dict[str, str] = {}
    fid = _distance(reference.pool_statistics, samples.pool_statistics)
    sfid = _distance(reference.spatial_statistics, samples.spatial_statistics)
    for key, value, names in (("fid", fid, "mu and sigma"), ("sfid", sfid, "mu_s and sigma_s")):
        if value is None:
            reasons[key] = f"a batch holds neither pictures nor {names}"
    inception = None
    if samples.pool is not None and head is not None:
        inception = inception_score(samples.pool, head)
    else:
        reasons["inception_score"] = "the sample batch holds statistics alone, no pictures"
    precision = recall = None
    if reference.pool is not None and samples.pool is not None:
        pairs = pair_count(len(reference.pool), len(samples.pool))
        with tqdm(total=pairs, unit="pair", unit_scale=True, desc="precision and recall") as bar:
            precision, recall = precision_recall(reference.pool, samples.pool, progress=bar.update)
    else:
        role = "reference" if reference.pool is None else "sample"
        reasons["precision"] = reasons["recall"] = f"the {role} batch holds statistics alone, no pictures"
    return Scores(fid, sfid, inception, precision, recall, reasons)


def _distance(first: Statistics | None, second: Statistics | None) -> float | None:
    return None if first is None or second is None else frechet_distance(first, second)


def protocol_record(samples: Path) -> dict[str, Any] | None:
    """The JSON record of how samples were made: SAMPLES.json, or protocol.json in the folder (else beside the file)."""
    folder = samples if samples.is_dir() else samples.parent
    for place in (samples.with_suffix(".json"), samples.with_name(samples.name + ".json"), folder / "protocol.json"):
        if place.is_file():
            try:
                record = json.loads(place.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{place} cannot be read as the samples' protocol record: {error}; mend or move it.") from None
            if not isinstance(record, dict):
                raise InputError(f"{place} is no protocol record: it holds {type(record).__name__}, not keys and values.")
            return record
    return None


def report(
    reference: PictureBatch,
    samples: PictureBatch,
    scores: Scores,
    network: FeatureNetwork | None,
    batch_size: int,
    protocol: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything that belongs to the scores, fit for JSON."""
    return {
        "fid": scores.fid,
        "sfid": scores.sfid,
        "inception_score": scores.inception_score,
        "precision": scores.precision,
        "recall": scores.recall,
        "not_computed": scores.not_computed,
        "reference": _description(reference),
        "samples": _description(samples),
        "network": {"name": network.name, "backend": network.backend, "sha256": network.sha256} if network else None,
        "settings": {"neighbours": NEIGHBOURS, "inception_score_split": SPLIT_SIZE, "batch_size": batch_size},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch", "pillow")},
        "seconds": round(seconds, 1),
        "protocol": protocol,
    }


def _description(batch: PictureBatch) -> dict[str, Any]:
    pictures = batch.pictures
    return {
        "path": str(batch.path.resolve()),
        "count": pictures.count if pictures else None,
        "height": pictures.height if pictures else None,
        "width": pictures.width if pictures else None,
        "fid_statistics": "read from the file" if batch.pool else "computed from the pictures" if pictures else None,
        "sfid_statistics": "read from the file" if batch.spatial else "computed from the pictures" if pictures else None,
    }


def _size(pictures: Pictures) -> str:
    return f"{pictures.width} x {pictures.height}"


def table(record: dict[str, Any]) -> str:
    """The report as it stands on the screen."""
    lines = []
    for role in ("reference", "samples"):
        batch = record[role]
        size = f"{batch['count']:,} pictures of {batch['width']} x {batch['height']}" if batch["count"] else "statistics alone"
        source = f"; FID statistics {batch['fid_statistics']}" if batch["count"] and batch["fid_statistics"] else ""
        lines.append(f"{role:<16} {batch['path']}\n{'':<16} {size}{source}")
    if record["network"]:
        network = record["network"]
        lines.append(f"{'network':<16} {network['name']}, {network['backend']}\n{'':<16} SHA-256 {network['sha256']}")
    if record["protocol"]:
        lines += [f"{'protocol':<16} {key}: {_shown(value)}" for key, value in record["protocol"].items()]
    else:
        lines.append(f"{'protocol':<16} no record beside the samples")
    names = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "precision": "Precision", "recall": "Recall"}
    lines.append("-" * 40)
    for key, name in names.items():
        value = record[key]
        lines.append(f"{name:<16} " + (f"{value:.4f}" if value is not None else f"not computed: {record['not_computed'][key]}"))
    lines += [f"warning: {sentence}" for sentence in record["warnings"]]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


if __name__ == "__main__":
    run_script(main)
