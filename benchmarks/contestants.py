"""Networks that compete: the dense one and the method's, each plain as published scripts run it and with our execution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffusion.guidance import Predict
from models import DiT
from runtime.distributed import set_numerics
from runtime.execution import Execution, Executor
from runtime.networks import build, method_name
from runtime.sampling import plain_forward

DEVIATION = 0.02
PLAIN, OURS = "plain", "ours"
NOTHING_TO_COMPARE = (
    "What is asked for is the plain execution, so there are no rows of ours; ask with --precision bf16 or --compile default."
)


Seen = tuple[Tensor, Tensor, Tensor]
"""Latents (N, C, H, W), timesteps (N,) and labels (N,) that a measurement shows a network."""


NOT_RECORDED = "sizes of {} depend on what it sees, so its rows are without CUDA graphs"


@dataclass(frozen=True)
class Contestant:
    """A network on its device, and how its forward is run."""

    network: DiT
    predict: Predict
    precision: str


def random_network(blueprint: DiT, device: torch.device) -> DiT:
    """The network of a blueprint with weights that are drawn, without gradients.

    A freshly initialised DiT is full of zeros, and on zeros a GPU runs cooler and faster than on numbers.
    """
    torch.manual_seed(0)
    with device:
        network = build(blueprint)
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=DEVIATION)
    return network.eval().requires_grad_(False)


def plain_execution(device: torch.device) -> Execution:
    """What published scripts do: float32 weights, eager; products rounded to TF32 on a GPU that can."""
    return Execution(device, "tf32" if device.type == "cuda" else "fp32")


def is_plain(execution: Execution) -> bool:
    """Whether an execution is the plain one, so that measuring both would measure the same twice."""
    return replace(execution, note=None) == plain_execution(execution.device)


def execution_notes(blueprints: tuple[DiT, DiT], execution: Execution) -> list[str]:
    """Where rows are not what `execution` lets expect."""
    changing = [method_name(one) for one in blueprints if one.work is not None]
    recorded = [NOT_RECORDED.format(name) for name in changing if execution.cuda_graphs]
    return [*recorded, *([NOTHING_TO_COMPARE] if is_plain(execution) else [])]


def contestants(blueprints: tuple[DiT, DiT], execution: Execution, seen: Callable[[DiT], Seen]) -> dict[str, Contestant]:
    """ "METHOD, plain" for both networks, the dense one first, and "METHOD, ours" where `execution` is another than the plain.

    A method that is the dense one competes once. Where a network's work depends on what it sees, its decisions fall on what
    `seen` finds that it will see as often as training would make them.
    """
    device, plain = execution.device, plain_execution(execution.device)
    found: dict[str, Contestant] = {}
    for blueprint in {method_name(one): one for one in blueprints}.values():
        name, network = method_name(blueprint), random_network(blueprint, device)
        if network.work is not None:
            network.imitate_training(*seen(network))
        found[f"{name}, {PLAIN}"] = Contestant(network, partial(plain_forward, network), plain.precision)
        if not is_plain(execution):
            own = copy.deepcopy(network)  # an executor converts its network's weights in place
            found[f"{name}, {OURS}"] = Contestant(own, Executor(own, execution), execution.precision)
    return found


def with_numerics(precision: str, run: Callable[[], object]) -> Callable[[], None]:
    """`run` under the process-wide switches of its precision, which others in the same process may have set otherwise."""

    def switched() -> None:
        set_numerics(precision != "fp32")
        run()

    return switched
