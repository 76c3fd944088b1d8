"""What a token density costs: a table for the terminal, a plot for the record.

Works through `density`, `plan`, `macs` and `mean_macs` for whatever method; only the paper's rows are told by options. GMACs
are those of one image and one forward pass; guidance makes two passes of a step.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models import DiT
from models.token_density import TIMESTEPS, TokenDensity
from runtime.networks import dense_blueprint, mean_gmacs
from runtime.plots import new_canvas, save_canvas, try_to_draw


class Published(NamedTuple):
    """A row of table 1 of arXiv 2412.06028 that varies the density."""

    latent_side: int
    rates: str
    gmacs: float
    dense_gmacs: float


PUBLISHED = (
    Published(32, "0.44:0.61", 88.91, 118.64),
    Published(32, "0.61:0.86", 68.05, 118.64),
    Published(64, "0.61:0.86", 286, 525),
    Published(64, "0.90:0.96", 235, 525),
)
PUBLISHED_MODEL = "DiT-XL/2"

TOKENS_COLOR, COST_COLOR = "#1f5fa8", "#c0392b"
RARE = 10
"""Timesteps below which an interval is hardly worth its grid."""
LABELLED = 60
"""Timesteps of the shortest interval that has room in the plot for the name of its grid."""


def density_lines(network: DiT, model: str, timesteps: Sequence[int]) -> list[str]:
    """What is printed before training and sampling, beside `runtime.networks.summary`: grids and GMACs over the timesteps.

    `timesteps` are those of the sampler's steps. Nothing where every step does the same and there are no grids; one line where
    there is one grid; a table, mean GMACs and the paper's figure where there are more.
    """
    density = network.density
    if density is None:
        return [_means(network, timesteps)] if network.plan_varies else []
    full = network.backbone.tokens
    if len(density.intervals) == 1:
        tokens = _tokens(density)[0]
        return [f"token density {density}: {_shown(density)[0]} = {tokens} of {full} tokens, r {_rate(tokens, full)}, "
                "at every timestep"]  # fmt: skip
    digits = _decimals(mean_gmacs(network))
    lines = [f"token density {density}"]
    lines.append(f"  {'timesteps':<10}{'grid':>8}{f'tokens of {full}':>16}{'pruned r':>10}{'GMACs':>10}")
    rows = zip(density.intervals, _shown(density), _tokens(density), _gmacs(network, density), strict=True)
    for interval, grid, tokens, gmacs in rows:
        span = f"{interval.start}-{interval.stop - 1}"
        lines.append(f"  {span:<10}{grid:>8}{tokens:>16}{_rate(tokens, full):>10}{gmacs:>10.{digits}f}")
    if (least := min(map(len, density.intervals))) < RARE:
        lines.append(
            f"  note: one of these grids serves {least} of {TIMESTEPS:,} timesteps; the map may be too coarse for rates"
        )
    lines.append("  " + _means(network, timesteps))
    row = published_row(network, model)
    if row is not None:
        lines.append(f"  the paper prints {row.gmacs:g} for r {row.rates} (arXiv 2412.06028, table 1), "
                     f"{row.dense_gmacs:g} for dense; why they differ: docs/token-density.md")  # fmt: skip
    return lines


def published_row(network: DiT, model: str) -> Published | None:
    """The row of the paper that the network is: backbone, split and schedule; None where there is none.

    The paper does not say into how many intervals it cuts its schedule: maximal runs of a grid and its figure's quarters count.
    """
    options, backbone = network.options, network.backbone
    if model != PUBLISHED_MODEL or not hasattr(options, "density"):
        return None
    for row in PUBLISHED:
        if backbone.latent_size == (row.latent_side,) * 2:
            # A method's defaults at the published size are the paper's.
            schedules = (type(options)(density=density) for density in (row.rates, f"{row.rates}/4"))
            if options in (network.resolve(schedule, backbone) for schedule in schedules):
                return row
    return None


def draw_density(network: DiT, path: Path, sampled: Sequence[int]) -> None:
    """Sparse tokens and GMACs over the timesteps as a PNG. Equal content makes equal bytes; no file where there is no density.

    Noise grows to the right; `sampled` are the timesteps of the sampler's steps.
    """
    density = network.density
    if density is None:
        return
    canvas = new_canvas(path, 8, 4.5)
    mean, dense = mean_gmacs(network, sampled), mean_gmacs(dense_blueprint(network))
    edges, full = [*density.starts, TIMESTEPS], network.backbone.tokens
    figure = canvas.figure
    left = figure.add_subplot()
    left.set_title(textwrap.fill(f"token density {density}", 90, max_lines=3), fontsize=10)
    left.set(xlim=(0, TIMESTEPS), ylim=(0, full * 1.05), xlabel="timestep t (0 clean, 999 noise)")
    left.set_ylabel(f"sparse tokens of {full}", color=TOKENS_COLOR)
    left.stairs(_tokens(density), edges, fill=True, color=TOKENS_COLOR, alpha=0.2)
    left.stairs(_tokens(density), edges, baseline=None, color=TOKENS_COLOR, linewidth=2, label="sparse tokens")
    for timesteps, tokens, grid in zip(density.intervals, _tokens(density), _shown(density), strict=True):
        if len(timesteps) >= LABELLED:
            middle = (timesteps.start + timesteps.stop) / 2
            left.text(middle, tokens, f"{grid}\n", ha="center", va="center", fontsize=8, color=TOKENS_COLOR)
    right = left.twinx()
    # The dense backbone stands as high as the whole token map.
    right.set_ylim(0, dense * 1.05)
    right.set_ylabel("GMACs", color=COST_COLOR)
    right.stairs(_gmacs(network, density), edges, baseline=None, color=COST_COLOR, linewidth=2, label="GMACs of one pass")
    right.axhline(mean, color=COST_COLOR, linestyle="--", label=f"mean over {len(sampled)} sampled timesteps: {mean:.4g}")
    right.axhline(dense, color="0.35", label=f"dense backbone: {dense:.4g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_canvas(canvas, path)


def record_density(network: DiT, path: Path, sampled: Sequence[int]) -> None:
    """`draw_density` beside work that is more than the picture: what keeps it from being drawn is a warning."""
    try_to_draw("the token density", lambda: draw_density(network, path, sampled))


def _means(network: DiT, timesteps: Sequence[int]) -> str:
    """Mean GMACs over all timesteps and over the sampler's, and what share of the dense backbone's the latter is."""
    everywhere, sampled, dense = mean_gmacs(network), mean_gmacs(network, timesteps), mean_gmacs(dense_blueprint(network))
    digits = _decimals(everywhere)
    most = "" if network.work is None else ", at most"
    return (
        f"mean GMACs{most}: {everywhere:.{digits}f} over all {TIMESTEPS:,} timesteps, {sampled:.{digits}f} over the "
        f"{len(timesteps)} sampled timesteps ({sampled / dense:.1%} of the dense backbone's {dense:.{digits}f})"
    )


def _decimals(gmacs: float) -> int:
    """Decimals that show at least four digits of the network's mean GMACs, at least two."""
    return max(2, 3 - math.floor(math.log10(gmacs)))


def _shown(density: TokenDensity) -> list[str]:
    return [f"{rows}x{columns}" for rows, columns in density.grids]


def _tokens(density: TokenDensity) -> list[int]:
    return [rows * columns for rows, columns in density.grids]


def _gmacs(network: DiT, density: TokenDensity) -> list[float]:
    return [network.macs(network.plan(timesteps.start)) / 1e9 for timesteps in density.intervals]


def _rate(tokens: int, full: int) -> str:
    return f"{1 - tokens / full:.2f}"
