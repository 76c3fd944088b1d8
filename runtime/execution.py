"""How a network is executed when it samples: precision, compiled blocks, attention kernel, CUDA graphs. Never what it computes.

What is not asked for is what pays on the device: on a CPU packed weights alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import DiT, Plan, compile_blocks
from models.layers import Float32Linear
from models.token_density import TIMESTEPS
from runtime.config import InputError, option
from runtime.cuda_graphs import CudaCapture, PlanGraphs
from runtime.distributed import choose_precision, set_numerics
from runtime.packed_weights import can_pack, pack_linears

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The type of matrix products; fp8 rounds the operands of some of them further."""

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class ExecutionSettings:
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = option(
        "auto",
        "of matrix products; tf32: as published; fp8: newer GPUs, with torchao; auto: the launcher's --mixed_precision, else "
        "bf16 on a GPU that has it, else fp32",
    )
    tf32: bool | None = option(None, "of DiT's commands: true is --precision tf32, false is --precision fp32")
    compile: Literal["auto", "none", "default", "max-autotune"] = option(
        "auto", "compile the blocks; takes a minute the first time; auto: default on a GPU, none on a CPU"
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = option(
        "auto", "attention kernel; auto: torch's choice for the device"
    )
    cuda_graphs: bool = option(True, "on a GPU, record what a step launches once for each plan, and replay it")
    pack_weights: bool | None = option(
        None, "on a CPU, in fp32 without compilation: lay weights out once as products read them; none: where that can be"
    )


@dataclass(frozen=True)
class Execution:
    """`ExecutionSettings` resolved for one device."""

    device: torch.device
    precision: str = "fp32"  # fp32, tf32, bf16, fp16 or fp8
    compile: str = "none"  # none, default or max-autotune
    attention: str = "auto"
    cuda_graphs: bool = False
    packed_weights: bool = False
    note: str | None = None  # where something is not as asked for

    def __str__(self) -> str:
        compiled = "blocks not compiled" if self.compile == "none" else f"blocks compiled ({self.compile})"
        kernel = "" if self.attention == "auto" else f", {self.attention} attention"
        parts = (("CUDA graphs", self.cuda_graphs), ("weights packed", self.packed_weights))
        return f"{self.device.type}, {self.precision}, {compiled}{kernel}" + "".join(f", {name}" for name, on in parts if on)

    def lines(self) -> list[str]:
        """What is printed before sampling."""
        return [f"execution: {self}", *([] if self.note is None else [f"WARNING: {self.note}"])]


def resolve_execution(settings: ExecutionSettings, device: torch.device) -> Execution:
    """What `settings` mean on `device`. InputError for what cannot run there."""
    gpu = device.type == "cuda"
    if settings.precision == "fp8":
        check_fp8(device)
    precision, note = choose_precision("bf16" if settings.precision == "fp8" else settings.precision, settings.tf32, device)
    compiled = settings.compile
    if compiled == "auto":
        compiled = "default" if gpu and importlib.util.find_spec("triton") else "none"
    if compiled != "none":
        check_compiler(device)
    check_attention(settings.attention, precision, device)
    return Execution(
        device,
        precision="fp8" if settings.precision == "fp8" else precision,
        compile=compiled,
        attention=settings.attention,
        cuda_graphs=gpu and settings.cuda_graphs,
        packed_weights=resolve_packing(settings.pack_weights, device, precision, compiled),
        note=note,
    )


def resolve_packing(asked: bool | None, device: torch.device, precision: str, compiled: str) -> bool:
    """Whether weights are packed. InputError where they are to be and cannot."""
    possible = device.type == "cpu" and precision == "fp32" and compiled == "none" and can_pack()
    if asked and not possible:
        raise InputError("--pack-weights is for a CPU with oneDNN, --precision fp32 and --compile none; leave it out.")
    return possible if asked is None else asked


def check_compiler(device: torch.device) -> None:
    """InputError where torch has nothing to compile with."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError("--compile needs triton, which is not installed; install it, or give --compile none.")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError("--compile needs a C++ compiler, and none is found; install g++, or give --compile none.") from None


def check_attention(kernel: str, precision: str, device: torch.device) -> None:
    """InputError unless the device has the kernel, for what it multiplies in this precision."""
    there = {"cpu": ("auto", "flash", "math"), "cuda": ("auto", *KERNELS)}.get(device.type, ("auto",))
    if kernel not in there:
        raise InputError(f"--attention {kernel} does not exist on {device.type}; choose {' or '.join(there)}.")
    if device.type == "cuda" and kernel in ("cudnn", "flash") and precision not in HALF:
        raise InputError(
            f"--attention {kernel} takes no float32 on a GPU, and --precision is {precision}; choose bf16 or fp16, "
            "or --attention efficient."
        )


def check_fp8(device: torch.device) -> None:
    """InputError unless the device multiplies in fp8 and torchao is installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError("--precision fp8 needs a GPU that multiplies in it (Ada, Hopper or newer); choose bf16.")
    if importlib.util.find_spec("torchao") is None:
        raise InputError('--precision fp8 needs torchao; pip install -e ".[fp8]", or choose bf16.')


class Executor:
    """A network ready to sample: `executor(x, t, y, plan, index)` as the network's own forward.

    The network's weights are converted in place; it can be sampled from alone afterwards. TF32 is a setting of the process,
    and torch hands compiled blocks to any network of the same shapes whatever its attention kernel: the executors of one
    process share both.
    """

    def __init__(self, network: DiT, execution: Execution) -> None:
        # A pass whose sizes depend on what it sees cannot be recorded.
        if execution.cuda_graphs and network.work is not None:
            note = "CUDA graphs are off: the sizes of this network's products depend on what it sees."
            note = note if execution.note is None else f"{execution.note} {note}"
            execution = replace(execution, cuda_graphs=False, note=note)
        self.network, self.execution = network.to(execution.device), execution
        set_numerics(execution.precision != "fp32")
        if execution.precision in HALF:
            convert_linears(network, HALF[execution.precision])
        if execution.precision == "fp8":
            if network.work is not None:
                raise InputError("--precision fp8 multiplies by whole weights, and this method by slices; choose bf16.")
            round_to_fp8(network)
        if execution.packed_weights:
            pack_linears(network)
        if execution.compile != "none":
            compile_blocks(network, execution.compile, sampling_plans(network))
        self._run = PlanGraphs(self._forward, CudaCapture()) if execution.cuda_graphs else self._forward

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, plan: Plan, index: Tensor | None) -> Tensor:
        return self._run(x, t, y, plan, index)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor, plan: Plan, index: Tensor | None) -> Tensor:
        with numerics(self.execution):
            return self.network(x, t, y, plan, index=index)


def sampling_plans(network: DiT) -> list[Plan]:
    """All that sampling may run."""
    plans = [plan for t in range(TIMESTEPS) for plan in (*network.guidance_plans(t), network.cheap_plan(t))]
    return [plan for plan in plans if plan is not None]


@contextmanager
def numerics(execution: Execution) -> Iterator[None]:
    """Within it, products have the execution's precision, and attention its kernel."""
    with ExitStack() as stack:
        if execution.precision in HALF:
            # Weights are of the type already; a cache of converted ones would live in a recorded graph's memory.
            stack.enter_context(torch.autocast(execution.device.type, HALF[execution.precision], cache_enabled=False))
        if execution.attention != "auto":
            stack.enter_context(sdpa_kernel(KERNELS[execution.attention]))
        yield


def convert_linears(network: nn.Module, half: torch.dtype) -> None:
    """Stores the weights of matrix products as autocast would convert them at every call; `Float32Linear`s stay."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Float32Linear):
            module.to(half)


def round_to_fp8(network: DiT) -> None:
    """torchao's products of rounded operands, with a scale for every row, in the blocks' Linears but the modulation's."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def chosen(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and "adaLN_modulation" not in name and min(module.weight.shape) % 16 == 0

    # Its settings for the compiler would hold for the whole process, and older releases also change how float32 multiplies.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(network.blocks, config, filter_fn=chosen)
