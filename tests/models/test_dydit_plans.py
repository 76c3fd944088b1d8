"""DyDiT's plans: the masked decisions of every timestep, computed once; and the operations that passes are counted to cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import DyDiT, Plan
from models.dydit import COMPLETE, DECISIONS, MASKED, WITH_COMPLETE
from models.work import CountedWork
from runtime.config import InputError
from runtime.execution import Execution, Executor
from runtime.networks import blueprint
from runtime.packed_weights import can_pack
from tests.models.random_networks import SIZES, counted_macs, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return network("dydit", tiny())


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SIZES.values(), ids=SIZES)
def test_plans_are_the_masked_decisions_in_float64(backbone: Any) -> None:
    model: Any = network("dydit", backbone)
    exact, timesteps = copy.deepcopy(model).double(), torch.arange(0, 1000, 37)
    x = torch.zeros(len(timesteps), backbone.in_channels, *backbone.latent_size, dtype=torch.float64)
    features = exact.predict(x, timesteps, torch.zeros_like(timesteps), MASKED, None)[1]
    for place, t in enumerate(timesteps.tolist()):
        for layer, (heads, channels) in enumerate(model.plan(t).selection):
            assert heads == tuple(features["heads"][place, layer].nonzero().flatten().tolist())
            assert channels == tuple(features["channels"][place, layer].nonzero().flatten().tolist())
    assert model.plan_varies
    assert {len(heads) for t in range(1000) for heads, _ in model.plan(t).selection} > {1}


@pytest.mark.parametrize("router", ["attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.2"])
def test_routers_that_are_no_numbers_are_refused(model: Any, router: str) -> None:
    """They would say "off", and nothing in the pictures would tell."""
    model.blocks[1].get_submodule(router).bias[0] = float("nan")
    with pytest.raises(InputError, match="the routers' weights hold numbers that are not finite"):
        model.plan(3)


def test_plans_are_computed_once_for_all_timesteps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated, compute = [], DyDiT._plans
    monkeypatch.setattr(DyDiT, "_plans", lambda self, *layers: evaluated.append(self) or compute(self, *layers))
    plans = [model.plan(t) for t in range(1000)]
    for t, plan in enumerate(plans):
        assert model.plan(t) is plan
        assert plan.timestep == t
    model.mean_macs()
    x, t, y = inputs(tiny())
    model(x, t[:1], y, model.plan(int(t[0])), index=torch.arange(3))
    assert len(evaluated) == 1
    for router in ("attn_rate", "mlp_rate"):
        model.blocks[5].get_submodule(router).router.bias.add_(0.5)
        assert model.plan(0) is not plans[0]
    assert [model.plan(t) for t in range(1000)] != plans
    assert len(evaluated) == 3
    model.t_embedder.mlp[0].weight.mul_(2)
    model.plan(0)
    assert len(evaluated) == 4


@pytest.mark.parametrize("how", [{"precision": "bf16"}, {"precision": "tf32"}, {"packed_weights": True}])
def test_an_execution_keeps_the_plans(model: Any, how: dict[str, Any]) -> None:
    if "packed_weights" in how and not can_pack():
        pytest.skip("this torch has no oneDNN")
    plans = [model.plan(t) for t in range(1000)]
    executed = Executor(copy.deepcopy(model), Execution(CPU, **how)).network
    assert [executed.plan(t) for t in range(1000)] == plans
    if "packed_weights" not in how:
        executed.bfloat16()
        assert [executed.plan(t) for t in range(1000)] != plans  # rounded routers would be noticed


def test_training_trains_both_passes_and_then_the_dynamic_one() -> None:
    assert blueprint("dydit", tiny(), {"complete_steps": 7}).training_stages() == [0, 7]
    for steps, step, plan in ((7, 6, WITH_COMPLETE), (7, 7, MASKED), (0, 0, MASKED), (None, 10**6, WITH_COMPLETE)):
        model = blueprint("dydit", tiny(), {"complete_steps": steps})
        assert model.training_plans(step) == [(range(1000), plan)]
        assert model.training_stages() == ([0, 7] if steps == 7 else [0])


# Costs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("plan", [MASKED, COMPLETE], ids=["masked", "complete"])
def test_macs_of_training_s_passes_are_exact(backbone: Any, plan: Plan) -> None:
    model = blueprint("dydit", backbone, {})
    assert model.macs(plan) == counted_macs(model, plan)
    assert model.macs(COMPLETE) == blueprint("dense", backbone, {}).macs()


def counted(model: Any, timestep: int, count: int) -> float:
    """All multiply-accumulates of a batch, as torch counts them where attention is made of plain products."""
    (x, t, y), plan = inputs(model.backbone, count), model.plan(timestep)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.full_like(t, timestep), y, plan)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("backbone", SIZES.values(), ids=SIZES)
def test_work_is_exactly_what_ran(backbone: Any) -> None:
    model: Any = network("dydit", backbone)
    total = sum(counted(model, timestep, count) for timestep, count in ((0, 3), (500, 1), (500, 4), (999, 2)))
    assert model.work.macs == total
    assert model.work.passes == 10
    assert model.work.images[[0, 500, 999]].tolist() == [3, 5, 2]
    assert model.work.macs < 10 * model.macs(COMPLETE)


def test_the_count_notices_a_token_too_many(model: Any) -> None:
    feed = model.blocks[2].feed
    model.blocks[2].feed = lambda tokens, places, *rest: feed(tokens, places[1:], *rest)
    assert counted(model, 500, 3) != model.work.macs


def test_work_is_the_ratio_of_the_masked_decisions(model: Any) -> None:
    x, t, y = inputs(tiny(), 6)
    t = torch.full_like(t, 500)
    model(x, t, y, model.plan(500))
    features = model.predict(x, t, y, MASKED, None)[1]
    whole = 6 * sum(block.attn.macs(64) + block.mlp.macs(64) for block in model.blocks)
    assert model.work.block_macs / whole == pytest.approx(float(model.flops_ratio(features).mean()), rel=1e-6)
    for name in DECISIONS:
        kept = features[name].mean(dim=(0, 2)).tolist()
        assert model.work.rates(name)[:, 500].tolist() == pytest.approx(kept, rel=1e-6)
        assert model.work.rates(name)[:, 499] != pytest.approx(kept)  # NaN: never met


def test_a_layer_s_work_by_hand(model: Any) -> None:
    """Width 48, 4 heads of 12, 4 groups of 48 channels, 64 tokens."""
    heads, channels = model.plan(500).selection[0]
    for block in model.blocks[1:]:
        block.token_selection.mlp_head[2].weight.zero_()
        block.token_selection.mlp_head[2].bias.fill_(-1.0)  # no MLP
    x, t, y = inputs(tiny(), 2)
    model(x, torch.full_like(t, 500), y, model.plan(500))
    on = round(2 * 64 * float(model.work.rates("tokens")[0, 500]))
    assert 0 < on < 128
    attention = sum(len(layer[0]) * 12 * (64 * 4 * 48 + 2 * 64 * 64) for layer in model.plan(500).selection)
    assert model.work.block_macs == 2 * attention + on * 2 * 48 * 48 * len(channels)
    assert model.work.rates("heads")[0, 500] == len(heads) / 4


def test_work_of_processes_adds_up(model: Any) -> None:
    parts = [CountedWork(8), CountedWork(8)]
    whole = CountedWork(8)
    for place, timestep in ((0, 3), (1, 3), (1, 4)):
        for work in (parts[place], whole):
            work.add_layer(2, timestep, 2, {"heads": 0.5, "channels": 0.25, "tokens": place}, 10)
            work.add_pass(timestep, 2, 7)
    parts[0].add(parts[1])
    assert (parts[0].macs, parts[0].block_macs, parts[0].passes) == (whole.macs, whole.block_macs, whole.passes) == (51, 30, 6)
    assert parts[0].rates("tokens")[2, 3] == whole.rates("tokens")[2, 3] == 0.5


def test_masked_passes_and_planned_costs_are_no_work(model: Any) -> None:
    model(*inputs(tiny()))
    model.mean_macs()
    assert (model.work.passes, model.work.macs) == (0, 0)
