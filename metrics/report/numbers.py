"""The parts of a report that are words and numbers: every measure with its source, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import PurePath
from typing import Any

from metrics.measures import MEASURES, Measure
from metrics.report.markup import Markup, joined, tag

_LARGEST = 1e100
"""Beyond it, charts overflow; no score is anywhere near."""


def lookup(record: Any, *keys: str) -> Any:
    """The entry at a path of keys through nested mappings; None where the path ends early."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def finite(value: Any) -> float | None:
    """`value` as a number; None where it is none, or NaN, or infinite."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
    return number if math.isfinite(number) and abs(number) < _LARGEST else None


def shown(value: Any, decimals: int) -> str:
    """A number with so many decimals, or three digits where that would show next to none; a dash where it is no number."""
    number = finite(value)
    if number is None:
        return "–"
    return f"{number:,.{decimals}f}" if number == 0 or abs(number) >= 10 ** (1 - decimals) else f"{number:.3g}"


def name_of(record: Mapping[str, Any], role: str) -> str:
    """The last part of a batch's path, without .npz."""
    path = PurePath(str(lookup(record, role, "path") or role))
    return path.stem if path.suffix == ".npz" else path.name or str(path)


def numbers(record: Mapping[str, Any]) -> Markup:
    """A card per measure that the record names, computed or not."""
    reasons = record.get("not_computed") or {}
    cards = [_card(measure, record) for measure in MEASURES if measure.key in record or measure.key in reasons]
    return tag("dl", *cards, class_="numbers")


def _card(measure: Measure, record: Mapping[str, Any]) -> Markup:
    number = finite(record.get(measure.key))
    parts = [tag("dt", measure.name)]
    if number is None:
        reason = lookup(record, "not_computed", measure.key) or "the value is not a finite number"
        parts.append(tag("dd", f"not computed: {reason}", class_="absent"))
    else:
        exact = tag("data", shown(number, measure.decimals), value=repr(number), title=repr(number))
        parts.append(tag("dd", exact, class_="value"))
        parts += [tag("dd", sentence) for sentence in _spread(measure, record)]
    parts.append(tag("dd", f"{measure.better} is better · {measure.source}", class_="quiet"))
    return tag("div", *parts)


def _spread(measure: Measure, record: Mapping[str, Any]) -> list[str]:
    sentences = []
    ends = [finite(end) for end in lookup(record, "intervals", measure.key) or ()]
    if len(ends) == 2 and None not in ends:
        sentences.append(f"95 % interval {shown(ends[0], measure.decimals)} to {shown(ends[1], measure.decimals)}")
    deviation = finite(record.get(f"{measure.key}_deviation"))
    if deviation is not None:
        sentences.append(f"standard deviation over subsets {shown(deviation, measure.decimals)}")
    return sentences


def protocol(record: Mapping[str, Any]) -> Markup:
    """What produced the numbers: network, batches, settings, versions, and how the samples were made."""
    network, made = record.get("network"), record.get("protocol")
    nothing = tag("p", "No network was run: both batches hold statistics, and which network they are of is not known here.")
    unknown = tag("p", "No protocol record was found beside the samples, so how they were made is unknown.")
    names = {"name": "network", "protocol": "preparation", "sha256": "weights SHA-256"}
    blocks = [
        ("Feature network", listing({names.get(k, k): v for k, v in network.items()}) if network else nothing),
        ("Reference", _batch(record.get("reference"))),
        ("Samples", _batch(record.get("samples"))),
        ("Settings", listing(record.get("settings") or {})),
        ("Versions", listing(record.get("versions") or {})),
        ("How the samples were made", listing(made) if made else unknown),
    ]
    advice = (
        "Numbers of other networks, other weights, other preparation of the pictures or other protocols must not be compared "
        "with these."
    )
    parts = [tag("div", tag("h3", title), content) for title, content in blocks]
    return joined([tag("p", tag("strong", advice)), tag("div", *parts, class_="protocol")])


def _batch(batch: Any) -> Markup:
    if not isinstance(batch, Mapping):
        return tag("p", "not recorded")
    shape = batch.get("width"), batch.get("height")
    count = batch.get("count")
    known: dict[str, Any] = {
        "path": batch.get("path"),
        "SHA-256": batch.get("sha256"),
        "pictures": f"{count:,}" if isinstance(count, int) else "none, statistics alone",
        "size": f"{shape[0]} × {shape[1]} pixels" if None not in shape else None,
        "statistics for FID": batch.get("fid_statistics"),
        "statistics for sFID": batch.get("sfid_statistics"),
    }
    further = {
        key: value
        for key, value in batch.items()
        if key not in ("path", "sha256", "count", "height", "width", "fid_statistics", "sfid_statistics")
    }
    return listing({key: value for key, value in known.items() if value is not None} | further)


def listing(values: Mapping[str, Any]) -> Markup:
    """A mapping as a list of terms, nested mappings as nested lists."""
    rows = [tag("div", tag("dt", str(key).replace("_", " ")), tag("dd", _value(value))) for key, value in values.items()]
    return tag("dl", *rows, class_="listing") if rows else tag("p", "none", class_="quiet")


def _value(value: Any) -> Markup | str:
    if isinstance(value, Mapping):
        return listing(value)
    if isinstance(value, list | tuple):
        if any(isinstance(entry, Mapping | list | tuple) for entry in value):
            return tag("ol", *(tag("li", _value(entry)) for entry in value))
        return ", ".join(str(_value(entry)) for entry in value) or "none"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
