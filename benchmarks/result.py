"""Results: one form for all measurements, in JSON, as a table and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import device_name
from benchmarks.timing import Timing
from runtime.config import InputError
from runtime.files import atomic_write, write_json

Row = dict[str, Any]
Result = dict[str, Any]

COLUMNS = {
    "images_per_second": ("images/s", ".4g"),
    "ms_per_step": ("ms/step", ".4g"),
    "gmacs": ("GMACs", ".4g"),
    "tflops": ("TFLOP/s", ".4g"),
    "share_of_ceiling": ("of ceiling", ".1%"),
    "peak_memory_gib": ("memory, GiB", ".3f"),
}
"""Field of a row -> its title and how it is written. Fields that no row has are left out."""
BAR_COLOR, BASELINE_COLOR = "#1f5fa8", "0.55"


@dataclass(frozen=True)
class Work:
    """What one run of a contestant gets done. None: does not apply."""

    images: float | None = None  # pictures that are finished, each through all its steps
    steps: float | None = None
    gmacs: float | None = None  # of one picture and pass, the mean over the passes
    total_gmacs: float | None = None  # of the whole run
    precision: str | None = None  # of its matrix products: which ceiling it is compared with
    memory_gib: float | None = None  # held beside what a run adds: weights


def row(timing: Timing, work: Work, baseline: Timing | None, ceiling: Mapping[str, float] | None = None) -> Row:
    """One contestant. "ratio" is its speed against the baseline: the median of the ratios of the single rounds."""
    found: Row = {"seconds": {"median": timing.median, "fastest": timing.fastest, "slowest": timing.slowest,
                              "rounds": list(timing.rounds)}}  # fmt: skip
    if work.images is not None:
        found["images_per_second"] = work.images / timing.median
    if work.steps is not None:
        found["ms_per_step"] = 1000 * timing.median / work.steps
    if work.gmacs is not None:
        found["gmacs"] = work.gmacs
    if work.total_gmacs is not None:
        found["tflops"] = 2 * work.total_gmacs / 1000 / timing.median
        if work.precision in (ceiling or {}):
            found["share_of_ceiling"] = found["tflops"] / (ceiling or {})[str(work.precision)]
    if work.memory_gib is not None:
        found["peak_memory_gib"] = work.memory_gib + timing.added_gib
    if baseline is not None:
        speeds = timing.speeds(baseline)
        found["ratio"] = {"median": statistics.median(speeds), "fastest": max(speeds), "slowest": min(speeds)}
    return found


def rows_of(
    timings: Mapping[str, Timing], works: Mapping[str, Work], baseline: str, ceiling: Mapping[str, float] | None = None
) -> dict[str, Row]:
    """All contestants of one measurement; without ratios where the baseline did not run.

    Where they finish different numbers of pictures in a round, the baseline's time is that for as many as the other's.
    """

    def base_for(name: str) -> Timing | None:
        images, theirs = works[name].images, works[baseline].images if baseline in works else None
        base = timings.get(baseline)
        return base if base is None or not images or not theirs else base.part(theirs / images)

    return {name: row(timing, works[name], base_for(name), ceiling) for name, timing in timings.items()}


def headed(measured: str, command: str, body: Mapping[str, Any]) -> Result:
    """The common form: what was measured, how, when and where, then `body` with "settings", "rows" and, if any, "ceiling".

    The settings name the kind of "device" where it is not the CPU.
    """
    device = torch.device(body["settings"].get("device", "cpu"))
    return {
        "measured": measured,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        **body,
    }


def heading(result: Mapping[str, Any]) -> list[str]:
    """Where and how it was measured; the ceilings."""
    rounds = next(iter(result["rows"].values()))["seconds"]["rounds"]
    lines = [f"{result['device']}, torch {result['torch']}, median of {len(rounds)} rounds"]
    if result.get("ceiling"):
        reached = ", ".join(f"{name} {value:.4g} TFLOP/s" for name, value in result["ceiling"].items())
        lines.append(f"ceiling, a large matrix product: {reached}")
    return lines


def table(rows: Mapping[str, Row], titles: Mapping[str, str] | None = None) -> list[str]:
    """The rows as lines; a ratio above 1 is faster than the baseline, whose own is 1. `titles` renames columns."""
    wide = max(len(name) for name in rows) + 2
    kept = [name for name in COLUMNS if any(name in found for found in rows.values())]
    heads = [(titles or {}).get(name, COLUMNS[name][0]) for name in kept]
    lines = [f"{'':<{wide}}{'seconds':>10}{'fastest':>10}{'slowest':>10}" + "".join(f"{head:>13}" for head in heads)]
    if any("ratio" in found for found in rows.values()):
        lines[0] += f"{'speed':>9}{'(rounds)':>16}"
    for name, found in rows.items():
        seconds = found["seconds"]
        line = f"{name:<{wide}}" + "".join(f"{seconds[key]:>10.4f}" for key in ("median", "fastest", "slowest"))
        for key in kept:
            line += f"{format(found[key], COLUMNS[key][1]) if key in found else '':>13}"
        if "ratio" in found:
            ratio = found["ratio"]
            spread = f"{ratio['slowest']:.2f} to {ratio['fastest']:.2f}"
            line += f"{ratio['median']:>7.2f} x{spread:>16}"
        lines.append(line)
    return lines


def store(result: Result, folder: Path) -> list[Path]:
    """Writes MEASUREMENT.json and MEASUREMENT.png into `folder`; the paths."""
    paths = [folder / f"{result['measured']}{ending}" for ending in (".json", ".png")]
    write_json(paths[0], result)
    draw(result, paths[1])
    return paths


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each row, with the spread of its rounds: images per second, or where there are none speed or seconds."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{path} needs matplotlib, which cannot be imported; run `pip install -e .` again.") from None
    rows = result["rows"]
    title, bars = bars_of(rows, result.get("counted", "images"))
    # Without pyplot there is no state that other code in the process could see, and no display is asked for.
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(rows)), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    low, middle, high = zip(*bars, strict=True)
    errors = [[m - smallest for m, smallest in zip(middle, low, strict=True)],
              [largest - m for m, largest in zip(middle, high, strict=True)]]  # fmt: skip
    colors = [BASELINE_COLOR if found.get("ratio", {}).get("median") == 1 else BAR_COLOR for found in rows.values()]
    axes.barh(range(len(rows)), middle, xerr=errors, color=colors, capsize=3)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(title)
    for place, (name, largest) in enumerate(zip(rows, high, strict=True)):
        ratio = rows[name].get("ratio")
        axes.text(
            largest, place, f"  {plain_number(middle[place])}" + (f"  ({ratio['median']:.2f} x)" if ratio else ""), va="center"
        )
    axes.set_xlim(0, max(high) * 1.35)
    axes.set_title(caption(result), fontsize=9)
    with atomic_write(path) as temporary:
        canvas.print_png(temporary, metadata={"Software": None})


def caption(result: Mapping[str, Any]) -> str:
    """What was measured, of what and how, and where."""
    settings = result["settings"]
    latent = settings.get("latent")
    size = "x".join(map(str, latent)) if latent else settings.get("image_size")
    facts = [settings.get("model"), settings.get("density") and f"density {settings['density']}", size and f"at {size}",
             settings.get("batch_size") and f"batch {settings['batch_size']}",
             settings.get("execution") or settings.get("precision")]  # fmt: skip
    return "\n".join((f"benchmark.py {result['measured']}: {result['device']}, {result['date'][:10]}",
                      ", ".join(str(fact) for fact in facts if fact)))  # fmt: skip


def plain_number(value: float) -> str:
    """Four digits, without exponents."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def bars_of(rows: Mapping[str, Row], counted: str = "images") -> tuple[str, Sequence[tuple[float, float, float]]]:
    """The title of the axis, and for each row the smallest, middle and largest value of its rounds."""
    values = list(rows.values())
    if all("images_per_second" in found for found in values):
        bars = []
        for found in values:
            seconds, rate = found["seconds"], found["images_per_second"]
            images = rate * seconds["median"]
            bars.append((images / seconds["slowest"], rate, images / seconds["fastest"]))
        return f"{counted} per second", bars
    if all("ratio" in found for found in values):
        return "speed against the baseline", [
            (found["ratio"]["slowest"], found["ratio"]["median"], found["ratio"]["fastest"]) for found in values
        ]
    return "seconds", [
        (found["seconds"]["fastest"], found["seconds"]["median"], found["seconds"]["slowest"]) for found in values
    ]
