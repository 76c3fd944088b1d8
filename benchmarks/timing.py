"""Timing that compares: rounds in which every contestant runs once, the first rounds thrown away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant: the median of the rounds, and the fastest and slowest."""

    median: float
    fastest: float
    slowest: float


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Runs every contestant once a round, in turn, so that a slow spell of the machine hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(warm_up + rounds), "measure", unit="round"):
        for name, run in contestants.items():
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
