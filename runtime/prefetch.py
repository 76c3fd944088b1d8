"""Batches that a thread makes ahead of time: one while the step before it computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Made = tuple[Tensor, ...]


class Prefetcher:
    """`make(number)` for the numbers that are asked for, in the order in which they are asked for: the next one is begun when
    one is taken. A failure appears where the batch that it concerns is taken.
    """

    def __init__(self, make: Callable[[int], Made], end: int, device: torch.device) -> None:
        """From number `end` on nothing is made ahead. On a GPU batches are made in a stream of their own."""
        self._make, self._end = make, end
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[tuple[Made, torch.cuda.Event | None]]] | None = None

    def take(self, number: int) -> Made:
        """The tensors of batch `number`, ready for the current stream."""
        pending, self._next = self._next, None
        if pending is None or pending[0] != number:
            pending = (number, self._pool.submit(self._work, number))
        made, ready = pending[1].result()
        if number + 1 < self._end:
            self._next = (number + 1, self._pool.submit(self._work, number + 1))
        if ready is not None:
            current = torch.cuda.current_stream(self._stream.device if self._stream else None)
            current.wait_event(ready)
            for tensor in made:
                # Their memory belongs to the other stream, which would reuse it while this one still reads it.
                tensor.record_stream(current)
        return made

    def close(self) -> None:
        """Ends the thread; what it was making is dropped."""
        self._next = None
        self._pool.shutdown(cancel_futures=True)

    def _work(self, number: int) -> tuple[Made, torch.cuda.Event | None]:
        if self._stream is None:
            return self._make(number), None
        with torch.cuda.stream(self._stream):
            return self._make(number), self._stream.record_event()
