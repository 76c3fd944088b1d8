"""Numbers that come late: by exactly the lag, in order, each once, and as they were when they were put in."""

from __future__ import annotations

import pytest
import torch

from runtime.lagged_reads import LaggedReads


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_numbers_come_by_the_lag(lag: int) -> None:
    reads, values, come = LaggedReads(lag), torch.zeros(2), []
    for step in range(6):
        values.fill_(step)  # the same memory each time, as a recorded graph has it
        due = reads.put(step, values)
        assert due == ([(step - lag, [step - lag, step - lag])] if step >= lag else [])
        come += due
    come += reads.settle()
    assert come == [(step, [step, step]) for step in range(6)]
    assert reads.settle() == []
