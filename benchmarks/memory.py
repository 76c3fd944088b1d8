"""How much memory a piece of work adds to the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_SECONDS_BETWEEN_LOOKS = 0.005


class Added:
    """Resident memory above that at the start, at its peak so far."""

    megabytes = 0.0


@contextmanager
def watch_memory() -> Iterator[Added]:
    """Watches the process from a thread while the block runs; what it yields holds the result when the block has ended."""
    process, added, done = psutil.Process(), Added(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.is_set():
            added.megabytes = max(added.megabytes, (process.memory_info().rss - before) / 1e6)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield added
    finally:
        done.set()
        watcher.join()
