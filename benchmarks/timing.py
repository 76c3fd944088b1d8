"""Timing that compares: rounds in which every contestant runs once, the first rounds thrown away."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from tqdm import tqdm

from benchmarks.devices import synchronise
from benchmarks.memory import watch_memory


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant in every round, and the memory that its runs added."""

    rounds: tuple[float, ...]
    added_gib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        return min(self.rounds)

    @property
    def slowest(self) -> float:
        return max(self.rounds)

    def part(self, parts: float) -> Timing:
        """Of runs that did `parts` times the work: the time of doing it once."""
        return Timing(tuple(seconds / parts for seconds in self.rounds), self.added_gib)

    def speeds(self, baseline: Timing) -> list[float]:
        """How many times faster than the baseline, round by round: what slows a whole round cancels out."""
        return [theirs / ours for ours, theirs in zip(self.rounds, baseline.rounds, strict=True)]


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, Timing]:
    """Runs every contestant once a round, in turn, so that a slow spell of the machine hits them alike.

    The clock is read when `device` has done all its work. Memory is the largest amount that a run added; on a GPU that of the
    warm-up counts, where graphs take theirs once for all, elsewhere it does not: what compiles there is part of the process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory = dict.fromkeys(contestants, 0.0)
    for number in tqdm(range(warm_up + rounds), "measure", unit="round"):
        for name, run in contestants.items():
            synchronise(device)
            with watch_memory(device) as added:
                started = perf_counter()
                run()
                synchronise(device)
                ended = perf_counter()
            if number >= warm_up:
                seconds[name].append(ended - started)
            if number >= warm_up or device.type != "cpu":
                memory[name] = max(memory[name], added.gib)
    return {name: Timing(tuple(times), memory[name]) for name, times in seconds.items()}
