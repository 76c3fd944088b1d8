"""Attention kernels at the head size and token counts of a network: which is fastest, and does padding the heads pay?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks.ceiling import TYPES, ceilings
from benchmarks.contestants import with_numerics
from benchmarks.devices import choose_device
from benchmarks.options import DeviceSettings, NetworkSettings, recorded
from benchmarks.result import Row, Work, heading, row, table
from benchmarks.timing import interleaved
from models import DiT
from runtime.config import option
from runtime.execution import KERNELS

AUTO = "auto"
MULTIPLE = 16
"""Head sizes are padded to the next multiple of this; kernels are written for such sizes."""


@dataclass(frozen=True)
class AttentionSettings(NetworkSettings, DeviceSettings):
    batch_size: int = option(1, "pictures at once; guidance doubles those of sample.py")
    precision: Literal["fp32", "bf16", "fp16"] = option("bf16", "type of queries, keys and values")
    repeats: int | None = option(None, "calls in a row that a round times; none: 50 on a GPU, 3 on a CPU")


QUICK_CPU: Mapping[str, Any] = {"rounds": 3, "image_size": 256}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3}


class Shape(NamedTuple):
    """One kind of attention in a network."""

    heads: int
    queries: int
    keys: int
    head_size: int

    @property
    def gmacs(self) -> float:
        """Of one picture, without padding."""
        return 2 * self.heads * self.queries * self.keys * self.head_size / 1e9


def measure(settings: AttentionSettings) -> dict[str, Any]:
    """Seconds of every kernel at every shape; the baseline is torch's choice, unpadded, at the same shape."""
    device = choose_device(settings.device)
    repeats = settings.repeats or (3 if device.type == "cpu" else 50)
    shapes = list(dict.fromkeys(shape for network in settings.blueprints() for shape in attention_shapes(network)))
    ceiling, rows, missing = ceilings(device, [settings.precision]), dict[str, Row](), Counter[str]()
    for shape in shapes:
        runs: dict[str, Callable[[], None]] = {}
        for kernel in (AUTO, *KERNELS):
            for padded in dict.fromkeys((shape.head_size, math.ceil(shape.head_size / MULTIPLE) * MULTIPLE)):
                name = f"{shape.queries} x {shape.keys}, {kernel}, heads of {shape.head_size}"
                name += "" if padded == shape.head_size else f" as {padded}"
                run = run_of(shape, kernel, padded, settings, device)
                if works(run):
                    runs[name] = run
                else:
                    missing[kernel] += 1
        timings = interleaved({name: repeated(run, repeats) for name, run in runs.items()}, settings.rounds, device)
        total = repeats * settings.batch_size * shape.gmacs
        work = Work(steps=repeats, gmacs=shape.gmacs, total_gmacs=total, precision=settings.precision)
        baseline = timings[f"{shape.queries} x {shape.keys}, {AUTO}, heads of {shape.head_size}"]
        rows |= {name: row(timing, work, baseline, ceiling) for name, timing in timings.items()}
    known = recorded(settings, device=device.type, repeats=repeats)
    notes = [f"{kernel}: no row for {count} of the shapes and paddings, which this device has no such kernel for"
             for kernel, count in missing.items()]  # fmt: skip
    notes += [f"{settings.method} with all heads on; its steps run as many of them as their plans say"
              for network in settings.blueprints() if network.work is not None]  # fmt: skip
    return {"settings": known, "rows": rows, "ceiling": ceiling, "notes": notes}


def attention_shapes(network: DiT) -> list[Shape]:
    """The different shapes of attention in one pass of a blueprint, over all its plans, in running order."""
    found: list[Shape] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                queries, keys = args[0], args[1]  # each (N, heads, tokens, head size)
                found.append(Shape(queries.shape[1], queries.shape[2], keys.shape[2], queries.shape[3]))
            return func(*args, **(kwargs or {}))

    backbone = network.backbone
    with torch.no_grad(), torch.device("meta"), Watched():
        x, t, y = torch.zeros(1, backbone.in_channels, *backbone.latent_size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        for plan in dict.fromkeys(plan for _, plan in network.training_plans()):
            network(x, t, y, plan)
    return list(dict.fromkeys(found))


def run_of(shape: Shape, kernel: str, padded: int, settings: AttentionSettings, device: torch.device) -> Callable[[], None]:
    """Attention of random tokens by one kernel, its heads padded with zeros to a size of `padded`; padding is timed too."""
    dtype, batch = TYPES[settings.precision], settings.batch_size
    q, k, v = (
        torch.randn(batch, shape.heads, tokens, shape.head_size, device=device, dtype=dtype)  # (N, heads, tokens, head size)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    return with_numerics(settings.precision, partial(attend, q, k, v, kernel, padded))


@torch.no_grad()
def attend(q: Tensor, k: Tensor, v: Tensor, kernel: str, padded: int) -> Tensor:
    """softmax(q k' / sqrt(head size)) v. q (N, heads, Q, d), k, v (N, heads, K, d) -> (N, heads, Q, d)"""
    size = q.shape[-1]
    if padded != size:
        q, k, v = (F.pad(one, (0, padded - size)) for one in (q, k, v))
    if kernel == AUTO:
        return F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    """One call of a kernel is shorter than waiting for the device takes."""

    def several() -> None:
        for _ in range(times):
            run()

    return several


def works(run: Callable[[], None]) -> bool:
    """Whether the device has the kernel."""
    try:
        run()
    except RuntimeError as error:
        said = str(error).lower()  # torch finds "no available kernel", cuDNN no "execution plans"
        if isinstance(error, torch.OutOfMemoryError) or not ("kernel" in said or "cudnn" in said):
            raise
        return False
    return True


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings = result["settings"]
    lines = [
        f"attention of {settings['model']}, dense and {settings['method']}, batch {settings['batch_size']}, "
        f"{settings['precision']}; queries x keys",
        *heading(result),
        *table(result["rows"], {"ms_per_step": "ms/call"}),
        *result["notes"],
        "speed is against torch's own choice (auto) without padding, at the same shape",
    ]
    return "\n".join(lines)
