"""Samples many pictures on any number of processes, and packs them for the evaluator.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000 --image-size 512 --seed 1

Started again after a kill, the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from data.latents import Codec, CodecSpec, load_codec
from models import DiT
from models.token_density import TIMESTEPS
from models.work import CountedWork
from runtime.config import ArgumentParser, InputError, from_mapping, option, run_script, to_mapping
from runtime.decoding import make_decoder, resolve_overlap
from runtime.density_report import record_density
from runtime.distributed import make_state
from runtime.execution import Execution, Executor, resolve_execution
from runtime.files import check_new_file, check_writable, lock, sha256, write_json
from runtime.logs import say
from runtime.networks import blueprint, method_name
from runtime.pictures import PictureWriter, pack_pictures, picture_path
from runtime.sampling import (
    MOST_AT_ONCE,
    Checkpoint,
    CheckpointSettings,
    choose_checkpoint,
    density_text,
    draw_labels,
    open_checkpoint,
    sample_latents,
    sampled_timesteps,
    sampling_cost,
)
from runtime.startup import FirstPictures
from runtime.work_report import gather_work, read_work, record_work, save_work, work_lines, work_record

PROTOCOL = "protocol.json"
CIRCUMSTANCES = ("device", "versions", "count", "gmacs_per_pass", "measured", "passes_per_picture", "execution")
"""Entries of a protocol record that may differ within one set."""
WORK = "work.npz"
"""What was counted while the pictures beside it were sampled."""


@dataclass(frozen=True)
class SampleSettings(CheckpointSettings):
    num_fid_samples: int = option(50_000, "number of pictures")
    labels: Literal["random", "balanced"] = option(
        "random", "uniform and independent, as for published scores; or equal counts"
    )
    per_proc_batch_size: int = option(32, "pictures sampled at once by a process")
    overlap_decoding: bool | None = option(
        None, "decode and write a batch while the next is sampled, in the memory of both; none: on a GPU alone"
    )
    sample_dir: str = option("samples", "folder that holds one folder, one npz and one protocol record per sample set")
    sample_name: str | None = option(None, "name of the sample set; none: made from checkpoint and settings")


def sample(settings: SampleSettings) -> None:
    """Checks, then samples this process's blocks; the first process packs."""
    if not 1 <= settings.num_fid_samples < 2**32:
        raise InputError(f"--num-fid-samples is {settings.num_fid_samples}; it must be at least 1, and below 2^32.")
    if not 1 <= settings.per_proc_batch_size <= MOST_AT_ONCE:
        raise InputError(f"--per-proc-batch-size is {settings.per_proc_batch_size}; it must be 1 to {MOST_AT_ONCE}.")
    state = make_state()
    execution = resolve_execution(settings, state.device)
    settings = replace(settings, overlap_decoding=resolve_overlap(settings.overlap_decoding, execution))
    # One process chooses: a training that saves meanwhile could give each of them another newest checkpoint.
    path = broadcast_object_list([choose_checkpoint(settings) if state.is_main_process else None])[0]
    checkpoint, spec = open_checkpoint(settings, str(path))
    settings = settings.under(checkpoint.objective)
    check_writable(settings.sample_dir, "--sample-dir")
    codec = load_codec(spec, state.device)
    checkpoint = checkpoint.build()
    network = checkpoint.network
    executor = Executor(network, execution)
    execution = executor.execution
    target = Path(settings.sample_dir, settings.sample_name or sample_name(settings, checkpoint))
    held, record, counted = None, dict[str, Any](), network.work
    if state.is_main_process:
        check_writable(target, "--sample-dir")
        check_new_file(f"{target}.npz", "--sample-dir")
        held = lock(target, f"{target} is being filled by another process; wait for it, or give another --sample-name.")
        if counted is not None:
            counted = read_work(target / WORK, network.backbone.depth)
        record = protocol(settings, checkpoint, spec, execution) | costs(network, settings, counted)
        begin(target, record, network)
        print("\n".join((*checkpoint.lines(settings), *execution.lines())))
        if network.plan_varies:
            record_density(network, Path(f"{target}.density.png"), sampled_timesteps(network, settings))
        print(
            f"{settings.num_fid_samples} pictures of {checkpoint.image_size} x {checkpoint.image_size} into {target}",
            flush=True,
        )
    state.wait_for_everyone()
    sample_blocks(settings, executor, codec, target, state)
    added = gather_work(network)  # waits for everyone
    state.wait_for_everyone()
    if state.is_main_process:
        if counted is not None and added is not None:
            counted.add(added)
            save_work(counted, target / WORK)  # at once: who packs again samples nothing that could be counted
        packed = Path(f"{target}.npz")
        index = torch.arange(settings.num_fid_samples)
        labels = draw_labels(settings.labels, network.backbone.num_classes, settings.seed, index).numpy()
        pack_pictures(target, settings.num_fid_samples, (checkpoint.image_size,) * 2, packed, labels)
        if counted is not None:
            report_work(network, counted, target, record | costs(network, settings, counted))
        print(f"{packed}: arr_0 ({settings.num_fid_samples}, {checkpoint.image_size}, {checkpoint.image_size}, 3) uint8, "
              f"arr_1 the labels; protocol in {target}.json")  # fmt: skip
    if held:
        held.close()


def sample_blocks(settings: SampleSettings, executor: Executor, codec: Codec, target: Path, state: PartialState) -> None:
    """Samples the blocks of this process. Block b holds the pictures b * batch .. (b + 1) * batch - 1.

    Blocks are fixed, whoever computes them, and the last one is padded: the same batch size gives the same bytes for any
    number of processes. A block with a picture missing is computed whole, and only what is missing is written.
    """
    batch, count, network = settings.per_proc_batch_size, settings.num_fid_samples, executor.network
    blocks = range(state.process_index, -(-count // batch), state.num_processes)
    mine = {block: range(block * batch, min(count, (block + 1) * batch)) for block in blocks}
    missing = {block: [i for i in wanted if not picture_path(target, i).exists()] for block, wanted in mine.items()}
    total, absent = (sum(map(len, parts.values())) for parts in (mine, missing))
    bar = tqdm(
        initial=total - absent,  # what stands already says nothing about speed
        total=total,
        desc="sample" if state.num_processes == 1 else "sample (this process's share)",
        unit=" pictures",
        disable=not state.is_main_process,
        dynamic_ncols=True,
    )
    first: FirstPictures | None = FirstPictures(executor.execution) if state.is_main_process else None

    def deliver(wanted: list[int], start: int, pictures: Tensor) -> None:
        """Pictures of the block's places from `start` on."""
        nonlocal first
        if first is not None:
            say(first.line())
            first = None
        chosen = [i for i in wanted if start <= i % batch < start + len(pictures)]
        for i in chosen:
            writer.write(i, pictures[i % batch - start])
        bar.update(len(chosen))

    with PictureWriter(target) as writer, bar, make_decoder(codec, state.device, bool(settings.overlap_decoding)) as decoder:
        for block, wanted in missing.items():
            if wanted:
                index = torch.arange(block * batch, (block + 1) * batch)
                labels = draw_labels(settings.labels, network.backbone.num_classes, settings.seed, index)
                latents = sample_latents(network, settings, labels, index, settings.seed, state.device, executor)
                decoder.submit(latents, partial(deliver, wanted))


def sample_name(settings: SampleSettings, checkpoint: Checkpoint) -> str:
    """A name that tells sample sets of different settings apart, in DiT's manner."""
    method = method_name(checkpoint.network)
    step = f"step-{checkpoint.step}" if checkpoint.step is not None else Path(checkpoint.path).stem
    name = (
        f"{checkpoint.model.replace('/', '-')}-{method}-{step}-size-{checkpoint.image_size}-cfg-{settings.cfg_scale}"
        f"-{settings.sampler}-{settings.num_sampling_steps}-seed-{settings.seed}"
    )
    if settings.guidance != "classifier-free":
        name += f"-{settings.guidance}"
    if settings.guidance_interval is not None:
        name += "-interval-{:g}-{:g}".format(*settings.guidance_interval)
    asked = checkpoint.asked_density
    if asked is not None:
        # File systems end names at 255 bytes.
        name += f"-density-{asked if len(asked) <= 40 else hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    return re.sub(r"[^\w.-]+", "-", name)


def protocol(settings: SampleSettings, checkpoint: Checkpoint, spec: CodecSpec, execution: Execution) -> dict[str, Any]:
    """Everything a score must name to be reproduced."""
    gpu = torch.cuda.get_device_name(execution.device) if execution.device.type == "cuda" else None
    packages, network = ("torch", "diffusers", "numpy", "pillow"), checkpoint.network
    return {
        "method": method_name(network),
        "model": checkpoint.model,
        "options": to_mapping(network.options),
        "objective": checkpoint.objective,
        "time_scale": network.backbone.time_scale,
        "density": {
            "sampled": density_text(network),
            "trained": checkpoint.trained_density,
            "note": checkpoint.density_note,
        },
        "passes_per_picture": sampling_cost(network, settings).passes,
        "image_size": checkpoint.image_size,
        "num_classes": network.backbone.num_classes,
        "checkpoint": {"path": checkpoint.path, "sha256": hash_of(checkpoint.path), "step": checkpoint.step},
        "weights": checkpoint.kind,
        "guidance": {
            "kind": settings.guidance,
            "scale": settings.cfg_scale,
            "channels": settings.guidance_channels,
            "interval": None if settings.guidance_interval is None else list(settings.guidance_interval),
        },
        "sampler": settings.sampler,
        "steps": settings.num_sampling_steps,
        "codec": to_mapping(spec),
        "labels": settings.labels,
        "count": settings.num_fid_samples,
        "seed": settings.seed,
        "batch_size": settings.per_proc_batch_size,
        "precision": execution.precision,
        "execution": {
            "compile": execution.compile,
            "attention": execution.attention,
            "cuda_graphs": execution.cuda_graphs,
            "packed_weights": execution.packed_weights,
        },
        "device": gpu or "cpu",
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
    }


def costs(network: DiT, settings: SampleSettings, counted: CountedWork | None) -> dict[str, Any]:
    """What a pass cost, for the protocol record: as plans say, or where they cannot, the mean of what was `counted`.

    Passes are those of whole blocks, the padded places of the last one among them, in runs that came to their end. null:
    no run has come to its end yet.
    """
    if counted is None:
        cost = sampling_cost(network, settings)
        return {"gmacs_per_pass": cost.macs / cost.passes / 1e9}
    measured = work_record(network, counted) if counted.passes else None
    return {"gmacs_per_pass": measured and measured["gmacs_per_pass"], "measured": measured}


def report_work(network: DiT, counted: CountedWork, target: Path, record: Mapping[str, Any]) -> None:
    """Prints, draws and records what all runs that filled the set have counted."""
    lines = work_lines(network, counted)
    if not lines:
        lines = ["nothing is measured: the runs that made these pictures were ended before they could say"]
    elif counted.passes < record["passes_per_picture"] * record["count"]:
        lines.append(f"  these are not all passes of {record['count']:,} pictures: a run that is ended early leaves no counts")
    if counted.passes:
        lines.append(f"what was on, layer by timestep: {target}.kept.png")
    print("\n".join(lines))
    record_work(network, counted, Path(f"{target}.kept.png"))
    write_json(target / PROTOCOL, record)
    write_json(Path(f"{target}.json"), record)


def hash_of(path: str) -> str | None:
    """SHA-256 of a checkpoint file; None for folders and hub ids, whose versions the hub names."""
    return sha256(path) if Path(path).is_file() else None


def begin(target: Path, record: Mapping[str, Any], network: DiT) -> None:
    """Writes the protocol record, or checks that the pictures already there were made by the same protocol."""
    beside = ("npz", "density.png", "kept.png")
    for folder, name in ((target, ""), *((target.parent, f"{target.name}.{kind}.") for kind in beside)):
        for leftover in folder.glob(f".{name}*.partial"):
            leftover.unlink()  # what a killed process left half written
    existing = target / PROTOCOL
    if existing.exists():
        try:
            before = identity(upgraded(json.loads(existing.read_text(encoding="utf-8")), network))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{existing} is damaged, so nobody knows how the pictures beside it were made; delete {target}, "
                             "or give another --sample-name.") from None  # fmt: skip
        differ = [key for key, value in identity(record).items() if before.get(key) != value]
        if differ:
            # What "auto" means has changed since older sets, and differs between machines.
            flags = [f"--{key} {before[key]}" for key in differ if key in ("precision", "compile", "attention")]
            flags += [f"--{'' if before[key] else 'no-'}pack-weights" for key in differ if key == "packed_weights"]
            go_on = f"add {' '.join(flags)} to go on with them, or " if len(flags) == len(differ) else ""
            raise InputError(f"{target} holds pictures made with another {', '.join(differ)}; {go_on}give another "
                             "--sample-name or --sample-dir, or delete them.")  # fmt: skip
    elif any(target.glob("*.png")):
        raise InputError(f"{target} holds pictures without a {PROTOCOL}, so nobody knows how they were made; give another "
                         "--sample-name or --sample-dir.")  # fmt: skip
    write_json(existing, record)
    write_json(Path(f"{target}.json"), record)


def upgraded(record: Mapping[str, Any], network: DiT) -> Mapping[str, Any]:
    """An older record in today's terms: what it does not name was not there to choose."""
    plain = {"compile": "none", "attention": "auto", "cuda_graphs": False, "packed_weights": False}
    guidance = {"kind": "classifier-free", "interval": None, **record["guidance"]}
    record = {
        "objective": "ddpm",
        "time_scale": TIMESTEPS,
        **record,
        "execution": plain | record.get("execution", {}),
        "guidance": guidance,
    }
    if "density" in record:
        return record
    # Before token density the options held the grid, which was the density.
    try:
        plan = blueprint(record["method"], network.backbone, record["options"])
        options, density = to_mapping(plan.options), density_text(plan)
    except InputError:  # of another network, as the comparison will say
        options, density = record["options"], None
    return {**record, "options": options, "density": {"sampled": density}}


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the pictures of one set have in common.

    A larger count extends a set, machine and versions are for the reader to judge, and costs follow from the rest. CUDA graphs
    launch what would be launched without them. A checkpoint is its hash and step, wherever it lies, or the path where there is
    no hash; the density it was trained with follows from it.
    """
    kept = {key: record[key] for key in record if key not in CIRCUMSTANCES}
    checkpoint, execution = record["checkpoint"], record["execution"]
    origin = checkpoint["sha256"] or checkpoint["path"], checkpoint["step"]
    ran = {name: execution[name] for name in ("compile", "attention", "packed_weights")}
    return {**kept, **ran, "density": record["density"]["sampled"], "checkpoint": origin}


def main() -> None:
    parser = ArgumentParser(
        "Samples pictures from a checkpoint as PNGs and one npz. Started again, it goes on where it stopped.",
        epilog="Underscores may stand for dashes in every flag.",
    )
    parser.add_config(SampleSettings)
    sample(from_mapping(SampleSettings, vars(parser.parse_args()), "command line"))


if __name__ == "__main__":
    run_script(main)
