"""The settings of a training run, and how defaults, the method's recipe, a YAML file and flags become one of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from models import METHODS, DiT, method_class
from models.backbone import ObjectiveName, check_objective
from models.token_density import TIMESTEPS
from runtime.config import (
    ArgumentParser,
    InputError,
    checked_values,
    from_mapping,
    load_yaml,
    nearest,
    option,
    to_mapping,
)
from runtime.networks import published_objective

PROFILED = 5
"""Steps that `--profile` records where no number is given."""


@dataclass(frozen=True)
class TrainingSettings:
    model: str = option(
        "DiT-XL/2",
        "backbone: DiT-{S,B,L,XL}/{2,4,8}, DiT-T/2, or in numbers DiT-WIDTHxDEPTHxHEADS/PATCH; SiT-...: the same under flow",
    )
    method: str = option("sparsedit", f"what is done with tokens: {', '.join(METHODS)}")
    pretrained: str = option("none", "weights to start from: a file, a diffusers-layout folder, a hub id, or none")
    feature_path: str = option("features", "folder of extracted latents with a manifest.json, or a fast-DiT feature root")
    image_size: int = option(256, "side of the pictures the latents were made from")
    num_classes: int | None = option(None, "number of classes; none: the manifest's, or 1000 for fast-DiT features")
    objective: ObjectiveName | None = option(
        None, "what is noised and predicted: DiT's diffusion, or flow matching on the linear path; none: as published"
    )
    learn_sigma: bool | None = option(None, "predict the variance beside the noise; none: under ddpm")
    flow_times: Literal["uniform", "logit-normal"] | None = option(
        None, "how flow times are drawn in training; none: logit-normal, more in the middle"
    )
    time_scale: float | None = option(
        None,
        "what the network is given as time at full noise: 1000 as DiT, 1 for the flow time itself as SiT and SPRINT; none: the "
        "resumed run's, that of the checkpoint of ours in --pretrained, or as published",
    )
    results_dir: str = option("results", "folder that holds one folder per run")
    run_name: str | None = option(None, "name of the run's folder; none: MODEL-METHOD-SIZE")
    resume: str = option("auto", "auto: go on from the run's newest checkpoint; none: refuse to continue one; or a file")
    max_steps: int | None = option(None, "optimizer steps of the whole run; none: by --epochs")
    epochs: int = option(1400, "passes over the data, where --max-steps is not given")
    global_batch_size: int = option(256, "samples per optimizer step, over all processes and accumulation")
    gradient_accumulation: int = option(1, "forward passes per optimizer step and process")
    density_groups: int | None = option(
        None,
        "parts of the batch with a token count each, where it varies; none: the resumed run's, or one a process and "
        "accumulation step",
    )
    learning_rate: float = option(1e-4, "AdamW's rate", flags=("--lr",))
    learning_rate_schedule: Literal["constant", "cosine"] = option("constant", "after the warm-up")
    warmup_steps: int = option(0, "steps in which the rate rises from 0")
    adam_beta2: float = option(0.999, "AdamW's decay of squared gradients; lower adapts sooner in short runs")
    weight_decay: float = option(0.0, "AdamW's decay of weights")
    gradient_clip: float | None = option(None, "largest gradient norm; none: not clipped")
    skip_gradient_norm: float | None = option(
        None, "leave out updates whose gradient norm is above this; the method's recipe sets it, none: all count"
    )
    timestep_strata: int = option(
        1, "equal parts of the timesteps, from which the samples of a batch draw in turn; the method's recipe sets it, 1: none"
    )
    min_snr_gamma: float | None = option(None, "weight the loss by min(snr, gamma)/snr; the method's recipe sets it, none: off")
    alignment: float = option(
        0.0,
        "weight of representation alignment (REPA: 0.5), which needs features of extract_features.py --alignment; 0: none",
    )
    alignment_block: int | None = option(
        None, "block, counted from 1, behind which tokens are aligned; none: 8, at most half of the depth"
    )
    label_drop: float = option(0.1, "share of labels replaced by the null class, for guidance")
    ema_decay: float = option(0.9999, "decay of the averaged weights")
    ema_warmup: bool = option(True, "decay min(ema_decay, (1 + step) / (10 + step)): short runs average too")
    seed: int = option(0, "names every random draw of the run", flags=("--global-seed",))
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto",
        "of matrix products, weights are float32 in any case; auto: the launcher's --mixed_precision, else bf16 on a GPU",
    )
    tf32: bool | None = option(None, "of older commands: true is --precision tf32, false is --precision fp32")
    compile: Literal["auto", "none", "default", "max-autotune"] = option(
        "auto", "compile the blocks; takes minutes the first time; auto: default on a GPU, none on a CPU"
    )
    gradient_checkpointing: Literal["none", "selective", "full"] = option(
        "none",
        "what backward computes again instead of storing it; selective: all but matrix products and attention; full: whole "
        "blocks, a third more time; without a value: full",
        bare="full",
        off="none",
    )
    prefetch: bool | None = option(None, "read the next batch while a step computes; none: on a GPU")
    num_workers: int = option(0, "of old commands, without effect: one memory map outruns reading processes")
    log_every: int = option(100, "steps between log lines")
    checkpoint_every: int = option(10_000, "steps between checkpoints", flags=("--ckpt-every",))
    keep_checkpoints: int = option(3, "how many of the last checkpoints stay")
    sample_every: int = option(0, "steps between sample grids from the averaged weights; 0: none, and no VAE is loaded")
    sample_steps: str = option("50", "sampling steps of a grid")
    sample_count: int = option(16, "pictures in a grid")
    cfg_scale: float = option(4.0, "guidance scale of a grid")
    vae: str | None = option(None, "decoder of grids: ema, mse, taesd, pixels or a folder; none: the features' own")
    non_finite_limit: int = option(5, "stop after this many steps in a row whose gradients are not finite")
    profile: int = option(
        0,
        f"record this many steps and write where their time went to the run's folder; without a value: {PROFILED}",
        bare=str(PROFILED),
    )

    @staticmethod
    def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as files of any age hold them: checkpointing was on or off, and a profile may be."""
        meant: Mapping[str, tuple[Any, Any]] = {"gradient_checkpointing": ("none", "full"), "profile": (0, PROFILED)}
        return {
            key: meant[name][value] if isinstance(value, bool) and (name := str(key).replace("-", "_")) in meant else value
            for key, value in settings.items()
        }


OF_DDPM, OF_FLOW = frozenset({"min_snr_gamma"}), frozenset({"flow_times"})
"""Settings that one objective alone has."""

LEAST = {
    1: (
        "image_size",
        "max_steps",
        "epochs",
        "global_batch_size",
        "gradient_accumulation",
        "density_groups",
        "timestep_strata",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_count",
        "non_finite_limit",
        "alignment_block",
    ),
    0: ("warmup_steps", "weight_decay", "sample_every", "profile"),
}
"""The least value of settings that may not be smaller."""

MAY_CHANGE = frozenset(
    {
        "time_scale",  # the network has its own, which is compared
        "feature_path",
        "num_classes",  # the network has its own, which is compared
        "results_dir",
        "run_name",
        "resume",
        "max_steps",
        "epochs",
        "gradient_accumulation",
        "precision",
        "tf32",
        "compile",
        "gradient_checkpointing",
        "prefetch",
        "num_workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_every",
        "sample_steps",
        "sample_count",
        "cfg_scale",
        "vae",
        "non_finite_limit",
        "profile",
    }
)
"""Settings that a resumed run may change: they do not alter which numbers it computes beyond rounding."""


def parse_training(arguments: Sequence[str], prog: str = "train.py") -> tuple[TrainingSettings, dict[str, Any]]:
    """Command line -> (settings, options of the method). Precedence: defaults, the method's recipe, YAML, flags."""
    first = ArgumentParser("", prog)
    first.add_argument("--config")
    first.add_argument("--method")
    known, _ = first.parse_known_args([word for word in arguments if word not in ("-h", "--help")])
    content = load_yaml(known.config) if known.config else {}
    method = method_class(str(known.method or content.get("method", TrainingSettings.method)))
    refuse_options_of_others(arguments, method)
    parser = training_parser(method, prog)
    flags = vars(parser.parse_args(arguments))
    flags.pop("config", None)
    option_names = {field.name for field in fields(method.options_type)}
    given_options = {name: flags.pop(name) for name in option_names & flags.keys()}
    file_settings, file_options = split_yaml(content, known.config or "", method.options_type)
    recipe = dict(method.recipe)
    given = {**file_settings, **checked_values(TrainingSettings, flags, "command line")}
    if "epochs" in given:
        recipe.pop("max_steps", None)
    if objective_of(from_mapping(TrainingSettings, given, "settings")) == "flow":
        for name in OF_DDPM & recipe.keys():
            del recipe[name]
    settings = with_objective(from_mapping(TrainingSettings, {**recipe, **given}, "settings"))
    check(settings)
    return settings, {**file_options, **checked_values(method.options_type, given_options, "command line")}


def objective_of(settings: TrainingSettings) -> ObjectiveName:
    """What is trained for: as asked, or as published for the backbone and the method."""
    return settings.objective or published_objective(settings.model, settings.method)


def with_objective(settings: TrainingSettings) -> TrainingSettings:
    """The settings with an objective and what follows from it. InputError for what another one has."""
    objective = objective_of(settings)
    check_objective(settings.model, objective)
    for name in OF_FLOW if objective == "ddpm" else OF_DDPM:
        if getattr(settings, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is no setting of --objective {objective}; leave it out.")
    return replace(
        settings,
        objective=objective,
        learn_sigma=objective == "ddpm" if settings.learn_sigma is None else settings.learn_sigma,
        flow_times=(settings.flow_times or "logit-normal") if objective == "flow" else None,
    )


def refuse_options_of_others(arguments: Sequence[str], method: type[DiT]) -> None:
    """InputError for a flag that only another method has."""

    def flags(kind: type[DiT]) -> set[str]:
        own = fields(kind.options_type)
        return {flag for field in own for flag in ("--" + field.name.replace("_", "-"), *field.metadata.get("flags", ()))}

    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    for name, kind in METHODS.items():
        if wrong := sorted(given & (flags(kind) - flags(method))):
            raise InputError(f"{wrong[0]} is a flag of --method {name}, which this is not; leave it out, or give the method.")


def training_parser(method: type[DiT], prog: str) -> ArgumentParser:
    """The parser of train.py; the method's own flags are those of `--method`."""
    parser = ArgumentParser(
        "Trains a diffusion transformer, or fine-tunes one whose tokens are sparsified, on extracted latents.\n"
        "The same command continues a run that was stopped. `train.py export CHECKPOINT OUTPUT` writes its weights alone,\n"
        "`train.py plan` says what a network costs.",
        prog,
        epilog="Underscores may stand for dashes in every flag.",
    )
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help="YAML file of settings; flags win over it")
    parser.add_config(TrainingSettings, defaults=method.recipe)
    if fields(method.options_type):
        title = (
            "options of the method (those of --method); not given: as in the run that goes on, or in the checkpoint of ours "
            "and this method in --pretrained, else the default"
        )
        parser.add_config(method.options_type, title)
    return parser


def split_yaml(content: Mapping[str, Any], where: str, options_type: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """A YAML file's settings and, from its group `options`, the method's options, both checked."""
    settings = {key: value for key, value in content.items() if key != "options"}
    names = [field.name for field in fields(TrainingSettings)]
    for key in settings:
        if str(key).replace("-", "_") not in names:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), [*names, 'options'])}")
    options = content.get("options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"{where}: options must be a group of `key: value` lines.")
    return (
        checked_values(TrainingSettings, settings, where),
        checked_values(options_type, options, f"{where}: options"),
    )


def check(settings: TrainingSettings) -> None:
    """InputError for values that no run can use."""
    for least, names in LEAST.items():
        for name in names:
            value = getattr(settings, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
    for name, most in (("global_batch_size", 2**24), ("sample_count", 10_000), ("profile", 100)):
        if getattr(settings, name) > most:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at most {most}.")
    for name in ("label_drop", "ema_decay", "adam_beta2"):
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be between 0 and 1.")
    strata = settings.timestep_strata
    if TIMESTEPS % strata or settings.global_batch_size % strata:
        raise InputError(
            f"--timestep-strata is {strata}; it must divide the {TIMESTEPS} timesteps and --global-batch-size, "
            f"{settings.global_batch_size}, or timesteps would not be drawn alike."
        )
    if not 0 <= settings.alignment < math.inf:
        raise InputError(f"--alignment is {settings.alignment}; it must be at least 0 and finite.")
    if settings.alignment_block is not None and not settings.alignment:
        raise InputError("--alignment-block is for --alignment, which is 0; give a weight such as 0.5, or leave the block out.")
    if not math.isfinite(settings.cfg_scale):
        raise InputError(f"--cfg-scale is {settings.cfg_scale}; it must be finite.")
    for name in ("learning_rate", "gradient_clip", "skip_gradient_norm"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and finite.")


def changed(saved: Mapping[str, Any], settings: TrainingSettings) -> list[str]:
    """Settings that differ from a checkpoint's and may not: "name (saved value, not new value)"."""
    now = to_mapping(settings)
    # A checkpoint may be older than a setting; before density_groups all timesteps had one token count.
    older = TrainingSettings(density_groups=1, method=settings.method, objective="ddpm")
    saved = {**to_mapping(with_objective(older)), **saved}
    for values in (now, saved):
        values["pretrained"] = Path(values["pretrained"]).name  # the file may have moved
    # With a cosine the length of the run decides every step's rate.
    fixed = set(now) - MAY_CHANGE | ({"max_steps", "epochs"} if settings.learning_rate_schedule == "cosine" else set())
    return [f"{name} ({saved[name]}, not {now[name]})" for name in now if name in fixed and saved.get(name) != now[name]]
