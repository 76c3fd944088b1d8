"""Trains a diffusion transformer, or fine-tunes one whose tokens are sparsified, on extracted latents.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py \\
        --model DiT-XL/2 --pretrained DiT-XL-2-512x512.pt --feature-path features --image-size 512
    python train.py plan --image-size 512 --density 0.61:0.86
    python train.py export results/DiT-XL-2-sparsedit-512/checkpoints/0400000.safetensors sparsedit-xl-512.safetensors
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor, nn

from data.features import AlignmentTargets, BatchOrder, FeatureDataset, open_features
from data.latents import Codec, CodecSpec, load_codec, resolve_codec
from data.manifest import ALIGNMENT
from models import Backbone, DiT
from models.weights import LoadingPlan, load
from runtime.alignment import make_alignment, with_alignment_block
from runtime.checkpoint import (
    FOLDER,
    Weights,
    read_weights,
    remove_leftovers,
)
from runtime.compilation import training_execution
from runtime.config import ArgumentParser, InputError, run_script, to_mapping
from runtime.decoding import decode_pictures
from runtime.density_groups import check_groups, groups_line, number_of_groups
from runtime.density_report import density_lines, draw_density, record_density
from runtime.distributed import make_accelerator, promised_processes, set_numerics
from runtime.execution import Execution
from runtime.export import export
from runtime.files import atomic_write, check_new_file, check_writable, lock, write_json
from runtime.logs import say
from runtime.networks import as_ours, build, describe, fit_weights, guidance_line, summary
from runtime.objectives import Objective, make_objective
from runtime.resuming import (
    changes_since,
    check_resumable,
    network_before,
    network_in,
    network_of,
    resume_from,
    saved_header,
)
from runtime.sampling import SamplingSettings, picture_grid, sample_latents, sampled_timesteps
from runtime.seeding import Keys, integers
from runtime.settings import TrainingSettings, parse_training
from runtime.training import Trainer
from runtime.work_report import measured_ratio, probe, record_work


class TrainingData:
    """The features in the order of the run's seed, with their alignment targets where there are any to be used."""

    def __init__(self, features: FeatureDataset, seed: int, batch_size: int, targets: AlignmentTargets | None = None) -> None:
        self.features, self.seed, self.targets = features, seed, targets
        self.order = BatchOrder(seed, len(features), batch_size)

    def __len__(self) -> int:
        return len(self.features)

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        keys, indices = Keys(self.seed, step, positions), self.order.indices(step, positions.numpy())
        batch = self.features.batch(indices, keys, device)
        return batch if self.targets is None else (*batch, self.targets.batch(indices, keys, device))


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked before anything large was made."""

    settings: TrainingSettings  # with the number of density groups
    features: FeatureDataset
    targets: AlignmentTargets | None
    network: DiT  # a blueprint
    objective: Objective
    run: Path
    lock: IO[str] | None  # held by the first process
    resume: Path | None
    state: Mapping[str, Tensor] | None  # pretrained weights, and how they are loaded
    loading: LoadingPlan | None
    origin: str | None
    option_changes: Sequence[str]  # against the checkpoint of the same method that the run starts from
    grid_codec: CodecSpec | None
    header: Mapping[str, Any]


def prepare(settings: TrainingSettings, options: Mapping[str, Any]) -> Prepared:
    """Checks every input. InputError for the first that cannot work."""
    shares = promised_processes() * settings.gradient_accumulation
    if settings.global_batch_size % shares:
        raise InputError(
            f"--global-batch-size {settings.global_batch_size} is not divisible by {promised_processes()} processes x "
            f"{settings.gradient_accumulation} accumulation steps; choose a multiple of {shares}."
        )
    features = open_features(settings.feature_path, settings.image_size, settings.num_classes)
    backbone = Backbone.named(
        settings.model,
        latent_size=features.latent_shape[1:],
        in_channels=features.latent_shape[0],
        num_classes=features.num_classes,
        learn_sigma=settings.learn_sigma,
        label_drop=settings.label_drop,
        objective=settings.objective,
    )
    run = Path(settings.results_dir, settings.run_name or run_name(settings))
    resume = resume_from(settings, run)
    saved = saved_header(resume) if resume else None
    before = network_in(resume, saved) if resume and saved else network_before(settings)
    network = network_of(settings, backbone, options, before)
    targets = features.open_alignment() if settings.alignment else None
    if targets:
        settings = with_alignment_block(settings, network, targets)
    sampled_timesteps(network, grid_sampling(settings))
    objective = make_objective(settings)
    grid_codec = grid_codec_of(settings, features) if settings.sample_every else None
    header = header_of(settings, network, data_header(features, targets))
    groups_before = saved["settings"].get("density_groups", 1) if saved else None
    if saved and not (isinstance(groups_before, int) and groups_before > 0):
        raise InputError(f"{resume}: the checkpoint's header is damaged; copy the file again.")
    groups = number_of_groups(settings.density_groups, groups_before, len(network.training_plans()), shares)
    settings = replace(settings, density_groups=groups)
    share = settings.global_batch_size // shares
    if share % settings.timestep_strata:
        raise InputError(
            f"{share} samples are computed at once (batch {settings.global_batch_size} / {shares}), in which the "
            f"--timestep-strata {settings.timestep_strata} have no equal parts; give a larger --global-batch-size, fewer "
            "--gradient-accumulation steps, or --timestep-strata 1."
        )
    if len(network.training_plans()) > 1 and settings.timestep_strata > 1:
        raise InputError("--timestep-strata is for networks with one token count, and this density has several: its density "
                         "groups spread the timesteps; leave the flag out.")  # fmt: skip
    if resume and saved:
        check_resumable(resume, saved, settings, header)
    check_groups(groups, promised_processes(), settings.gradient_accumulation)
    weights = None if resume or settings.pretrained == "none" else pretrained_weights(settings)
    state, loading = fit_weights(weights, network) if weights else (None, None)
    origin = weights.origin if weights else None
    changes = changes_since(before, network)
    held = hold(settings, run, resume)
    return Prepared(
        settings, features, targets, network, objective, run, held, resume, state, loading, origin, changes, grid_codec, header
    )


def pretrained_weights(settings: TrainingSettings) -> Weights:
    """--pretrained in our conventions."""
    return as_ours(read_weights(settings.pretrained), settings.model, settings.time_scale)


def hold(settings: TrainingSettings, run: Path, resume: Path | None) -> IO[str] | None:
    """Makes the run's folder and, in the first process, keeps every other run out of it until this one ends."""
    for folder in (run, run / FOLDER, run / "samples")[: 3 if settings.sample_every else 2]:
        check_writable(folder, "--results-dir")
    if settings.profile:
        for name in ("trace.json", "table.txt"):
            check_new_file(run / "profile" / name, "--profile")
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    held = lock(run, f"{run} is being trained by another process; wait for it, or give another --run-name.")
    if resume_from(settings, run) != resume:
        raise InputError(f"{run} went on while this run started; give the same command again.")
    remove_leftovers(run)
    return held


def train(settings: TrainingSettings, options: Mapping[str, Any]) -> None:
    """Checks, builds, runs."""
    execution = training_execution(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    precision = execution.precision
    prepared = prepare(settings, options)
    settings = prepared.settings
    accelerator = make_accelerator(precision, settings.gradient_accumulation)
    set_numerics(precision != "fp32")
    codec = None
    if prepared.grid_codec and accelerator.is_main_process:
        codec = load_codec(prepared.grid_codec, accelerator.device)
    torch.manual_seed(settings.seed)
    network, features, run = build(prepared.network), prepared.features, prepared.run
    if prepared.state and prepared.loading:
        load(network, prepared.state, prepared.loading)
        prepared = replace(prepared, state=None)  # gigabytes, times the processes of a machine
    grid = grid_maker(settings, codec, accelerator.device, run) if codec else None
    data = TrainingData(features, settings.seed, settings.global_batch_size, prepared.targets)
    alignment = make_alignment(settings, network, prepared.targets) if prepared.targets else None
    meter = work_meter(accelerator.device, run) if network.work else None
    trainer = Trainer(settings, accelerator, network, prepared.objective, data, run, prepared.header, grid, meter, alignment)
    if prepared.resume:
        trainer.restore(prepared.resume)
    steps = accelerator.gather(torch.tensor([trainer.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise InputError(f"the processes would start at steps {steps}; --results-dir must be one folder that all of them see.")
    if accelerator.is_main_process:
        write_json(run / "config.json", {"settings": to_mapping(settings), **prepared.header})
        for line in opening_lines(prepared, network, trainer, execution):
            say(line)
        if network.plan_varies:
            record_density(network, run / "density.png", sampled_timesteps(network, SamplingSettings()))
    trainer.run()
    # The data-parallel wrapper must not be the process group's last owner: its destructor would join gloo's threads while it
    # holds the interpreter lock that they need, and the process would never end.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def run_name(settings: TrainingSettings) -> str:
    """The name of a run's folder where none is given."""
    return f"{settings.model.replace('/', '-')}-{settings.method}-{settings.image_size}"


def opening_lines(prepared: Prepared, network: DiT, trainer: Trainer, execution: Execution) -> Iterator[str]:
    """What is said before the first step: what is trained, at what cost, on what, how the work is dealt, from what weights."""
    settings, accelerator = prepared.settings, trainer.accelerator
    processes, accumulation = accelerator.num_processes, settings.gradient_accumulation
    yield summary(network, settings.model)
    yield from network.training_lines(trainer.last_step)
    yield from density_lines(network, settings.model, sampled_timesteps(network, SamplingSettings()))
    yield prepared.features.describe()
    yield (
        f"batch {settings.global_batch_size} = {processes} processes x {accumulation} accumulation x "
        f"{settings.global_batch_size // (processes * accumulation)}, {accelerator.device.type}, precision "
        f"{execution.precision}, {trainer.last_step} steps, run folder {prepared.run}"
    )
    if execution.compile != "none":
        yield f"blocks compiled ({execution.compile}): the first steps wait for it"
    if settings.gradient_checkpointing != "none":
        yield f"gradient checkpointing: {settings.gradient_checkpointing}"
    if prepared.targets:
        where = f"weight {settings.alignment:g} behind block {settings.alignment_block}"
        yield f"alignment: {where}, with {prepared.targets.spec.describe()}"
    if len(trainer.intervals) > 1:
        yield groups_line(trainer.groups, processes, accumulation, len(trainer.intervals))
    yield from origin_lines(prepared, trainer.step, execution.note)


def origin_lines(prepared: Prepared, step: int, note: str | None) -> list[str]:
    """What was loaded, what is new, and what is not as asked for."""
    loading = prepared.loading
    if prepared.resume:
        lines = [f"resumed from {prepared.resume} at step {step}"]
    elif loading:
        warnings = (f"WARNING: {warning}" for warning in loading.warnings)
        changes = [f"not as in {prepared.settings.pretrained}: {change}" for change in prepared.option_changes]
        lines = [f"{prepared.origin}: {loading.summary()}", *changes, *loading.notes, *warnings]
    else:
        lines = ["weights newly initialised (--pretrained none)"]
    return lines + ([f"WARNING: {note}"] if note else [])


def header_of(settings: TrainingSettings, network: DiT, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says beside its numbers."""
    described = describe(network, settings.model)
    return {"network": described, "data": data, "versions": versions(), "objective": network.backbone.objective}


def data_header(features: FeatureDataset, targets: AlignmentTargets | None) -> dict[str, Any]:
    """What sampling must know of the data, and what it was."""
    manifest = getattr(features, "manifest", None)
    unused = () if targets else (ALIGNMENT,)  # features may be extracted again, with targets, under a run that has none
    return {
        "count": len(features),
        "image_size": features.image_size,
        "codec": dataclasses.asdict(features.codec),
        "classes": list(manifest.classes) if manifest else None,
        "sha256": {name: value for name, value in manifest.sha256.items() if name not in unused} if manifest else None,
    }


def versions() -> dict[str, str]:
    """The software that made a checkpoint."""
    packages = ("torch", "accelerate", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def grid_codec_of(settings: TrainingSettings, features: FeatureDataset) -> CodecSpec:
    """The decoder of sample grids: the features' own, or --vae. InputError where its latents are of another shape."""
    codec = resolve_codec(settings.vae) if settings.vae else features.codec
    if codec.latent_shape(settings.image_size) != features.latent_shape:
        shape = codec.latent_shape(settings.image_size)
        raise InputError(f"--vae {settings.vae} decodes latents of {shape}, and the features are {features.latent_shape}; give "
                         f"the codec they were made with ({features.codec.name}).")  # fmt: skip
    return codec


def grid_maker(settings: TrainingSettings, codec: Codec, device: torch.device, run: Path) -> Callable[[nn.Module, int], Tensor]:
    """A function from the averaged network and the step to a picture of samples, also written to the run's folder."""
    index, sampling = torch.arange(settings.sample_count), grid_sampling(settings)

    def make(network: Any, step: int) -> Tensor:
        labels = integers(Keys(settings.seed, 0, index), "grid label", network.backbone.num_classes)
        latents = sample_latents(network, sampling, labels, index, settings.seed, device)
        grid = picture_grid(decode_pictures(codec, latents))
        with atomic_write(run / "samples" / f"{step:07d}.png") as temporary:
            Image.fromarray(grid.numpy()).save(temporary, format="png")
        return grid

    return make


def grid_sampling(settings: TrainingSettings) -> SamplingSettings:
    """How the pictures of a grid are sampled."""
    return SamplingSettings(cfg_scale=settings.cfg_scale, num_sampling_steps=settings.sample_steps)


def work_meter(device: torch.device, run: Path) -> Callable[[DiT], Mapping[str, float]]:
    """A function that samples a little from the averaged network, draws what that computed, and says which share it was."""

    def measure(network: DiT) -> Mapping[str, float]:
        work = probe(network, device)
        record_work(network, work, run / "kept.png")
        return {"flops_ratio/sampled": measured_ratio(network, work)}

    return measure


def plan(arguments: list[str]) -> None:
    """`train.py plan ...`: what the network of these settings computes and costs, without features or weights."""
    parser = ArgumentParser("Says what a network costs before there are features or weights; takes every flag of train.py.",
                            "train.py plan", "For latents of other autoencoders than SD's give --vae.")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="PNG to write: sparse tokens and GMACs over the timesteps")
    default = SamplingSettings().num_sampling_steps
    parser.add_argument(
        "--num-sampling-steps", default=default, metavar="TEXT", help=f"as of sample_ddp.py (default: {default})"
    )
    chosen, others = parser.parse_known_args(arguments)
    settings, options = parse_training(others, "train.py plan")
    channels, *latent_size = resolve_codec(settings.vae or "ema").latent_shape(settings.image_size)
    classes = settings.num_classes or 1000
    backbone = Backbone.named(
        settings.model,
        (latent_size[0], latent_size[1]),
        channels,
        classes,
        settings.learn_sigma,
        objective=settings.objective,
    )
    network = network_of(settings, backbone, options, network_before(settings))
    timesteps = sampled_timesteps(network, SamplingSettings(num_sampling_steps=chosen.num_sampling_steps))
    if chosen.output and network.density is None:
        raise InputError(f"--output: --method {settings.method} has no token density to draw; leave the flag out.")
    if chosen.output:
        check_new_file(chosen.output, "--output")
    costs = (
        *network.training_lines(settings.max_steps),
        *density_lines(network, settings.model, timesteps),
        *guidance_line(network),
    )
    print("\n".join((summary(network, settings.model), *costs)))
    if chosen.output:
        draw_density(network, Path(chosen.output), timesteps)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["export"]:
        export(arguments[1:])
    elif arguments[:1] == ["plan"]:
        plan(arguments[1:])
    else:
        train(*parse_training(arguments))


if __name__ == "__main__":
    run_script(main)
