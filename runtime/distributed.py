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


def choose_precision(requested: str, tf32: bool | None, device: torch.device) -> tuple[str, str | None]:
    """("fp32", "tf32", "bf16" or "fp16", a sentence to print when it is not what was asked for).

    "auto" takes the launcher's `--mixed_precision` fp16 or bf16; otherwise what `tf32` says; otherwise bf16 on a `device`
    of CUDA's that has it, float32 elsewhere. `tf32` is DiT's flag: float32 storage, products rounded to TF32 or not.
    """
    # accelerate says "no" also when nobody asked: that must not make float32 the default on a GPU.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("no", "")
    gpu = device.type == "cuda"
    if requested == "auto":
        full = None if tf32 is None else "tf32" if tf32 else "fp32"
        requested = launched or full or ("bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32")
    elif tf32 is not None and requested == ("fp32" if tf32 else "tf32"):
        raise InputError(
            f"--precision {requested} and {'--tf32' if tf32 else '--no-tf32'} contradict each other; leave one out."
        )
    if requested not in ("fp32", "tf32", "bf16", "fp16"):
        raise InputError(f"precision {requested!r} is not supported; choose fp32, tf32, bf16 or fp16.")
    if requested in ("fp16", "tf32") and not gpu:
        return "fp32", f"{requested} needs a CUDA device and this is {device.type}: computed in float32."
    return requested, None


def make_accelerator(precision: str, gradient_accumulation: int) -> Accelerator:
    """The accelerator for training in a precision of `choose_precision`'s.

    Refuses to start when the launcher promises more processes than joined.
    """
    accelerator = Accelerator(
        # Without this a plain Accelerator on a host without GPU makes every launched process an unrelated run of its own.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if precision in ("fp32", "tf32") else precision,
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
