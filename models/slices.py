"""Linears of which a part can be run: rows or columns of the weight, cut out once for each set of groups and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

MOST_SLICES = 4
"""Slices that one Linear keeps. Sets change slowly over the timesteps: most are asked for many steps in a row."""


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer writes to weights past the counters of their versions.
register_optimizer_step_post_hook(_count_step)


class Snapshot:
    """Tells later whether tensors are what they were: the same objects, in the same memory, and not written to since.

    As autograd's checks, it does not see what is written in place through `.data`, nor into inference mode's own tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        # They keep the memory from being given to others as long as its address is compared.
        self._there = [one.detach() for one in tensors]
        self._versions = [version(one) for one in tensors]
        self._steps = _optimizer_steps

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        if self._steps != _optimizer_steps or len(tensors) != len(self._tensors):
            return False
        known = zip(tensors, self._tensors, self._there, self._versions, strict=True)
        return all(now is then and version(now) == was and in_place_of(now, there) for now, then, there, was in known)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts."""
    return -1 if tensor.is_inference() else tensor._version


def in_place_of(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are one memory, read alike."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        return False
    # A packed one lies nowhere that torch tells, and nobody moves it.
    return tensor.is_mkldnn or tensor.data_ptr() == other.data_ptr()


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
        self._slices: dict[Any, Slice] = {}
        self._source = Snapshot(())

    def slice(self, active: tuple[int, ...]) -> Slice:
        """The part of the groups `active`, ascending. It computes no gradient."""
        if not self._source.holds((self.weight, self.bias)):
            self._slices, self._source = {}, Snapshot((self.weight, self.bias))
        key = active, self.lay_out
        found = self._slices.pop(key, None) or self._cut(active)
        self._slices[key] = found  # last: the most recently used
        if len(self._slices) > MOST_SLICES:
            del self._slices[next(iter(self._slices))]
        return found

    def forget(self) -> None:
        """Frees the slices that are kept."""
        self._slices = {}

    def macs(self, groups: int, positions: int) -> int:
        """Multiply-accumulates of so many groups at `positions` places."""
        return positions * self.weight.numel() // self.groups * groups

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
