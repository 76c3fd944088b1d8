"""One forward pass, the method against the dense backbone: does the time follow the multiply-accumulates?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.ceiling import ceilings
from benchmarks.contestants import NOTHING_TO_COMPARE, OURS, PLAIN, Contestant, contestants, is_plain, with_numerics
from benchmarks.devices import choose_device
from benchmarks.memory import weights_gib
from benchmarks.options import DENSE, DeviceSettings, NetworkSettings, recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.timing import interleaved
from models.token_density import TIMESTEPS
from runtime.config import InputError, option
from runtime.execution import ExecutionSettings, resolve_execution
from runtime.logs import say
from runtime.networks import mean_gmacs


@dataclass(frozen=True)
class ForwardSettings(ExecutionSettings, NetworkSettings, DeviceSettings):
    batch_size: int = option(1, "pictures of a pass")
    timestep: int = option(0, "whose plan runs, 0 clean to 999 noise")


QUICK_CPU: Mapping[str, Any] = {"model": "DiT-B/2", "image_size": 256, "rounds": 3}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3}


def measure(settings: ForwardSettings) -> dict[str, Any]:
    """Seconds per forward pass of the dense backbone and of the method; their ratio beside that of the MACs.

    Both run the plan of the original `timestep`, 0 .. 999, on which the tokens of a varying density depend.
    """
    if not 0 <= settings.timestep < TIMESTEPS:
        raise InputError(f"--timestep is {settings.timestep}; give one of 0 to {TIMESTEPS - 1}.")
    device = choose_device(settings.device)
    execution, blueprints, batch = resolve_execution(settings, device), settings.blueprints(), settings.batch_size
    for line in execution.lines():
        say(line)
    with torch.no_grad():
        competing = contestants(blueprints, execution)
        runs = {name: run_of(one, batch, settings.timestep, device) for name, one in competing.items()}
        works = {}
        for name, one in competing.items():
            gmacs = one.network.macs(one.network.plan(settings.timestep)) / 1e9
            works[name] = Work(batch, None, gmacs, batch * gmacs, one.precision, weights_gib(one.network))
        precisions = [one.precision for one in competing.values()]
        ceiling = ceilings(device, precisions)
        timings = interleaved(runs, settings.rounds, device)
        ceiling = ceilings(device, precisions, ceiling)
    method, density = blueprints[1], blueprints[1].density
    return {
        "settings": recorded(settings, device=device.type, execution=str(execution)),
        "density": None if density is None else str(density),
        "grid": None if density is None else list(density.grid_at(settings.timestep)),
        "mean_gmacs": mean_gmacs(method) if method.plan_varies else None,
        "rows": rows_of(timings, works, f"{DENSE}, {PLAIN}", ceiling),
        "ceiling": ceiling,
        "notes": [NOTHING_TO_COMPARE] if is_plain(execution) else [],
    }


def run_of(contestant: Contestant, batch: int, timestep: int, device: torch.device) -> Callable[[], None]:
    """One pass of random latents, all at one timestep, each with a label of its own."""
    backbone = contestant.network.backbone
    x = torch.randn(batch, backbone.in_channels, *backbone.latent_size, device=device)  # (N, C, H, W)
    t = torch.full((1,), timestep, device=device)
    y = torch.arange(batch, device=device) % backbone.num_classes  # (N,)
    run = partial(contestant.predict, x, t, y, contestant.network.plan(timestep), None)
    return with_numerics(contestant.precision, run)


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings, rows = result["settings"], result["rows"]
    size = "x".join(map(str, settings["latent"])) if settings["latent"] else settings["image_size"]
    lines = [f"{settings['model']} at {size}, batch {settings['batch_size']}, timestep {settings['timestep']}; ours: "
             f"{settings['execution']}", *heading(result)]  # fmt: skip
    if result["density"] is not None:
        line = f"token density {result['density']}: {'x'.join(map(str, result['grid']))} at timestep {settings['timestep']}"
        if result["mean_gmacs"] is not None:
            line += f"; {result['mean_gmacs']:.4g} GMACs in the mean over all {TIMESTEPS:,} timesteps"
        lines.append(line)
    lines += table(rows)
    for kind in (PLAIN, OURS):
        first, second = (f"{name}, {kind}" for name in (DENSE, settings["method"]))
        if first in rows and second in rows:
            seconds = rows[second]["seconds"]["median"] / rows[first]["seconds"]["median"]
            lines.append(f"{kind}: time ratio {seconds:.3f}, MACs ratio {rows[second]['gmacs'] / rows[first]['gmacs']:.3f}")
    return "\n".join(lines + result["notes"])
