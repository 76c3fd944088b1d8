"""What it costs that the host waits, once a block, to learn how many tokens were chosen: passes that choose, against passes
that are told beforehand which tokens they would have chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import forward
from benchmarks.contestants import contestants
from benchmarks.devices import choose_device
from benchmarks.forward import ForwardSettings, timesteps_of
from benchmarks.options import recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.sampling import best
from benchmarks.timing import interleaved
from models import METHODS, DiT
from runtime.config import InputError, option
from runtime.execution import resolve_execution
from runtime.logs import say

CHOSEN, TOLD = "chosen", "told"


@dataclass(frozen=True)
class WaitSettings(ForwardSettings):
    method: str = option("dydit", f"one whose blocks choose tokens, of {', '.join(METHODS)}")


QUICK_CPU: Mapping[str, Any] = {"model": "DiT-S/2", "image_size": 256, "rounds": 3}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3}


def measure(settings: WaitSettings) -> dict[str, Any]:
    """Seconds of a round's passes with our execution, where blocks choose and where they are told."""
    timesteps, device, batch = timesteps_of(settings), choose_device(settings.device), settings.batch_size
    execution, blueprints = resolve_execution(settings, device), settings.blueprints()
    if not choosing(blueprints[1]):
        raise InputError(f"--method {settings.method} chooses nothing while it runs, so no host waits; try --method dydit.")
    for line in execution.lines():
        say(line)
    with torch.no_grad():
        competing = contestants(blueprints, execution, lambda network: forward.inputs(network, batch, timesteps, device))
        contestant = best(competing, settings.method)[1]
        run = forward.run_of(contestant, batch, timesteps, device)
        blocks = choosing(contestant.network)
        timings = interleaved({CHOSEN: run, TOLD: told(blocks, run)}, settings.rounds, device)
    timings = {name: timing.part(len(timesteps)) for name, timing in timings.items()}
    return {
        "settings": recorded(settings, device=device.type, execution=str(execution)),
        "blocks": len(blocks),
        "rows": rows_of(timings, dict.fromkeys(timings, Work(images=batch)), CHOSEN),
    }


def choosing(network: DiT) -> list[Any]:
    """The blocks that choose tokens: by `select`, logits (N, T) -> places (M,)."""
    return [block for block in network.blocks if hasattr(block, "select")]


def told(blocks: Sequence[Any], run: Callable[[], None]) -> Callable[[], None]:
    """`run` with the tokens that it chooses now, in every block and pass, given to it."""
    chosen: list[list[Tensor]] = [[] for _ in blocks]
    with selecting(blocks, [watched(block.select, places) for block, places in zip(blocks, chosen, strict=True)]):
        run()

    def run_told() -> None:
        with selecting(blocks, [replayed(places) for places in chosen]):
            run()

    return run_told


@contextmanager
def selecting(blocks: Sequence[Any], choices: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, blocks choose by these."""
    own = [block.select for block in blocks]
    for block, choose in zip(blocks, choices, strict=True):
        block.select = choose
    try:
        yield
    finally:
        for block, choose in zip(blocks, own, strict=True):
            block.select = choose


def watched(choose: Callable[[Tensor], Tensor], places: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """`choose`, which leaves what it chose in `places`."""

    def choosing(logits: Tensor) -> Tensor:
        places.append(choose(logits))
        return places[-1]

    return choosing


def replayed(places: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """One of `places` after the other, whatever the logits are."""
    rest = iter(places)
    return lambda logits: next(rest)


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings, blocks = result["settings"], result["blocks"]
    size = "x".join(map(str, settings["latent"])) if settings["latent"] else settings["image_size"]
    rounds = [result["rows"][name]["seconds"]["rounds"] for name in (CHOSEN, TOLD)]
    costs = [1e6 * (chosen - known) / blocks for chosen, known in zip(*rounds, strict=True)]
    passed = result["rows"][CHOSEN]["seconds"]["median"]
    middle = statistics.median(costs)
    lines = [
        f"{settings['method']} {settings['model']} at {size}, batch {settings['batch_size']}: {settings['execution']}",
        *heading(result),
        *table(result["rows"]),
        f"choosing and waiting for the number: {middle:.0f} us in each of {blocks} blocks (rounds: {min(costs):.0f} to "
        f"{max(costs):.0f}), {middle * blocks / 1e6 / passed:.1%} of a pass",
    ]
    return "\n".join(lines)
