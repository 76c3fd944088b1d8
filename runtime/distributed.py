"""Processes and devices: accelerate set up so that the commands of a GPU cluster also run on a machine without GPU."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from runtime.config import InputError

PATIENCE = timedelta(hours=24)
"""How long a process waits for the others. The default of ten minutes kills runs in which one rank packs or writes."""


def promised_processes() -> int:
    """How many processes the launcher's environment speaks of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_precision(requested: str) -> tuple[str, str | None]:
    """(accelerate's name of the precision, a sentence to print when it is not what was asked for).

    "auto" takes the launcher's `--mixed_precision` fp16 or bf16; otherwise bf16 on a GPU that has it, float32 elsewhere.
    """
    # accelerate says "no" also when nobody asked: that must not make float32 the default on a GPU.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("no", "")
    gpu = torch.cuda.is_available()
    if requested == "auto":
        requested = launched or ("bf16" if gpu and torch.cuda.is_bf16_supported() else "no")
    requested = {"fp32": "no"}.get(requested, requested)
    if requested not in ("no", "bf16", "fp16"):
        raise InputError(f"precision {requested!r} is not supported; choose fp32, bf16 or fp16.")
    if requested == "fp16" and not gpu:
        return "no", "fp16 needs a GPU and this machine has none: training runs in float32."
    return requested, None


def make_accelerator(mixed_precision: str, gradient_accumulation: int) -> Accelerator:
    """The accelerator for training. Refuses to start when the launcher promises more processes than joined."""
    accelerator = Accelerator(
        # Without this a plain Accelerator on a host without GPU makes every launched process an unrelated run of its own.
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # spares a copy of all gradients
        ],
    )
    refuse_unrelated_processes(accelerator.num_processes)
    return accelerator


def make_state() -> PartialState:
    """Device, rank and barrier for sampling. Refuses to start as `make_accelerator` does."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    refuse_unrelated_processes(state.num_processes)
    return state


def set_numerics(tf32: bool) -> None:
    """How a GPU computes: TF32 products or full float32, and convolutions that give the same bytes each time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = True


def refuse_unrelated_processes(joined: int) -> None:
    """InputError when the environment names more processes than joined: they would write the same files."""
    promised = promised_processes()
    if promised != joined:
        raise InputError(
            f"the launcher started {promised} processes but only {joined} joined this run; start with `torchrun "
            f"--nproc_per_node={promised}` or `accelerate launch --multi_gpu --num_processes {promised}`, or run one process."
        )
