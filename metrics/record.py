"""What belongs to the scores so that another person can judge and repeat them: as JSON, and as a table on the screen."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from metrics.content import content_hash
from metrics.density_coverage import NEIGHBOURS as COVERAGE_NEIGHBOURS
from metrics.features import Features
from metrics.inception_score import SPLIT_SIZE
from metrics.measures import TITLES
from metrics.pictures import PictureBatch
from metrics.precision_recall import NEIGHBOURS
from metrics.scores import Scores
from runtime.config import InputError

_PACKAGES = ("numpy", "scipy", "torch", "pillow")
_OPTIONAL = ("tensorflow", "timm")
READ = "read from the file"


def protocol_of(samples: Path) -> dict[str, Any] | None:
    """The JSON record of how samples were made: SAMPLES.json, or protocol.json in the folder (else beside the file)."""
    path = samples.resolve()
    folder = path if path.is_dir() else path.parent
    for place in (path.with_suffix(".json"), path.with_name(path.name + ".json"), folder / "protocol.json"):
        if place.is_file():
            return read_json(place, f"{place} cannot be read as the samples' protocol record", "mend or move it.")
    return None


def read_json(path: Path, problem: str, remedy: str) -> dict[str, Any]:
    """The keys and values of a JSON file that other programs wrote; NaN and infinity, which some write, become text.

    Raises InputError `problem`, the reason and `remedy` where the file holds anything else, or what no JSON file may hold.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=str)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{problem} ({' '.join(str(error).split())[:200]}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{problem} (it holds {type(content).__name__}, not keys and values); {remedy}")
    return content


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
    return {
        **scores.values,
        **_kernel_deviation(scores),
        "intervals": {key: list(interval) for key, interval in scores.intervals.items()} or None,
        "not_computed": scores.not_computed,
        "reference": dict(reference),
        "samples": dict(samples),
        "network": dict(network) if network else None,
        "settings": dict(settings),
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "seconds": round(seconds, 1),
        "warnings": scores.warnings,
        "protocol": dict(protocol) if protocol else None,
    }


def _kernel_deviation(scores: Scores) -> dict[str, float | None]:
    kernel = scores.kernel
    keys = [key for key in ("kid", "kdd") if kernel and key in scores.values]
    return {f"{key}_deviation": kernel.deviation if kernel and kernel.subsets > 1 else None for key in keys}


def _versions() -> dict[str, str]:
    """Of Python, of what always computes, and of what was loaded for the network."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions | {name: sys.modules[name].__version__ for name in _OPTIONAL if name in sys.modules}


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


def description(batch: PictureBatch, features: Features) -> dict[str, Any]:
    """What a batch is: where it lies, the SHA-256 of its content, how many pictures, and where its statistics come from."""
    pictures = batch.pictures
    maker = batch.network.get("name") if batch.network else "a network that the file does not name"
    return {
        "path": str(batch.path.resolve()),
        "sha256": features.content or content_hash(batch),
        "count": pictures.count if pictures else None,
        "height": pictures.height if pictures else None,
        "width": pictures.width if pictures else None,
        "fid_statistics": READ if batch.pool else "computed from the pictures" if pictures else None,
        "sfid_statistics": READ if batch.spatial else "computed from the pictures" if pictures else None,
        "statistics_by": maker if batch.pool or batch.spatial else None,
        "statistics_count": batch.pool.count if batch.pool else None,
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands on the screen."""
    lines = []
    for role in ("reference", "samples"):
        batch = record[role]
        size = f"{batch['count']:,} pictures of {batch['width']} x {batch['height']}" if batch["count"] else "statistics alone"
        lines += _entry(role, batch["path"], size, *_sources(batch))
    if network := record["network"]:
        lines += _entry(
            "network", f"{network['name']}, {network['backend']}", network["protocol"], f"SHA-256 {network['sha256']}"
        )
    if record["protocol"]:
        lines += [line for key, value in record["protocol"].items() for line in _entry("protocol", _shown(f"{key}: ", value))]
    else:
        lines += _entry("protocol", "no record beside the samples")
    lines.append("-" * 40)
    lines += [_score_line(record, key) for key in TITLES if key in record]
    lines += [f"warning: {sentence}" for sentence in record["warnings"]]
    return "\n".join(lines)


def _sources(batch: Mapping[str, Any]) -> list[str]:
    """Where a batch's statistics come from, in words."""
    sources = {name: batch[f"{name}_statistics"] for name in ("fid", "sfid") if batch[f"{name}_statistics"]}
    shown = " ".join(dict.fromkeys(sources.values())) if len(set(sources.values())) == 1 else ", ".join(
        f"{name} {source}" for name, source in sources.items()
    )  # fmt: skip
    if not sources:
        return []
    made_of = f", made of {batch['statistics_count']:,} pictures" if batch["statistics_count"] else ""
    return [f"statistics {shown}" + (f" by {batch['statistics_by']}{made_of}" if batch["statistics_by"] else "")]


def _score_line(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if value is None:
        return f"{TITLES[key]:<16} not computed: {record['not_computed'][key]}"
    digits = 6 if key in ("kid", "kdd") else 4
    line = f"{TITLES[key]:<16} {value:.{digits}f}"
    if key in ("kid", "kdd"):
        count, size = (record["settings"][name] for name in ("kernel_subsets", "kernel_subset_size"))
        spread = f", standard deviation {record[f'{key}_deviation']:.6f}" if count > 1 else ""
        line += f"   ({count} subset{'s' * (count > 1)} of {size:,}{spread})"
    if (interval := (record["intervals"] or {}).get(key)) is not None:
        line += f"   95 % interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
    return line


def _entry(title: str, *texts: str) -> list[str]:
    return [f"{title if place == 0 else '':<16} {text}" for place, text in enumerate(texts)]


def _shown(key: str, value: Any) -> str:
    """On one line, whatever it holds: a line break or a control character in a file must not pass for a line of ours."""
    text = key + (json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value))
    return "".join(letter if letter.isprintable() else " " for letter in text)
