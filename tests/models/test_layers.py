"""Layers whose fast form is not their plain one, and what mixed precision leaves in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers import Block, Condition, Float32Linear, PatchEmbedder, TimestepEmbedder, modulate
from tests.models.random_networks import distance, randomized
from tests.models.random_networks import one_thread as one_thread

EXACT = 1e-6


@pytest.mark.parametrize(("patch", "shape"), [(1, (3, 4, 6)), (2, (4, 8, 12)), (4, (1, 16, 8))])
def test_the_patch_embedding_is_its_convolution(patch: int, shape: tuple[int, int, int]) -> None:
    embedder = randomized(PatchEmbedder(patch, shape[0], 20))
    x = torch.randn(3, *shape, generator=torch.manual_seed(0))
    convolved = embedder.proj(x).flatten(2).transpose(1, 2)
    assert distance(embedder(x), convolved) < EXACT
    if patch > 1:
        assert distance(embedder(x.transpose(2, 3).reshape(x.shape)), convolved) > 0.1


def test_tokens_lie_token_by_token() -> None:
    """Else every norm and every product up to the first attention copies them, and is compiled for a layout of its own."""
    embedder, x = PatchEmbedder(2, 4, 20), torch.randn(3, 4, 8, 12)
    assert embedder(x).is_contiguous()
    assert not embedder.proj(x).flatten(2).transpose(1, 2).is_contiguous()


def test_what_must_not_be_rounded_is_not() -> None:
    linear, patches, timesteps = randomized(Float32Linear(8, 8)), randomized(PatchEmbedder(2, 4, 8)), TimestepEmbedder(8)
    x, latents, t = torch.randn(5, 8), torch.randn(2, 4, 4, 4), torch.arange(5)
    exact = linear(x), patches(latents), timesteps(t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear(x), patches(latents), timesteps(t)
        assert torch.nn.functional.linear(x, linear.weight).dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(mixed, exact, strict=True))


@pytest.mark.parametrize("row_of", [None, [1, 0, 1]])
def test_a_condition_hands_out_its_rows(row_of: list[int] | None) -> None:
    values = torch.arange(6.0).reshape(3, 2)
    index = None if row_of is None else torch.tensor(row_of)
    spread = Condition(values, index).spread(2 * values)
    assert torch.equal(spread, 2 * values[row_of or [0, 1, 2]])


def test_modulation_is_float32_under_autocast() -> None:
    """Known bad: as the product comes out, where 1 + scale is rounded to half precision."""
    block = Block(32, 2, 4.0)
    condition = Condition(torch.randn(3, 32, generator=torch.manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert block.adaLN_modulation(condition.rows).dtype == torch.bfloat16
        assert block.modulation(condition).dtype == torch.float32


def test_modulation_is_scale_and_shift() -> None:
    tokens, shift, scale = (torch.randn(2, count, 6, generator=torch.manual_seed(count)) for count in (5, 1, 1))
    scale = scale.flip(2)
    expected: Tensor = tokens * (1 + scale) + shift
    assert distance(modulate(tokens, shift, scale), expected) < EXACT
    assert distance(modulate(tokens, scale, shift), expected) > 0.1
