"""Networks: one backbone, one registry of methods, weights of any known layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from models.dit import Backbone, DiT
from models.layers import Plan
from models.sparsedit import SparseDiT
from runtime.config import InputError, from_mapping, nearest

__all__ = ["METHODS", "Backbone", "DiT", "Plan", "SparseDiT", "checkpoint_blocks", "create_model", "method_class"]

METHODS: Mapping[str, type[DiT]] = {"dense": DiT, "sparsedit": SparseDiT}
"""Every method by name, the dense backbone first. To add one: a file in `models/` and a line here."""


def method_class(name: str) -> type[DiT]:
    """The network class of a method; InputError with the nearest name when there is none."""
    if name not in METHODS:
        raise InputError(f"--method {name!r} is not known{nearest(name, list(METHODS))}")
    return METHODS[name]


def create_model(method: str, backbone: Backbone, options: Mapping[str, Any] | None = None) -> DiT:
    """The network of `method` on `backbone`; `options` are the fields of the method's options dataclass."""
    kind = method_class(method)
    return kind(backbone, from_mapping(kind.options_type, options or {}, f"method {method}"))


def checkpoint_blocks(network: DiT) -> None:
    """Gradient checkpointing: from now on each block's activations are recomputed in backward instead of stored.

    Networks draw no random numbers, so the recomputed activations equal the stored ones bit for bit.
    """
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
