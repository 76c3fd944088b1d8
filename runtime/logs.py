"""What a run says while it goes: one console line, one JSON line and TensorBoard scalars from the same numbers."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from runtime.files import atomic_write

METRICS = "metrics.jsonl"
LAYERS = "layers/"
"""How the names of numbers begin of which there is one for each layer: too many for the console."""


class RunLog:
    """Logs of one run's folder. Only rank 0 has one."""

    def __init__(self, run: Path, first_step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / METRICS
        self._drop_after(first_step)
        # purge_step hides what a killed run wrote beyond its checkpoint, as _drop_after does for the JSON lines.
        self._board = _board_writer(str(run), purge_step=first_step + 1)
        self._lines = self.path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of optimizer step `step` (counted from 1) everywhere."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = (f"{name} {value:.4g}" for name, value in values.items() if not name.startswith(LAYERS))
        say("  ".join([f"step {step}", *shown]))

    def picture(self, step: int, name: str, pixels: torch.Tensor) -> None:
        """pixels (H, W, 3) uint8, shown in TensorBoard."""
        self._board.add_image(name, pixels.numpy(), step, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _drop_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint; their old lines go."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # a kill can cut the last line, a power cut can fill it with anything
                continue
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _board_writer(folder: str, purge_step: int) -> Any:
    # TensorBoard imports TensorFlow where it is installed: seconds, pages of warnings, and a fight over the GPU. This empty
    # module is its own switch for going without.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_step)


def say(text: str) -> None:
    """A line on the console that does not tear a progress bar."""
    tqdm.write(text)


def memory_gib() -> float:
    """Peak memory allocated on the GPU, or this process's resident memory without one, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
