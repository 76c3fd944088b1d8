"""Token density: how many sparse tokens a network keeps at which timestep (SparseDiT, arXiv 2412.06028; never released).

At high noise a picture is rough and few tokens do; towards the clean end more are kept. r = 1 - M / N is the pruning rate, M of
N tokens kept. Sparse tokens stand on a grid, so a rate becomes one, and the timesteps fall into intervals of one grid each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from runtime.config import InputError

TIMESTEPS = 1000
"""Timesteps of the schedule that networks are trained with; 0 is cleanest."""

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True)
class TokenDensity:
    """A sparse grid for every timestep: `grids[i]` from `starts[i]` up to the next start. One interval is a fixed density."""

    starts: tuple[int, ...]
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.grids):
            raise InputError(
                f"token density {self} names {len(self.grids)} grid(s) and {len(self.starts)} start(s); give each grid one "
                "start, as in 10,9,8,6@0,250,500,750."
            )
        ascending = all(first < second for first, second in zip(self.starts, self.starts[1:], strict=False))
        if not self.starts or self.starts[0] != 0 or self.starts[-1] >= TIMESTEPS or not ascending:
            raise InputError(
                f"token density {self}: starts must ascend from 0 and stay below {TIMESTEPS}, as in 10,9,8,6@0,250,500,750."
            )
        if any(side < 1 for grid in self.grids for side in grid):
            raise InputError(f"token density {self}: a grid has at least 1 row and 1 column; give sides of 1 or more.")

    @classmethod
    def fixed(cls, grid: Grid) -> TokenDensity:
        """The same grid at every timestep."""
        return cls((0,), (grid,))

    @classmethod
    def from_rates(cls, low: float, high: float, full: Grid, intervals: int | None = None) -> TokenDensity:
        """The paper's schedule of pruning rates on the token map `full`: `pruning_rate` at every timestep, as grids.

        Without `intervals` an interval is a maximal run of equal grids. With it, that many equal parts of the timesteps, four
        in the paper's figure; a part takes the rate of its noisy end, so that with four or more `low` and `high` both occur.
        """
        if not 0 <= low <= high < 1:
            raise InputError(
                f"token density {low:g}:{high:g}: pruning rates are at least 0 and below 1, that of the clean end first and "
                "not the larger; for another order give grids and starts, as in 6,8,10@0,250,750."
            )
        if intervals is None:
            grids = [grid_of_rate(pruning_rate(t, low, high), full) for t in range(TIMESTEPS)]
            return cls.of_runs(grids)
        if not 1 <= intervals <= TIMESTEPS:
            raise InputError(
                f"token density {low:g}:{high:g}/{intervals}: {TIMESTEPS} timesteps fall into 1 to {TIMESTEPS} parts; "
                f"give /4, or another number of parts up to {TIMESTEPS}."
            )
        bounds = [place * TIMESTEPS // intervals for place in range(intervals + 1)]
        return cls(tuple(bounds[:-1]), tuple(grid_of_rate(pruning_rate(stop, low, high), full) for stop in bounds[1:]))

    @classmethod
    def of_runs(cls, grids: Iterable[Grid]) -> TokenDensity:
        """The grid of every timestep, 0 first, as maximal runs of equal ones."""
        starts, kept, start = [], [], 0
        for grid, run in groupby(grids):
            starts.append(start)
            kept.append(grid)
            start += len(list(run))
        return cls(tuple(starts), tuple(kept))

    @classmethod
    def parse(cls, text: str, full: Grid) -> TokenDensity:
        """`8` or `8x6`: fixed; `0.61:0.86`: rates, `0.61:0.86/4` in four parts; `10,9,8,6@0,250,500,750`: grids@starts.

        InputError for anything else, and for a grid larger than the token map `full`.
        """
        # Not \d, which takes digits of every script.
        count, rate = "[0-9]{1,9}", r"[0-9]*\.?[0-9]+"
        side = f"{count}(?:x{count})?"
        text = text.strip()
        if match := re.fullmatch(rf"({rate})\s*:\s*({rate})(?:\s*/\s*({count}))?", text):
            density = cls.from_rates(float(match[1]), float(match[2]), full, int(match[3]) if match[3] else None)
        elif match := re.fullmatch(rf"({side}(?:\s*,\s*{side})*)\s*@\s*({count}(?:\s*,\s*{count})*)", text):
            density = cls(tuple(map(int, match[2].split(","))), tuple(map(_grid, match[1].split(","))))
        elif re.fullmatch(side, text):
            density = cls.fixed(_grid(text))
        else:
            raise InputError(
                f"token density {text!r} is not understood; give sparse tokens a side (8, or 8x6), pruning rates (0.61:0.86), "
                "or grids and the timesteps at which they start (10,9,8,6@0,250,500,750)."
            )
        density.check_fits(full)
        return density

    def check_fits(self, full: Grid) -> None:
        """InputError where a grid is larger than the token map."""
        for grid in self.grids:
            if grid[0] > full[0] or grid[1] > full[1]:
                shown, limit = f"{grid[0]}x{grid[1]}", f"{full[0]}x{full[1]}"
                raise InputError(f"sparse grid {shown} does not fit the token map of {limit}; give at most its sides.")

    @property
    def intervals(self) -> Sequence[range]:
        """The timesteps of each grid, in order; together 0 .. 999."""
        return [range(start, stop) for start, stop in zip(self.starts, (*self.starts[1:], TIMESTEPS), strict=True)]

    def grid_at(self, t: int) -> Grid:
        """The sparse grid at the original timestep t."""
        if not 0 <= t < TIMESTEPS:
            raise ValueError(f"timestep {t} is not one of 0 .. {TIMESTEPS - 1}")
        return self.grids[max(place for place, start in enumerate(self.starts) if start <= t)]

    def __str__(self) -> str:
        """What `parse` reads back, with the grids written out: `8`, or `10,9,8,6@0,250,500,750`."""
        sides = [str(rows) if rows == columns else f"{rows}x{columns}" for rows, columns in self.grids]
        return sides[0] if self.starts == (0,) and len(sides) == 1 else f"{','.join(sides)}@{','.join(map(str, self.starts))}"


def pruning_rate(t: float, low: float, high: float) -> float:
    """The paper's r(t): `low` for t < T / 4, from there linear up to `high` at t = T, which is pure noise."""
    quarter = TIMESTEPS / 4
    return low if t < quarter else low + (high - low) * (t - quarter) / (TIMESTEPS - quarter)


def grid_of_rate(rate: float, full: Grid) -> Grid:
    """The grid nearest to a pruning rate: each side of the map times sqrt(1 - rate), rounded (a half up), at least 1.

    The paper's rates are those of whole grids to two digits, and come back as them: on 16 x 16 tokens .44, .61, .75, .86 are
    12, 10, 8, 6 a side; on 32 x 32 .61, .75, .86, .90, .96 are 20, 16, 12, 10, 6.
    """
    rows, columns = (max(1, math.floor(side * math.sqrt(1 - rate) + 0.5)) for side in full)
    return rows, columns


def _grid(text: str) -> Grid:
    rows, _, columns = text.strip().partition("x")
    return int(rows), int(columns or rows)
