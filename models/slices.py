"""Linears of which a part can be run: rows or columns of the weight, cut out once for each set of groups and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_SLICES = 4
"""Slices that one Linear keeps. Sets change slowly over the timesteps: most are asked for many steps in a row."""


class Slice(NamedTuple):
    """Weight and bias of a part of a Linear."""

    weight: Tensor  # (outputs, inputs), laid out as the execution wants it
    bias: Tensor  # (outputs,)


class SliceableLinear(nn.Linear):
    """A Linear whose outputs or inputs are groups of equal size, of which chosen ones can be run alone.

    `parts`: the outputs are all groups' so many times over, as the queries, keys and values of all heads. A slice is kept until
    weight or bias change, or until `MOST_SLICES` others were asked for after it.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, along: Literal["outputs", "inputs"], parts: int = 1) -> None:
        super().__init__(inputs, outputs)
        self.groups, self.along, self.parts = groups, along, parts
        self.lay_out: Callable[[Slice], Slice] | None = None
        """What the execution makes of every slice."""
        self._slices: dict[tuple[int, ...], Slice] = {}
        self._source = self._now()

    def slice(self, active: tuple[int, ...]) -> Slice:
        """The part of the groups `active`, ascending. It computes no gradient."""
        if (now := self._now()) != self._source:
            self._slices, self._source = {}, now
        found = self._slices.pop(active, None) or self._cut(active)
        self._slices[active] = found  # last: the most recently used
        if len(self._slices) > MOST_SLICES:
            del self._slices[next(iter(self._slices))]
        return found

    def macs(self, groups: int, positions: int) -> int:
        """Multiply-accumulates of so many groups at `positions` places."""
        return positions * self.weight.numel() // self.groups * groups

    def _now(self) -> tuple[object, ...]:
        """What slices were cut from, to be compared: the parameters, how often each was written to, where they lie."""
        state = ((id(one), one._version, one.data_ptr(), one.dtype, one.device) for one in (self.weight, self.bias))
        return self.lay_out, *state

    def _cut(self, active: tuple[int, ...]) -> Slice:
        weight, bias, dimension = self.weight.detach(), self.bias.detach(), 0 if self.along == "outputs" else 1
        if len(active) < self.groups:
            chosen = torch.tensor(active, device=weight.device)
            grouped = weight.unflatten(dimension, (self.parts, self.groups, -1))
            weight = grouped.index_select(dimension + 1, chosen).flatten(dimension, dimension + 2)
            if self.along == "outputs":
                bias = bias.unflatten(0, (self.parts, self.groups, -1)).index_select(1, chosen).flatten()
        part = Slice(weight, bias)
        return part if self.lay_out is None else self.lay_out(part)


def linear(x: Tensor, part: Slice) -> Tensor:
    """x (..., inputs) -> (..., outputs)"""
    if part.weight.is_mkldnn:  # packed: `runtime/packed_weights.py`
        return torch.ops.mkldnn._linear_pointwise(x, part.weight, part.bias, "none", [], "")
    return F.linear(x, part.weight, part.bias)


def any_width(part: Slice) -> Slice:
    """For `SliceableLinear.lay_out`: how much was cut must not become a compiled graph's constant."""
    import torch._dynamo  # a second, which others need not wait

    # The side that was not cut is a multiple of what the network's other tensors fix, and torch finds that out.
    torch._dynamo.maybe_mark_dynamic(part.weight, [0, 1])
    torch._dynamo.maybe_mark_dynamic(part.bias, 0)
    return part
