"""A thread that makes the next batch: the same batches in the same order, one ahead, and failures where they belong."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from runtime.prefetch import Prefetcher

CPU = torch.device("cpu")


class Made:
    """Makes numbered batches, noting when and by which thread."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        if number == 7:
            raise OSError("disk gone")
        self.numbers.append(number)
        self.threads.add(threading.get_ident())
        return torch.full((2,), number), torch.tensor(number)

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + 10
        while len(self.numbers) < count:
            assert time.monotonic() < end
            time.sleep(0.001)


def test_batches_come_in_order_and_one_ahead() -> None:
    made = Made()
    ahead = Prefetcher(made, end=5, device=CPU)
    for number in range(5):
        tensors = ahead.take(number)
        assert [int(tensors[0][0]), int(tensors[1])] == [number, number]
        made.wait_for(min(number + 2, 5))
        time.sleep(0.002)
        assert made.numbers == list(range(min(number + 2, 5)))  # never two ahead, and nothing beyond the end
    ahead.close()
    assert made.threads
    assert threading.get_ident() not in made.threads


def test_a_jump_drops_what_was_made_ahead() -> None:
    made = Made()
    ahead = Prefetcher(made, end=100, device=CPU)
    assert int(ahead.take(0)[1]) == 0
    assert int(ahead.take(40)[1]) == 40
    assert int(ahead.take(41)[1]) == 41
    ahead.close()


def test_a_failure_appears_where_its_batch_is_taken() -> None:
    ahead = Prefetcher(Made(), end=100, device=CPU)
    assert int(ahead.take(6)[1]) == 6
    with pytest.raises(OSError, match="disk gone"):
        ahead.take(7)
    assert int(ahead.take(8)[1]) == 8
    ahead.close()


def test_no_thread_is_left() -> None:
    threads = threading.active_count()
    ahead = Prefetcher(Made(), end=100, device=CPU)
    ahead.take(0)
    assert threading.active_count() == threads + 1
    ahead.close()
    assert threading.active_count() == threads
    ahead.close()
