"""What a run goes on or starts from: which checkpoint, what it says, and whether the run may continue it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import Backbone, DiT
from runtime.checkpoint import checkpoints, read_header
from runtime.config import InputError, to_mapping
from runtime.networks import blueprint, describe, described, method_name, published_time_scale
from runtime.settings import TrainingSettings, changed


def resume_from(settings: TrainingSettings, run: Path) -> Path | None:
    """The checkpoint to go on from, None for a new run. InputError where `--resume none` would overwrite one."""
    saved = checkpoints(run)
    if settings.resume == "auto":
        return saved[-1] if saved else None
    if settings.resume == "none":
        if saved:
            raise InputError(f"{run} already holds a run at step {int(saved[-1].stem)}; give another --run-name, or leave out "
                             "--resume none to continue it.")  # fmt: skip
        return None
    chosen = Path(settings.resume)
    if not chosen.is_file():
        raise InputError(f"--resume {settings.resume}: no such checkpoint; give a file, auto or none.")
    later = [path for path in saved if chosen.stem.isdigit() and int(path.stem) > int(chosen.stem)]
    if later:
        raise InputError(f"{run} already goes on to step {int(later[-1].stem)}; give another --run-name to branch off from "
                         f"{chosen}.")  # fmt: skip
    return chosen


def saved_header(path: Path) -> Mapping[str, Any]:
    """What a training checkpoint says of its run. InputError where the file is damaged or something else."""
    try:
        header = read_header(path)
    except InputError as error:
        raise InputError(f"{error} Or delete it, and the same command continues from the checkpoint before.") from None
    if header is None or not {"settings", "step"} <= header.keys():
        raise InputError(f"{path} is no training checkpoint; give it as --pretrained to start from its weights.")
    return header


def network_in(path: Path, header: Mapping[str, Any]) -> DiT:
    """The blueprint of the network in a checkpoint of ours. InputError where the header does not describe one."""
    try:
        return described(header["network"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: the checkpoint's header is damaged; copy the file again.") from None


def network_before(settings: TrainingSettings) -> DiT | None:
    """The blueprint of what a new run starts from, where that is a checkpoint of ours."""
    path = Path(settings.pretrained)
    header = read_header(path) if path.suffix == ".safetensors" and path.is_file() else None
    return None if header is None else network_in(path, header)


def network_of(settings: TrainingSettings, backbone: Backbone, given: Mapping[str, Any], before: DiT | None) -> DiT:
    """The blueprint of a run. Options that are not given are those of `before`, a network of the same method; else defaults.

    So is what it embeds as time, which `before` of any method says.
    """
    published = published_time_scale(settings.model, settings.method)
    there = published if before is None else before.backbone.time_scale
    backbone = replace(backbone, time_scale=there if settings.time_scale is None else settings.time_scale)
    if before is None or method_name(before) != settings.method:
        return blueprint(settings.method, backbone, given)
    try:
        return blueprint(settings.method, backbone, {**to_mapping(before.options), **given})
    except InputError as error:
        blueprint(settings.method, backbone, given)  # what is given may be wrong by itself
        raise InputError(f"{error} (What was not given is as in the checkpoint.)") from None


def changes_since(before: DiT | None, network: DiT) -> list[str]:
    """What a network embeds, predicts, and, of the same method, its options, where the one `before` has others: "name (then,
    not now)".
    """
    if before is None:
        return []
    then, now = ({name: getattr(one.backbone, name) for name in ("objective", "time_scale")} for one in (before, network))
    if type(before) is type(network):
        then, now = then | to_mapping(before.options), now | to_mapping(network.options)
    lines = different(then, now)
    return [f"{line}: it learns anew what it predicts" if line.startswith("objective ") else line for line in lines]


def check_resumable(path: Path, saved: Mapping[str, Any], settings: TrainingSettings, now: Mapping[str, Any]) -> None:
    """InputError when the checkpoint was made (`saved`) with settings, a network or data (`now`) that give another run."""
    differences = changed(saved["settings"], settings)
    # Built and described again, the network of an older checkpoint has today's options under today's names.
    network = describe(network_in(path, saved), saved["network"].get("model"))
    for before, part in ((network, "network"), (saved.get("data") or {}, "data")):
        known = {difference.partition(" ")[0] for difference in differences}
        differences += [line for line in different(before, now[part]) if line.partition(" ")[0] not in known]
    if differences:
        raise InputError(f"{path} was made with other settings: {', '.join(differences)}; give a new --run-name to start anew, "
                         "or those settings to continue.")  # fmt: skip


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries of `now` that were otherwise: "name (then, not now)"; groups are named by their entries."""
    lines = []
    for key, value in now.items():
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            lines += different(before[key], value)
        elif before.get(key) != value:
            lines.append(f"{key} ({before.get(key)}, not {value})")
    return lines
