"""Token density: rates become the paper's grids, intervals cover every timestep once, text is read back or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffusion.schedule
import models.token_density
from models.token_density import TIMESTEPS, Grid, TokenDensity, grid_of_rate, pruning_rate
from runtime.config import InputError

FULL = (16, 16)

# Rates and grids -----------------------------------------------------------------------------------------------------

PUBLISHED = {
    16: {12: 0.44, 10: 0.61, 8: 0.75, 6: 0.86},
    32: {20: 0.61, 16: 0.75, 12: 0.86, 10: 0.90, 6: 0.96},
}
"""Tokens per side of the full map -> side of the sparse grid -> pruning rate, to two digits (reference/sparsedit.md)."""


def misread_rates(grid_of: Callable[[float, Grid], Grid]) -> list[tuple[int, int]]:
    """Published (full side, sparse side) whose rate does not come back as the grid."""
    return [
        (full, side)
        for full, rates in PUBLISHED.items()
        for side, rate in rates.items()
        if grid_of(rate, (full, full)) != (side, side)
    ]


def test_the_timesteps_are_those_of_the_noise_schedule() -> None:
    """Networks and schedules do not import each other, so the number stands in both."""
    assert diffusion.schedule.TIMESTEPS == TIMESTEPS


def test_the_papers_rates_are_those_of_its_grids() -> None:
    for full, rates in PUBLISHED.items():
        for side, rate in rates.items():
            assert round(1 - side**2 / full**2, 2) == pytest.approx(rate)
    assert misread_rates(grid_of_rate) == []


@pytest.mark.parametrize("rounding", [math.ceil, math.floor], ids=["up", "down"])
def test_the_published_grids_catch_another_rounding(rounding: Callable[[float], int]) -> None:
    def rounded(rate: float, full: Grid) -> Grid:
        rows, columns = (rounding(side * math.sqrt(1 - rate)) for side in full)
        return rows, columns

    assert misread_rates(rounded)


sides = st.integers(1, 64)


@given(full=st.tuples(sides, sides), side=sides)
def test_an_exact_rate_comes_back_as_its_grid(full: Grid, side: int) -> None:
    """On a square map every grid has a rate of its own; on a rectangle both sides shrink alike."""
    side = min(side, full[0])
    rate = 1 - side**2 / full[0] ** 2
    assert grid_of_rate(rate, (full[0], full[0])) == (side, side)
    rows, columns = grid_of_rate(rate, full)
    assert rows == side
    assert abs(columns - full[1] * side / full[0]) <= 0.5 + 1e-9 or columns == 1


@given(full=st.tuples(sides, sides), rate=st.floats(0, 1, exclude_max=True))
def test_a_grid_is_never_empty_or_larger_than_the_map(full: Grid, rate: float) -> None:
    assert all(1 <= side <= limit for side, limit in zip(grid_of_rate(rate, full), full, strict=True))
    assert grid_of_rate(0, full) == full


@pytest.mark.parametrize("low", [0.0, 0.44, 0.61])
@pytest.mark.parametrize("high", [0.61, 0.86, 0.96])
def test_the_pruning_rate_is_the_papers_at_its_corners(low: float, high: float) -> None:
    for t in (0, 1, 100, 249, 249.9):
        assert pruning_rate(t, low, high) == low
    assert pruning_rate(250, low, high) == low
    assert pruning_rate(1000, low, high) == pytest.approx(high)
    assert pruning_rate(625, low, high) == pytest.approx((low + high) / 2)
    assert pruning_rate(500, low, high) == pytest.approx(low + (high - low) / 3)
    rates = [pruning_rate(t, low, high) for t in range(TIMESTEPS)]
    assert rates == sorted(rates)


# Schedules -----------------------------------------------------------------------------------------------------------


def by_timestep(low: float, high: float, full: Grid) -> list[Grid]:
    """The grid of every timestep, from the facts of the paper, one timestep at a time."""
    grids = []
    for t in range(1000):
        rate = low + max(0, t - 250) / 750 * (high - low)
        grids.append((max(1, int(full[0] * (1 - rate) ** 0.5 + 0.5)), max(1, int(full[1] * (1 - rate) ** 0.5 + 0.5))))
    return grids


def disagreements(density: TokenDensity, reference: Sequence[Grid]) -> int:
    """Timesteps at which the two have different grids; intervals must be maximal runs, and cover 0 .. 999 once, in order."""
    assert [t for interval in density.intervals for t in interval] == list(range(1000))
    assert all(first != second for first, second in zip(density.grids, density.grids[1:], strict=False))
    by_interval = [grid for grid, interval in zip(density.grids, density.intervals, strict=True) for _ in interval]
    assert by_interval == [density.grid_at(t) for t in range(1000)]
    return sum(ours != theirs for ours, theirs in zip(by_interval, reference, strict=True))


SCHEDULES = [
    (0.44, 0.61, (16, 16)),
    (0.61, 0.86, (16, 16)),
    (0.61, 0.86, (32, 32)),
    (0.90, 0.96, (32, 32)),
    (0.0, 0.99, (16, 16)),
    (0.3, 0.9, (8, 20)),
    (0.3, 0.9, (7, 5)),
    (0.0, 0.0, (16, 16)),
    (0.5, 0.9999, (1, 12)),
]


@pytest.mark.parametrize(("low", "high", "full"), SCHEDULES)
def test_runs_are_those_of_every_timestep(low: float, high: float, full: Grid) -> None:
    density = TokenDensity.from_rates(low, high, full)
    assert disagreements(density, by_timestep(low, high, full)) == 0
    assert density == TokenDensity.of_runs(by_timestep(low, high, full))
    assert density == TokenDensity.parse(f"{low}:{high}", full)


@given(rates=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), full=st.tuples(sides, sides))
def test_fewer_tokens_at_more_noise(rates: tuple[float, float], full: Grid) -> None:
    low, high = sorted(rates)
    for intervals in (None, 4):
        grids = TokenDensity.from_rates(low, high, full, intervals).grids
        for place in (0, 1):
            assert [grid[place] for grid in grids] == sorted((grid[place] for grid in grids), reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, low, high: low + (high - low) * t / 1000,
        lambda t, low, high: pruning_rate(999 - t, low, high),
        lambda t, low, high: pruning_rate(t + 1, low, high),
        lambda t, low, high: pruning_rate(t, high, low),
    ],
    ids=["linear from 0", "time reversed", "off by one", "rates swapped"],
)
def test_the_reference_catches_another_schedule(
    wrong: Callable[[float, float, float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.token_density, "pruning_rate", wrong)
    density = TokenDensity.from_rates(0.61, 0.86, (32, 32))
    assert disagreements(density, by_timestep(0.61, 0.86, (32, 32))) > 0


@pytest.mark.parametrize(
    ("text", "full", "written"),
    [
        ("0.61:0.86/4", (16, 16), "10,9,8,6@0,250,500,750"),
        ("0.44:0.61/4", (16, 16), "12,11,11,10@0,250,500,750"),
        ("0.61:0.86/4", (32, 32), "20,18,15,12@0,250,500,750"),
        ("0.90:0.96/4", (32, 32), "10,9,8,6@0,250,500,750"),
        ("0.61:0.86/1", (16, 16), "6"),
        ("0.61:0.86/3", (16, 16), "10,8,6@0,333,666"),
        ("0.61:0.86/4", (8, 24), "5x15,4x13,4x11,3x9@0,250,500,750"),
        ("0.61:0.86", (16, 16), "10,9,8,7,6@0,363,574,761,925"),
        ("0.44:0.61", (16, 16), "12,11,10@0,442,821"),
        ("0.61:0.86", (32, 32), "20,19,18,17,16,15,14,13,12@0,306,418,523,623,717,805,887,963"),
        ("0.90:0.96", (32, 32), "10,9,8,7,6@0,399,619,814,985"),
        ("0.61:0.61", (16, 16), "10"),
        (".61 : .86 / 4", (16, 16), "10,9,8,6@0,250,500,750"),
        (" 8\n", (16, 16), "8"),
        ("8x8", (16, 16), "8"),
        ("16x3", (16, 20), "16x3"),
        ("08 , 6x4@0 ,500", (16, 16), "8,6x4@0,500"),
        ("8,8@0,500", (16, 16), "8,8@0,500"),
        ("8@0", (16, 16), "8"),
        ("5,7@0,999", (16, 16), "5,7@0,999"),
        ("0:0", (12, 20), "12x20"),
    ],
)
def test_text_is_read_and_written_out_in_grids(text: str, full: Grid, written: str) -> None:
    density = TokenDensity.parse(text, full)
    assert str(density) == written
    assert TokenDensity.parse(written, full) == density
    assert [t for interval in density.intervals for t in interval] == list(range(1000))


@pytest.mark.parametrize("intervals", [1, 2, 3, 4, 7, 999, 1000])
def test_equal_parts_are_equal_and_end_at_the_noisy_rate(intervals: int) -> None:
    density = TokenDensity.from_rates(0.61, 0.86, (32, 32), intervals)
    lengths = {len(interval) for interval in density.intervals}
    assert len(density.intervals) == intervals
    assert max(lengths) - min(lengths) <= 1
    for grid, interval in zip(density.grids, density.intervals, strict=True):
        assert grid == grid_of_rate(pruning_rate(interval.stop, 0.61, 0.86), (32, 32))
    assert density.grids[-1] == (12, 12)
    assert intervals < 4 or density.grids[0] == (20, 20)


def test_a_boundary_belongs_to_the_interval_that_starts_there() -> None:
    density = TokenDensity.parse("10,9,8,6@0,250,500,750", FULL)
    found = [density.grid_at(t)[0] for t in (0, 249, 250, 499, 500, 749, 750, 999)]
    assert found == [10, 10, 9, 9, 8, 8, 6, 6]
    assert density.intervals == [range(250), range(250, 500), range(500, 750), range(750, 1000)]
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=f"timestep {t} is not one of 0 .. 999"):
            density.grid_at(t)


starts = st.sets(st.integers(1, 999), max_size=12).map(lambda chosen: (0, *sorted(chosen)))
densities = starts.flatmap(
    lambda chosen: st.lists(st.tuples(sides, sides), min_size=len(chosen), max_size=len(chosen)).map(
        lambda grids: TokenDensity(chosen, tuple(grids))
    )
)


@given(density=densities)
def test_every_density_is_read_back_and_covers_every_timestep_once(density: TokenDensity) -> None:
    assert TokenDensity.parse(str(density), (64, 64)) == density
    assert [t for interval in density.intervals for t in interval] == list(range(1000))
    for grid, interval in zip(density.grids, density.intervals, strict=True):
        assert density.grid_at(interval.start) == density.grid_at(interval.stop - 1) == grid
    runs = TokenDensity.of_runs(density.grid_at(t) for t in range(1000))
    assert disagreements(runs, [density.grid_at(t) for t in range(1000)]) == 0


@given(grid=st.tuples(sides, sides))
def test_a_fixed_density_is_one_interval(grid: Grid) -> None:
    density = TokenDensity.fixed(grid)
    assert density.intervals == [range(1000)]
    assert {density.grid_at(t) for t in (0, 500, 999)} == {grid}
    assert TokenDensity.parse(str(density), (64, 64)) == density


# Wrong text ----------------------------------------------------------------------------------------------------------

NOT_UNDERSTOOD = [
    "", " ", "\n", "8,6", "-8", "+8", "8.0", "0.5", "a", "a:b", "nan:0.5", "0:inf", "8x8x8", "8x", "x8", "8X6", "8×6", "8*6",
    "1e-1:0.5", "0.1:", ":0.5", "0.1:0.2:0.3", "0.1:0.2/", "0.1:0.2/a", "0.1:0.2/4/4", "0.1:0.2/-4", "-0.1:0.5", "8@", "@0",
    "8,@0", "8,6@0,", "8,,6@0,500", "8,6@0,-5", "8,6@0,5.5", "8 6@0 500", "8;6@0;500", "8@0@0", "8\n6", "8x\n6", "8 x 6",
    "[8, 6]", "none", "8" * 10, "8@" + "1" * 10, "８", "٣", "8x٣", "٠.٦:0.8", "8,6@0,５00", "²", "0.5:0.6\x00",
]  # fmt: skip

RATES = "pruning rates are at least 0 and below 1, that of the clean end first and not the larger"
STARTS = "starts must ascend from 0 and stay below 1000"
REFUSED = {
    "0.86:0.61": ["token density 0.86:0.61", RATES, "6,8,10@0,250,750"],
    "1:1": ["token density 1:1", RATES],
    "0.5:1": ["token density 0.5:1", RATES],
    "61:86": ["token density 61:86", RATES],
    "9" * 400 + ":1": ["token density inf:1", RATES],
    "0.1:0.2/0": ["token density 0.1:0.2/0", "1 to 1000 parts", "give /4"],
    "0.1:0.2/1001": ["token density 0.1:0.2/1001", "1 to 1000 parts"],
    "9@5": ["token density 9@5", STARTS, "10,9,8,6@0,250,500,750"],
    "8,6@0,0": ["token density 8,6@0,0", STARTS],
    "8,6@0,1000": ["token density 8,6@0,1000", STARTS],
    "8,6@500,0": ["token density 8,6@500,0", STARTS],
    "8,7,6@0,500,400": ["token density 8,7,6@0,500,400", STARTS],
    "8,6@0": ["token density 8,6@0 names 2 grid(s) and 1 start(s)", "give each grid one start"],
    "8@0,100": ["token density 8@0,100 names 1 grid(s) and 2 start(s)"],
    "0": ["token density 0:", "at least 1 row and 1 column", "sides of 1 or more"],
    "8x0": ["token density 8x0:", "at least 1 row and 1 column"],
    "8,0@0,500": ["token density 8,0@0,500:", "at least 1 row and 1 column"],
    "99": ["sparse grid 99x99", "token map of 16x16", "at most its sides"],
    "17x3": ["sparse grid 17x3", "16x16"],
    "8,3x17,4@0,1,2": ["sparse grid 3x17", "16x16"],
    "999999999": ["sparse grid 999999999x999999999", "16x16"],
}


def sentence(text: str, full: Grid = FULL) -> str:
    with pytest.raises(InputError) as caught:
        TokenDensity.parse(text, full)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    ours = message.replace(repr(text.strip()), "")
    assert not re.search(r"\.\.|\s\.|\. [A-Z]", ours), f"more than one sentence: {message}"
    return message


@pytest.mark.parametrize("text", NOT_UNDERSTOOD, ids=lambda text: ascii(text)[:24])
def test_text_of_no_known_form_is_shown_with_the_three_forms(text: str) -> None:
    message = sentence(text)
    assert message.startswith("token density '")
    for form in ("is not understood", "a side (8, or 8x6)", "pruning rates (0.61:0.86)", "(10,9,8,6@0,250,500,750)"):
        assert form in message


@pytest.mark.parametrize(("text", "words"), REFUSED.items(), ids=[text[:24] for text in REFUSED])
def test_what_cannot_be_is_refused_by_name_and_with_a_remedy(text: str, words: list[str]) -> None:
    message = sentence(text)
    for word in words:
        assert word in message


@given(text=st.text(st.sampled_from("0123456789.,:@/x -\n٣a"), max_size=14))
def test_any_text_is_a_density_or_one_sentence(text: str) -> None:
    try:
        density = TokenDensity.parse(text, FULL)
    except InputError:
        sentence(text)
    else:
        assert TokenDensity.parse(str(density), FULL) == density
        assert text.isascii()


def test_examples_in_messages_are_understood() -> None:
    """What a message or the help recommends must work."""
    for text in ("8", "8x6", "0.61:0.86", "0.61:0.86/4", "10,9,8,6@0,250,500,750", "6,8,10@0,250,750"):
        TokenDensity.parse(text, FULL)
