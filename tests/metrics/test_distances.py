from __future__ import annotations

import numpy as np
import pytest
import torch

from metrics.distances import full_precision, merge_nearest, squared_distances


def test_distances_have_the_same_bits_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(64, 200, generator=generator), 3 * torch.rand(96, 200, generator=generator)
    ours = squared_distances(rows, columns)
    assert torch.equal(ours, squared_distances(columns, rows).T)
    expected = (rows.double()[:, None] - columns.double()).square().sum(dim=2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert squared_distances(rows, rows).min() == 0
    # The known-bad variant: one norm after the other, which rounds differently in the two directions.
    norms = [side.square().sum(dim=1) for side in (rows, columns)]
    doubled = 2 * rows @ columns.T
    assert not torch.equal(norms[0][:, None] - doubled + norms[1], (norms[1][:, None] - doubled.T + norms[0]).T)


def test_merging_keeps_the_least() -> None:
    values = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    nearest = torch.full((5, 3), float("inf"))
    for place in (slice(0, 1), slice(1, 25), slice(25, 40)):
        for rows in (slice(0, 2), slice(2, 5)):
            merge_nearest(nearest, rows, values[rows, place])
    assert torch.equal(nearest, values.sort(dim=1).values[:, :3])


def test_precision_is_put_back() -> None:
    @full_precision()
    def fail() -> None:
        raise KeyError(str(torch.backends.cuda.matmul.allow_tf32))

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        for _ in range(2):
            with pytest.raises(KeyError, match="False"):
                fail()
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
