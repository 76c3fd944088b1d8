"""One forward pass, the method against the dense backbone: does the time follow the multiply-accumulates?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceiling import ceilings
from benchmarks.contestants import OURS, PLAIN, Contestant, Seen, contestants, execution_notes, with_numerics
from benchmarks.counted import CountedRun, counted
from benchmarks.devices import choose_device
from benchmarks.memory import weights_gib
from benchmarks.options import DENSE, DeviceSettings, NetworkSettings, recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.timing import interleaved
from diffusion.schedule import respaced_timesteps
from models import DiT
from models.token_density import TIMESTEPS
from runtime.config import InputError, option
from runtime.execution import ExecutionSettings, resolve_execution
from runtime.logs import say
from runtime.networks import mean_gmacs


@dataclass(frozen=True)
class ForwardSettings(ExecutionSettings, NetworkSettings, DeviceSettings):
    batch_size: int = option(1, "pictures of a pass")
    timestep: int = option(0, "whose plan runs, 0 clean to 999 noise")
    timesteps: int | None = option(None, "run one pass at each of so many timesteps, evenly spread, in place of one; none: one")


QUICK_CPU: Mapping[str, Any] = {"model": "DiT-B/2", "image_size": 256, "rounds": 3}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3}


def measure(settings: ForwardSettings) -> dict[str, Any]:
    """Seconds per forward pass of the dense backbone and of the method; their ratio beside that of the MACs.

    Both run the plans of the original timesteps, 0 .. 999, on which the tokens of a varying density depend, and all of DyDiT.
    """
    timesteps, device = timesteps_of(settings), choose_device(settings.device)
    execution, blueprints, batch = resolve_execution(settings, device), settings.blueprints(), settings.batch_size
    for line in execution.lines():
        say(line)
    with torch.no_grad():
        competing = contestants(blueprints, execution, lambda network: inputs(network, batch, timesteps, device))
        runs = {name: CountedRun.of(one.network, run_of(one, batch, timesteps, device)) for name, one in competing.items()}
        precisions = [one.precision for one in competing.values()]
        ceiling = ceilings(device, precisions)
        timings = interleaved(runs, settings.rounds, device)
        ceiling = ceilings(device, precisions, ceiling)
        works = {name: runs[name].measured(work_of(one, batch, timesteps)) for name, one in competing.items()}
        timings = {name: timing.part(len(timesteps)) for name, timing in timings.items()}
    method, density = blueprints[1], blueprints[1].density
    return {
        "settings": recorded(settings, device=device.type, execution=str(execution)),
        "density": None if density is None else str(density),
        "grid": None if density is None else [list(density.grid_at(t)) for t in timesteps],
        "at": timesteps,
        "mean_gmacs": mean_gmacs(method) if method.plan_varies else None,
        "rows": rows_of(timings, works, f"{DENSE}, {PLAIN}", ceiling),
        "ceiling": ceiling,
        "notes": execution_notes(blueprints, execution),
        **counted(runs),
    }


def timesteps_of(settings: ForwardSettings) -> Sequence[int]:
    """The original timesteps of a round's passes. InputError for what are none."""
    if not 0 <= settings.timestep < TIMESTEPS:
        raise InputError(f"--timestep is {settings.timestep}; give one of 0 to {TIMESTEPS - 1}.")
    if settings.timesteps is None:
        return [settings.timestep]
    if settings.timestep:
        raise InputError("--timestep and --timesteps both say where passes are timed; leave one of them out.")
    return respaced_timesteps(str(settings.timesteps))


def latents_and_labels(network: DiT, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for every contestant: noise (N, C, H, W), and a label of its own for each, (N,)"""
    backbone = network.backbone
    noise = torch.randn(batch, backbone.in_channels, *backbone.latent_size, generator=torch.Generator().manual_seed(0))
    return noise.to(device), torch.arange(batch, device=device) % backbone.num_classes


def inputs(network: DiT, batch: int, timesteps: Sequence[int], device: torch.device) -> Seen:
    """All that the passes of a round see."""
    (x, y), count = latents_and_labels(network, batch, device), len(timesteps)
    t = torch.tensor(timesteps, device=device).repeat_interleave(batch)
    return x.repeat(count, 1, 1, 1), t, y.repeat(count)


def run_of(contestant: Contestant, batch: int, timesteps: Sequence[int], device: torch.device) -> Callable[[], None]:
    """A pass of the same latents at each timestep."""
    x, y = latents_and_labels(contestant.network, batch, device)
    times = [torch.full((1,), timestep, device=device) for timestep in timesteps]

    def run() -> None:
        for timestep, t in zip(timesteps, times, strict=True):
            contestant.predict(x, t, y, contestant.network.plan(timestep), None)

    return with_numerics(contestant.precision, run)


def work_of(contestant: Contestant, batch: int, timesteps: Sequence[int]) -> Work:
    """That of one pass, the mean over the timesteps."""
    gmacs = mean_gmacs(contestant.network, timesteps)
    return Work(batch, None, gmacs, batch * gmacs, contestant.precision, weights_gib(contestant.network))


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings, rows = result["settings"], result["rows"]
    size = "x".join(map(str, settings["latent"])) if settings["latent"] else settings["image_size"]
    many = "s" if len(result["at"]) > 1 else ""
    at = f"timestep{many} {', '.join(map(str, result['at']))}"
    lines = [f"{settings['model']} at {size}, batch {settings['batch_size']}, {at}; ours: "
             f"{settings['execution']}", *heading(result)]  # fmt: skip
    if result["density"] is not None:
        grids = ", ".join("x".join(map(str, grid)) for grid in result["grid"])
        line = f"token density {result['density']}: {grids} at {at}"
        if result["mean_gmacs"] is not None:
            line += f"; {result['mean_gmacs']:.4g} GMACs in the mean over all {TIMESTEPS:,} timesteps"
        lines.append(line)
    lines += table(rows)
    for kind in (PLAIN, OURS):
        first, second = (f"{name}, {kind}" for name in (DENSE, settings["method"]))
        if first in rows and second in rows:
            seconds = rows[second]["seconds"]["median"] / rows[first]["seconds"]["median"]
            lines.append(f"{kind}: time ratio {seconds:.3f}, MACs ratio {rows[second]['gmacs'] / rows[first]['gmacs']:.3f}")
    return "\n".join([*lines, *result["counted_lines"], *result["notes"]])
