"""SPRINT (arXiv 2510.21986): in training the middle blocks see few of the tokens, and a fusion joins what they make of these
with the encoder's full map.

encoder blocks on all tokens -> most tokens are dropped -> middle blocks -> back to their places, a mask token elsewhere ->
fusion with the encoder's output -> decoder blocks on all tokens. Positions are rotary: a token that moves keeps its own.
Sampling drops nothing; the cheap path of path-drop guidance runs no middle block, and the mask token stands everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, ObjectiveName
from models.dit import DiT, Draws
from models.layers import (
    Attention,
    Condition,
    FlatPatchEmbedder,
    Float32Linear,
    ModulatedBlock,
    Plan,
    join_heads,
    linear_macs,
    modulate,
    split_heads,
)
from models.token_density import TIMESTEPS
from models.weights import DenseRules
from runtime.config import InputError, option
from runtime.seeding import Keys, uniform

GROUPS: Mapping[float, tuple[int, int]] = {0.5: (2, 2), 0.625: (4, 6), 0.75: (2, 1), 0.875: (4, 2)}
"""Structured drop, by ratio: in every group of n x n tokens k stay."""

THETA = 10_000.0
"""Of the rotary frequencies."""

RELEASED_BLOCKS = ("encoder_blocks", "middle_blocks", "decoder_blocks")


@dataclass(frozen=True)
class SPRINTOptions:
    encoder_blocks: int = option(2, "first blocks, on all tokens")
    decoder_blocks: int = option(2, "last blocks, on all tokens")
    drop_ratio: float = option(
        0.75, "share of tokens that the middle blocks do not see in training; 0: they see all, the second stage"
    )
    drop_pattern: Literal["structured", "random"] = option(
        "structured", "which tokens are dropped: as many of every group of neighbours (.5, .625, .75, .875), or any"
    )
    path_drop: float = option(0.1, "share of training samples whose middle blocks count for nothing, for path-drop guidance")


class Rotation(NamedTuple):
    """Cosines and sines of the angle by which each pair of channels is turned, of the tokens of a stream."""

    cos: Tensor  # (T, D / heads / 2), or (N, 1, K, D / heads / 2) where samples have tokens of different places
    sin: Tensor

    def at(self, kept: Tensor) -> Rotation:
        """Of the tokens `kept` (N, K) of the full map."""
        return Rotation(self.cos[kept].unsqueeze(1), self.sin[kept].unsqueeze(1))

    def turn(self, vectors: Tensor) -> Tensor:
        """Neighbouring channels of vectors (N, heads, T, D / heads), turned."""
        pairs = vectors.unflatten(3, (-1, 2))  # (N, heads, T, D / heads / 2, 2)
        if not torch.compiler.is_compiling():  # one kernel, which the compiler does not know; it makes one of the other form
            return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(self.cos, self.sin)).flatten(3)
        even, odd = pairs.unbind(4)  # (N, heads, T, D / heads / 2) each
        return torch.stack((even * self.cos - odd * self.sin, odd * self.cos + even * self.sin), dim=4).flatten(3)


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are normed, then turned by their tokens' places."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:  # type: ignore[override]
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)  # each (N, heads, T, D / heads)
        # Norm and rotation in float32 at least, whatever the products' precision.
        q, k = (rotation.turn(norm(x.to(norm.weight.dtype))).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (N, T, D)


class RotaryBlock(ModulatedBlock):
    """The DiT block with rotary positions; its context is the `Rotation` of the tokens that it is given."""

    attn: RotaryAttention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(RotaryAttention(hidden_size, num_heads), hidden_size, mlp_ratio)

    def forward(self, tokens: Tensor, context: Rotation, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, *feed_forward = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        attended = self.attn(modulate(self.norm1(tokens), shift1, scale1), context)  # (N, T, D)
        return self.feed_forward(torch.addcmul(tokens, gate1, attended), *feed_forward)  # (N, T, D)

    def macs(self, tokens: int, full: int) -> int:
        return self.attn.macs(tokens) + self.mlp.macs(tokens) + self.modulation_macs()


class SPRINT(DiT):
    """SPRINT on any backbone. A plan's signature holds how many tokens take the middle blocks; which ones, training draws."""

    options_type: ClassVar[type] = SPRINTOptions
    released_layout: ClassVar[str] = "released SPRINT"
    released_objective: ClassVar[ObjectiveName | None] = "flow"
    released_time_scale: ClassVar[float | None] = 1.0
    training_options: ClassVar[frozenset[str]] = frozenset({"drop_ratio", "drop_pattern", "path_drop"})
    recipe: ClassVar[Mapping[str, Any]] = {"max_steps": 2_000_000, "gradient_clip": 1.0}
    blocks: Sequence[RotaryBlock]
    rotation_cos: Tensor
    rotation_sin: Tensor

    def __init__(self, backbone: Backbone, options: SPRINTOptions | None = None) -> None:
        super().__init__(backbone, options)
        table = rotary_table(backbone.hidden_size // backbone.num_heads, backbone.grid)
        # Buffers that no checkpoint holds: they follow from the sizes.
        self.register_buffer("rotation_cos", table.cos, persistent=False)
        self.register_buffer("rotation_sin", table.sin, persistent=False)

    @classmethod
    def resolve(cls, options: SPRINTOptions, backbone: Backbone) -> SPRINTOptions:
        for name in ("encoder_blocks", "decoder_blocks"):
            if getattr(options, name) < 1:
                raise InputError(f"{name} is {getattr(options, name)}; it must be at least 1.")
        if options.encoder_blocks + options.decoder_blocks >= backbone.depth:
            raise InputError(
                f"{options.encoder_blocks} encoder and {options.decoder_blocks} decoder blocks leave no middle block of the "
                f"backbone's {backbone.depth}; give fewer encoder_blocks or decoder_blocks."
            )
        head = backbone.hidden_size // backbone.num_heads
        if head % 4:
            raise InputError(f"heads of {head} channels cannot turn pairs on two axes; choose a --model whose heads have a "
                             "multiple of 4.")  # fmt: skip
        if not 0 <= options.path_drop <= 1:
            raise InputError(f"--path-drop is {options.path_drop}; it must be between 0 and 1.")
        check_drop(options, backbone)
        return options

    def build_outside_blocks(self) -> None:
        backbone = self.backbone
        self.x_embedder = FlatPatchEmbedder(backbone.patch_size, backbone.in_channels, backbone.hidden_size)
        # The residual stream passes through it. Half precision would round it here for all further blocks.
        self.renoise_linear = Float32Linear(2 * backbone.hidden_size, backbone.hidden_size)
        # Frozen where it was drawn.
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.hidden_size), requires_grad=False)

    def embed_patches(self, x: Tensor) -> Tensor:
        return self.x_embedder(x)  # (N, T, D)

    def initialize_outside_blocks(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)

    def build_blocks(self) -> Iterator[ModulatedBlock]:
        for _ in range(self.backbone.depth):
            yield RotaryBlock(self.backbone.hidden_size, self.backbone.num_heads, self.backbone.mlp_ratio)

    # Plans and draws -------------------------------------------------------------------------------------------------

    def plan(self, t: int) -> Plan:
        return middle_plan(self.backbone.tokens)

    def cheap_plan(self, t: int) -> Plan:
        return middle_plan(0)

    def training_plans(self, step: int = 0) -> Sequence[tuple[range, Plan]]:
        return [(range(TIMESTEPS), middle_plan(self.kept))]

    @property
    def kept(self) -> int:
        """How many tokens take the middle blocks in training."""
        return kept_tokens(self.backbone.tokens, self.options.drop_ratio)

    def training_lines(self, steps: int | None = None) -> list[str]:
        tokens, full = self.backbone.tokens, self.macs(self.plan(0))
        if self.kept == tokens:
            return ["no token is dropped: all take the middle blocks in training too"]
        macs = self.macs(middle_plan(self.kept))
        return [
            f"{self.options.drop_pattern} drop: in training {self.kept} of {tokens} tokens take the {len(self.middle_blocks)} "
            f"middle blocks, a pass is {macs / 1e9:.4g} GMACs ({macs / full:.1%} of a full one)"
        ]

    def draw(self, keys: Keys) -> dict[str, Tensor]:
        """Label drop; path_drop (N,) bool, independent of it; and kept (N, K) int64, where tokens are dropped."""
        drawn = super().draw(keys)
        drawn["path_drop"] = uniform(keys, "path drop") < self.options.path_drop
        if self.kept < self.backbone.tokens:
            numbers = uniform(keys, "token drop", (self.backbone.tokens,))  # (N, T)
            drawn["kept"] = draw_kept(numbers, self.options, self.backbone.grid)
        return drawn

    def places_behind(self, block: int, draws: Draws) -> Tensor | None:
        middle = self.options.encoder_blocks < block <= self.backbone.depth - self.options.decoder_blocks
        return draws.get("kept") if middle else None

    # Passes ----------------------------------------------------------------------------------------------------------

    @property
    def middle_blocks(self) -> Sequence[RotaryBlock]:
        return self.blocks[self.options.encoder_blocks : self.backbone.depth - self.options.decoder_blocks]

    def run_blocks(
        self, tokens: Tensor, condition: Condition, plan: Plan, draws: Draws | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rotation, (_, count) = Rotation(self.rotation_cos, self.rotation_sin), plan.signature
        encoder, decoder = self.blocks[: self.options.encoder_blocks], self.blocks[-self.options.decoder_blocks :]
        encoded = run(encoder, tokens, rotation, condition)  # (N, T, D)
        # Without draws nothing is dropped.
        kept = draws["kept"] if draws is not None and 0 < count < self.backbone.tokens else None  # (N, K)
        deep = self.run_middle(encoded, rotation, condition, kept) if count else self.mask_token.expand_as(encoded)
        if draws is not None:
            deep = torch.where(draws["path_drop"][:, None, None], self.mask_token, deep)  # (N, T, D)
        fused = self.renoise_linear(torch.cat((deep, encoded), dim=2))  # (N, T, 2 D) -> (N, T, D)
        return run(decoder, fused, rotation, condition), {}  # (N, T, D)

    def run_middle(self, encoded: Tensor, rotation: Rotation, condition: Condition, kept: Tensor | None) -> Tensor:
        """encoded (N, T, D), kept (N, K) or None for all tokens -> (N, T, D), the mask token where none was kept"""
        if kept is None:
            return run(self.middle_blocks, encoded, rotation, condition)
        places = kept.unsqueeze(2).expand(-1, -1, encoded.shape[2])  # (N, K, D)
        deep = run(self.middle_blocks, encoded.gather(1, places), rotation.at(kept), condition)  # (N, K, D)
        return self.mask_token.expand_as(encoded).scatter(1, places, deep)  # (N, T, D)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, T, C p p), channels first inside a patch -> (N, C, H, W)"""
        (rows, columns), patch = self.backbone.grid, self.backbone.patch_size
        patches = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))  # (N, rows, columns, C, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (N, C, H, W)

    def block_macs(self, plan: Plan) -> int:
        tokens, block, middle = self.backbone.tokens, self.blocks[0], len(self.middle_blocks)
        _, count = plan.signature
        deep = middle * block.macs(count, tokens) if count else 0
        return (len(self.blocks) - middle) * block.macs(tokens, tokens) + deep + linear_macs(self.renoise_linear, tokens)

    # Weights ---------------------------------------------------------------------------------------------------------

    @classmethod
    def recognize(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Mapping[str, Any]] | None:
        if "renoise_linear.weight" not in shapes:
            return None
        # What training dropped is not told, and sampling drops nothing.
        if not any(key.startswith("encoder_blocks.") for key in shapes):
            return "SPRINT", {"drop_ratio": 0.0}
        ends = ("encoder_blocks", "decoder_blocks")
        counts = {name: len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")}) for name in ends}
        return cls.released_layout, {**counts, "drop_ratio": 0.0}

    def layout_names(self, layout: str) -> dict[str, str]:
        if layout != self.released_layout:
            return super().layout_names(layout)
        middle, decoder = self.options.encoder_blocks, self.backbone.depth - self.options.decoder_blocks
        starts = {0: "encoder_blocks", middle: "middle_blocks", decoder: "decoder_blocks"}

        def renamed(match: re.Match[str]) -> str:
            place = int(match[1])
            start = max(first for first in starts if first <= place)
            return f"{starts[start]}.{place - start}."

        return {key: re.sub(r"^blocks\.(\d+)\.", renamed, key) for key in self.state_dict()}

    def dense_rules(self) -> DenseRules:
        raise InputError("a dense DiT has no rotary positions and no normed queries, so --method sprint cannot start from its "
                         "weights; leave --pretrained out, or give SPRINT weights.")  # fmt: skip


def run(blocks: Sequence[RotaryBlock], tokens: Tensor, rotation: Rotation, condition: Condition) -> Tensor:
    """tokens (N, T, D) -> (N, T, D)"""
    for block in blocks:
        tokens = block(tokens, rotation, block.modulation(condition))  # (N, T, D)
    return tokens


def middle_plan(tokens: int) -> Plan:
    """So many tokens take the middle blocks."""
    return Plan(("middle tokens", tokens))


def rotary_table(head: int, grid: tuple[int, int]) -> Rotation:
    """Angles of the tokens of a map: the first half of a head's channels tells the row, the second the column."""
    half = head // 2
    frequencies = THETA ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # (half / 2,)
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid)
    angles = torch.cat((rows.repeat_interleave(grid[1], 0), columns.repeat(grid[0], 1)), dim=1)  # (T, half)
    return Rotation(angles.cos().float(), angles.sin().float())


# Which tokens are dropped --------------------------------------------------------------------------------------------


def check_drop(options: SPRINTOptions, backbone: Backbone) -> None:
    """InputError for what no map can drop."""
    ratio, (rows, columns) = options.drop_ratio, backbone.grid
    if not 0 <= ratio < 1:
        raise InputError(f"--drop-ratio is {ratio}; it must be at least 0 and below 1.")
    if ratio == 0 or options.drop_pattern == "random":
        return
    if ratio not in GROUPS:
        raise InputError(f"--drop-ratio {ratio} has no structured pattern; choose 0, {', '.join(map(str, GROUPS))}, or "
                         "--drop-pattern random.")  # fmt: skip
    side = GROUPS[ratio][0]
    if rows % side or columns % side:
        raise InputError(f"--drop-ratio {ratio} takes groups of {side} x {side} tokens, into which the {rows} x {columns} map "
                         "cannot be cut; choose another ratio, or --drop-pattern random.")  # fmt: skip


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of a map's tokens stay, at least one."""
    return max(1, round(tokens * (1 - ratio)))


def draw_kept(numbers: Tensor, options: SPRINTOptions, grid: tuple[int, int]) -> Tensor:
    """The places of the tokens that stay: of the whole map, or of each of its groups, those with the smallest numbers.

    numbers (N, T), uniform and independent -> (N, K) int64, places in the full map
    """
    rows, columns = grid
    if options.drop_pattern == "random":
        kept = kept_tokens(rows * columns, options.drop_ratio)
        return numbers.argsort(dim=1, stable=True)[:, :kept]  # (N, K)
    places = torch.arange(rows * columns, device=numbers.device)  # (T,)
    side, count = GROUPS[options.drop_ratio]

    def grouped(values: Tensor) -> Tensor:
        """(..., T) -> (..., groups, side * side)"""
        cells = values.unflatten(-1, (rows // side, side, columns // side, side)).transpose(-3, -2)
        return cells.flatten(-2).flatten(-3, -2)

    smallest = grouped(numbers).argsort(dim=2, stable=True)[:, :, :count]  # (N, groups, count)
    return grouped(places).expand(len(numbers), -1, -1).gather(2, smallest).flatten(1)  # (N, K)
