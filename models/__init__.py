"""Networks: one backbone, one registry of methods, weights of any known layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from models.dit import Backbone, DiT
from models.layers import Plan
from models.sparsedit import SparseDiT
from runtime.config import InputError, from_mapping, nearest

__all__ = [
    "METHODS",
    "Backbone",
    "DiT",
    "Plan",
    "SparseDiT",
    "checkpoint_blocks",
    "compile_blocks",
    "create_model",
    "method_class",
]

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


def compile_blocks(network: DiT, mode: str, plans: Iterable[Plan]) -> None:
    """From now on the blocks run compiled, each kind of block once for each shape that it meets; the network is not wrapped.

    `mode` is torch's "default" or "max-autotune"; `plans` are those that will run: torch goes back to running uncompiled when
    a kind of block has met more shapes than its limit, of 8.
    """
    import torch._dynamo  # a second, which others need not wait

    # Whole batch and guided half batch, a last smaller batch of each.
    shapes = 4 * len(set(plans))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)
    for block in network.blocks:
        # CUDA graphs are recorded around the whole network, not inside.
        inner = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
        block.forward = torch.compile(block.forward, mode=inner, dynamic=False)
