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
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState

from data.cropped import CroppedPictures
from metrics.content import ContentState, content_state
from metrics.evidence import make_report
from metrics.features import Features, Share, cache_place, extract
from metrics.networks import FeatureNetwork, check_network, open_network
from metrics.networks import description as network_description
from metrics.pictures import PictureBatch, Pictures, open_batch
from metrics.record import description, make_record, protocol_of, read_json, settings_of, table
from metrics.reference import common_network, usable_statistics, write_reference
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


MOST_RESAMPLINGS = 10_000
SHORT_NAMES = {"is": ("inception_score",), "prc": ("precision", "recall")}
"""What people call scores, beside the keys of the record."""


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
    metrics: str = option(
        "all", "the scores to compute, with commas: fid (fdd), sfid, inception_score (is), precision, recall (both: prc), "
        "kid (kdd), density, coverage; precision and recall cost most"
    )  # fmt: skip
    trust_statistics: bool = option(False, "take mu and sigma of a file that names no network as made by --network")
    bootstrap: int = option(
        0,
        f"resamplings of the samples, such as 100, for 95 % intervals (FID: seconds each); at most {MOST_RESAMPLINGS}, 0: none",
    )
    json: str | None = option(None, "also write the scores, their settings and their protocol to this file")
    report: str | None = option(None, "also write a page (index.html, self-contained) with pictures to this folder")


@dataclass(frozen=True)
class ReferenceOptions(NetworkOptions):
    """The flags of make_reference."""

    image_size: int | None = option(
        None,
        "read a folder of class folders (or a zip of one), cropped to this size as ADM does; none: take an npz or PNG folder",
    )
    cache: str | None = option(None, "folder for computed features; none: beside the reference, as REF.npz.features")
    pictures: int = option(10_000, "pictures to keep in the file, evenly spaced; precision and recall need them; 0: none")


def compare(options: Options, earlier: Sequence[Path]) -> None:
    """Computes, prints and writes the scores of one pair of batches."""
    reference, samples = open_batch(str(options.ref_batch)), open_batch(str(options.sample_batch))
    states = [content_state(batch) for batch in (reference, samples)]
    check_pair(reference, samples)
    needs_network = bool(reference.pictures or samples.pictures)
    if needs_network:
        check_network(options.network, options.backend)
    identity = None if needs_network else common_network(reference, samples)
    wanted = wanted_scores(options, identity)
    others = [read_record(path) for path in earlier]
    protocol = protocol_of(samples.path)
    started = time.perf_counter()
    state = make_state()
    network = open_on(state, options) if needs_network else None
    identity = network_description(network) if network else identity
    (reference, notes), (samples, more_notes) = (
        usable_statistics(batch, identity if network else None, options.trust_statistics) for batch in (reference, samples)
    )
    if network:
        check_dimensions((reference, samples), network)
    of_reference = features_of(reference, network, options, state, "reference", wanted)
    of_samples = features_of(samples, network, options, state, "samples", wanted)
    if not state.is_main_process:
        return
    check_unchanged((reference, samples), states)
    scores = score(of_reference, of_samples, network.head if network else None, wanted, options.bootstrap, state.device)
    scores.warnings[:0] = notes + more_notes
    record = make_record(
        description(reference, of_reference), description(samples, of_samples), scores, identity,
        settings_of(scores, options.batch_size, options.bootstrap), protocol, time.perf_counter() - started,
    )  # fmt: skip
    print(table(record))
    if options.json:
        write_json(options.json, record)
    if options.report:
        check_unchanged((reference, samples), states)
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
    check_network(options.network, options.backend)
    state = make_state()
    network = open_on(state, options)
    # Beside the reference: the source may be a data set, whose neighbourhood is no place for a cache.
    options = dataclasses.replace(options, cache=options.cache or f"{target}.features")
    features = features_of(batch, network, options, state, "reference")
    if state.is_main_process:
        kept = write_reference(target, batch, features, network_description(network), options.pictures)
        names = "mu, sigma, mu_s, sigma_s" if features.spatial_statistics else "mu, sigma"
        print(f"{target}: {names} by {network.name} of {count:,} pictures, {kept:,} of them kept; the features of all stay in "
              f"{options.cache} and may be deleted")  # fmt: skip


def open_on(state: PartialState, options: NetworkOptions) -> FeatureNetwork:
    """The network on this process's device; the first process fetches what must be fetched."""
    set_numerics(options.tf32)
    with state.main_process_first():
        return open_network(options.network, options.weights, options.weights_sha256, options.backend, state.device)


def features_of(
    batch: PictureBatch,
    network: FeatureNetwork | None,
    options: NetworkOptions,
    state: PartialState,
    role: str,
    wanted: Sequence[str] = (),
) -> Features:
    """The batch's features, from the cache or computed by all processes together; statistics alone where those are enough."""
    if batch.pictures is None or network is None or (role == "reference" and _statistics_suffice(batch, options, wanted)):
        return Features(None, batch.pool, batch.spatial)
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    return extract(batch, network, cache_place(batch, options.cache), options.batch_size, role, share)


def _statistics_suffice(batch: PictureBatch, options: NetworkOptions, wanted: Sequence[str]) -> bool:
    """Whether a reference's own statistics give all that is wanted, as ADM's files do for FID and sFID."""
    given = {"inception_score"}
    given |= {"fid", "fdd"} if batch.pool else set()
    given |= {"sfid"} if batch.spatial else set()
    return bool(wanted) and set(wanted) <= given and not (isinstance(options, Options) and options.report)


def wanted_scores(options: Options, network: Mapping[str, str] | None) -> tuple[str, ...]:
    """The keys of the scores that --metrics names, for `all` all that can be: by --network, or for two batches of statistics
    alone by the network that they are of (a `networks.description`).
    """
    possible = SCORES_OF[network.get("distance", "FID") if network else "FDD" if options.network == "dinov2" else "FID"]
    if options.metrics == "all":
        return possible
    words = [word.strip().lower().replace("-", "_") for word in options.metrics.split(",")]
    named = [name for word in words for name in SHORT_NAMES.get(word, (word,))]
    for name in named:
        if name not in possible:
            raise InputError(f"--metrics: {options.network} gives no score {name!r}{nearest(name, possible)}")
    return tuple(named)


def check_pair(reference: PictureBatch, samples: PictureBatch) -> None:
    """Raises InputError where two batches, each good by itself, cannot be compared."""
    for batch in (reference, samples):
        if batch.pictures and batch.pictures.count < 2:
            raise InputError(f"{batch.path} holds one picture; statistics need two, and useful scores thousands.")
    if reference.pictures and samples.pictures and _size(reference.pictures) != _size(samples.pictures):
        raise InputError(f"the reference's pictures are {_size(reference.pictures)} pixels ({reference.path}), the samples' "
                         f"{_size(samples.pictures)} ({samples.path}); compare batches of one size.")  # fmt: skip


def check_unchanged(batches: Sequence[PictureBatch], before: Sequence[ContentState]) -> None:
    """Raises InputError where a batch was written to since it was opened: numbers and pictures must be of one content."""
    for batch, state in zip(batches, before, strict=True):
        if content_state(batch) != state:
            raise InputError(f"{batch.path} changed while it was evaluated; run the same command again.")


def check_dimensions(batches: Sequence[PictureBatch], network: FeatureNetwork) -> None:
    """Raises InputError where a file's statistics have other dimensions than the network's features, before the long work."""
    with_statistics = [batch for batch in batches if batch.pool or batch.spatial]
    if not with_statistics:
        return
    pool, spatial = network.activations(np.zeros((2, 32, 32, 3), np.uint8))
    for batch in with_statistics:
        for given, rows, names in ((batch.pool, pool, "mu and sigma"), (batch.spatial, spatial, "mu_s and sigma_s")):
            if given is not None and (rows is None or len(given.mean) != rows.shape[1]):
                found = "none" if rows is None else f"{rows.shape[1]:,}"
                raise InputError(f"{batch.path}: {names} are of {len(given.mean):,} dimensions, where {network.name} has "
                                 f"{found}; they are of another network.")  # fmt: skip


def _size(pictures: Pictures) -> str:
    return f"{pictures.width} x {pictures.height}"


def read_record(path: Path, flag: str = "--compare") -> dict[str, Any]:
    """Scores that an earlier evaluation wrote with --json. Raises InputError, naming `flag`, for anything else."""
    remedy = "give files that --json wrote" if flag == "--compare" else "it would be replaced, so name another file"
    if not path.is_file():
        raise InputError(f"{flag}: {path} is no file; {remedy}.")
    record = read_json(path, f"{flag}: {path} cannot be read as scores", f"{remedy}.")
    if not isinstance(record.get("samples"), Mapping) or "network" not in record:
        raise InputError(f"{flag}: {path} holds no scores; {remedy}.")
    return record


def parse_comparison(arguments: Sequence[str]) -> tuple[Options, list[Path]]:
    """The command line, with the two positional batches folded in. Raises InputError for what cannot work."""
    parser = ArgumentParser(__doc__ or "", epilog=EPILOG)
    parser.add_argument("batches", nargs="*", metavar="REF SAMPLES", help="the two batches, instead of the flags")
    parser.add_argument("--compare", action="append", type=Path, default=[], metavar="JSON",
                        help="scores of an earlier evaluation (--json) for the report; may be given several times")  # fmt: skip
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
    if not (options.bootstrap == 0 or 2 <= options.bootstrap <= MOST_RESAMPLINGS):
        raise InputError(f"--bootstrap must be 0, or 2 to {MOST_RESAMPLINGS} resamplings, not {options.bootstrap}.")
    if earlier and not options.report:
        raise InputError("--compare draws earlier scores into the report; name its folder with --report.")
    check_options(options)
    check_outputs(options)
    return options, earlier


def check_outputs(options: Options) -> None:
    """Raises InputError where scores or report cannot be written, or would replace something else."""
    if options.json:
        check_new_file(options.json, "--json")
        if Path(options.json).exists():
            read_record(Path(options.json), "--json")  # earlier scores may be replaced, nothing else
    if options.report:
        check_writable(options.report, "--report")
        for batch in (options.ref_batch, options.sample_batch):
            if Path(options.report).resolve() == Path(str(batch)).resolve():
                raise InputError(f"--report: {options.report} holds the pictures themselves; name another folder.")


def parse_reference(arguments: Sequence[str]) -> tuple[ReferenceOptions, Path, Path]:
    """The command line of make_reference. Raises InputError for what cannot work."""
    parser = ArgumentParser(
        "Turns a folder of PNGs, an npz, or with --image-size a folder of class folders, into a reference npz:\n"
        "mu, sigma, mu_s, sigma_s, the network that made them, and some of the pictures.",
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
    """Raises InputError for settings that make no sense."""
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {options.batch_size}.")
    if options.tf32 and options.backend == "tensorflow":
        raise InputError("--backend tensorflow computes in float32 alone; leave --tf32 out.")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["make_reference"], ["make-reference"]):
        make_reference(*parse_reference(arguments[1:]))
    else:
        compare(*parse_comparison(arguments))


if __name__ == "__main__":
    run_script(main)
