"""Density groups: which timesteps the parts of a training batch hold, where token counts differ between timesteps.

What one process computes at once has one token count, so its timesteps come from one interval of the token density. The global
batch is cut into groups of equal size, contiguous positions each; a group draws one timestep t, and all its samples draw theirs
within the interval that holds t. The groups of a step take t by systematic sampling (Cochran 1977, "Sampling techniques",
chapter 8): one uniform offset for all, turned by the group's share of the range. Hence every group draws an interval with a
probability of exactly its length / 1000, every sample's timestep is uniform over all 1000, and the groups of one step spread
over the intervals as evenly as whole numbers allow. A group follows from the place in the global batch, not from the process.
Where timesteps are not uniform, as logit-normal flow times, all this holds for the share of the draws that are smaller than t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from models.token_density import TIMESTEPS
from runtime.config import InputError
from runtime.seeding import Keys, integers, uniform


def number_of_groups(asked: int | None, saved: int | None, intervals: int, shares: int) -> int:
    """Density groups of a run: as asked for, as the run had before (`saved`), or one for each of `shares`, the parts of the
    global batch that are computed at once.

    With one interval there is one group, and nothing depends on it. InputError where more are asked for.
    """
    if intervals == 1:
        if asked is not None and asked > 1:
            raise InputError(f"--density-groups is {asked}, yet all timesteps have one token count and no group draws an "
                             "interval; leave the flag out.")  # fmt: skip
        return 1
    return asked or saved or shares


def check_groups(groups: int, processes: int, accumulation: int) -> None:
    """InputError where some process would hold parts of two groups in one pass."""
    shares = processes * accumulation
    if groups < 1 or shares % groups:
        raise InputError(
            f"{groups} density groups cannot be dealt to {shares} parts of the batch (processes x accumulation steps, "
            f"{processes} x {accumulation}); choose --gradient-accumulation so that the product is a multiple of {groups}, or "
            f"for a new run a --density-groups that divides {shares}."
        )


def group_of(position: int, batch: int, groups: int) -> int:
    """The group of a position in a global batch of `batch` samples."""
    return position * groups // batch


def evenly(share: float) -> int:
    """The timestep of which `share` of uniform draws are smaller."""
    return int(share * TIMESTEPS)


def group_timestep(seed: int, step: int, group: int, groups: int, timestep_at: Callable[[float], int] = evenly) -> int:
    """The timestep, 0 .. 999, whose interval is that of `group` at `step`; it falls for each group as training draws timesteps.

    `timestep_at` is the objective's: of which timestep a share of the draws is smaller.
    """
    keys = Keys(seed, step, torch.zeros(1, dtype=torch.int64))  # one for all groups
    offset = turned(int(integers(keys, "density groups", TIMESTEPS)), group, groups)
    return timestep_at((offset + float(uniform(keys, "density groups"))) / TIMESTEPS)


def turned(offset: int, group: int, groups: int) -> int:
    """The thousandth of the draws in which `group` lies where the first group's is `offset`."""
    return (offset + group * TIMESTEPS // groups) % TIMESTEPS


def interval_of(intervals: Sequence[range], timestep: int) -> int:
    """The place of the interval that holds a timestep."""
    return next(place for place, timesteps in enumerate(intervals) if timestep in timesteps)


def groups_line(groups: int, processes: int, accumulation: int, intervals: int) -> str:
    """How the token counts of a step are dealt, and what helps where a step does not meet all of the noise range."""
    shares = processes * accumulation
    counted = "1 density group" if groups == 1 else f"{groups} density groups"
    each = f"{shares // groups} of {shares} processes x accumulation steps"
    dealt = f"{counted}, one for every {'process and accumulation step' if groups == shares else each}"
    if groups >= intervals:
        return dealt
    return f"{dealt}: a step learns from {groups} of {intervals} intervals at most; more --gradient-accumulation spreads it"
