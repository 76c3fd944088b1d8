"""Every score of one batch of samples against one reference, computed from their features."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.bootstrap import Interval, frechet_interval, inception_score_interval, kernel_interval, mean_interval
from metrics.density_coverage import NEIGHBOURS as DENSITY_NEIGHBOURS
from metrics.density_coverage import DensityCoverage, density_coverage
from metrics.density_coverage import pair_count as density_pair_count
from metrics.features import Features
from metrics.frechet import Statistics, frechet_distance, rank_of
from metrics.inception_score import inception_score
from metrics.kernel_distance import SUBSETS, KernelDistance, kernel_distance
from metrics.measures import TITLES
from metrics.precision_recall import NEIGHBOURS, RADII_NAME, Covered, covered, neighbour_radii

SCORES_OF = {
    "FID": ("fid", "sfid", "inception_score", "precision", "recall", "kid", "density", "coverage"),
    "FDD": ("fdd", "precision", "recall", "kdd", "density", "coverage"),
}
"""What a network's distance is called -> the scores its features give."""


@dataclass
class Scores:
    """The numbers, None where one could not be computed, and in words why not."""

    values: dict[str, float | None] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    covered: Covered | None = None
    density: DensityCoverage | None = None
    kernel: KernelDistance | None = None

    def leave_out(self, keys: Collection[str], reason: str) -> None:
        """Records that `keys` could not be computed, and why."""
        for key in keys:
            self.values[key], self.not_computed[key] = None, reason
            self.intervals.pop(key, None)


def score(
    reference: Features,
    samples: Features,
    head: NDArray[np.float32] | None,
    wanted: Collection[str],
    repeats: int,
    device: torch.device,
) -> Scores:
    """The scores named in `wanted` (keys of `TITLES`), with 95 % intervals of `repeats` resamplings where that is above 0.

    `head` (D, classes) gives class logits, for the Inception Score; distances between pictures are computed on `device`.
    """
    scores = Scores()
    _frechet(scores, {"fid", "fdd"} & set(wanted), reference.pool_statistics, samples.pool_statistics, "mu and sigma")
    _frechet(scores, {"sfid"} & set(wanted), reference.spatial_statistics, samples.spatial_statistics, "mu_s and sigma_s")
    if "inception_score" in wanted:
        _inception_score(scores, samples.pool, head)
    of_both = [key for key in wanted if key not in ("fid", "fdd", "sfid", "inception_score")]
    if reference.pool is None or samples.pool is None:
        role = "reference" if reference.pool is None else "sample"
        scores.leave_out(of_both, f"the {role} batch holds statistics alone, no pictures")
    else:
        _pairwise(scores, of_both, reference, samples, device)
    if repeats and samples.pool is not None:
        _intervals(scores, reference, samples.pool, head, repeats, device)
    infinite = [key for key, value in scores.values.items() if value is not None and not math.isfinite(value)]
    scores.leave_out(infinite, "the result is not a finite number; the statistics or the class weights hold absurd values")
    scores.values = {key: scores.values[key] for key in TITLES if key in scores.values}
    return scores


def _frechet(scores: Scores, keys: set[str], reference: Statistics | None, samples: Statistics | None, stored_as: str) -> None:
    for key in keys:
        if reference is None or samples is None:
            scores.leave_out([key], f"a batch holds neither pictures nor {stored_as}")
            continue
        scores.values[key] = frechet_distance(reference, samples)
        for role, statistics in (("reference", reference), ("sample", samples)):
            if why := _deficiency(statistics):
                scores.warnings.append(f"{TITLES[key]}: the {role} batch {why}; the value is biased upwards and not comparable "
                                       "with published ones (50,000 samples).")  # fmt: skip


def _deficiency(statistics: Statistics) -> str | None:
    """Why a batch's covariance is of too few pictures, in words; None where it is not."""
    dimensions = len(statistics.mean)
    if statistics.count is not None:
        few = statistics.count <= dimensions
        text = f"holds {statistics.count:,} pictures, too few for a covariance over {dimensions:,} feature dimensions"
        return text if few else None
    rank = rank_of(statistics)
    text = f"has a covariance of rank {rank:,} over {dimensions:,} feature dimensions, as from too few pictures"
    return text if rank < dimensions else None


def _inception_score(scores: Scores, pool: NDArray[np.float32] | None, head: NDArray[np.float32] | None) -> None:
    if pool is None:
        scores.leave_out(["inception_score"], "the sample batch holds statistics alone, no pictures")
    elif head is None:
        scores.leave_out(["inception_score"], "the weights file holds no class head")
    else:
        scores.values["inception_score"] = inception_score(pool, head)


def _pairwise(
    scores: Scores, keys: Collection[str], of_reference: Features, of_samples: Features, device: torch.device
) -> None:
    """The scores that look at single pictures of both batches."""
    reference, samples = of_reference.pool, of_samples.pool
    assert reference is not None
    assert samples is not None
    counts = len(reference), len(samples)
    if _computable(scores, keys, ("precision", "recall"), counts, (NEIGHBOURS + 1, NEIGHBOURS + 1)):
        radii = _radii(of_reference, "reference", device), _radii(of_samples, "samples", device)
        with _bar("precision and recall", "pair", len(reference) * len(samples)) as bar:
            scores.covered = covered(reference, samples, progress=bar.update, device=device, radii=radii)
        _means(scores, keys, {"precision": scores.covered.samples, "recall": scores.covered.references})
    if distances := _computable(scores, keys, ("kid", "kdd"), counts, (2, 2)):
        with _bar("kernel distance", "subset", SUBSETS) as bar:
            scores.kernel = kernel_distance(reference, samples, progress=bar.update, device=device)
        scores.values |= dict.fromkeys(distances, scores.kernel.mean)
    if _computable(scores, keys, ("density", "coverage"), counts, (DENSITY_NEIGHBOURS + 1, 1)):
        with _bar("density and coverage", "pair", density_pair_count(len(reference), len(samples))) as bar:
            scores.density = density_coverage(reference, samples, progress=bar.update, device=device)
        _means(scores, keys, {"density": scores.density.density, "coverage": scores.density.coverage})


def _computable(
    scores: Scores, keys: Collection[str], group: tuple[str, ...], counts: tuple[int, int], least: tuple[int, int]
) -> list[str]:
    """The `keys` that are of `group`; left out, and none, where (reference, samples) hold too few pictures for them."""
    wanted = [key for key in group if key in keys]
    for role, count, needed in zip(("reference", "sample"), counts, least, strict=True):
        if wanted and count < needed:
            scores.leave_out(wanted, f"the {role} batch has too few pictures ({count}; at least {needed} are needed)")
            return []
    return wanted


def _radii(features: Features, role: str, device: torch.device) -> NDArray[np.float32]:
    """The radii of a batch's balls: the costliest part of precision and recall, found in the cache the next time."""
    pool = features.pool
    assert pool is not None

    def compute() -> NDArray[np.float32]:
        with _bar(f"{role}: nearest neighbours", "pair", len(pool) ** 2) as bar:
            return neighbour_radii(pool, progress=bar.update, device=device)

    return features.kept(RADII_NAME, compute)


def _intervals(
    scores: Scores,
    reference: Features,
    samples: NDArray[np.float32],
    head: NDArray[np.float32] | None,
    repeats: int,
    device: torch.device,
) -> None:
    """The intervals of the scores that stand; `metrics.bootstrap` says why sFID, recall and coverage have none."""
    for key in ("fid", "fdd"):
        distance = scores.values.get(key)
        if distance is not None and reference.pool_statistics is not None:
            with _bar(f"{TITLES[key]} interval", "resampling", repeats) as bar:
                scores.intervals[key] = frechet_interval(
                    reference.pool_statistics, samples, distance, repeats, progress=bar.update, device=device
                )
    inception = scores.values.get("inception_score")
    if inception is not None and head is not None:
        scores.intervals["inception_score"] = inception_score_interval(samples, head, inception, repeats=repeats)
    if scores.covered and "precision" in scores.values:
        scores.intervals["precision"] = mean_interval(scores.covered.samples, repeats)
    if scores.density and "density" in scores.values:
        scores.intervals["density"] = mean_interval(scores.density.density, repeats)
    for key in ("kid", "kdd"):
        if scores.kernel and key in scores.values and reference.pool is not None:
            interval = kernel_interval(scores.kernel, len(reference.pool), len(samples))
            scores.intervals |= {key: interval} if interval else {}


def _means(scores: Scores, keys: Collection[str], per_picture: Mapping[str, NDArray[np.bool_] | NDArray[np.float32]]) -> None:
    scores.values |= {key: float(values.mean(dtype=np.float64)) for key, values in per_picture.items() if key in keys}


def _bar(title: str, unit: str, total: int) -> tqdm:
    return tqdm(total=total, unit=unit, unit_scale=unit == "pair", desc=title, dynamic_ncols=True)
