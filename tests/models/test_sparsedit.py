"""SparseDiT against its published, slow form, written here once more: explicit attention matrices, W1 after the upsampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import Backbone, DiT, SparseDiT, create_model
from models.layers import Attention, Block, Condition, CrossAttention, modulate
from models.sparsedit import (
    Context,
    Grids,
    MergeBlock,
    PoolingBlock,
    RecoverBlock,
    nearest_index,
    pool_tokens,
    upsample_tokens,
)
from models.weights import load, plan_loading
from tests.models.random_networks import distance, inputs, network, randomized, tiny
from tests.models.random_networks import one_thread as one_thread

EXACT = 1e-12
"""Float64 networks are compared to rounding: the two forms are the same function."""

SPLITS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "no pooling": {"poolingformer_blocks": 0, "modules": 2, "module_blocks": (1, 1, 1, 1), "top_blocks": 0},
    "two of each": {"poolingformer_blocks": 1, "modules": 1, "module_blocks": (2, 1, 2, 1), "top_blocks": 1},
    "module after module": {"poolingformer_blocks": 2, "modules": 3, "module_blocks": (1, 0, 1, 0), "top_blocks": 0},
    "readded position": {"readd_position": True, "modules": 1, "module_blocks": (1, 2, 2, 1)},
}
GRIDS = {
    "dividing": ((16, 16), "4"),
    "not dividing": ((16, 16), "5"),
    "rectangular": ((12, 20), "3x4"),
    "one token": ((8, 8), "1"),
    "full map": ((8, 12), "4x6"),
}


# The slow form -------------------------------------------------------------------------------------------------------


def attend(projected: Sequence[Tensor], heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with the matrix written out. `projected`: q (N, Q, D), k and v (N, K, D) -> (N, Q, D)"""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in projected)  # each (N, heads, tokens, d)
    matrix = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3)  # (N, heads, Q, K)
    return (matrix @ v).transpose(1, 2).flatten(2)


def averaged(v: Tensor) -> Tensor:
    """Attention whose matrix holds 1 / T everywhere. (N, T, D) -> (N, T, D)"""
    matrix = torch.full((v.shape[1], v.shape[1]), 1 / v.shape[1], dtype=v.dtype)
    return matrix @ v


def upsampled(tokens: Tensor, sparse_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    plane = tokens.transpose(1, 2).unflatten(2, sparse_grid)  # (N, D, rows, columns)
    return F.interpolate(plane, size=grid, mode="nearest").flatten(2).transpose(1, 2)


def pooled(tokens: Tensor, grid: tuple[int, int], sparse_grid: tuple[int, int]) -> Tensor:
    plane = tokens.transpose(1, 2).unflatten(2, grid)  # (N, D, rows, columns)
    return F.adaptive_avg_pool2d(plane, sparse_grid).flatten(2).transpose(1, 2)


def framed(block: Any, tokens: Tensor, modulation: Tensor, attention: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """The adaLN-Zero frame; `attention` is given the block's modulated norm."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=2)
    tokens = tokens + gate1 * block.attn.proj(attention(lambda x: modulate(block.norm1(x), shift1, scale1)))
    return tokens + gate2 * block.mlp(modulate(block.norm2(tokens), shift2, scale2))


def slow_block(block: Any, tokens: Tensor, keys: Tensor, modulation: Tensor) -> Tensor:
    """A pooling, plain, or cross-attention block; `keys` are the other side of the last."""
    attn = block.attn
    if isinstance(block, PoolingBlock):
        return framed(block, tokens, modulation, lambda norm: averaged(attn.v(norm(tokens))))
    if isinstance(block, Block):
        return framed(block, tokens, modulation, lambda norm: attend(attn.qkv(norm(tokens)).chunk(3, dim=2), attn.num_heads))
    return framed(
        block,
        tokens,
        modulation,
        lambda norm: attend((attn.q(norm(tokens)), *attn.kv(norm(keys)).chunk(2, dim=2)), attn.num_heads),
    )


def slow_forward(model: SparseDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The whole network block by block, by the facts of the paper."""
    grid, sparse_grid = model.backbone.grid, model.split.density.grid_at(0)
    position = model.pos_embed if model.options.readd_position else torch.zeros_like(model.pos_embed)
    tokens = model.x_embedder(x) + model.pos_embed
    condition = model.t_embedder.mlp(model.t_embedder.sinusoids(t).to(x.dtype)) + model.y_embedder(y)
    is_full, full = True, tokens
    for block in model.blocks:
        modulation = block.adaLN_modulation(condition)
        if isinstance(block, MergeBlock):
            if is_full:
                is_full, full = False, tokens
                tokens = pooled(full, grid, sparse_grid) + pooled(position, grid, sparse_grid)
            tokens = slow_block(block, tokens, full, modulation)
        elif isinstance(block, RecoverBlock):
            before = tokens
            spread = before if is_full else upsampled(before, sparse_grid, grid)
            merged = block.merged_layer1(spread) + block.merged_layer2(full) + (0 if is_full else position)
            tokens, is_full = slow_block(block, merged, before, modulation), True
        else:
            tokens = slow_block(block, tokens, tokens, modulation)
    return model.unpatchify(model.final_layer(tokens, Condition(condition)))


def double_network(options: Mapping[str, Any], latent_size: tuple[int, int] = (16, 16)) -> SparseDiT:
    model = network("sparsedit", tiny(latent_size=latent_size), options).double()
    assert isinstance(model, SparseDiT)
    # The timestep embedder computes its sinusoids in float32, whatever the network's type.
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return model


def slow_and_fast(model: SparseDiT) -> float:
    x, t, y = inputs(model.backbone)
    with torch.no_grad():
        return distance(model(x.double(), t, y), slow_forward(model, x.double(), t, y))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("latent_size", [(16, 16), (12, 20)], ids=["square", "rectangular"])
def test_network_is_its_slow_form(split: str, latent_size: tuple[int, int]) -> None:
    assert slow_and_fast(double_network(SPLITS[split], latent_size)) < EXACT


@pytest.mark.parametrize(("latent_size", "density"), GRIDS.values(), ids=GRIDS)
def test_every_sparse_grid_is_its_slow_form(latent_size: tuple[int, int], density: str) -> None:
    assert slow_and_fast(double_network({**SPLITS["two of each"], "density": density}, latent_size)) < EXACT


CROSS_ATTENTION = CrossAttention.forward


def transposed_index(sparse_grid: tuple[int, ...], grid: tuple[int, int], device: torch.device) -> Tensor:
    return nearest_index(sparse_grid, grid, device).unflatten(0, grid).t().flatten()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nearest_index", transposed_index),
        ("nearest_index", lambda sparse, grid, device: nearest_index(sparse, grid, device).roll(1)),
        ("pool_tokens", lambda tokens, grid, sparse: tokens[:, : sparse[0] * sparse[1]]),
        ("pool_tokens", lambda tokens, grid, sparse: pooled(tokens, grid[::-1], sparse)),
        ("modulate", lambda tokens, shift, scale: tokens * scale + shift),
        ("PoolingAttention.forward", lambda self, pooled: self.v(self.proj(pooled))),
        ("CrossAttention.forward", lambda self, queries, keys: CROSS_ATTENTION(self, queries, queries)),
    ],
    ids=[
        "transposed upsampling",
        "shifted upsampling",
        "first tokens",
        "transposed pooling",
        "scale without one",
        "projections swapped",
        "keys from the queries' side",
    ],
)
def test_the_slow_form_catches(name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_network({"density": "3x4"}, (12, 20))
    monkeypatch.setattr(f"models.sparsedit.{name}", wrong)
    assert slow_and_fast(model) > 1e-6


# The parts -----------------------------------------------------------------------------------------------------------


def modulation_of(width: int) -> Tensor:
    return randomized(nn.Linear(width, 6)).weight.t().reshape(1, -1).repeat(2, 1).double().detach()  # (2, 6 D)


def test_pooling_block_is_attention_with_one_over_n() -> None:
    block = randomized(PoolingBlock(48, 4.0)).double()
    tokens, modulation = torch.randn(2, 20, 48, generator=torch.manual_seed(0)).double(), modulation_of(48)
    assert distance(block(tokens, Context(), modulation), slow_block(block, tokens, tokens, modulation)) < EXACT


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that any tensor holds which an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


def pooling_costs(forward: Callable[[Any, Tensor, Tensor], Tensor], count: int) -> tuple[int, int]:
    """(largest tensor, multiply-accumulates beside the feed-forward part) of a pooling block on `count` tokens."""
    with torch.device("meta"), torch.no_grad():
        block, tokens, modulation = PoolingBlock(48, 4.0), torch.zeros(1, count, 48), torch.zeros(1, 6 * 48)
        with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
            forward(block, tokens, modulation)
    return largest.numbers, counter.get_total_flops() // 2 - block.mlp.macs(count)


def test_pooling_costs_one_vector_per_image() -> None:
    count = 4096
    hidden = 4 * 48 * count  # the feed-forward part's own tensor, far below 4096 x 4096
    assert pooling_costs(lambda block, tokens, m: block(tokens, Context(), m), count) == (hidden, 2 * 48**2)
    slow = pooling_costs(lambda block, tokens, m: slow_block(block, tokens, tokens, m), count)
    assert slow == (count**2, 2 * 48**2 * count + count**2 * 48)


def test_w1_before_the_upsampling_is_w1_after_it() -> None:
    block, grid, sparse_grid = randomized(RecoverBlock(48, 4, 4.0)).double(), (6, 10), (4, 3)
    full, tokens = (torch.randn(2, count, 48, generator=torch.manual_seed(0)).double() for count in (60, 12))
    merged = block.merged_layer1(upsampled(tokens, sparse_grid, grid)) + block.merged_layer2(full)
    expected = slow_block(block, merged, tokens, modulation_of(48))
    assert distance(block(tokens, Context(full, Grids(sparse_grid, grid)), modulation_of(48)), expected) < EXACT


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (7, 5), (1, 4), (16, 16)])
def test_pooling_is_adaptive_average_pooling(grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, grid[0] * grid[1], 3, generator=torch.manual_seed(0), dtype=torch.float64)
    for sparse_grid in ((rows, columns) for rows in range(1, grid[0] + 1) for columns in range(1, grid[1] + 1)):
        torch.testing.assert_close(
            pool_tokens(tokens, grid, sparse_grid), pooled(tokens, grid, sparse_grid), rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("side", [*range(1, 33), 40, 64, 128])
def test_upsampling_is_nearest_interpolation(side: int) -> None:
    """Sides up to 32 and the usual larger ones; torch rounds i s / n in float32, so that a few odd ones (44, 46, 58) differ."""
    for small in range(1, side + 1):
        plane = torch.arange(small, dtype=torch.float32).reshape(1, 1, 1, small)
        expected = F.interpolate(plane, size=(1, side), mode="nearest").flatten().long()
        assert torch.equal(nearest_index((1, small), (1, side), torch.device("cpu")), expected)
        assert torch.equal(nearest_index((small, 1), (side, 1), torch.device("cpu")), expected)


def test_upsampling_of_a_rectangle_is_nearest_interpolation() -> None:
    grid, sparse_grid = (7, 10), (3, 4)
    plane = torch.arange(12.0).reshape(1, 1, *sparse_grid)
    expected = F.interpolate(plane, size=grid, mode="nearest").flatten().long()
    assert torch.equal(nearest_index(sparse_grid, grid, torch.device("cpu")), expected)


@pytest.mark.parametrize(("sparse_grid", "grid"), [((4, 4), (8, 8)), ((2, 3), (6, 12)), ((5, 5), (8, 8)), ((1, 1), (4, 6))])
def test_upsampling_copies_the_nearest_token_and_sums_its_gradients(
    sparse_grid: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Both ways, the view for grids that divide and the index for those that do not, are the index's."""
    index = nearest_index(sparse_grid, grid, torch.device("cpu"))
    tokens = torch.randn(2, sparse_grid[0] * sparse_grid[1], 3, generator=torch.manual_seed(0), dtype=torch.float64)
    weights = torch.randn(2, grid[0] * grid[1], 3, generator=torch.manual_seed(1), dtype=torch.float64)
    tokens.requires_grad_()
    ours, reference = upsample_tokens(tokens, sparse_grid, grid), tokens.index_select(1, index)
    assert torch.equal(ours, reference)
    gradients = [torch.autograd.grad((result * weights).sum(), tokens)[0] for result in (ours, reference)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_readding_the_position_is_off_and_changes_the_output() -> None:
    off, on = network("sparsedit", tiny()), network("sparsedit", tiny(), {"readd_position": True})
    assert off.options.readd_position is False
    assert distance(on(*inputs(tiny())), off(*inputs(tiny()))) > 1e-2


def test_no_weight_depends_on_the_sparse_grid() -> None:
    coarse, fine = (network("sparsedit", tiny(), {"density": side}) for side in (2, 8))
    fine.load_state_dict(coarse.state_dict())
    assert torch.equal(coarse(*inputs(tiny()), plan=fine.plan(0)), fine(*inputs(tiny())))
    assert distance(coarse(*inputs(tiny())), fine(*inputs(tiny()))) > 1e-2


# Converting a dense DiT ----------------------------------------------------------------------------------------------


def converted(dense: DiT, options: Mapping[str, Any]) -> SparseDiT:
    """A SparseDiT that starts from the weights of `dense`."""
    model = create_model("sparsedit", dense.backbone, options)
    shapes = {key: tuple(value.shape) for key, value in dense.state_dict().items()}
    load(model, dense.state_dict(), plan_loading(model, shapes, {"dense": DiT, "sparsedit": SparseDiT}))
    assert isinstance(model, SparseDiT)
    return model


@pytest.mark.parametrize("density", ["4", "5x3", "8", "8,3@0,500"])
def test_right_after_conversion_the_merged_map_is_the_full_map(density: str) -> None:
    model = converted(network("dense", tiny()), {"density": density})
    maps: list[Tensor] = []
    merge, recover = model.blocks[1], model.blocks[5]
    merge.register_forward_pre_hook(lambda module, arguments: maps.append(arguments[1].full_map))
    recover.norm1.register_forward_pre_hook(lambda module, arguments: maps.append(arguments[0]))
    model(*inputs(tiny()), model.plan(999))
    full, merged = maps[0], maps[1]
    assert torch.equal(merged, full)
    assert full.std() > 0.1


def identity_blocks(model: DiT, places: range) -> DiT:
    """Closes the gates of some blocks: they return their tokens."""
    for place in places:
        for parameter in model.blocks[place].adaLN_modulation.parameters():
            nn.init.zeros_(parameter)
    return model


def conversion_error(dense: DiT, density: str) -> float:
    split = {"poolingformer_blocks": 0, "modules": 1, "module_blocks": (1, 3, 1, 1), "top_blocks": 1}
    model = converted(dense, {**split, "density": density})
    return distance(model(*inputs(dense.backbone)), dense(*inputs(dense.backbone)))


def test_on_the_full_map_a_converted_dit_is_the_dit() -> None:
    """Where merge and sparse blocks are identities and the sparse grid is the whole map, SparseDiT computes the dense DiT."""
    backbone = Backbone.named("DiT-48x7x4/2", (12, 16), num_classes=10)
    assert conversion_error(identity_blocks(network("dense", backbone), range(4)), "6x8") < 1e-5
    # Known-bad variants: a smaller map, or sparse blocks that do something, and the two are different functions.
    assert conversion_error(identity_blocks(network("dense", backbone), range(4)), "3x4") > 1e-3
    assert conversion_error(identity_blocks(network("dense", backbone), range(1)), "6x8") > 1e-3


def test_each_block_takes_the_weights_of_its_dense_block() -> None:
    dense = network("dense", tiny())
    model = converted(dense, {"poolingformer_blocks": 1, "modules": 1, "module_blocks": (2, 1, 2, 1), "top_blocks": 1})
    state = dense.state_dict()
    for place, block in enumerate(model.blocks):
        q, k, v = state[f"blocks.{place}.attn.qkv.weight"].chunk(3)
        if isinstance(block.attn, Attention):
            assert torch.equal(block.attn.qkv.weight, torch.cat((q, k, v)))
        elif isinstance(block, MergeBlock | RecoverBlock):
            assert torch.equal(block.attn.q.weight, q)
            assert torch.equal(block.attn.kv.weight, torch.cat((k, v)))
        else:
            assert isinstance(block, PoolingBlock)
            assert torch.equal(block.attn.v.weight, v)
        assert torch.equal(block.mlp.fc1.weight, state[f"blocks.{place}.mlp.fc1.weight"])


def test_a_fresh_sparsedit_has_the_release_s_initialisation() -> None:
    torch.manual_seed(0)
    model = SparseDiT(Backbone.named("DiT-S/2", (16, 16)))
    recover = next(block for block in model.blocks if isinstance(block, RecoverBlock))
    assert not recover.merged_layer1.weight.any()
    assert torch.equal(recover.merged_layer2.weight, torch.eye(384))
    assert not any(parameter.any() for parameter in (recover.merged_layer1.bias, recover.merged_layer2.bias))
    # Xavier-uniform of gain g is uniform on +- g sqrt(6 / (in + out)).
    bound = 0.5 * (6 / (384 + 1536)) ** 0.5
    assert float(recover.mlp.fc1.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    patch_bound = (6 / (16 + 384)) ** 0.5
    assert float(model.x_embedder.proj.weight.detach().abs().max()) == pytest.approx(patch_bound, rel=1e-2)
    for table in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert isinstance(table, nn.Embedding | nn.Linear)
        assert float(table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
