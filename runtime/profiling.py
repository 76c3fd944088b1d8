"""Where the time of training steps goes: a trace to look at and a table, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from runtime.files import atomic_write
from runtime.logs import say

WARM_UP = 3
"""Steps before those that are recorded: the first ones allocate and compile."""


BETWEEN = "Python between operators (ProfilerStep* in the table)"
"""What is not inside any operator is counted for the step."""


class StepProfiler:
    """Records some training steps after a warm-up, says what took longest, and is silent from then on."""

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        """Writes FOLDER/trace.json, for chrome://tracing or ui.perfetto.dev, and FOLDER/table.txt."""
        self.folder, self.steps, self.device = folder, steps, device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
        self._profile: Any = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._ended = 0
        self._profile.start()

    def step(self) -> bool:
        """To be called at the end of every training step. -> whether it wrote the files, which takes its time"""
        if self._profile is None:
            return False
        self._ended += 1
        self._profile.step()
        if self._ended < WARM_UP + self.steps:
            return False
        self._profile.stop()
        self._profile = None
        return True

    def close(self) -> None:
        """Writes what there is where training ends before the last step to be recorded."""
        if self._profile is None:
            return
        if self._ended <= WARM_UP:
            say(f"--profile: training ended before there was a step to record; it takes more than {WARM_UP} steps.")
        self._profile.stop()
        self._profile = None

    def _write(self, recorded: Any) -> None:
        steps = min(self.steps, self._ended - WARM_UP)
        if steps < 1:
            return
        try:
            self._write_files(recorded, steps)
        except OSError as error:  # training is worth more than its profile
            say(f"WARNING: the profile cannot be written to {self.folder} ({error.strerror}); training goes on.")

    def _write_files(self, recorded: Any, steps: int) -> None:
        time = f"self_{'device' if self.device.type == 'cuda' else 'cpu'}_time_total"
        averages = recorded.key_averages()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "trace.json") as temporary:
            recorded.export_chrome_trace(str(temporary))
        with atomic_write(self.folder / "table.txt") as temporary:
            temporary.write_text(averages.table(sort_by=time, row_limit=60, max_name_column_width=70), encoding="utf-8")
        own = sorted(((getattr(entry, time), entry.key) for entry in averages), reverse=True)
        total = sum(spent for spent, _ in own) or 1.0
        names = (name if not name.startswith("ProfilerStep") else BETWEEN for _, name in own)
        largest = ", ".join(f"{name} {spent / total:.0%}" for name, (spent, _) in zip(names, own[:4], strict=False))
        say(f"profile of {steps} steps in {self.folder} (trace.json, table.txt): {largest}")
