"""What SPRINT's attention does to queries and keys: norm and rotation."""

from __future__ import annotations

import pytest
import torch

from models import SPRINT
from models.layers import Float32Linear
from models.sprint import RotaryAttention, rotary_table
from runtime.seeding import Keys, normal
from tests.models.random_networks import network, tiny

VECTORS = normal(Keys(0, 0, torch.arange(3)), "vectors", (2, 20, 12))  # (N, heads, T, D / heads)
TABLE = rotary_table(12, (4, 5))


def test_both_forms_of_the_rotation_turn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = TABLE.turn(VECTORS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(TABLE.turn(VECTORS), eager, rtol=0, atol=1e-6)
    backwards = TABLE._replace(sin=-TABLE.sin)
    assert (backwards.turn(VECTORS) - eager).abs().max() > 0.1


def test_the_rotation_turns_neighbours_rows_first() -> None:
    one = torch.zeros(1, 1, 20, 12)
    one[..., 0] = 1.0
    row = torch.arange(4.0).repeat_interleave(5)
    torch.testing.assert_close(TABLE.turn(one)[0, 0, :, :2], torch.stack((row.cos(), row.sin()), dim=1))
    one = torch.zeros(1, 1, 20, 12)
    one[..., 7] = 1.0  # the second of the first pair that tells the column
    column = torch.arange(5.0).repeat(4)
    torch.testing.assert_close(TABLE.turn(one)[0, 0, :, 6:8], torch.stack((-column.sin(), column.cos()), dim=1))


def test_the_rotation_keeps_lengths_and_tells_distances_alone() -> None:
    """Scores of queries and keys depend on how far apart their tokens are."""
    turned = TABLE.turn(VECTORS[:, :, :1].expand(-1, -1, 20, -1))
    torch.testing.assert_close(turned.norm(dim=3), VECTORS[:, :, :1].norm(dim=3).expand(-1, -1, 20))
    scores = turned @ turned.transpose(2, 3)  # (N, heads, T, T)
    torch.testing.assert_close(scores[:, :, 0, 6], scores[:, :, 7, 13])  # one row and one column on
    assert (scores[:, :, 0, 6] - scores[:, :, 0, 7]).abs().max() > 1e-2


def test_small_queries_are_normed_too_and_the_fusion_is_exact() -> None:
    """1e-6 in the root: one of 1e-5 would leave small vectors shorter."""
    model = network("sprint", tiny())
    assert isinstance(model, SPRINT)
    assert isinstance(model.renoise_linear, Float32Linear)
    attention = model.blocks[0].attn
    assert isinstance(attention, RotaryAttention)
    small = torch.full((12,), 2e-3)
    for norm in (attention.q_norm, attention.k_norm):
        torch.testing.assert_close(norm(small), norm.weight * 2e-3 / (4e-6 + 1e-6) ** 0.5)
