"""Scores a batch of samples against a reference batch, with the network and the conventions of published figures.

    python evaluator.py --ref_batch REF.npz --sample_batch SAMPLES.npz
    python evaluator.py REF SAMPLES --json scores.json --report report
    torchrun --nproc_per_node=8 evaluator.py REF SAMPLES
    python evaluator.py make_reference PICTURES REF.npz

Each batch is an npz with `arr_0` (N, H, W, 3) uint8 and perhaps `mu, sigma, mu_s, sigma_s`, or a folder of PNGs. By default
the numbers are those of ADM's evaluator: its frozen Inception graph (run by PyTorch), statistics from the file where it holds
them, half-precision distances for precision and recall. Pictures are read a few at a time, and their features are kept beside
the batch: a second evaluation, or one that was interrupted, does not compute them again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from data.cropped import CroppedPictures
from metrics.evidence import make_report
from metrics.features import Features, Share, cache_place, extract
from metrics.networks import FeatureNetwork, check_network, open_network
from metrics.networks import description as network_description
from metrics.pictures import PictureBatch, Pictures, content_hash, open_batch
from metrics.precision_recall import NEIGHBOURS
from metrics.record import description, make_record, protocol_of, settings_of, table
from metrics.reference import usable_statistics, write_reference
from metrics.report import write_report
from metrics.scores import SCORES_OF, score
from runtime.config import ArgumentParser, InputError, from_mapping, nearest, option, run_script
from runtime.distributed import make_state, set_numerics
from runtime.files import check_new_file, check_writable, write_json

EPILOG = """\
Networks: `adm` is the Inception graph of ADM's evaluator, which published FID, sFID, IS, precision and recall are made with.
Its file is looked for in --weights, else in $XDG_CACHE_HOME/sparsedit (~/.cache/sparsedit), else downloaded there once. This
project does not know the file's true SHA-256: a download is checked against the length and MD5 that the server declares, its
SHA-256 is kept beside it, and a file that changes later is refused (trust on first use). Pin a hash you know with
--weights-sha256. `torch-fidelity` and `pytorch-fid` take an Inception weights file of these projects (--weights) and prepare
pictures as they do. `dinov2` gives the Frechet DINO distance (FDD); it needs `pip install -e .[dinov2]`.
The network's name and the hash of its weights are printed with the scores: numbers of different networks do not compare.

A reference without pictures (statistics alone) gives FID, sFID and Inception Score; the others need pictures.
A protocol record beside the samples (SAMPLES.json or protocol.json) is printed and stored with the scores.
`evaluator.py make_reference --help` tells how to make a reference from a folder or an npz.
"""


@dataclass(frozen=True)
class NetworkOptions:
    """Which network turns pictures into features, and how."""

    network: Literal["adm", "torch-fidelity", "pytorch-fid", "dinov2"] = option("adm", "the feature network")
    weights: str | None = option(
        None,
        "the network's weights: ADM's classify_image_graph_def.pb or the folder that holds it, or the file of another network",
        flags=("--inception",),
    )
    weights_sha256: str | None = option(None, "refuse weights whose SHA-256 is another", flags=("--inception-sha256",))
    backend: Literal["torch", "tensorflow"] = option("torch", "what runs ADM's graph; tensorflow is a cross-check")
    batch_size: int = option(64, "pictures per run of the network; of no consequence but for speed and rounding")
    tf32: bool = option(False, "let a GPU round products to TF32: faster, and not what published scores are made with")
    cache: str | None = option(None, "folder for computed features; none: beside each batch, as NAME.features")


@dataclass(frozen=True)
class Options(NetworkOptions):
    """The flags of a comparison."""

    ref_batch: str | None = option(None, "the reference: an npz, or a folder of PNGs")
    sample_batch: str | None = option(None, "the samples: an npz, or a folder of PNGs")
    metrics: str = option("all", "the scores to compute, such as fid,sfid; precision and recall cost most")
    bootstrap: int = option(0, "resamplings of the samples for 95 % intervals, such as 200; 0: none")
    json: str | None = option(None, "also write the scores, their settings and their protocol to this file")
    report: str | None = option(None, "also write a page (index.html, self-contained) with pictures to this folder")


@dataclass(frozen=True)
class ReferenceOptions(NetworkOptions):
    """The flags of make_reference."""

    image_size: int | None = option(
        None,
        "read a folder of class folders (or a zip of one), cropped to this size as ADM does; none: take an npz or PNG folder",
    )
    pictures: int = option(10_000, "pictures to keep in the file, evenly spaced; precision and recall need them; 0: none")


def compare(options: Options, earlier: Sequence[Path]) -> None:
    """Computes, prints and writes the scores of one pair of batches."""
    reference, samples = open_batch(str(options.ref_batch)), open_batch(str(options.sample_batch))
    check_pair(reference, samples)
    wanted = wanted_scores(options)
    others = [read_record(path) for path in earlier]
    protocol = protocol_of(samples.path)
    started = time.perf_counter()
    state = make_state()
    network = open_on(state, options) if reference.pictures or samples.pictures else None
    identity = network_description(network) if network else None
    reference, notes = usable_statistics(reference, identity)
    samples, more_notes = usable_statistics(samples, identity)
    of_reference = features_of(reference, network, options, state, "reference")
    of_samples = features_of(samples, network, options, state, "samples")
    if not state.is_main_process:
        return
    scores = score(of_reference, of_samples, network.head if network else None, wanted, options.bootstrap, state.device)
    scores.warnings[:0] = notes + more_notes
    record = make_record(
        described(reference, options), described(samples, options), scores, identity,
        settings_of(scores, options.batch_size, options.bootstrap), protocol, time.perf_counter() - started,
    )  # fmt: skip
    print(table(record))
    if options.json:
        write_json(options.json, record)
    if options.report:
        report = make_report(record, (reference, samples), (of_reference, of_samples), scores.covered, others, state.device)
        print(f"report: {write_report(Path(options.report), report)}")


def make_reference(options: ReferenceOptions, source: Path, target: Path) -> None:
    """Writes the statistics of a batch's features, and some of its pictures, as a reference for later comparisons."""
    if options.image_size is None:
        batch = open_batch(source)
    else:
        cropped = CroppedPictures(source, options.image_size)
        batch = PictureBatch(source, cropped, None, None, cropped.labels())
    if batch.pictures is None:
        raise InputError(f"{source} holds statistics alone; a reference is made from pictures.")
    count = batch.pictures.count
    # What stands in the source may be of another network, or of other pictures.
    batch = dataclasses.replace(batch, pool=None, spatial=None)
    state = make_state()
    network = open_on(state, options)
    features = features_of(batch, network, options, state, "reference")
    if state.is_main_process:
        kept = write_reference(target, batch, features, network_description(network), options.pictures)
        names = "mu, sigma, mu_s, sigma_s" if features.spatial_statistics else "mu, sigma"
        print(f"{target}: {names} by {network.name} of {count:,} pictures, {kept:,} of them kept")


def open_on(state: PartialState, options: NetworkOptions) -> FeatureNetwork:
    """The network on this process's device; the first process fetches what must be fetched."""
    set_numerics(options.tf32)
    with state.main_process_first():
        return open_network(options.network, options.weights, options.weights_sha256, options.backend, state.device)


def features_of(
    batch: PictureBatch, network: FeatureNetwork | None, options: NetworkOptions, state: PartialState, role: str
) -> Features:
    """The batch's features, from the cache or computed by all processes together."""
    if batch.pictures is None or network is None:
        return Features(None, batch.pool, batch.spatial)
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    return extract(batch, network, cache_place(batch, options.cache), options.batch_size, role, share)


def described(batch: PictureBatch, options: NetworkOptions) -> dict[str, Any]:
    """The batch's entry in the record."""
    return description(batch, content_hash(batch, cache_place(batch, options.cache) if batch.pictures else None))


def wanted_scores(options: Options) -> tuple[str, ...]:
    """The keys of the scores that --metrics names, all that the network gives for `all`."""
    possible = SCORES_OF["FDD" if options.network == "dinov2" else "FID"]
    if options.metrics == "all":
        return possible
    named = [name.strip().lower().replace("-", "_") for name in options.metrics.split(",")]
    for name in named:
        if name not in possible:
            raise InputError(f"--metrics: {options.network} gives no score {name!r}{nearest(name, possible)}")
    return tuple(named)


def check_pair(reference: PictureBatch, samples: PictureBatch) -> None:
    """Raises InputError where two batches, each good by itself, cannot be compared."""
    for batch in (reference, samples):
        if batch.pictures and batch.pictures.count <= NEIGHBOURS:
            raise InputError(f"{batch.path} holds {batch.pictures.count} pictures; precision and recall need at least "
                             f"{NEIGHBOURS + 1}, and useful scores thousands.")  # fmt: skip
    if reference.pictures and samples.pictures and _size(reference.pictures) != _size(samples.pictures):
        raise InputError(f"the reference's pictures are {_size(reference.pictures)} pixels ({reference.path}), the samples' "
                         f"{_size(samples.pictures)} ({samples.path}); compare batches of one size.")  # fmt: skip


def _size(pictures: Pictures) -> str:
    return f"{pictures.width} x {pictures.height}"


def read_record(path: Path) -> dict[str, Any]:
    """Scores that an earlier evaluation wrote with --json."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--compare: {path} cannot be read as scores ({' '.join(str(error).split())}); give files that "
                         "--json wrote.") from None  # fmt: skip
    if not isinstance(record, dict) or not isinstance(record.get("samples"), Mapping):
        raise InputError(f"--compare: {path} holds no scores; give files that --json wrote.")
    return record


def parse_comparison(arguments: Sequence[str]) -> tuple[Options, list[Path]]:
    """The command line, with the two positional batches folded in. Raises InputError for what cannot work."""
    parser = ArgumentParser(__doc__ or "", epilog=EPILOG)
    parser.add_argument("batches", nargs="*", metavar="REF SAMPLES", help="the two batches, instead of the flags")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="JSON",
                        help="scores of earlier evaluations (--json), to draw into the report")  # fmt: skip
    parser.add_config(Options)
    given = vars(parser.parse_args(arguments))
    positional, earlier = given.pop("batches"), given.pop("compare")
    options = from_mapping(Options, given, "command line")
    if positional and (options.ref_batch or options.sample_batch):
        raise InputError("give the batches as --ref_batch and --sample_batch or as two plain arguments, not both ways.")
    if positional and len(positional) != 2:
        raise InputError(f"two batches are compared, REF and SAMPLES, but {len(positional)} were given.")
    if positional:
        options = dataclasses.replace(options, ref_batch=positional[0], sample_batch=positional[1])
    if not options.ref_batch or not options.sample_batch:
        missing = "--sample_batch" if options.ref_batch else "--ref_batch"
        raise InputError(f"{missing} is missing; try `python evaluator.py --ref_batch REF.npz --sample_batch SAMPLES.npz`.")
    if options.bootstrap < 0 or options.bootstrap == 1:
        raise InputError(f"--bootstrap must be 0, or at least 2 resamplings, not {options.bootstrap}.")
    if earlier and not options.report:
        raise InputError("--compare draws earlier scores into the report; name its folder with --report.")
    check_options(options)
    if options.json:
        check_new_file(options.json, "--json")
    if options.report:
        check_writable(options.report, "--report")
    return options, earlier


def parse_reference(arguments: Sequence[str]) -> tuple[ReferenceOptions, Path, Path]:
    """The command line of make_reference. Raises InputError for what cannot work."""
    parser = ArgumentParser(
        "Turns a folder of PNGs, an npz, or with --image-size a folder of class folders, into a reference npz: mu, sigma, "
        "mu_s, sigma_s, the network that made them, and some of the pictures.",
        "evaluator.py make_reference",
    )
    parser.add_argument("source", type=Path, metavar="PICTURES", help="folder, npz or (with --image-size) zip of pictures")
    parser.add_argument("target", type=Path, metavar="REF.npz", help="the file to write")
    parser.add_config(ReferenceOptions)
    given = vars(parser.parse_args(arguments))
    source, target = given.pop("source"), given.pop("target")
    options = from_mapping(ReferenceOptions, given, "command line")
    if target.suffix != ".npz":
        raise InputError(f"{target}: the name of a reference ends in .npz.")
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is the source itself; give the reference another name.")
    if options.pictures < 0:
        raise InputError(f"--pictures must not be negative, but it is {options.pictures}.")
    check_options(options)
    check_new_file(target, "REF.npz")
    return options, source, target


def check_options(options: NetworkOptions) -> None:
    """Raises InputError for a network that cannot run here and for numbers that make no sense."""
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {options.batch_size}.")
    if options.tf32 and options.backend == "tensorflow":
        raise InputError("--backend tensorflow computes in float32 alone; leave --tf32 out.")
    check_network(options.network, options.backend)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["make_reference"], ["make-reference"]):
        make_reference(*parse_reference(arguments[1:]))
    else:
        compare(*parse_comparison(arguments))


if __name__ == "__main__":
    run_script(main)
