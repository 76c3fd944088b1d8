"""Weights laid out as a CPU's matrix products read them: once, where a plain product does so at every call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models import DiT
from models.slices import Slice, SliceableLinear, linear

TYPICAL_ROWS = 1024
"""Rows of the products that the layout is chosen for; it serves all others."""


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's product with packed weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_linears(network: DiT) -> None:
    """From now on the Linears of a float32 network on the CPU multiply by packed weights, which take the place of their own.

    Those of which slices are run keep theirs, and pack the slices.
    """
    for module in network.modules():
        if isinstance(module, SliceableLinear):
            module.lay_out = packed_slice
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(packed(module.weight.detach()), requires_grad=False)
            module.forward = partial(packed_product, module)  # type: ignore[method-assign]


def packed_slice(part: Slice) -> Slice:
    return part._replace(weight=packed(part.weight))


def packed(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) as oneDNN lays it out."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)


def packed_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)"""
    return linear(x, Slice(layer.weight, layer.bias))
