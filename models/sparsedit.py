"""SparseDiT (arXiv 2412.06028): Poolingformer blocks, sparse-dense token modules, dense top blocks.

A sparse-dense token module pools the full map to a small grid, works there, and recovers the full map from it by
cross-attention. The blocks stand in one flat list in running order, block i taking the place of DiT block i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.dit import DiT, Draws
from models.layers import Block, Condition, CrossAttention, Float32Linear, ModulatedBlock, Plan, linear_macs, modulate
from models.token_density import Grid, TokenDensity
from models.weights import DenseRules, Rows
from runtime.config import InputError, option

POOLING, MERGE, SPARSE, RECOVER, DENSE = "pooling", "merge", "sparse", "recover", "dense"

DEFAULT_SPLITS = {
    28: (2, 4, (1, 3, 1, 1), 2),
    24: (2, 4, (1, 2, 1, 1), 2),
    12: (1, 2, (1, 2, 1, 1), 1),
    8: (1, 1, (1, 3, 1, 1), 1),
}
"""Depth -> Poolingformer blocks, modules, blocks per module, top blocks. 28 (XL) is published; the others are ours, in its
proportions: the paper gives none for S, B and L."""

RELEASED_GROUPS = {
    MERGE: "token_merge_blocks",
    SPARSE: "semantic_blocks",
    RECOVER: "token_recover_blocks",
    DENSE: "normal_blocks",
}
"""Group names inside a `dumbbell_blocks.i` of the authors' checkpoints."""


@dataclass(frozen=True)
class SparseDiTOptions:
    poolingformer_blocks: int | None = option(None, "first blocks, with pooling in place of attention; none: by depth")
    modules: int | None = option(None, "number of sparse-dense token modules; none: by depth")
    module_blocks: tuple[int, ...] | None = option(None, "merge,sparse,recover,dense blocks in a module; none: by depth")
    top_blocks: int | None = option(None, "last, dense blocks; none: by depth")
    density: str | None = option(
        None,
        "sparse tokens: 8 or 8x6 at all timesteps, pruning rates 0.61:0.86 (0.61:0.86/4: in four parts), or grids and where "
        "they start, 10,9,8,6@0,250,500,750; none: 8 a side, at most half the map",
        flags=("--sparse-grid",),
    )
    readd_position: bool = option(False, "add the position embedding again at the switches (as the paper, not the release)")

    @staticmethod
    def upgraded(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options from before token density, when one `sparse_grid` (8, 8x6, "8,6", [8, 6]) held throughout, in today's terms.

        InputError where it stands beside `density`, or twice.
        """
        renamed: dict[str, Any] = {}
        for key, value in mapping.items():
            older = str(key).replace("-", "_") == "sparse_grid"
            if older and isinstance(value, str) and "@" not in value:
                value = value.split(",")
            name = "density" if older else key
            if name in renamed:
                raise InputError("sparse_grid is the older name of density, and both are given; keep one of the two.")
            renamed[name] = "x".join(map(str, value)) if older and isinstance(value, list | tuple) else value
        return renamed


class Grids(NamedTuple):
    """Rows and columns of the sparse tokens and of the full map."""

    sparse: Grid
    full: Grid


class Context(NamedTuple):
    """What a block needs beside its token stream."""

    full_map: Tensor | None = None  # (N, T, D), the map at the start of the current module
    upsample: Grids | None = None  # the sparse grid and the full one; None once the map is full
    position: Tensor | None = None  # (1, T, D), where positions are added again


class Split(NamedTuple):
    """The options with every default filled in, checked against the backbone."""

    poolingformer_blocks: int
    modules: int
    module_blocks: tuple[int, ...]
    top_blocks: int
    density: TokenDensity

    @classmethod
    def of(cls, options: SparseDiTOptions, backbone: Backbone) -> Split:
        """InputError where the sparse grid does not fit the map, or the blocks do not sum to the backbone's depth."""
        given = (options.poolingformer_blocks, options.modules, options.module_blocks, options.top_blocks)
        default = DEFAULT_SPLITS.get(backbone.depth)
        if default is None and None in given:
            known = ", ".join(map(str, sorted(DEFAULT_SPLITS)))
            missing = ", ".join(name for name, value in zip(cls._fields, given, strict=False) if value is None)
            raise InputError(f"depth {backbone.depth} has no default split ({known} have); give {missing}.")
        chosen = [default[place] if default and value is None else value for place, value in enumerate(given)]
        if options.density is None:
            rows, columns = (max(1, min(8, side // 2)) for side in backbone.grid)
            density = TokenDensity.fixed((rows, columns))
        else:
            density = TokenDensity.parse(options.density, backbone.grid)
        split = cls(*chosen, density)  # type: ignore[call-arg, arg-type]
        split.check(backbone)
        return split

    def check(self, backbone: Backbone) -> None:
        group = self.module_blocks
        for name, least in (("poolingformer_blocks", 0), ("modules", 1), ("top_blocks", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if len(group) != 4 or group[0] < 1 or group[2] < 1 or min(group) < 0:
            raise InputError(
                f"module_blocks is {','.join(map(str, group))}; it takes four counts merge,sparse,recover,dense, with at least "
                "one merge and one recover block, and no count may be negative."
            )
        total = len(self.layout())
        if total != backbone.depth:
            raise InputError(
                f"the split has {self.poolingformer_blocks} + {self.modules} x ({'+'.join(map(str, group))}) + "
                f"{self.top_blocks} = {total} blocks and the backbone has {backbone.depth}; change poolingformer_blocks, "
                "modules, module_blocks or top_blocks, or give all four as none: by depth."
            )

    def layout(self) -> list[str]:
        """The kind of each block, in running order."""
        kinds = (MERGE, SPARSE, RECOVER, DENSE)
        module = [kind for kind, count in zip(kinds, self.module_blocks, strict=True) for _ in range(count)]
        return [POOLING] * self.poolingformer_blocks + module * self.modules + [DENSE] * self.top_blocks


class PoolingBlock(ModulatedBlock):
    """Attention replaced by the mean of the values. mean(V(x)) = V(mean(x)): one vector per image does."""

    attn: PoolingAttention

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__(PoolingAttention(hidden_size), hidden_size, mlp_ratio)

    def forward(self, tokens: Tensor, context: Context, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, *feed_forward = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        pooled = modulate(self.norm1(tokens).mean(dim=1, keepdim=True), shift1, scale1)  # (N, 1, D)
        tokens = torch.addcmul(tokens, gate1, self.attn(pooled))  # (N, T, D)
        return self.feed_forward(tokens, *feed_forward)  # (N, T, D)

    def macs(self, tokens: int, full: int) -> int:
        return self.attn.macs(positions=1) + self.mlp.macs(tokens) + self.modulation_macs()


class PoolingAttention(nn.Module):
    """Value and output projections, applied to the pooled vector."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.v = nn.Linear(hidden_size, hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.proj(self.v(pooled))  # (N, 1, D)

    def macs(self, positions: int) -> int:
        return linear_macs(self.v, positions) + linear_macs(self.proj, positions)


class MergeBlock(ModulatedBlock):
    """Sparse tokens gather from the full map; one adaLN and one norm serve both sides."""

    attn: CrossAttention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(CrossAttention(hidden_size, num_heads), hidden_size, mlp_ratio)

    def forward(self, tokens: Tensor, context: Context, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, *feed_forward = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        queries = modulate(self.norm1(tokens), shift1, scale1)  # (N, S, D)
        keys = modulate(self.norm1(context.full_map), shift1, scale1)  # (N, T, D)
        tokens = torch.addcmul(tokens, gate1, self.attn(queries, keys))  # (N, S, D)
        return self.feed_forward(tokens, *feed_forward)  # (N, S, D)

    def macs(self, tokens: int, full: int) -> int:
        return self.attn.macs(tokens, full) + self.mlp.macs(tokens) + self.modulation_macs()


class RecoverBlock(ModulatedBlock):
    """The full map is rebuilt from the sparse tokens and the map before the module, then attends to the sparse tokens.

    `merged_layer1` and `merged_layer2` are the paper's W1 and W2. W1 runs before the nearest upsampling: the same function,
    on fewer tokens. Once the map is full again, a further recover block takes the current tokens in the sparse ones' place.
    """

    attn: CrossAttention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(CrossAttention(hidden_size, num_heads), hidden_size, mlp_ratio)
        # The residual stream passes through W1 and W2. Half precision would round it here for all further blocks.
        self.merged_layer1 = Float32Linear(hidden_size, hidden_size)
        self.merged_layer2 = Float32Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, context: Context, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, *feed_forward = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        spread = self.merged_layer1(tokens)  # (N, S, D), or (N, T, D) when the map is full already
        if context.upsample is not None:
            spread = upsample_tokens(spread, *context.upsample)  # (N, T, D)
        full = spread + self.merged_layer2(context.full_map)  # (N, T, D)
        if context.position is not None:
            full = full + context.position  # (N, T, D)
        queries = modulate(self.norm1(full), shift1, scale1)  # (N, T, D)
        keys = modulate(self.norm1(tokens), shift1, scale1)  # (N, S, D)
        full = torch.addcmul(full, gate1, self.attn(queries, keys))  # (N, T, D)
        return self.feed_forward(full, *feed_forward)  # (N, T, D)

    def macs(self, tokens: int, full: int) -> int:
        merging = linear_macs(self.merged_layer1, tokens) + linear_macs(self.merged_layer2, full)
        return merging + self.attn.macs(full, tokens) + self.mlp.macs(full) + self.modulation_macs()


class SparseDiT(DiT):
    """SparseDiT on any DiT backbone. The plan's signature is the sparse grid of the timestep; no weight depends on it."""

    options_type: ClassVar[type] = SparseDiTOptions
    released_layout: ClassVar[str] = "released SparseDiT"
    recipe: ClassVar[Mapping[str, Any]] = {"min_snr_gamma": 5.0, "max_steps": 400_000}

    def __init__(self, backbone: Backbone, options: SparseDiTOptions | None = None) -> None:
        self.split = Split.of(options or SparseDiTOptions(), backbone)
        self.layout = self.split.layout()
        super().__init__(backbone, options)

    @classmethod
    def resolve(cls, options: SparseDiTOptions, backbone: Backbone) -> SparseDiTOptions:
        split = Split.of(options, backbone)
        return replace(options, **{**split._asdict(), "density": str(split.density)})

    def build_blocks(self) -> Iterator[ModulatedBlock]:
        width, heads, ratio = self.backbone.hidden_size, self.backbone.num_heads, self.backbone.mlp_ratio
        for kind in self.layout:
            if kind == POOLING:
                yield PoolingBlock(width, ratio)
            elif kind == MERGE:
                yield MergeBlock(width, heads, ratio)
            elif kind == RECOVER:
                yield RecoverBlock(width, heads, ratio)
            else:
                yield Block(width, heads, ratio)

    @property
    def density(self) -> TokenDensity:
        return self.split.density

    def plan(self, t: int) -> Plan:
        return Plan(signature=("sparse grid", *self.density.grid_at(t)))

    def training_plans(self, step: int = 0) -> Sequence[tuple[range, Plan]]:
        return [(timesteps, self.plan(timesteps.start)) for timesteps in self.density.intervals]

    def alignable_blocks(self) -> Sequence[int]:
        return [number for number, kind in enumerate(self.layout, 1) if kind not in (MERGE, SPARSE)]

    def run_blocks(
        self, tokens: Tensor, condition: Condition, plan: Plan, draws: Draws | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grid, sparse_grid = self.backbone.grid, plan.signature[1:]
        position = self.pos_embed if self.options.readd_position else None  # (1, T, D)
        context, previous = Context(), None
        for kind, block in zip(self.layout, self.blocks, strict=True):
            if kind == MERGE and previous != MERGE:
                context = Context(tokens, Grids(sparse_grid, grid), position)
                tokens = pool_tokens(tokens, grid, sparse_grid)  # (N, T, D) -> (N, S, D)
                if position is not None:
                    tokens = tokens + pool_tokens(position, grid, sparse_grid)  # (N, S, D)
            tokens = block(tokens, context, block.modulation(condition))  # (N, S, D) or (N, T, D)
            if kind == RECOVER:
                context = context._replace(upsample=None, position=None)
            previous = kind
        return tokens, {}  # (N, T, D)

    def block_macs(self, plan: Plan) -> int:
        full, sparse = self.backbone.tokens, plan.signature[1] * plan.signature[2]
        total, current = 0, full
        for kind, block in zip(self.layout, self.blocks, strict=True):
            if kind == MERGE:
                current = sparse
            total += block.macs(current, full)
            if kind == RECOVER:
                current = full
        return total

    def initialize_weights(self, linear_gain: float = 0.5) -> None:
        """From scratch: DiT's initialisation with gain 0.5. W1 = 0 and W2 = I, so a module starts from the full map."""
        super().initialize_weights(linear_gain)
        for block in self.blocks:
            if isinstance(block, RecoverBlock):
                nn.init.zeros_(block.merged_layer1.weight)
                nn.init.eye_(block.merged_layer2.weight)

    @classmethod
    def recognize(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Mapping[str, Any]] | None:
        if any(key.startswith("dumbbell_blocks.") for key in shapes):
            groups = [count_blocks(shapes, rf"dumbbell_blocks\.0\.{name}") for name in RELEASED_GROUPS.values()]
            return cls.released_layout, {
                "poolingformer_blocks": count_blocks(shapes, "poolingformer_blocks"),
                "modules": count_blocks(shapes, "dumbbell_blocks"),
                "module_blocks": groups,
                "top_blocks": count_blocks(shapes, "normal_blocks"),
            }
        return ("SparseDiT", {}) if any(key.endswith(".merged_layer1.weight") for key in shapes) else None

    def layout_names(self, layout: str) -> dict[str, str]:
        if layout != self.released_layout:
            return super().layout_names(layout)
        prefixes = dict(enumerate(self._released_blocks()))
        renamed = {}
        for key in self.state_dict():
            block = re.match(r"blocks\.(\d+)\.", key)
            renamed[key] = prefixes[int(block[1])] + key[block.end() - 1 :] if block else key
        return renamed

    def _released_blocks(self) -> Iterator[str]:
        yield from (f"poolingformer_blocks.{i}" for i in range(self.split.poolingformer_blocks))
        for module in range(self.split.modules):
            for name, count in zip(RELEASED_GROUPS.values(), self.split.module_blocks, strict=True):
                yield from (f"dumbbell_blocks.{module}.{name}.{i}" for i in range(count))
        yield from (f"normal_blocks.{i}" for i in range(self.split.top_blocks))

    def dense_rules(self) -> DenseRules:
        """Block i from DiT block i: q is the first third of its qkv, k and v the rest; W1, W2 have no source."""
        sources, new, dropped = {}, set(), set()
        for key in self.state_dict():
            name = re.sub(r"\.attn\.(v|q|kv)\.", ".attn.qkv.", key)
            if ".attn.v." in key:
                sources[key] = Rows(name, 2, 3)
                dropped.add(Rows(name, 0, 2))
            elif ".attn.q." in key:
                sources[key] = Rows(name, 0, 1)
            elif ".attn.kv." in key:
                sources[key] = Rows(name, 1, 3)
            elif ".merged_layer" in key:
                new.add(key)
            else:
                sources[key] = Rows(key)
        return DenseRules(sources, frozenset(new), frozenset(dropped))


def count_blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many different numbers follow `prefix` (a regular expression) at the start of the keys."""
    return len({match[1] for key in shapes if (match := re.match(rf"{prefix}\.(\d+)\.", key))})


def pool_tokens(tokens: Tensor, grid: Grid, sparse_grid: Grid) -> Tensor:
    """Adaptive average pooling of a token map: (N, rows * columns, D) -> (N, S, D)

    Where the grid does not divide the map windows overlap, and on a GPU the backward adds them up in no fixed order.
    """
    (rows, columns), (sparse_rows, sparse_columns) = grid, sparse_grid
    if rows % sparse_rows == 0 and columns % sparse_columns == 0:
        # Equal windows: a mean over a view, without moving the channels and deterministic in backward on a GPU.
        windows = tokens.unflatten(1, (sparse_rows, rows // sparse_rows, sparse_columns, columns // sparse_columns))
        return windows.mean(dim=(2, 4)).flatten(1, 2)  # (N, S, D)
    plane = tokens.transpose(1, 2).unflatten(2, grid)  # (N, D, rows, columns)
    return F.adaptive_avg_pool2d(plane, (sparse_rows, sparse_columns)).flatten(2).transpose(1, 2)  # (N, S, D)


def upsample_tokens(tokens: Tensor, sparse_grid: Grid, grid: Grid) -> Tensor:
    """Nearest-neighbour upsampling of a token map: (N, S, D) -> (N, rows * columns, D)"""
    (rows, columns), (sparse_rows, sparse_columns) = grid, sparse_grid
    if rows % sparse_rows == 0 and columns % sparse_columns == 0:
        # A view: its backward is a sum over windows, where an indexed copy would add into the same token from many threads.
        cells = tokens.unflatten(1, (sparse_rows, 1, sparse_columns, 1))  # (N, s, 1, s, 1, D)
        cells = cells.expand(-1, -1, rows // sparse_rows, -1, columns // sparse_columns, -1)
        return cells.flatten(1, 4)  # (N, T, D)
    return tokens[:, nearest_index(sparse_grid, grid, tokens.device)]  # (N, T, D)


def nearest_index(sparse_grid: Grid, grid: Grid, device: torch.device) -> Tensor:
    """For every full token the index of its nearest sparse one, floor(i s / n) on each axis. -> (rows * columns,) int64"""
    row, column = (torch.arange(side, device=device) * small // side for side, small in zip(grid, sparse_grid, strict=True))
    return (row[:, None] * sparse_grid[1] + column[None, :]).flatten()
