"""The block of DyDiT (arXiv 2410.03456): heads and channel groups that the timestep switches, tokens that pass the MLP by.

Three ways through a block give the same numbers: under masks, every sample with decisions of its own and gradients for the
routers; sliced and gathered, only what is on, for a batch that shares its timestep; and whole, with everything on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, Float32Linear, Mlp, ModulatedBlock, join_heads, linear_macs, modulate, split_heads
from models.slices import Slice, SliceableLinear, any_width, linear

TEMPERATURE = 5.0
"""Of the relaxed decisions in training."""
REDUCTION = 16
"""The token router is so many times narrower than the network."""


class Masks(NamedTuple):
    """A block's decisions for each sample; gradients pass straight through to the routers."""

    heads: Tensor  # (N, heads), 0 or 1
    channels: Tensor  # (N, groups), 0 or 1
    token_noise: Tensor | None  # (N, T) logistic; None: no noise


class Slices(NamedTuple):
    """A block's weights of what is on."""

    qkv: Slice
    proj: Slice
    fc1: Slice
    fc2: Slice


class WidthRouter(nn.Module):
    """Timestep embedding -> a logit for each head or channel group but the first, which is always on."""

    def __init__(self, hidden_size: int, groups: int) -> None:
        super().__init__()
        self.router = Float32Linear(hidden_size, groups - 1)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.router(timestep)  # (N, D) -> (N, groups - 1)

    def macs(self) -> int:
        return linear_macs(self.router)


class TokenRouter(nn.Module):
    """Token -> a logit: above 0 it takes the MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        narrow = max(1, hidden_size // REDUCTION)
        # In float32: sampling in half precision decides as training did.
        self.mlp_head = nn.Sequential(Float32Linear(hidden_size, narrow), nn.ReLU(), Float32Linear(narrow, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp_head(tokens).squeeze(2)  # (N, T, D) -> (N, T)

    def macs(self, tokens: int) -> int:
        return linear_macs(self.mlp_head[0], tokens) + linear_macs(self.mlp_head[2], tokens)


class HeadsAttention(Attention):
    """Self-attention of which chosen heads can be left out."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.head_size = hidden_size // num_heads
        self.qkv: SliceableLinear = SliceableLinear(hidden_size, 3 * hidden_size, num_heads, "outputs", parts=3)
        self.proj: SliceableLinear = SliceableLinear(hidden_size, hidden_size, num_heads, "inputs")

    def masked(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """All heads, of which those count that are on: tokens (N, T, D), heads (N, heads) -> (N, T, D)"""
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)  # each (N, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        return self.proj(join_heads(attended * heads[:, :, None, None].to(attended.dtype)))  # (N, T, D)

    def sliced(self, tokens: Tensor, qkv: Slice, proj: Slice) -> Tensor:
        """The heads of the slices alone: tokens (N, T, D) -> (N, T, D)"""
        projected = linear(tokens, qkv).unflatten(2, (3, -1, self.head_size))  # (N, T, 3, on, D / heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, on, T, D / heads)
        return linear(join_heads(F.scaled_dot_product_attention(q, k, v)), proj)  # (N, T, D)

    def sliced_macs(self, heads: int, tokens: int) -> int:
        """For one image with so many heads."""
        return self.macs(tokens) // self.num_heads * heads


class GroupsMlp(Mlp):
    """An MLP of whose inner channels chosen groups can be left out."""

    def __init__(self, hidden_size: int, mlp_ratio: float, groups: int) -> None:
        super().__init__(hidden_size, mlp_ratio)
        inner = self.fc1.out_features
        self.fc1: SliceableLinear = SliceableLinear(hidden_size, inner, groups, "outputs")
        self.fc2: SliceableLinear = SliceableLinear(inner, hidden_size, groups, "inputs")

    def masked(self, tokens: Tensor, channels: Tensor) -> Tensor:
        """All channels, of which those of groups that are off are zero: tokens (N, T, D), channels (N, groups) -> (N, T, D)"""
        inner = self.fc1(tokens).unflatten(2, (channels.shape[1], -1))  # (N, T, groups, 4 D / groups)
        inner = (inner * channels[:, None, :, None].to(inner.dtype)).flatten(2)  # (N, T, 4 D); GELU(0) = 0
        return self.fc2(F.gelu(inner, approximate="tanh"))  # (N, T, D)

    def sliced(self, tokens: Tensor, fc1: Slice, fc2: Slice) -> Tensor:
        """The groups of the slices alone: (..., D) -> (..., D)"""
        return linear(F.gelu(linear(tokens, fc1), approximate="tanh"), fc2)  # (..., D)

    def sliced_macs(self, groups: int, positions: int) -> int:
        """At `positions` tokens with so many groups."""
        return self.fc1.macs(groups, positions) + self.fc2.macs(groups, positions)


class DynamicBlock(ModulatedBlock):
    """A DiT block of which each sample runs its own part: `forward` under masks, `gathered` by leaving out what is off."""

    attn: HeadsAttention
    mlp: GroupsMlp

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(HeadsAttention(hidden_size, num_heads), hidden_size, mlp_ratio)
        self.mlp = GroupsMlp(hidden_size, mlp_ratio, num_heads)
        self.attn_rate = WidthRouter(hidden_size, num_heads)
        self.mlp_rate = WidthRouter(hidden_size, num_heads)
        self.token_selection = TokenRouter(hidden_size)
        self.select: Callable[[Tensor], Tensor] = places_on

    def forward(self, tokens: Tensor, context: Masks | None, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """(N, T, D) -> (N, T, D), which tokens took the MLP (N, T), their router's logits (N, T)

        Without masks everything is on, and what comes is the token stream alone.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        normed = modulate(self.norm1(tokens), shift1, scale1)  # (N, T, D)
        if context is None:
            tokens = torch.addcmul(tokens, gate1, self.attn(normed))  # (N, T, D)
            return self.feed_forward(tokens, shift2, scale2, gate2)  # (N, T, D)
        tokens = torch.addcmul(tokens, gate1, self.attn.masked(normed, context.heads))  # (N, T, D)
        logits = self.token_selection(tokens)  # (N, T)
        mask = decide(logits, context.token_noise)  # (N, T)
        fed = self.mlp.masked(modulate(self.norm2(tokens), shift2, scale2), context.channels)  # (N, T, D)
        return torch.addcmul(tokens, gate2 * mask.unsqueeze(2), fed), mask, logits  # (N, T, D)

    def gathered(self, tokens: Tensor, parts: Slices, modulation: Tensor) -> tuple[Tensor, int]:
        """The heads and channels of the slices; through the MLP the tokens of the whole batch that are on, side by side.

        (N, T, D) -> (N, T, D), how many tokens were on. The host waits for that number, once a block: the shapes of all that
        is launched next depend on it.
        """
        tokens, logits = self.attend(tokens, parts.qkv, parts.proj, modulation)  # (N, T, D), (N, T)
        places = self.select(logits)  # (M,) of N T
        if len(places):
            tokens = self.feed(tokens, places, parts.fc1, parts.fc2, modulation)  # (N, T, D)
        return tokens, len(places)

    def attend(self, tokens: Tensor, qkv: Slice, proj: Slice, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """The attention of these heads, and what the token router says of the result: (N, T, D) -> (N, T, D), (N, T)"""
        shift, scale, gate = modulation.unsqueeze(1).chunk(6, dim=2)[:3]  # each (N, 1, D)
        attended = self.attn.sliced(modulate(self.norm1(tokens), shift, scale), qkv, proj)  # (N, T, D)
        tokens = torch.addcmul(tokens, gate, attended)  # (N, T, D)
        return tokens, self.token_selection(tokens)

    def feed(self, tokens: Tensor, places: Tensor, fc1: Slice, fc2: Slice, modulation: Tensor) -> Tensor:
        """The MLP of these channel groups for the tokens at `places` (M,) of the flattened batch: (N, T, D) -> (N, T, D)"""
        stream, sample = tokens.flatten(0, 1), places // tokens.shape[1]  # (N T, D), (M,)
        shift, scale, gate = modulation.chunk(6, dim=1)[3:]  # each (N, D)
        chosen = stream.index_select(0, places)  # (M, D)
        normed = modulate(self.norm2(chosen), shift.index_select(0, sample), scale.index_select(0, sample))  # (M, D)
        chosen = torch.addcmul(chosen, gate.index_select(0, sample), self.mlp.sliced(normed, fc1, fc2))  # (M, D)
        # Places are different ones: a copy has one source, where a sum would have to be ordered.
        return stream.index_copy(0, places, chosen).view_as(tokens)  # (N, T, D)

    def slices(self, heads: tuple[int, ...], channels: tuple[int, ...]) -> Slices:
        """The weights of these heads and channel groups."""
        attention = self.attn.qkv.slice(heads), self.attn.proj.slice(heads)
        return Slices(*attention, self.mlp.fc1.slice(channels), self.mlp.fc2.slice(channels))

    @property
    def sliceable(self) -> tuple[SliceableLinear, ...]:
        """The layers that `slices` cuts from."""
        return self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2

    def compile_with(self, compiled: Callable[[Any], Any]) -> None:
        """How many heads, channels and tokens are on must not become a graph's constant, and no graph can hold the choice."""
        super().compile_with(compiled)
        self.attend, self.feed = compiled(self.attend), compiled(self.feed)  # type: ignore[method-assign]
        self.select = any_length(places_on)
        for layer in self.sliceable:
            layer.lay_out = any_width

    def macs(self, tokens: int, full: int) -> int:
        """With everything on, and no router."""
        return self.attn.macs(tokens) + self.mlp.macs(tokens) + self.modulation_macs()

    def router_macs(self, tokens: int) -> int:
        return self.attn_rate.macs() + self.mlp_rate.macs() + self.token_selection.macs(tokens)


def decide(logits: Tensor, noise: Tensor | None) -> Tensor:
    """1 where on, 0 where off, of the logits' type.

    Without noise: logit above 0. With logistic noise (Gumbel-sigmoid, Jang et al. 2017): on with the logit's sigmoid as
    probability; the gradient is that of the relaxed decision at the temperature.
    """
    if noise is None:
        return (logits > 0).to(logits.dtype)
    soft = torch.sigmoid((logits + noise) / TEMPERATURE)
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # the second term is exactly 0


def places_on(logits: Tensor) -> Tensor:
    """logits (N, T) -> (M,) int64, the places of those above 0 in the flattened batch. The host waits for their number."""
    return (logits > 0).flatten().nonzero().squeeze(1)


def any_length(choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`choose`, of whose number of places no compiled graph may depend."""
    import torch._dynamo  # a second, which others need not wait

    def choosing(logits: Tensor) -> Tensor:
        places = choose(logits)
        torch._dynamo.maybe_mark_dynamic(places, 0)
        return places

    return choosing
