"""How a training is compiled: block by block (`--compile`), or as a whole where the launcher asks for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from models import DiT, Plan, checkpoint_blocks, compile_blocks
from runtime.config import InputError
from runtime.execution import Execution, ExecutionSettings, resolve_execution
from runtime.seeding import key_words
from runtime.settings import TrainingSettings


def training_execution(settings: TrainingSettings, device: torch.device) -> Execution:
    """Precision and compilation of a training on `device`. InputError for what cannot run there."""
    chosen = ExecutionSettings(precision=settings.precision, tf32=settings.tf32, compile=settings.compile)
    if launcher_compiles():
        if settings.compile not in ("auto", "none"):
            raise InputError(
                f"--compile {settings.compile} compiles the blocks, and the launcher's --dynamo_backend the whole step; leave "
                "one of them out."
            )
        chosen = replace(chosen, compile="none")
    return resolve_execution(chosen, device)


def launcher_compiles() -> bool:
    """Whether `accelerate launch --dynamo_backend` (or its configuration file) asks for compilation."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").upper() not in ("NO", "")


def prepare_blocks(network: DiT, checkpointing: str, compiled: str) -> None:
    """Checkpoints the blocks ("none", "selective", "full"), then compiles them ("none", "default", "max-autotune")."""
    if checkpointing != "none":
        checkpoint_blocks(network, selective=checkpointing == "selective")
    if compiled != "none":
        compile_blocks(network, compiled, plans_of_training(network))


def plans_of_training(network: DiT) -> list[Plan]:
    """The plans of all intervals of timesteps and all stages of a training."""
    return [plan for stage in network.training_stages() for _, plan in network.training_plans(stage)]


def allow_graphs(accelerator: Accelerator, plans: Sequence[Plan]) -> None:
    """Where the launcher asks for compilation (`accelerate launch --dynamo_backend`): one graph for each signature."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    import torch._dynamo  # a second, which others need not wait

    torch.compiler.assume_constant_result(key_words)
    if plugin.dynamic is None:  # torch's default would make the second grid met a variable, and slow graphs for any grid
        plugin.dynamic = False
    signatures = {plan.signature for plan in plans}
    # Beyond its limit, of 8, torch goes back to running uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(signatures))
