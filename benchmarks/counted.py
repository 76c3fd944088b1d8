"""What passes computed while they were timed, for networks whose work depends on what they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.result import Work
from models import DiT
from models.work import CountedWork
from runtime.work_report import work_lines, work_record


@dataclass(frozen=True)
class CountedRun:
    """A run, and what its network computed in all rounds of it; no counts where plans say what is computed."""

    network: DiT
    run: Callable[[], None]
    counts: CountedWork | None

    @classmethod
    def of(cls, network: DiT, run: Callable[[], None]) -> CountedRun:
        return cls(network, run, None if network.work is None else CountedWork(network.backbone.depth))

    def __call__(self) -> None:
        self.network.work = self.counts  # other rows may run the same network
        self.run()

    def measured(self, planned: Work) -> Work:
        """The work of a round, with the multiply-accumulates that were counted in place of those that are planned at most."""
        if self.counts is None or planned.gmacs is None or planned.total_gmacs is None:
            return planned
        gmacs = self.counts.macs / self.counts.passes / 1e9
        return replace(planned, gmacs=gmacs, total_gmacs=planned.total_gmacs * gmacs / planned.gmacs)


def counted(runs: Mapping[str, CountedRun]) -> dict[str, Any]:
    """Parts of a result: the counts of every row that has some, in "counted_work", and lines about them."""
    there = {name: (run.network, run.counts) for name, run in runs.items() if run.counts is not None}
    lines = [f"{name}, {line.strip()}" for name, (network, counts) in there.items() for line in work_lines(network, counts)]
    return {"counted_work": {name: work_record(*one) for name, one in there.items()}, "counted_lines": lines}
