"""What belongs to the scores so that another person can judge and repeat them: as JSON, and as a table on the screen."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metrics.density_coverage import NEIGHBOURS as COVERAGE_NEIGHBOURS
from metrics.inception_score import SPLIT_SIZE
from metrics.pictures import PictureBatch
from metrics.precision_recall import NEIGHBOURS
from metrics.scores import TITLES, Scores
from runtime.config import InputError

_PACKAGES = ("numpy", "scipy", "torch", "pillow")


def protocol_of(samples: Path) -> dict[str, Any] | None:
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


def make_record(
    reference: Mapping[str, Any],
    samples: Mapping[str, Any],
    scores: Scores,
    network: Mapping[str, str] | None,
    settings: Mapping[str, Any],
    protocol: Mapping[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything that belongs to the scores, fit for JSON. `reference` and `samples` are `description`s of the batches."""
    packages = (*_PACKAGES, "tensorflow-cpu") if network and network["backend"].startswith("TensorFlow") else _PACKAGES
    return {
        **scores.values,
        **{f"{key}_deviation": scores.kernel.deviation for key in ("kid", "kdd") if key in scores.values and scores.kernel},
        "intervals": {key: list(interval) for key, interval in scores.intervals.items()} or None,
        "not_computed": scores.not_computed,
        "reference": dict(reference),
        "samples": dict(samples),
        "network": dict(network) if network else None,
        "settings": dict(settings),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "warnings": scores.warnings,
        "protocol": dict(protocol) if protocol else None,
    }


def settings_of(scores: Scores, batch_size: int, repeats: int) -> dict[str, Any]:
    """The numbers that definitions leave open, as they were chosen here."""
    settings: dict[str, Any] = {
        "neighbours": NEIGHBOURS,
        "inception_score_split": SPLIT_SIZE,
        "coverage_neighbours": COVERAGE_NEIGHBOURS,
        "batch_size": batch_size,
        "bootstrap": repeats,
    }
    if scores.kernel:
        settings |= {"kernel_subsets": scores.kernel.subsets, "kernel_subset_size": scores.kernel.subset_size}
    return settings


def description(batch: PictureBatch, content: str | None) -> dict[str, Any]:
    """What a batch is: where it lies, the SHA-256 of its content, how many pictures, and where its statistics come from."""
    pictures = batch.pictures
    return {
        "path": str(batch.path.resolve()),
        "sha256": content,
        "count": pictures.count if pictures else None,
        "height": pictures.height if pictures else None,
        "width": pictures.width if pictures else None,
        "fid_statistics": "read from the file" if batch.pool else "computed from the pictures" if pictures else None,
        "sfid_statistics": "read from the file" if batch.spatial else "computed from the pictures" if pictures else None,
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands on the screen."""
    lines = []
    for role in ("reference", "samples"):
        batch = record[role]
        size = f"{batch['count']:,} pictures of {batch['width']} x {batch['height']}" if batch["count"] else "statistics alone"
        source = f"; statistics {batch['fid_statistics']}" if batch["count"] and batch["fid_statistics"] else ""
        lines += _entry(role, batch["path"], f"{size}{source}")
    if network := record["network"]:
        lines += _entry(
            "network", f"{network['name']}, {network['backend']}", network["protocol"], f"SHA-256 {network['sha256']}"
        )
    if record["protocol"]:
        lines += [line for key, value in record["protocol"].items() for line in _entry("protocol", f"{key}: {_shown(value)}")]
    else:
        lines += _entry("protocol", "no record beside the samples")
    lines.append("-" * 40)
    lines += [_score_line(record, key) for key in TITLES if key in record]
    lines += [f"warning: {sentence}" for sentence in record["warnings"]]
    return "\n".join(lines)


def _score_line(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if value is None:
        return f"{TITLES[key]:<16} not computed: {record['not_computed'][key]}"
    digits = 6 if key in ("kid", "kdd") else 4
    line = f"{TITLES[key]:<16} {value:.{digits}f}"
    if key in ("kid", "kdd"):
        line += f"   standard deviation of its subsets {record[f'{key}_deviation']:.6f}"
    if (interval := (record["intervals"] or {}).get(key)) is not None:
        line += f"   95 % interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
    return line


def _entry(title: str, *texts: str) -> list[str]:
    return [f"{title if place == 0 else '':<16} {text}" for place, text in enumerate(texts)]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
