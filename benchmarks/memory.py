"""How much memory a piece of work adds to what stood before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

CPU = torch.device("cpu")
_SECONDS_BETWEEN_LOOKS = 0.01


class Added:
    """Memory above that at the start, at its peak so far."""

    gib = 0.0

    @property
    def megabytes(self) -> float:
        return self.gib * 2**30 / 1e6


@contextmanager
def watch_memory(device: torch.device = CPU) -> Iterator[Added]:
    """Watches while the block runs; what it yields holds the result when the block has ended.

    CUDA: the allocator's own peak. Elsewhere a thread looks: at the process's resident memory, or at what Metal's driver holds.
    """
    added = Added()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield added
        finally:
            added.gib = (torch.cuda.max_memory_allocated(device) - before) / 2**30
        return
    look = torch.mps.driver_allocated_memory if device.type == "mps" else lambda: psutil.Process().memory_info().rss
    with _looking(look, added):
        yield added


@contextmanager
def _looking(look: Callable[[], int], added: Added) -> Iterator[None]:
    before, done = look(), threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            added.gib = max(added.gib, (look() - before) / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        added.gib = max(added.gib, (look() - before) / 2**30)


def weights_gib(*networks: nn.Module) -> float:
    """Memory that the networks' parameters and buffers take."""
    held = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**30
