"""What every method must hold, on backbones of every kind; each invariant with a planted bug that it must catch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DiT, Plan, checkpoint_blocks, create_model, method_class
from models.backbone import BACKBONES
from runtime.config import InputError
from runtime.networks import build, describe, described, method_name
from runtime.seeding import Keys, integers, normal
from tests.models.random_networks import SIZES, distance, inputs, network, randomized, tiny
from tests.models.random_networks import one_thread as one_thread

every_method = pytest.mark.parametrize("method", METHODS)
every_size = pytest.mark.parametrize("backbone", SIZES.values(), ids=SIZES)


@every_method
@every_size
def test_output_has_the_shape_of_the_latent_and_is_finite(method: str, backbone: Backbone) -> None:
    output = network(method, backbone)(*inputs(backbone))
    channels = backbone.in_channels * (2 if backbone.learn_sigma else 1)
    assert output.shape == (3, channels, *backbone.latent_size)
    assert output.isfinite().all()
    assert output.abs().max() > 0.1


@every_method
def test_each_input_matters(method: str) -> None:
    model, (x, t, y) = network(method, SIZES["rectangular"]), inputs(SIZES["rectangular"])
    output = model(x, t, y)
    for changed in ((x.flip(3), t, y), (x.flip(2), t, y), (x, (t + 300) % 1000, y), (x, t, (y + 1) % 11)):
        assert distance(model(*changed), output) > 1e-2


@every_method
def test_a_fresh_network_outputs_zero(method: str) -> None:
    assert not create_model(method, tiny())(*inputs(tiny())).any()


def drawn_for(model: DiT, count: int = 3) -> dict[str, Tensor]:
    """What training draws for a batch."""
    return model.draw(Keys(0, 0, torch.arange(count)))


# Gradients -----------------------------------------------------------------------------------------------------------


def without_gradient(model: DiT) -> list[str]:
    """Trainable parameters that a backward pass through the output does not reach."""
    draws = {**drawn_for(model), "label_drop": torch.tensor([False, True, False])}
    output = model(*inputs(model.backbone), draws=draws)
    (output * normal(Keys(2, 0, torch.arange(len(output))), "weights", output.shape[1:])).sum().backward()
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name, parameter in parameters if parameter.grad is None or not parameter.grad.any()]


@every_method
@every_size
def test_a_gradient_reaches_every_parameter(method: str, backbone: Backbone) -> None:
    assert without_gradient(network(method, backbone)) == []


@every_method
def test_the_gradient_test_catches_a_detached_block_and_a_fresh_network(method: str) -> None:
    model = network(method, tiny())
    model.blocks[4].mlp.fc2.register_forward_hook(lambda module, arguments, output: output.detach())
    cut_off = [name for name, _ in model.named_parameters() if name.startswith(("blocks.4.mlp.", "blocks.4.mlp_rate."))]
    assert without_gradient(model) == cut_off
    assert len(cut_off) >= 4
    fresh = create_model(method, tiny())
    reached = {name for name, _ in fresh.named_parameters()} - set(without_gradient(fresh))
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert reached == {"final_layer.linear.weight", "final_layer.linear.bias"} | frozen


# Gradient checkpointing ----------------------------------------------------------------------------------------------


def outputs_and_gradients(model: DiT) -> list[Tensor]:
    output = model(*inputs(model.backbone), draws=drawn_for(model))
    output.square().mean().backward()
    return [output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def same_with_checkpointing(model: DiT) -> bool:
    """Whether recomputed activations give the same output and the same gradients, bit for bit."""
    recomputed = copy.deepcopy(model)
    checkpoint_blocks(recomputed)
    stored = outputs_and_gradients(model)
    return all(torch.equal(a, b) for a, b in zip(stored, outputs_and_gradients(recomputed), strict=True))


@every_method
@pytest.mark.parametrize("size", ["debug", "odd grid"])
def test_checkpointing_changes_no_bit(method: str, size: str) -> None:
    assert same_with_checkpointing(network(method, SIZES[size]))


@every_method
def test_the_checkpointing_test_catches_randomness_inside_a_block(method: str) -> None:
    model = network(method, tiny())
    model.blocks[2].mlp.fc2.register_forward_hook(lambda module, arguments, output: F.dropout(output, 0.1))
    assert not same_with_checkpointing(model)


@every_method
def test_checkpointing_runs_every_block_again(method: str) -> None:
    calls: list[nn.Module] = []
    model = network(method, tiny())
    for block in model.blocks:
        block.mlp.fc2.register_forward_hook(lambda module, arguments, output: calls.append(module))
    checkpoint_blocks(model)
    outputs_and_gradients(model)
    assert [calls.count(block.mlp.fc2) for block in model.blocks] == [2] * 8


@every_method
def test_a_copy_of_a_checkpointed_network_runs_its_own_blocks(method: str) -> None:
    model = network(method, tiny())
    checkpoint_blocks(model)
    copied = randomized(copy.deepcopy(model), seed=5)
    assert distance(copied(*inputs(tiny())), model(*inputs(tiny()))) > 1e-2


# One sample does not see another -------------------------------------------------------------------------------------


def batch_dependence(model: DiT) -> float:
    """Largest relative change of a sample's output when its batch is reordered, or when it is alone."""
    x, t, y = inputs(model.backbone, count=4)
    together, order = model(x, t, y), torch.tensor([2, 0, 3, 1])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    return max(distance(alone, together), distance(model(x[order], t[order], y[order]), together[order]))


@every_method
@every_size
def test_samples_are_independent(method: str, backbone: Backbone) -> None:
    assert batch_dependence(network(method, backbone)) < 1e-5


@every_method
@pytest.mark.parametrize(
    "mixing", [lambda out: out + 1e-3 * out.mean(0), lambda out: out - out[:1] * 1e-3], ids=["mean", "first"]
)
def test_the_independence_test_catches_a_sum_over_the_batch(method: str, mixing: Callable[[Tensor], Tensor]) -> None:
    model = network(method, tiny())
    model.blocks[3].mlp.fc2.register_forward_hook(lambda module, arguments, output: mixing(output))
    assert batch_dependence(model) > 1e-5


# Randomness comes from outside ---------------------------------------------------------------------------------------


def draws_by_itself(model: DiT) -> bool:
    """Whether a training pass advances torch's generator."""
    model.train()
    before = torch.get_rng_state()
    x, t, y = inputs(model.backbone)
    model.training_forward(x, t, y, model.training_plans()[0][1], drawn_for(model))
    return not torch.equal(before, torch.get_rng_state())


@every_method
def test_networks_draw_nothing(method: str) -> None:
    assert not draws_by_itself(network(method, tiny()))


@every_method
def test_the_draws_test_catches_dropout(method: str) -> None:
    model = network(method, tiny())
    model.blocks[0].mlp.fc2.register_forward_hook(lambda module, arguments, output: F.dropout(output, 0.1))
    assert draws_by_itself(model)


@every_method
def test_label_drop_replaces_the_label_by_the_null_class(method: str) -> None:
    model, (x, t, _) = network(method, tiny()), inputs(tiny())
    y, drop = torch.tensor([1, 2, 3]), torch.tensor([False, True, False])
    draws, none = drawn_for(model), torch.zeros(3, dtype=torch.bool)
    dropped = model(x, t, y, draws={**draws, "label_drop": drop})
    assert torch.equal(dropped, model(x, t, torch.tensor([1, 10, 3]), draws={**draws, "label_drop": none}))
    assert distance(dropped, model(x, t, y, draws={**draws, "label_drop": none})) > 1e-2


@every_method
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_draws_are_named_by_sample_and_drop_the_asked_share(method: str, rate: float) -> None:
    model = create_model(method, tiny(label_drop=rate))
    index = torch.arange(20_000)
    drawn, some = model.draw(Keys(3, 7, index)), model.draw(Keys(3, 7, index[[17, 5, 17]]))
    for name, values in drawn.items():
        assert len(values) == len(index)
        assert torch.equal(values[[17, 5, 17]], some[name])
    assert drawn["label_drop"].dtype == torch.bool
    assert float(drawn["label_drop"].float().mean()) == pytest.approx(rate, abs=0.01)


@every_method
def test_training_forward_is_the_forward_pass(method: str) -> None:
    model, (x, t, y) = network(method, tiny()), inputs(tiny())
    draws = drawn_for(model)
    outputs, features = model.training_forward(x, t, y, model.training_plans()[0][1], draws)
    output, weight = outputs["denoising"]
    assert weight == 1.0
    assert torch.equal(output, model(x, t, y, draws=draws))
    assert all(loss.ndim == 0 for loss in model.extra_losses(features, 0).values())


# Plans ---------------------------------------------------------------------------------------------------------------


@every_method
def test_plans_are_hashable_and_name_the_default(method: str) -> None:
    model = network(method, tiny())
    assert len({model.plan(t).signature for t in (0, 999)}) >= 1
    conditional, unconditional = model.guidance_plans(500)
    assert conditional == model.plan(500)
    assert isinstance(unconditional, Plan)
    (x, t, y), plan = inputs(tiny()), model.training_plans()[0][1]
    assert torch.equal(model(x, t, y, plan), model(x, t, y))
    together = torch.full_like(t, 500)
    assert distance(model(x, together, y, model.plan(500)), model(x, together, y)) < 1e-5


# Building ------------------------------------------------------------------------------------------------------------


@every_method
@every_size
def test_a_description_through_json_gives_the_same_network(method: str, backbone: Backbone) -> None:
    model = network(method, backbone)
    plan = described(json.loads(json.dumps(describe(model, "DiT-T/2"))))
    assert (plan.backbone, plan.options, method_name(plan)) == (model.backbone, model.options, method)
    assert all(parameter.is_meta for parameter in plan.parameters())
    rebuilt = build(plan)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(*inputs(backbone)), model(*inputs(backbone)))


@every_method
def test_bfloat16_autocast_runs_and_stays_close(method: str) -> None:
    model, batch = network(method, tiny()), inputs(tiny())
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, stream: streams.append(stream[0].dtype))  # or of a tuple's first
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch)
    assert set(streams) == {torch.float32}  # the residual stream is never rounded, whatever the products are
    assert half.dtype == torch.float32
    assert 0 < distance(half.float(), model(*batch)) < 0.1


def test_names_of_methods_and_backbones() -> None:
    assert next(iter(METHODS)) == "dense"
    assert len(BACKBONES) == 26
    with pytest.raises(InputError, match=r"'sparsdit' is not known; did you mean 'sparsedit'\?$"):
        method_class("sparsdit")
    with pytest.raises(InputError, match=r"'DiT-XL2' is not known; did you mean 'DiT-XL/2'\?.*DiT-WIDTHxDEPTHxHEADS/PATCH"):
        Backbone.named("DiT-XL2", (32, 32))
    with pytest.raises(InputError, match="method sparsedit: unknown key 'densty'; did you mean 'density'"):
        create_model("sparsedit", tiny(), {"densty": 4})
    assert Backbone.named("DiT-96x8x4/1", (8, 8)).hidden_size == 96


@pytest.mark.parametrize(
    ("name", "latent_size", "sizes", "message"),
    [
        ("DiT-T/2", (15, 16), {}, "15 x 16 cannot be cut into patches of 2"),
        ("DiT-XL/8", (4, 4), {}, "4 x 4 cannot be cut into patches of 8"),
        ("DiT-T/2", (0, 16), {}, "0 x 16"),
        ("DiT-50x8x4/2", (8, 8), {}, "hidden size 50 must be a multiple of 4 and of the 4 heads"),
        ("DiT-48x8x5/2", (8, 8), {}, "hidden size 48 must be a multiple of 4 and of the 5 heads"),
        ("DiT-48x0x4/2", (8, 8), {}, "depth is 0; it must be at least 1"),
        ("DiT-48x8x0/2", (8, 8), {}, "num_heads is 0"),
        ("DiT-48x8x4/0", (8, 8), {}, "patch_size is 0"),
        ("DiT-T/2", (8, 8), {"in_channels": 0}, "in_channels is 0"),
        ("DiT-T/2", (8, 8), {"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_impossible_sizes_are_refused(name: str, latent_size: tuple[int, int], sizes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Backbone.named(name, latent_size, **sizes)


# A training run in small ---------------------------------------------------------------------------------------------

GOLDEN_LOSSES: Mapping[str, list[float]] = {
    "dense": [2.139690, 1.806892, 1.652509, 1.381263],
    "sparsedit": [2.168479, 1.745558, 1.503497, 1.386658],
    "dydit": [4.251235, 3.501375, 3.249253, 2.904236],
    "sprint": [2.150599, 1.801249, 1.622606, 1.456010],
}
"""Losses of `train_shortly`, recorded on the CPU with torch 2.13."""


def train_shortly(method: str, seed: int = 0, loss_step: Callable[[DiT], Any] = lambda model: None) -> list[float]:
    """Four optimizer steps on keyed data. -> their losses"""
    model, objective = network(method, tiny()), EpsilonObjective(NoiseSchedule.linear(), None, learned_variance=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(4):
        keys = Keys(seed, step, torch.arange(8))
        noised = objective.noised(0.5 * normal(keys, "latent", (4, 16, 16)), keys, range(1000))
        y, plan = integers(keys, "label", 10), model.training_plans()[0][1]
        outputs, features = model.training_forward(noised.x_t, noised.t, y, plan, model.draw(keys))
        losses_of = [weight * objective.losses(output, noised)["loss"].mean() for output, weight in outputs.values()]
        loss = torch.stack([*losses_of, *model.extra_losses(features, 1000).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        loss_step(model)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@every_method
def test_losses_of_a_seeded_run_are_the_recorded_ones(method: str) -> None:
    assert train_shortly(method) == pytest.approx(GOLDEN_LOSSES[method], rel=1e-3)


@every_method
@pytest.mark.parametrize("bug", ["another seed", "one block's gradient lost"])
def test_the_recorded_losses_catch(method: str, bug: str) -> None:
    if bug == "another seed":
        losses = train_shortly(method, seed=1)
    else:
        losses = train_shortly(method, loss_step=lambda model: model.blocks[5].zero_grad())
    assert losses != pytest.approx(GOLDEN_LOSSES[method], rel=1e-3)
