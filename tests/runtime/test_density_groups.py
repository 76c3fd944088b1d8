"""Timesteps drawn by groups of a batch are uniform over all, stratified within a step, and leave the expected loss alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from small_runs import random_network
from torch import Tensor

from diffusion.flow import FlowObjective, share_below
from diffusion.gaussian import EpsilonObjective, Timesteps
from diffusion.schedule import NoiseSchedule
from models import Backbone, DiT
from models.token_density import TIMESTEPS, TokenDensity
from runtime.config import InputError
from runtime.density_groups import check_groups, group_of, group_timestep, interval_of, turned
from runtime.seeding import Keys, integers, normal
from runtime.training import Batch, TrainingStep

DENSITIES = {
    "quarters": TokenDensity.parse("10,9,8,6@0,250,500,750", (16, 16)),
    "uneven": TokenDensity.parse("4,3,2,1@0,7,310,930", (4, 4)),
    "runs of a grid at 512": TokenDensity.parse("0.61:0.86", (32, 32)),
    "one": TokenDensity.parse("8", (16, 16)),
}
every_density = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
every_count = pytest.mark.parametrize("groups", [1, 2, 3, 7, 8, 32, 1000, 1024])

Draw = Callable[[Sequence[range], int, int, int], range]
"""Intervals, offset of the step, group, number of groups -> the timesteps within which the group draws."""


def drawn(intervals: Sequence[range], offset: int, group: int, groups: int) -> range:
    return intervals[interval_of(intervals, turned(offset, group, groups))]


def uniform_over_intervals(intervals: Sequence[range], offset: int, group: int, groups: int) -> range:
    return intervals[turned(offset, group, groups) * len(intervals) // TIMESTEPS]


def not_turned(intervals: Sequence[range], offset: int, group: int, groups: int) -> range:
    return drawn(intervals, offset, 0, groups)


# Exactly, over every offset ------------------------------------------------------------------------------------------


def weights(intervals: Sequence[range], group: int, groups: int, draw: Draw = drawn) -> list[Fraction]:
    """The probability of every timestep in one group, where the offset is uniform."""
    held = [draw(intervals, offset, group, groups) for offset in range(TIMESTEPS)]
    counts = {timesteps.start: held.count(timesteps) for timesteps in intervals}
    return [Fraction(counts[timesteps.start], TIMESTEPS * len(timesteps)) for timesteps in intervals for _ in timesteps]


@every_density
@every_count
def test_every_group_draws_every_timestep_alike(density: TokenDensity, groups: int) -> None:
    for group in {0, groups // 3, groups - 1}:
        assert set(weights(density.intervals, group, groups)) == {Fraction(1, TIMESTEPS)}


def test_intervals_drawn_alike_would_be_noticed() -> None:
    uneven = DENSITIES["uneven"].intervals
    assert weights(uneven, 0, 8, uniform_over_intervals)[0] == Fraction(1, 4 * 7)


def unevenness(intervals: Sequence[range], groups: int, draw: Draw = drawn) -> float:
    """By how many groups an interval's share of any step differs at most from its share of the timesteps."""
    worst = 0.0
    for offset in range(TIMESTEPS):
        starts = [draw(intervals, offset, group, groups).start for group in range(groups)]
        shares = ((starts.count(timesteps.start), groups * len(timesteps) / TIMESTEPS) for timesteps in intervals)
        worst = max(worst, *(abs(count - expected) for count, expected in shares))
    return worst


@pytest.mark.parametrize("density", [DENSITIES["quarters"], DENSITIES["uneven"]], ids=["quarters", "uneven"])
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_the_groups_of_a_step_spread_over_the_intervals(density: TokenDensity, groups: int) -> None:
    assert unevenness(density.intervals, groups) < 1
    if len(density.intervals) == 4 and groups == 8 and density is DENSITIES["quarters"]:
        assert unevenness(density.intervals, groups) == 0  # two groups in every quarter, at every step


def test_ranks_that_all_draw_the_same_would_be_noticed() -> None:
    assert unevenness(DENSITIES["quarters"].intervals, 8, not_turned) == 6


# Over many steps -----------------------------------------------------------------------------------------------------


OBJECTIVE = EpsilonObjective(NoiseSchedule.linear(), 5.0, learned_variance=True)


def timesteps_of_training(density: TokenDensity, processes: int, accumulation: int, count: int, draw: Draw = drawn) -> Tensor:
    """The timesteps of `count` samples, each process's share of a step being one sample. -> (count,) int64

    More samples of a share have their interval in common: together they would be no independent numbers to test.
    """
    shares = processes * accumulation
    found = []
    for step in range(count // shares):
        offset = group_timestep(3, step, 0, shares)
        for micro in range(accumulation):
            for rank in range(processes):
                position = micro * processes + rank
                timesteps = draw(density.intervals, offset, group_of(position, shares, shares), shares)
                keys = Keys(3, step, torch.tensor([position]))
                found.append(OBJECTIVE.noised(torch.zeros(1, 1, 1, 1), keys, timesteps).t)
    return torch.cat(found)


def chi_square(timesteps: Tensor) -> float:
    """The probability of timesteps that are so unevenly spread over 50 bins, or more so, were they uniform."""
    return float(scipy.stats.chisquare(np.bincount(timesteps.numpy() // 20, minlength=50)).pvalue)


LOGIT_NORMAL = FlowObjective("logit-normal")


def test_a_group_s_share_is_any_number() -> None:
    """Not a thousandth: logit-normal times below the first one's would never be drawn."""
    shares = list[float]()
    for step in range(200):
        group_timestep(0, step, 0, 4, lambda share: shares.append(share) or 0)
    within = np.array(shares) * TIMESTEPS % 1
    assert scipy.stats.kstest(within, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(shares, "uniform").pvalue > 1e-3


def flow_times(
    density: TokenDensity, groups: int, count: int, timestep_at: Callable[[float], int], turn: bool = True
) -> Tensor:
    """The flow times of `count` samples, one of each group of a step. -> (count,)

    `turn` False: groups are turned in timesteps instead of in shares of the draws.
    """
    found = []
    for step in range(count // groups):
        for group in range(groups):
            timestep = group_timestep(3, step, group if turn else 0, groups, timestep_at)
            timestep = timestep if turn else turned(timestep, group, groups)
            timesteps = density.intervals[interval_of(density.intervals, timestep)]
            keys = Keys(3, step, torch.tensor([group]))
            found.append(LOGIT_NORMAL.noised(torch.zeros(1, 1, 1, 1), keys, timesteps).t / TIMESTEPS)
    return torch.cat(found)


def logit_normal(times: Tensor) -> float:
    """The probability of times that lie so far or farther from the sigmoids of standard normal numbers."""
    return float(scipy.stats.kstest(torch.logit(times.double()).numpy(), "norm").pvalue)


@pytest.mark.parametrize("groups", [1, 4])
def test_times_of_a_flow_keep_their_law_whatever_the_groups(groups: int) -> None:
    found = flow_times(DENSITIES["uneven"], groups, 600, LOGIT_NORMAL.timestep_at)
    assert logit_normal(found) > 1e-3
    for group in range(groups):  # each by itself too: its losses stand for the same expectation
        assert logit_normal(found[group::groups]) > 1e-3


def test_groups_that_are_turned_in_time_would_be_noticed() -> None:
    found = flow_times(DENSITIES["uneven"], 8, 600, LOGIT_NORMAL.timestep_at, turn=False)
    assert logit_normal(found) < 1e-4


def test_groups_that_draw_intervals_by_their_length_would_be_noticed() -> None:
    """Planted bug: the share of uniform timesteps."""
    assert logit_normal(flow_times(DENSITIES["uneven"], 8, 600, lambda share: int(share * TIMESTEPS))) < 1e-4


def test_every_group_meets_an_interval_as_often_as_the_law_says() -> None:
    """Over an even grid of shares, which is exact up to the grid."""
    intervals = DENSITIES["uneven"].intervals
    met = [interval_of(intervals, LOGIT_NORMAL.timestep_at((place + 0.5) / 2000)) for place in range(2000)]
    edges = torch.tensor([timesteps.start for timesteps in intervals] + [TIMESTEPS], dtype=torch.float64) / TIMESTEPS
    expected = share_below("logit-normal", edges).diff()
    np.testing.assert_allclose(np.bincount(met, minlength=4) / len(met), expected, atol=2 / len(met))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (8, 1), (2, 4)])
def test_timesteps_over_many_steps_are_uniform(processes: int, accumulation: int) -> None:
    assert chi_square(timesteps_of_training(DENSITIES["uneven"], processes, accumulation, 1600)) > 1e-3


@pytest.mark.parametrize("processes", [1, 8])
def test_the_chi_square_catches_intervals_drawn_alike(processes: int) -> None:
    found = timesteps_of_training(DENSITIES["uneven"], processes, 1, 1600, uniform_over_intervals)
    assert chi_square(found) < 1e-9


def test_offsets_are_uniform_and_named_by_seed_and_step() -> None:
    offsets = torch.tensor([group_timestep(0, step, 0, 4) for step in range(2000)])
    assert chi_square(offsets) > 1e-3
    others = torch.tensor([group_timestep(1, step, 0, 4) for step in range(2000)])
    for one, other in ((offsets, others), (offsets[1:], offsets[:-1])):
        correlation = float(torch.corrcoef(torch.stack((one.double(), other.double())))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(2000)
    assert [group_timestep(0, 7, group, 4) for group in range(4)] == [
        (int(offsets[7]) + 250 * group) % 1000 for group in range(4)
    ]


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> DiT:
    options = {
        "density": "4,3,2@0,100,900",
        "poolingformer_blocks": 0,
        "modules": 1,
        "module_blocks": "1,0,1,0",
        "top_blocks": 0,
    }
    torch.manual_seed(0)
    return random_network("sparsedit", Backbone.named("DiT-16x2x2/2", (8, 8), num_classes=10), options).requires_grad_(False)


@pytest.fixture(scope="module")
def losses_at(network: DiT) -> np.ndarray:
    """The loss of one latent with one noise at every timestep, under that timestep's plan. -> (1000,)"""
    x0, noise = normal(Keys(0, 0, torch.arange(2)), "test", (4, 8, 8)).split(1)
    t, y = torch.arange(TIMESTEPS), torch.zeros(TIMESTEPS, dtype=torch.int64)
    x0, noise = x0.expand(TIMESTEPS, -1, -1, -1), noise.expand(TIMESTEPS, -1, -1, -1)
    schedule = OBJECTIVE.schedule.tables(x0.device)
    x_t = (
        schedule.sqrt_alphas_cumprod[:, None, None, None] * x0
        + schedule.sqrt_one_minus_alphas_cumprod[:, None, None, None] * noise
    )
    return OBJECTIVE(network(x_t, t, y), x0, t, noise).total.double().numpy()


def expected_loss(intervals: Sequence[range], groups: int, losses: np.ndarray, draw: Draw = drawn) -> float:
    """The mean of a step's loss over every offset, all samples of a group drawing within its interval."""
    means = {timesteps.start: losses[timesteps.start : timesteps.stop].mean() for timesteps in intervals}
    return float(np.mean([
        means[draw(intervals, offset, group, groups).start] for offset in range(TIMESTEPS) for group in range(groups)
    ]))  # fmt: skip


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_the_expected_loss_is_that_of_uniform_timesteps(groups: int, network: DiT, losses_at: np.ndarray) -> None:
    assert network.density is not None
    intervals = network.density.intervals
    assert losses_at.std() > 0.1 * losses_at.mean()
    assert expected_loss(intervals, groups, losses_at) == pytest.approx(losses_at.mean(), rel=1e-12)
    assert expected_loss(intervals, groups, losses_at, uniform_over_intervals) != pytest.approx(losses_at.mean(), rel=0.05)


def losses_of_training(network: DiT, groups: int, steps: int, draw: Draw = drawn) -> Tensor:
    """Losses of `TrainingStep` under the network as it is, the mean of each step's groups. -> (steps,)"""
    assert network.density is not None
    step_module, means = TrainingStep(network, OBJECTIVE, seed=0), []
    for step in range(steps):
        found = []
        for group in range(groups):
            timesteps = draw(network.density.intervals, group_timestep(0, step, 0, groups), group, groups)
            positions = torch.arange(group * 8, group * 8 + 8)
            latents = normal(Keys(0, step, positions), "latents", (4, 8, 8))
            bounds = Timesteps(torch.tensor(timesteps.start), torch.tensor(timesteps.stop))
            batch = Batch(latents, positions % 10, positions, bounds, network.plan(timesteps.start))
            found.append(step_module(batch, torch.tensor(step))[0])
        means.append(torch.stack(found).mean())
    return torch.stack(means).double()


def plain_losses(network: DiT, count: int) -> Tensor:
    """Losses under plain uniform timesteps, each sample under its own timestep's plan. -> (count,)"""
    keys = Keys(0, 0, torch.arange(count))
    noised = OBJECTIVE.noised(normal(keys, "latents", (4, 8, 8)), keys)
    output = network(noised.x_t, noised.t, integers(keys, "label", 10), draws=network.draw(keys))
    return OBJECTIVE.losses(output, noised)["loss"].double()


def standard_errors(ours: Tensor, plain: Tensor) -> float:
    """How many standard errors two means are apart."""
    error = math.sqrt(float(ours.var() / len(ours) + plain.var() / len(plain)))
    return abs(float(ours.mean() - plain.mean())) / error


def test_losses_of_the_training_step_average_to_those_of_uniform_timesteps(network: DiT) -> None:
    plain = plain_losses(network, 6000)
    assert standard_errors(losses_of_training(network, 2, 250), plain) < 4
    assert standard_errors(losses_of_training(network, 2, 250, uniform_over_intervals), plain) > 8


def test_groups_of_a_step_lower_the_spread_of_its_loss(network: DiT) -> None:
    """What stratifying is for. The known bad: as many groups that all draw the same interval."""
    assert losses_of_training(network, 4, 100).std() < 0.7 * losses_of_training(network, 4, 100, not_turned).std()


# How groups are dealt ------------------------------------------------------------------------------------------------


def test_a_group_is_a_contiguous_part_of_the_batch() -> None:
    assert [group_of(position, 12, 3) for position in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert {group_of(position, 256, 1) for position in range(256)} == {0}


@pytest.mark.parametrize(("groups", "processes", "accumulation"), [(1, 1, 1), (1, 3, 1), (4, 2, 2), (2, 1, 4), (8, 8, 4)])
def test_groups_that_can_be_dealt(groups: int, processes: int, accumulation: int) -> None:
    check_groups(groups, processes, accumulation)


@pytest.mark.parametrize(("groups", "processes", "accumulation"), [(2, 1, 1), (3, 2, 2), (16, 8, 1)])
def test_groups_that_cannot_be_dealt_are_refused(groups: int, processes: int, accumulation: int) -> None:
    with pytest.raises(InputError, match=f"{groups} density groups .* {processes} x {accumulation}.*--density-groups"):
        check_groups(groups, processes, accumulation)
