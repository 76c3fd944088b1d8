"""DyDiT: what is sliced and gathered gives the numbers of what is masked, whatever is on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import Backbone, create_model
from models.dydit import DECISIONS, MASKED
from models.dynamic_block import DynamicBlock, decide, places_on
from runtime.config import InputError
from runtime.seeding import Keys
from tests.models.random_networks import SIZES, distance, inputs, network, randomized, tiny
from tests.models.random_networks import one_thread as one_thread

EXACT = 1e-5
every_size = pytest.mark.parametrize("backbone", SIZES.values(), ids=SIZES)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def dynamic(backbone: Backbone) -> Any:
    """A network of which some of everything is on at timestep 500."""
    model: Any = network("dydit", backbone)
    features = decisions(model)
    for name in DECISIONS:
        assert 0.05 < float(features[name].mean()) < 0.98, name
    return model


def decisions(model: Any, timestep: int = 500, count: int = 3) -> dict[str, Tensor]:
    x, t, y = inputs(model.backbone, count)
    return model.predict(x, torch.full_like(t, timestep), y, MASKED, None)[1]


def both_ways(model: Any, timestep: int = 500, count: int = 3) -> tuple[Tensor, Tensor]:
    """Gathered, masked."""
    x, t, y = inputs(model.backbone, count)
    t = torch.full_like(t, timestep)
    return model(x, t, y, model.plan(timestep)), model(x, t, y, MASKED)


# Gathered and masked -------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("count", [1, 3])
def test_gathered_is_masked(backbone: Backbone, count: int) -> None:
    model = dynamic(backbone)
    for timestep in (0, 500, 999):
        assert distance(*both_ways(model, timestep, count)) < EXACT


def test_gathered_is_masked_in_a_guided_batch() -> None:
    """One timestep and few labels, handed out by index; both halves share the plan."""
    model = dynamic(tiny())
    x, _, _ = inputs(model.backbone, 8)
    labels, index = torch.tensor([3, 1, 10]), torch.tensor([0, 1, 0, 1, 2, 2, 2, 2])
    ours = model(x, torch.tensor([500]), labels, model.plan(500), index=index)
    assert distance(ours, model(x, torch.full((8,), 500), labels[index], MASKED)) < EXACT
    assert distance(ours, model(x, torch.full((8,), 500), labels[index.flip(0)], MASKED)) > 100 * EXACT
    assert model.guidance_plans(500)[0] is model.guidance_plans(500)[1]


def routers(model: Any, *names: str) -> list[torch.nn.Linear]:
    return [block.get_submodule(name) for block in model.blocks for name in names]


WIDTH, TOKENS = ("attn_rate.router", "mlp_rate.router"), ("token_selection.mlp_head.2",)


def set_all(model: Any, names: tuple[str, ...], logit: float) -> None:
    for router in routers(model, *names):
        router.weight.zero_()
        router.bias.fill_(logit)


def leave_one_token(model: Any) -> None:
    """Of the whole batch, in every layer, by biases that lie between the two largest logits."""
    for block in model.blocks:
        seen: list[Tensor] = []
        handle = block.token_selection.register_forward_hook(lambda module, given, logits, seen=seen: seen.append(logits))
        decisions(model)
        handle.remove()
        largest = seen[0].flatten().topk(2).values
        block.token_selection.mlp_head[2].bias.sub_(largest.mean())


PLANTED: dict[str, tuple[Callable[[Any], None], str, float]] = {
    "no token": (lambda model: set_all(model, TOKENS, -1.0), "tokens", 0.0),
    "every token": (lambda model: set_all(model, TOKENS, 1.0), "tokens", 1.0),
    "one token": (leave_one_token, "tokens", 1 / (3 * 64)),
    "one head": (lambda model: set_all(model, WIDTH[:1], -1.0), "heads", 1 / 4),
    "one group": (lambda model: set_all(model, WIDTH[1:], -1.0), "channels", 1 / 4),
    "one head and one group": (lambda model: set_all(model, WIDTH, -1.0), "heads", 1 / 4),
    "every head and group": (lambda model: set_all(model, WIDTH, 1.0), "heads", 1.0),
    "everything": (lambda model: set_all(model, WIDTH + TOKENS, 1.0), "tokens", 1.0),
    "nothing": (lambda model: set_all(model, WIDTH + TOKENS, -1.0), "tokens", 0.0),
}


@pytest.mark.parametrize(("plant", "name", "share"), PLANTED.values(), ids=PLANTED)
def test_gathered_is_masked_for_decisions_of_every_kind(plant: Callable[[Any], None], name: str, share: float) -> None:
    model = dynamic(tiny())
    plant(model)
    assert decisions(model)[name].mean(dim=(0, 2)).tolist() == pytest.approx([share] * 8)
    assert distance(*both_ways(model)) < EXACT


def all_places(logits: Tensor) -> Tensor:
    return torch.arange(logits.numel())


def mirrored_places(logits: Tensor) -> Tensor:
    return logits.numel() - 1 - places_on(logits)


@pytest.mark.parametrize("wrong", [all_places, mirrored_places])
def test_other_tokens_are_caught(wrong: Callable[[Tensor], Tensor]) -> None:
    model = dynamic(tiny())
    model.blocks[3].select = wrong
    assert distance(*both_ways(model)) > 100 * EXACT


def test_another_timestep_s_plan_is_caught() -> None:
    model = dynamic(tiny())
    x, t, y = inputs(model.backbone)
    other = next(model.plan(t) for t in range(500, 1000) if model.plan(t) != model.plan(500))
    t = torch.full_like(t, 500)
    assert distance(model(x, t, y, other), model(x, t, y, MASKED)) > 100 * EXACT


def test_modulation_of_another_sample_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dynamic(tiny())
    for block in model.blocks:
        feed = block.feed
        monkeypatch.setattr(block, "feed", lambda *given, feed=feed: feed(*given[:-1], given[-1].flip(0)))
    assert distance(*both_ways(model)) > 100 * EXACT


def test_a_timestep_mixes_with_others_only_masked() -> None:
    """Without a plan every sample decides by its own timestep."""
    model, (x, t, y) = dynamic(tiny()), inputs(tiny())
    alone = [model(x[i : i + 1], t[i : i + 1], y[i : i + 1], model.plan(int(t[i]))) for i in range(3)]
    assert distance(torch.cat(alone), model(x, t, y)) < EXACT


@every_size
def test_a_copy_runs_alone(backbone: Backbone) -> None:
    """Slices and plans of the one are none of the other's."""
    model = dynamic(backbone)
    before = both_ways(model)[0]
    copied = copy.deepcopy(model)
    assert torch.equal(both_ways(copied)[0], before)
    for parameter in copied.parameters():
        parameter.mul_(1.5)
    assert distance(*both_ways(copied)) < EXACT
    assert distance(both_ways(copied)[0], before) > 100 * EXACT
    assert torch.equal(both_ways(model)[0], before)


# Decisions -----------------------------------------------------------------------------------------------------------


def test_under_noise_a_logit_s_sigmoid_is_the_probability() -> None:
    model = create_model("dydit", tiny())
    noise = model.draw(Keys(0, 0, torch.arange(500)))["tokens noise"].flatten()
    for logit in (-3.0, 0.0, 1.0, 4.0):
        on = decide(torch.full_like(noise, logit), noise)
        assert set(on.unique().tolist()) == {0.0, 1.0}
        assert float(on.mean()) == pytest.approx(float(torch.tensor(logit).sigmoid()), abs=0.005)


def test_the_gradient_is_that_of_the_relaxed_decision() -> None:
    logits, noise = torch.linspace(-9, 9, 7, requires_grad=True), torch.linspace(4, -5, 7)
    with torch.enable_grad():
        relaxed = torch.sigmoid((logits + noise) / 5)  # the paper's temperature
        (expected,) = torch.autograd.grad(relaxed.sum(), logits)
        (ours,) = torch.autograd.grad(decide(logits, noise).sum(), logits)
    assert torch.equal(ours, expected)
    assert ours.abs().min() > 0


def test_a_channel_s_gradient_is_taken_before_the_activation() -> None:
    """Masked after it, the outputs were the same and the routers learned something else of groups that are off."""
    block, x = randomized(DynamicBlock(16, 2, 4.0)), torch.randn(3, 5, 16)
    masks = torch.tensor([[1.0, 0.0]]).repeat(3, 1).requires_grad_()
    with torch.enable_grad():
        (ours,) = torch.autograd.grad(block.mlp.masked(x, masks).sum(), masks)
    inner = block.mlp.fc1(x)  # (N, T, 4 D)
    slope = torch.full_like(inner, 0.5)  # of GELU at 0
    slope[..., :32] = torch.func.vmap(torch.func.grad(lambda h: F.gelu(h, approximate="tanh")))(inner[..., :32].flatten()).view(
        3, 5, 32
    )
    expected = (inner * slope * block.mlp.fc2.weight.sum(0)).unflatten(2, (2, 32)).sum((1, 3))  # (N, groups)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_noise_is_another_number_for_every_decision() -> None:
    drawn = create_model("dydit", tiny()).draw(Keys(0, 0, torch.arange(4)))
    values = torch.cat([drawn[f"{name} noise"].flatten() for name in DECISIONS])
    assert len(values) == 4 * 8 * (3 + 3 + 64)
    assert len(values.unique()) > 0.99 * len(values)  # of 2^24 numbers a few may meet
    other = create_model("dydit", tiny()).draw(Keys(0, 1, torch.arange(4)))
    assert not torch.equal(drawn["heads noise"], other["heads noise"])
    assert drawn["complete label_drop"].dtype == torch.bool


def test_complete_labels_are_dropped_by_their_own_draw() -> None:
    drawn = create_model("dydit", tiny(label_drop=0.5)).draw(Keys(0, 0, torch.arange(200)))
    assert 0.3 < float((drawn["label_drop"] == drawn["complete label_drop"]).float().mean()) < 0.7


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("DiT-48x8x1/2", {}, "a network of one head has none to switch off"),
        ("DiT-T/2", {"flops_target": 0.0}, "--flops-target is 0.0; it must be above 0 and at most 1"),
        ("DiT-T/2", {"flops_target": 1.1}, "--flops-target is 1.1"),
        ("DiT-48x8x2/2", {"flops_target": 0.1}, "one of 2 heads in every layer is always on, which is 0.227 already"),
        ("DiT-T/2", {"target_warmup": -1}, "--target-warmup is -1; it must be at least 0"),
        ("DiT-T/2", {"complete_steps": -5}, "--complete-steps is -5; it must be at least 0"),
    ],
)
def test_impossible_options_are_refused(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model("dydit", tiny(model), options)


def test_without_a_warm_up_the_target_holds_from_the_first_step() -> None:
    model: Any = create_model("dydit", tiny(), {"target_warmup": 0, "flops_target": 0.7})
    assert [float(model.target_at(step)) for step in (0, 1, 500)] == pytest.approx([0.7] * 3)
    ramp: Any = create_model("dydit", tiny(), {"target_warmup": 1000, "flops_target": 0.5})
    steps, targets = (0, 99, 100, 500, 1000, 5000), [1, 1, 0.95, 0.75, 0.5, 0.5]
    assert [float(ramp.target_at(step)) for step in steps] == pytest.approx(targets)
