"""Two results of one measurement: what got slower, beyond the spread of its rounds?"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config import ArgumentParser, InputError

MAY_DIFFER = ("rounds",)
"""Settings that change how well something is measured, not what."""
RESOLVED = ("precision", "tf32", "compile", "attention", "cuda_graphs", "pack_weights")
"""Flags that "execution" says the outcome of, where it stands: `auto` and what it comes to are the same."""
NOTICED, MANY = 0.02, 5
FASTER, SAME, SLOWER, ALONE = "faster", "same", "SLOWER", "only in one of them"


class Compared(NamedTuple):
    """One row in both results."""

    name: str
    before: float  # seconds, the median
    after: float
    verdict: str


def main(arguments: Sequence[str]) -> int:
    """`benchmark.py compare A.json B.json`: prints a table; the exit code, 1 where something got slower."""
    parser = ArgumentParser(
        "Says what got slower between two results of one measurement, beyond the spread of their rounds: its fastest round is\n"
        "slower than the slowest one before (of five or more the slowest does not count), and the median by more than 2 %.\n"
        "Exit code 1 where something did, 0 otherwise.",
        "benchmark.py compare",
    )
    parser.add_argument("before", help="result before a change: a MEASUREMENT.json of benchmark.py")
    parser.add_argument("after", help="result after it, of the same settings on the same device")
    chosen = parser.parse_args(arguments)
    before, after = read(chosen.before), read(chosen.after)
    check_comparable(chosen.before, chosen.after, before, after)
    found = compared(before["rows"], after["rows"])
    print(show(before, after, found))
    return int(any(row.verdict == SLOWER for row in found))


def read(path: str) -> Mapping[str, Any]:
    """InputError where the file is no result with timings."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; benchmark.py writes its results under --output.") from None
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read as JSON; give a file that benchmark.py wrote.") from None
    try:
        rounds = [value for row in result["rows"].values() for value in row["seconds"]["rounds"]]
        assert all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in rounds)
        assert all(isinstance(result[name], str) for name in ("measured", "device", "date", "torch"))
        assert all(row["seconds"]["rounds"] for row in result["rows"].values())
        assert isinstance(result["settings"], dict)
    except (KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{path} holds no timings of rounds; give a file that benchmark.py wrote.") from None
    return result


def check_comparable(first: str, second: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """InputError naming what was not the same: measurement, device or a setting."""
    for name in ("measured", "device"):
        if before[name] != after[name]:
            raise InputError(
                f"{first} and {second} cannot be compared: {name} is {before[name]!r} in one and {after[name]!r} in the other; "
                "measure both alike."
            )
    settings = {**before["settings"], **after["settings"]}
    ignored = MAY_DIFFER + (RESOLVED if "execution" in settings else ())
    names = [name for name in settings if name not in ignored]
    pairs = {name: (before["settings"].get(name), after["settings"].get(name)) for name in names}
    if differ := [f"{name} {one}, not {other}" for name, (one, other) in pairs.items() if one != other]:
        raise InputError(f"{first} and {second} cannot be compared: {'; '.join(differ)}; measure both with the same settings.")
    if not before["rows"].keys() & after["rows"].keys():
        raise InputError(f"{first} and {second} cannot be compared: they have no row in common; measure both alike.")


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Compared]:
    """Every row that both have, and those that one has alone."""
    found = []
    for name in {**before, **after}:
        one, other = ((rows[name]["seconds"]["rounds"] if name in rows else []) for rows in (before, after))
        found.append(Compared(name, median(before, name), median(after, name), verdict(one, other)))
    return found


def median(rows: Mapping[str, Any], name: str) -> float:
    """Median seconds of a row's rounds; NaN where it is missing."""
    return statistics.median(rows[name]["seconds"]["rounds"]) if name in rows else math.nan


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """Slower or faster only where the two spreads do not overlap and the medians are apart by more than `NOTICED`.

    Of five rounds or more the slowest does not count: a busy moment of the machine would hide any slow-down.
    """
    if not before or not after:
        return ALONE
    (first, last), (first_after, last_after) = spread(before), spread(after)
    change = statistics.median(after) / statistics.median(before) - 1
    if first_after > last and change > NOTICED:
        return SLOWER
    return FASTER if last_after < first and change < -NOTICED else SAME


def spread(rounds: Sequence[float]) -> tuple[float, float]:
    """The fastest and the slowest round that counts."""
    kept = sorted(rounds)[: -1 if len(rounds) >= MANY else None]
    return kept[0], kept[-1]


def show(before: Mapping[str, Any], after: Mapping[str, Any], found: Sequence[Compared]) -> str:
    """The comparison as a table."""
    wide = max(len(row.name) for row in found) + 2
    lines = [
        f"benchmark.py {before['measured']} on {before['device']}: before {before['date']} (torch {before['torch']}), after "
        f"{after['date']} (torch {after['torch']})",
        f"{'':<{wide}}{'before, s':>12}{'after, s':>12}{'change':>10}",
    ]
    for row in found:
        change = "" if row.verdict == ALONE else f"{row.after / row.before - 1:+.1%}"
        seconds = "".join(f"{'' if math.isnan(value) else f'{value:.4f}':>12}" for value in (row.before, row.after))
        lines.append(f"{row.name:<{wide}}{seconds}{change:>10}  {row.verdict}")
    few = min(len(row["seconds"]["rounds"]) for rows in (before["rows"], after["rows"]) for row in rows.values())
    if few < MANY:
        lines.append(f"with {few} rounds on a side the spread is easily left by chance; {MANY} or more --rounds say more")
    return "\n".join(lines)
