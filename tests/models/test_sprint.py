"""SPRINT: which tokens take the middle blocks, where they come back, what the cheap path leaves out, and what each costs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import SPRINT, Backbone, Plan, create_model
from models.sprint import GROUPS, Rotation, SPRINTOptions, draw_kept, kept_tokens, middle_plan
from models.weights import export
from runtime.checkpoint import Weights
from runtime.config import InputError
from runtime.execution import Execution, Executor
from runtime.networks import blueprint, build_with, method_name, recognized
from runtime.sampling import sample_latents
from runtime.sampling_settings import SamplingSettings, sampling_cost
from runtime.seeding import Keys, uniform
from tests.models.random_networks import counted_macs, distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread

EXACT = 1e-5
FLOW: dict[str, Any] = {"learn_sigma": False, "objective": "flow", "time_scale": 1.0}
RECTANGULAR = tiny(latent_size=(8, 16), **FLOW)


def sprint(backbone: Backbone = RECTANGULAR, **options: Any) -> SPRINT:
    made = network("sprint", backbone, options)
    assert isinstance(made, SPRINT)
    torch.nn.init.normal_(made.mask_token)  # large enough to be missed
    return made


def draws_of(model: SPRINT, kept: Tensor | None, path_drop: list[bool] | None = None) -> dict[str, Tensor]:
    """No label is dropped; `kept` (N, K)."""
    nothing = torch.zeros(3, dtype=torch.bool)
    drawn = {"label_drop": nothing, "path_drop": nothing if path_drop is None else torch.tensor(path_drop)}
    return drawn if kept is None else {**drawn, "kept": kept}


def keys(count: int, seed: int = 0) -> Keys:
    return Keys(seed, 0, torch.arange(count))


# Gather and restore --------------------------------------------------------------------------------------------------


def middle(model: SPRINT, kept: Tensor | None) -> Tensor:
    """What the middle blocks make of the embedded tokens."""
    tokens, condition = model.embed(*inputs(model.backbone))
    return model.run_middle(tokens, Rotation(model.rotation_cos, model.rotation_sin), condition, kept)


def shuffled(model: SPRINT, count: int | None = None) -> Tensor:
    """Places in an order of each sample's own: the first `count` (None: all). (N, K)"""
    return uniform(keys(3), "order", (model.backbone.tokens,)).argsort(dim=1)[:, :count]


def order_error(model: SPRINT) -> float:
    """How far all tokens in any order are from the full map."""
    return distance(middle(model, shuffled(model)), middle(model, None))


@torch.no_grad()
def test_all_tokens_in_any_order_are_the_full_map() -> None:
    assert order_error(sprint()) < EXACT


@torch.no_grad()
def test_tokens_that_leave_their_places_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sprint()
    monkeypatch.setattr(Rotation, "at", lambda self, kept: Rotation(self.cos[: kept.shape[1]], self.sin[: kept.shape[1]]))
    assert order_error(model) > 100 * EXACT


@torch.no_grad()
def test_kept_tokens_come_back_to_their_places_and_mask_tokens_stand_elsewhere() -> None:
    model = sprint()
    kept = shuffled(model, 8)
    without_blocks = copy.deepcopy(model)
    without_blocks.options = SPRINTOptions(encoder_blocks=4, decoder_blocks=4)  # no middle: what goes in comes out
    tokens, _ = model.embed(*inputs(model.backbone))
    restored = middle(without_blocks, kept)
    for sample in range(3):
        chosen = kept[sample].tolist()
        others = [place for place in range(model.backbone.tokens) if place not in chosen]
        assert torch.equal(restored[sample, chosen], tokens[sample, chosen])
        assert torch.equal(restored[sample, others], model.mask_token[0].expand(len(others), -1))


@torch.no_grad()
def test_the_order_in_which_tokens_are_kept_does_not_matter() -> None:
    model, kept = sprint(), shuffled(sprint(), 8)
    batch, plan = inputs(model.backbone), middle_plan(8)
    first = model(*batch, plan, draws_of(model, kept))
    assert distance(model(*batch, plan, draws_of(model, kept.flip(1))), first) < EXACT
    assert distance(model(*batch, plan, draws_of(model, (kept + 1) % 32)), first) > 100 * EXACT  # which ones does


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["structured", "random"])
def test_drop_ratio_zero_is_the_dense_path(pattern: str) -> None:
    model = sprint(drop_ratio=0.0, drop_pattern=pattern)
    ((_, plan),) = model.training_plans()
    drawn = model.draw(keys(3))
    assert set(drawn) == {"label_drop", "path_drop"}
    assert plan == model.plan(0)
    batch = inputs(model.backbone)
    assert torch.equal(model(*batch, plan, draws_of(model, None)), model(*batch, model.plan(0)))
    assert "no token is dropped" in model.training_lines()[0]


# The cheap path ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sample_whose_path_is_dropped_is_the_cheap_pass() -> None:
    model, batch = sprint(), inputs(RECTANGULAR)
    kept = model.draw(keys(3))["kept"]
    mixed = model(*batch, middle_plan(8), draws_of(model, kept, [False, True, False]))
    cheap, dropped = model(*batch, model.cheap_plan(0)), model(*batch, middle_plan(8), draws_of(model, kept))
    assert distance(mixed[1], cheap[1]) < EXACT
    assert distance(mixed[[0, 2]], dropped[[0, 2]]) < EXACT
    assert distance(dropped[1], cheap[1]) > 100 * EXACT


@torch.no_grad()
def test_the_cheap_path_runs_no_middle_block() -> None:
    model, ran = sprint(encoder_blocks=1, decoder_blocks=3), []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, given, output, number=number: ran.append(number))
    model(*inputs(RECTANGULAR), model.cheap_plan(0))
    assert ran == [0, 5, 6, 7]


def test_path_drop_is_independent_of_label_drop_and_of_what_is_kept() -> None:
    model = sprint(tiny(label_drop=0.3, **FLOW), path_drop=0.4)
    drawn = model.draw(keys(20_000))
    label, path = drawn["label_drop"], drawn["path_drop"]
    assert float(path.float().mean()) == pytest.approx(0.4, abs=0.015)
    assert float((label & path).float().mean()) == pytest.approx(0.12, abs=0.01)
    first = drawn["kept"][:, 0]  # of the first group's four places
    for place in (0, 1, 8, 9):
        assert float(path[first == place].float().mean()) == pytest.approx(0.4, abs=0.03)


# Which tokens are dropped --------------------------------------------------------------------------------------------


def held(kept: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """How many of every group of side x side tokens stay. kept (N, K) -> (N, groups)"""
    rows, columns = grid
    group = kept // columns // side * (columns // side) + kept % columns // side  # (N, K)
    return torch.nn.functional.one_hot(group, rows * columns // side**2).sum(1)


def structured(ratio: float, numbers: Tensor, grid: tuple[int, int]) -> Tensor:
    return draw_kept(numbers, SPRINTOptions(drop_ratio=ratio), grid)


@pytest.mark.parametrize("ratio", GROUPS)
@pytest.mark.parametrize("grid", [(4, 8), (8, 12)])
def test_a_structured_drop_keeps_as_many_of_every_group_each_as_often(ratio: float, grid: tuple[int, int]) -> None:
    (side, count), tokens = GROUPS[ratio], grid[0] * grid[1]
    kept = structured(ratio, uniform(keys(4000), "test", (tokens,)), grid)
    assert kept.shape == (4000, kept_tokens(tokens, ratio))
    assert (held(kept, side, grid) == count).all()
    assert all(len(set(sample)) == len(sample) for sample in kept[:50].tolist())
    often = torch.bincount(kept.flatten(), minlength=tokens) / 4000
    assert (often - count / side**2).abs().max() < 5 * 0.5 / 4000**0.5
    # The known-bad variants: the whole map's smallest, and the same offset in every group.
    anywhere = draw_kept(uniform(keys(50), "test", (tokens,)), SPRINTOptions(drop_ratio=ratio, drop_pattern="random"), grid)
    assert not (held(anywhere, side, grid) == count).all()
    assert len({tuple(sample) for sample in kept[:200].tolist()}) > 190


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 32), (0.3, 24), (0.75, 9), (0.99, 1), (0.999, 1)])
def test_a_random_drop_keeps_any_share_of_any_map(ratio: float, count: int) -> None:
    options = SPRINTOptions(drop_ratio=ratio, drop_pattern="random")
    kept = draw_kept(uniform(keys(4000), "test", (35,)), options, (5, 7))
    assert kept.shape == (4000, count)
    often = torch.bincount(kept.flatten(), minlength=35) / 4000
    assert (often - count / 35).abs().max() < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("pattern", ["structured", "random"])
def test_draws_follow_from_the_sample_s_key_alone(pattern: str) -> None:
    model = sprint(drop_pattern=pattern)
    whole, chosen = model.draw(keys(16)), torch.tensor([9, 2, 2])
    part = model.draw(Keys(0, 0, chosen))
    assert set(part) == {"label_drop", "path_drop", "kept"}
    assert all(torch.equal(values, whole[name][chosen]) for name, values in part.items())
    assert not torch.equal(whole["kept"], model.draw(keys(16, seed=1))["kept"])


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({"encoder_blocks": 0}, {}, "encoder_blocks is 0; it must be at least 1"),
        ({"decoder_blocks": 0}, {}, "decoder_blocks is 0; it must be at least 1"),
        ({"encoder_blocks": 4, "decoder_blocks": 4}, {}, "leave no middle block of the backbone's 8"),
        ({"drop_ratio": 1.0}, {}, "--drop-ratio is 1.0; it must be at least 0 and below 1"),
        ({"drop_ratio": -0.5}, {}, "--drop-ratio is -0.5"),
        ({"drop_ratio": 0.7}, {}, r"0.7 has no structured pattern; choose 0, 0.5, 0.625, 0.75, 0.875, or"),
        ({}, {"latent_size": (10, 14)}, "groups of 2 x 2 tokens, into which the 5 x 7 map cannot be cut"),
        ({"drop_ratio": 0.875}, {"latent_size": (12, 16)}, "groups of 4 x 4 tokens, into which the 6 x 8 map"),
        ({"path_drop": 1.5}, {}, "--path-drop is 1.5; it must be between 0 and 1"),
        ({}, {"model": "DiT-48x8x8/2"}, "heads of 6 channels cannot turn pairs on two axes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options: dict[str, Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        blueprint("sprint", tiny(**sizes), options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


# The mask token and the tables ---------------------------------------------------------------------------------------


def test_the_mask_token_is_drawn_frozen_and_saved() -> None:
    torch.manual_seed(0)
    model = create_model("sprint", Backbone.named("DiT-S/2", (16, 16), **FLOW))
    assert isinstance(model, SPRINT)
    assert not model.mask_token.requires_grad
    assert float(model.mask_token.std()) == pytest.approx(0.02, rel=0.15)
    assert "mask_token" in model.state_dict()
    assert not [name for name in model.state_dict() if "rotation" in name]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(model.state_dict()) - trained == {"mask_token"}


def test_tables_follow_the_network() -> None:
    model = sprint()
    assert copy.deepcopy(model).rotation_cos is not model.rotation_cos
    assert model.to("meta").rotation_sin.is_meta


def test_double_precision_runs() -> None:
    model, (x, t, y) = sprint(), inputs(RECTANGULAR)
    single = model(x, t, y, model.plan(0))
    assert distance(copy.deepcopy(model).double()(x.double(), t, y, model.plan(0)).float(), single) < EXACT


# Costs ---------------------------------------------------------------------------------------------------------------


def counted_with_drop(model: SPRINT, plan: Plan) -> float:
    """Multiply-accumulates of one training sample as torch counts them."""
    backbone, nothing = model.backbone, torch.zeros(1, dtype=torch.bool, device="meta")
    draws = {"label_drop": nothing, "path_drop": nothing}
    draws["kept"] = torch.zeros(1, model.kept, dtype=torch.long, device="meta")
    x = torch.zeros(1, backbone.in_channels, *backbone.latent_size, device="meta")
    one = torch.zeros(1, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, one, one, plan, draws)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("ratio", GROUPS)
@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2"])
def test_macs_with_and_without_drop_are_exact(name: str, ratio: float) -> None:
    model = blueprint("sprint", Backbone.named(name, (32, 32), **FLOW), {"drop_ratio": ratio})
    assert isinstance(model, SPRINT)
    dropped = middle_plan(model.kept)
    assert model.macs(model.plan(0)) == counted_macs(model)
    assert model.macs(model.cheap_plan(0)) == counted_macs(model, model.cheap_plan(0))
    assert model.macs(dropped) == counted_with_drop(model, dropped)
    assert model.macs(model.cheap_plan(0)) < model.macs(dropped) < model.macs(model.plan(0))


def by_hand() -> tuple[int, int]:
    """A pass of XL/2 at 256, whole and cheap: 28 blocks of 256 tokens of width 1152, of which the cheap pass runs 4."""
    width, tokens = 1152, 256
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    outside = tokens * 16 * width * 2 + 256 * width + width**2 + 2 * width**2 + tokens * 2 * width**2
    return 28 * block + outside, 4 * block + outside


def test_path_drop_guidance_costs_what_the_paper_says() -> None:
    model, (full, cheap) = blueprint("sprint", Backbone.named("DiT-XL/2", (32, 32), **FLOW), {}), by_hand()
    assert (model.macs(model.plan(0)), model.macs(model.cheap_plan(0))) == (full, cheap)
    assert (full + cheap) / (2 * full) == pytest.approx(0.274 / 0.477, abs=0.001)
    assert 2 * 2 * full / 1e12 == pytest.approx(0.477, abs=0.001)


@pytest.mark.parametrize(
    ("chosen", "whole", "cheaper"),
    [
        ({}, 10, 10),
        ({"guidance_interval": (0.25, 0.65)}, 10, 4),  # .6 .5 .4 .3 of 1 .9 ... .1
        ({"sampler": "heun", "guidance_interval": (0.25, 0.65)}, 20, 8),
        ({"cfg_scale": 1.0}, 10, 0),
        ({"guidance": "classifier-free"}, 20, 0),  # the known-bad variant: both halves whole
    ],
    ids=str,
)
def test_a_picture_under_path_drop_costs_what_it_does_by_hand(chosen: dict[str, Any], whole: int, cheaper: int) -> None:
    model, (full, cheap) = blueprint("sprint", Backbone.named("DiT-XL/2", (32, 32), **FLOW), {}), by_hand()
    usual = SamplingSettings(guidance="path-drop", sampler="euler", num_sampling_steps="10")
    cost = sampling_cost(model, replace(usual, **chosen))
    assert (cost.passes, cost.macs) == (whole + cheaper, whole * full + cheaper * cheap)


# Released weights ----------------------------------------------------------------------------------------------------


def released(latent_size: tuple[int, int]) -> tuple[SPRINT, Weights]:
    """A network that was trained dropping any tokens, and its weights as SPRINT's authors name them."""
    model = sprint(tiny(latent_size=latent_size, **FLOW), encoder_blocks=3, decoder_blocks=1, drop_pattern="random")
    return model, Weights(export(model, model.released_layout), "file")


@pytest.mark.parametrize("latent_size", [(10, 14), (10, 10), (16, 16)])
def test_released_weights_for_any_map_are_recognized_and_sample(latent_size: tuple[int, int]) -> None:
    """5 x 7 tokens have no groups, which the default drop of training would refuse."""
    original, weights = released(latent_size)
    plan = recognized(weights, "DiT-T/2", latent_size)
    assert method_name(plan) == "sprint"
    assert (plan.options.encoder_blocks, plan.options.decoder_blocks, plan.options.drop_ratio) == (3, 1, 0.0)
    ours, loading = build_with(plan, weights)
    assert loading.new == loading.notes == loading.warnings == ()
    index, settings = torch.arange(2), SamplingSettings(guidance="path-drop", num_sampling_steps="3")
    pictures, same = (sample_latents(one, settings, index, index, 0, torch.device("cpu")) for one in (ours, original))
    assert pictures.std() > 0.1
    assert torch.equal(pictures, same)


def test_an_odd_map_under_the_drop_of_training_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known-bad variant: options of the layout without what training dropped, which the defaults then say."""
    recognize = SPRINT.recognize

    def planted(shapes: Any) -> Any:
        layout, options = recognize(shapes) or ("", {})
        return layout, {name: value for name, value in options.items() if name != "drop_ratio"}

    monkeypatch.setattr(SPRINT, "recognize", planted)
    with pytest.raises(InputError, match="into which the 5 x 7 map"):
        recognized(released((10, 14))[1], "DiT-T/2", (10, 14))


# Execution -----------------------------------------------------------------------------------------------------------


def test_in_bf16_norms_and_rotation_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = sprint(), set()
    turn = Rotation.turn

    def watched(self: Rotation, vectors: Tensor) -> Tensor:
        seen.add((vectors.dtype, self.cos.dtype))
        return turn(self, vectors)

    monkeypatch.setattr(Rotation, "turn", watched)
    executor, (x, t, y) = Executor(model, Execution(torch.device("cpu"), "bf16")), inputs(RECTANGULAR)
    with torch.no_grad():
        executor(x, t[:1], y, model.plan(0), None)
    assert seen == {(torch.float32, torch.float32)}


def test_a_rotation_in_bf16_would_be_worse() -> None:
    """The known-bad variant: its products rounded on the way, beside the one rounding before attention."""
    table, vectors = Rotation(*(part.float() for part in angles(32, 6))), torch.randn(2, 4, 32, 12)
    exact = table.turn(vectors)
    assert torch.allclose(turned(table, vectors), exact, atol=1e-6)
    once, often = exact.bfloat16(), turned(Rotation(*(part.bfloat16() for part in table)), vectors.bfloat16())
    errors = [float((rounded.float() - exact).norm() / exact.norm()) for rounded in (once, often)]
    assert errors[1] > 1.5 * errors[0]


def turned(table: Rotation, vectors: Tensor) -> Tensor:
    """The rotation product by product, in the vectors' own precision."""
    even, odd = vectors[..., ::2], vectors[..., 1::2]
    return torch.stack((even * table.cos - odd * table.sin, odd * table.cos + even * table.sin), dim=4).flatten(3)


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    drawn = 6.0 * torch.rand(tokens, pairs)
    return drawn.cos(), drawn.sin()


@torch.no_grad()
@pytest.mark.parametrize("how", [{"packed_weights": True}, {"attention": "math"}, {"attention": "flash"}], ids=str)
@pytest.mark.parametrize("plan", ["plan", "cheap_plan"])
def test_fast_forms_are_the_plain_one_in_both_plans(how: dict[str, Any], plan: str) -> None:
    model, (x, t, y) = sprint(), inputs(RECTANGULAR)
    chosen = getattr(model, plan)(0)
    executor = Executor(copy.deepcopy(model), Execution(torch.device("cpu"), **how))
    assert distance(executor(x, t[:1], y, chosen, None), model(x, t[:1], y, chosen)) < EXACT
