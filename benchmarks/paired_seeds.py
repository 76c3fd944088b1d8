"""Means, spreads and paired differences over seeds, and the words for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

Values = Sequence[Mapping[str, float]]
"""One mapping of measures for each seed."""

CONFIDENCE = 0.95
COLUMNS = ("GMACs, all t", "sampler's t")
SHOWN = {"mse": "error of epsilon", "loss": "held-out loss", "frechet": "Frechet distance"}
"""Measure -> its title. The first is the one to judge by: no weight favours a part of the timesteps."""


def spread(values: Values) -> dict[str, dict[str, Any]]:
    """Each measure's mean and standard deviation (None for one seed) over the seeds, and the values themselves."""
    return {
        name: {
            "mean": statistics.fmean(found),
            "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
            "values": found,
        }
        for name in values[0]
        for found in [[seed[name] for seed in values]]
    }


def comparisons(first: str, second: str, of_first: Values, of_second: Values) -> dict[str, Any]:
    """Differences first - second, paired by seed, of every measure, and a sentence for each; lower is better in all."""
    names = [*of_first[0]]
    found = {name: difference([a[name] - b[name] for a, b in zip(of_first, of_second, strict=True)]) for name in names}
    sentences = [f"{SHOWN[name]}: {verdict(first, second, found[name])}" for name in SHOWN if name in names]
    return {"first": first, "second": second, "differences": found, "sentences": sentences}


def difference(paired: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences, its standard error and 95 % interval by Student's t; both None for a single pair."""
    mean, count = statistics.fmean(paired), len(paired)
    if count < 2:
        return {"mean": mean, "standard_error": None, "interval": None}
    error = statistics.stdev(paired) / math.sqrt(count)
    # With few seeds two standard errors would promise too much: at five, Student's t takes 2.8 of them.
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return {"mean": mean, "standard_error": error, "interval": [mean - reach, mean + reach]}


def verdict(first: str, second: str, found: Mapping[str, Any]) -> str:
    """Whether the difference is more than noise, in words."""
    mean, interval = found["mean"], found["interval"]
    if interval is None:
        return f"{first} minus {second} is {mean:+.3g} in one seed, which says nothing of noise"
    measured = f"{mean:+.3g} +- {found['standard_error']:.2g}, 95 % interval {interval[0]:+.3g} to {interval[1]:+.3g}"
    if interval[0] <= 0 <= interval[1]:
        return f"{first} minus {second} is within noise ({measured})"
    return f"{first} is {'lower (better)' if mean < 0 else 'higher (worse)'} than {second} ({measured})"


def show(result: Mapping[str, Any]) -> str:
    """The result as tables and sentences."""
    settings, rows = result["settings"], result["rows"]
    gamma = "no min-SNR weight" if settings["min_snr_gamma"] is None else f"min-SNR gamma {settings['min_snr_gamma']}"
    trained, tokens = result["count"] - settings["held_out"], " x ".join(map(str, result["tokens"]))
    quarters = [name for name in rows["dense"]["measures"] if name.startswith("loss_at_t/")]
    alone = settings["seeds"] == 1
    seeds = "1 seed" if alone else f"{settings['seeds']} seeds: mean +- standard deviation"
    titles = {arm: "dense (start)" if arm == "dense" else arm for arm in rows}
    wide = max(22, *(len(row["density"] or "") + 2 for row in rows.values()))
    first = f"{'network':<18}{'density':<{wide}}" + "".join(f"{title:>14}" for title in COLUMNS)
    lines = [
        f"{result['model']}, {tokens} tokens, {result['pictures']}: {trained:,} pictures for training, "
        f"{settings['held_out']:,} held out; {result['device']}, torch {result['torch']}",
        f"dense: {settings['pretraining_steps']:,} steps. The others start from it: {settings['steps']:,} steps, "
        f"{settings['gradient_accumulation']} micro-batches a step, {seeds}",
        "",
        first + "".join(f"{title:>22}" for title in SHOWN.values()),
    ]
    for arm, row in rows.items():
        lines.append(f"{titles[arm]:<18}{row['density'] or '':<{wide}}{row['gmacs_all_timesteps']:>14.4g}"
                     f"{row['gmacs_sampled_timesteps']:>14.4g}" + measured(row, SHOWN))  # fmt: skip
    lines += ["", f"{'held-out loss at t':<18}{'':<22}" + "".join(f"{name.partition('/')[2]:>22}" for name in quarters)]
    lines += [f"{titles[arm]:<40}{measured(row, quarters)}" for arm, row in rows.items()]
    if alone:
        lines += ["", "one seed: differences say nothing of noise"]
    else:
        lines += ["", "paired differences over the seeds, with standard error; lower is better"]
        lines += [sentence for compared in result["comparisons"] for sentence in compared["sentences"]]
    lines += [
        "",
        "Dynamic minus fixed in error of epsilon was chosen as the comparison to judge by before any result; the others",
        "explore.",
        "Fixed-grouped: the grid of fixed, with timesteps drawn as dynamic draws them, each micro-batch within one interval.",
        "GMACs: one pass of one picture, the mean over all timesteps and over the sampler's.",
        "Error of epsilon: its mean square, every timestep with equal weight and under its own grid.",
        f"Held-out loss: the training objective, with the variational term and {gamma}.",
        f"Frechet distance: {settings['samples']:,} samples ({settings['sampling_steps']} DDPM steps, guidance "
        f"{settings['cfg_scale']}) to all {result['count']:,} pictures, on {result['compared']}; not an FID.",
    ]
    return "\n".join(lines)


def measured(row: Mapping[str, Any], names: Sequence[str] | Mapping[str, str]) -> str:
    """Columns of mean and standard deviation."""
    return "".join(f"{column(row['measures'][name]):>22}" for name in names)


def column(found: Mapping[str, Any]) -> str:
    """`0.0123 +- 0.0004`, or the mean alone."""
    deviation = found["standard_deviation"]
    return f"{found['mean']:.5g}" + ("" if deviation is None else f" +- {deviation:.2g}")
