"""How long a command takes until its first pictures are there, and where that time goes."""

from __future__ import annotations

import time

import psutil

from runtime.execution import Execution


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included; right to about a second, as the system counts."""
    return time.time() - psutil.Process().create_time()


class FirstPictures:
    """Made when sampling begins."""

    def __init__(self, execution: Execution) -> None:
        once = {"compilation": execution.compile != "none", "recording of CUDA graphs": execution.cuda_graphs}
        self.once = " and ".join(name for name, done in once.items() if done)
        self.before = seconds_since_start()
        self._began = time.perf_counter()

    def line(self) -> str:
        """What is printed when the first pictures are decoded."""
        sampling = time.perf_counter() - self._began
        included = f", {self.once} included" if self.once else ""
        return (
            f"first pictures after {self.before + sampling:.0f} s: {self.before:.0f} s until sampling began (imports, "
            f"checkpoint, weights), {sampling:.1f} s to sample a batch and decode its first pictures{included}"
        )
