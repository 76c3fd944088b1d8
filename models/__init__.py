"""Networks: one backbone, one registry of methods, weights of any known layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.backbone import Backbone
from models.dit import DiT
from models.dydit import DyDiT
from models.layers import Plan
from models.sparsedit import SparseDiT
from models.sprint import SPRINT
from runtime.config import InputError, from_mapping, nearest

__all__ = [
    "METHODS",
    "SPRINT",
    "Backbone",
    "DiT",
    "DyDiT",
    "Plan",
    "SparseDiT",
    "checkpoint_blocks",
    "compile_blocks",
    "create_model",
    "method_class",
]

METHODS: Mapping[str, type[DiT]] = {"dense": DiT, "sparsedit": SparseDiT, "dydit": DyDiT, "sprint": SPRINT}
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


aten = torch.ops.aten
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective checkpointing keeps: nearly all of a block's arithmetic. Products of batches (bmm) are not among them: they
are the attention scores where no kernel fuses them, the largest of all tensors.
"""


def checkpoint_blocks(network: DiT, selective: bool = False) -> None:
    """Gradient checkpointing: from now on each block's activations are recomputed in backward instead of stored.

    Selective: what matrix products and attention put out is stored, and the cheap rest recomputed. Networks draw no random
    numbers, so the recomputed activations equal the stored ones bit for bit. Blocks are checkpointed first, then compiled.
    """
    recomputing = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if selective:
        recomputing = partial(recomputing, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS))
    for block in network.blocks:
        block.forward = partial(recomputing, block.forward)


def compile_blocks(network: DiT, mode: str, plans: Iterable[Plan]) -> None:
    """From now on the blocks run compiled, each kind of block once for each shape that it meets; the network is not wrapped.

    `mode` is torch's "default" or "max-autotune"; `plans` are those that will run: torch goes back to running uncompiled when
    a kind of block has met more shapes than its limit, of 8.
    """
    import torch._dynamo  # a second, which others need not wait

    # The full map and every plan's tokens, each in whole batches and guided half ones, and in a last smaller batch of each.
    shapes = 4 * (1 + len({plan.signature for plan in plans}))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)
    # It cuts graphs where a data-parallel bucket ends, which a block is smaller than; checkpointed ones it cannot cut.
    torch._dynamo.config.optimize_ddp = False
    # It warns of in-place operations in what is selectively checkpointed; blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # CUDA graphs are recorded around the whole network, not inside.
    inner = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
    for block in network.blocks:
        block.compile_with(partial(torch.compile, mode=inner, dynamic=False))
