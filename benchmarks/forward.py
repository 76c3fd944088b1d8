"""One forward pass, the method against the dense backbone: does the time follow the multiply-accumulates?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.timing import interleaved
from models import METHODS, Backbone, create_model
from models.token_density import TIMESTEPS
from runtime.config import InputError
from runtime.networks import mean_gmacs


@torch.inference_mode()
def measure(
    model: str, method: str, options: Mapping[str, Any], latent_side: int, batch: int, rounds: int, timestep: int
) -> dict[str, Any]:
    """Seconds per forward pass of the dense backbone and of `method`, float32, eager; their ratio beside that of the MACs.

    Both run the plan of the original `timestep`, 0 .. 999, on which the tokens of a varying density depend.
    """
    if not 0 <= timestep < TIMESTEPS:
        raise InputError(f"--timestep is {timestep}; give one of 0 to {TIMESTEPS - 1}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = Backbone.named(model, (latent_side, latent_side))
    dense = next(iter(METHODS))
    with device:
        chosen = {dense: {}, method: options}
        networks = {name: create_model(name, backbone, given).eval() for name, given in chosen.items()}
        x = torch.randn(batch, backbone.in_channels, latent_side, latent_side)
        t, y = torch.full((batch,), timestep), torch.randint(0, backbone.num_classes, (batch,))
    density = networks[method].density
    plans = {name: network.plan(timestep) for name, network in networks.items()}
    gmacs = {name: network.macs(plans[name]) / 1e9 for name, network in networks.items()}
    runs = {name: (lambda network=network, plan=plans[name]: network(x, t, y, plan)) for name, network in networks.items()}
    timings = interleaved(runs, rounds)
    rows = {
        name: {
            "seconds": timing.median,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "gmacs": gmacs[name],
            "gflops_per_second": 2 * batch * gmacs[name] / timing.median,
        }
        for name, timing in timings.items()
    }
    return {
        "measured": "forward",
        "model": model,
        "latent_side": latent_side,
        "batch": batch,
        "timestep": timestep,
        "density": None if density is None else str(density),
        "grid": None if density is None else list(density.grid_at(timestep)),
        "mean_gmacs": mean_gmacs(networks[method]) if networks[method].plan_varies else None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rounds": rounds,
        "rows": rows,
        "time_ratio": timings[method].median / timings[dense].median,
        "macs_ratio": gmacs[method] / gmacs[dense],
    }


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{result['model']}, latents {result['latent_side']}, batch {result['batch']}, timestep {result['timestep']}, "
             f"{result['device']}"]  # fmt: skip
    if result["density"] is not None:
        line = f"token density {result['density']}: {'x'.join(map(str, result['grid']))} at timestep {result['timestep']}"
        if result["mean_gmacs"] is not None:
            line += f"; {result['mean_gmacs']:.4g} GMACs in the mean over all {TIMESTEPS:,} timesteps"
        lines.append(line)
    lines.append(f"{'network':<12}{'seconds':>10}{'fastest':>10}{'slowest':>10}{'GMACs':>10}{'GFLOP/s':>10}")
    for name, row in result["rows"].items():
        lines.append(f"{name:<12}{row['seconds']:>10.4f}{row['fastest']:>10.4f}{row['slowest']:>10.4f}{row['gmacs']:>10.4g}"
                     f"{row['gflops_per_second']:>10.1f}")  # fmt: skip
    lines.append(f"time ratio {result['time_ratio']:.3f}, MACs ratio {result['macs_ratio']:.3f}")
    return "\n".join(lines)
