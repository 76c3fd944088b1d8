"""Released SiT weights as a dense backbone of ours: the time, the velocity and the variance outputs that differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Backbone, DiT
from models.layers import TimestepEmbedder, timestep_frequencies
from models.weights import export, from_sit, has_variance, without_variance
from runtime.checkpoint import Weights, read_weights
from runtime.config import InputError
from runtime.export import as_released
from runtime.networks import as_ours, blueprint, build_with, fit_weights, recognized
from tests.models.random_networks import distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread
from tests.models.weight_files import WRITERS, Writer

NAME = "SiT-T/2"
FLOW: dict[str, Any] = {"learn_sigma": False, "objective": "flow", "time_scale": 1.0}


def released(in_channels: int = 4, model: str = "DiT-T/2") -> DiT:
    """A SiT as its authors train it: DiT's network with variance outputs, given its own time, from noise (0) to data (1)."""
    return network("dense", tiny(model, in_channels=in_channels, time_scale=1.0))


def sit(theirs: DiT, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """SiT's velocity of x (N, C, H, W) at `time` (N,) from noise (0) to data (1): the first half of each place's channels."""
    # Our timestep is 1000 times what a network of time_scale 1 embeds.
    return theirs(x, 1000 * time, y).chunk(2, dim=1)[0]


def converted(theirs: DiT, turn: Any = from_sit, method: str = "dense") -> DiT:
    sizes = theirs.backbone
    named = tiny(f"DiT-48x8x4/{sizes.patch_size}", in_channels=sizes.in_channels, **FLOW)
    return build_with(blueprint(method, named, {}), Weights(turn(theirs.state_dict()), "file"))[0].to(sizes_type(theirs))


def sizes_type(model: DiT) -> torch.dtype:
    return model.x_embedder.proj.weight.dtype


def conversion_error(theirs: DiT, ours: DiT) -> float:
    x, _, y = inputs(theirs.backbone)
    time = torch.tensor([0.03, 0.4, 0.97], dtype=sizes_type(theirs))
    x = x.to(sizes_type(theirs))
    return distance(ours(x, 1000 * time, y), -sit(theirs, x, 1 - time, y))


@torch.no_grad()
@pytest.mark.parametrize(("channels", "model"), [(4, "DiT-T/2"), (3, "DiT-T/2"), (4, "DiT-48x8x4/4")])
def test_a_converted_sit_is_the_sit_at_the_other_time_with_the_other_sign(channels: int, model: str) -> None:
    theirs = released(channels, model)
    assert conversion_error(theirs, converted(theirs)) < 2e-5


def sign_kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    turned = from_sit(state)
    return turned | {name: -turned[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}


def time_kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return from_sit(state) | {"t_embedder.mlp.0.weight": state["t_embedder.mlp.0.weight"]}


def first_half_of_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    return from_sit(state) | {name: -state[name][: len(state[name]) // 2] for name in names}


@torch.no_grad()
@pytest.mark.parametrize("bug", [sign_kept, time_kept, first_half_of_rows])
def test_a_wrong_conversion_is_caught(bug: Any) -> None:
    theirs = released()
    assert conversion_error(theirs, converted(theirs, bug)) > 1e-3


# In double precision ---------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinusoids in double precision of the same frequencies, so that nothing is left but what the conversion itself does."""

    def sinusoids(t: Tensor) -> Tensor:
        angles = t[:, None].double() * timestep_frequencies().double()  # (N, 128)
        return torch.cat((angles.cos(), angles.sin()), dim=1)  # (N, 256)

    monkeypatch.setattr(TimestepEmbedder, "sinusoids", staticmethod(sinusoids))


def in_double(state: Mapping[str, Tensor], backbone: Backbone) -> DiT:
    model = network("dense", backbone).double()
    model.load_state_dict(state)
    return model


@torch.no_grad()
@pytest.mark.usefixtures("exact_times")
@pytest.mark.parametrize(("channels", "model"), [(4, "DiT-T/2"), (3, "DiT-48x8x4/4")])
def test_the_conversion_is_exact(channels: int, model: str) -> None:
    theirs = released(channels, model).double()
    ours = tiny(model, in_channels=channels, **FLOW)
    converted_state = from_sit(theirs.state_dict())
    assert {value.dtype for value in converted_state.values()} == {torch.float64}
    assert conversion_error(theirs, in_double(converted_state, ours)) < 1e-12
    # The known-bad variant: converted, and so rounded, in single precision.
    rounded = from_sit({name: value.float() for name, value in theirs.state_dict().items()})
    assert conversion_error(theirs, in_double(rounded, ours)) > 1e-9


@torch.no_grad()
def test_the_conversion_is_its_own_inverse() -> None:
    state = {key: value.double() for key, value in network("dense", tiny(**FLOW)).state_dict().items()}
    twice = from_sit(from_sit(state))
    assert set(twice) == set(state)
    assert max(float((twice[key] - state[key]).abs().max()) for key in state) < 1e-6
    with_variance = released().state_dict()
    assert has_variance({key: tuple(value.shape) for key, value in with_variance.items()})
    once = from_sit(with_variance)
    assert torch.equal(from_sit(without_variance(with_variance))["final_layer.linear.weight"],
                       once["final_layer.linear.weight"])  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("write", WRITERS)
def test_files_named_sit_load_converted(write: Writer, tmp_path: Path) -> None:
    theirs = released()
    weights = as_ours(read_weights(str(write(dict(theirs.state_dict()), tmp_path))), NAME)
    assert "SiT: time and velocity reversed" in weights.origin
    plan = recognized(weights, NAME, (16, 16))
    assert (plan.backbone.objective, plan.backbone.time_scale, plan.backbone.learn_sigma) == ("flow", 1.0, False)
    ours, loading = build_with(plan, weights)
    assert loading.new == ()
    assert conversion_error(theirs, ours) < 2e-5
    back = as_released(ours, NAME)
    first = back["t_embedder.mlp.0.weight"] - theirs.state_dict()["t_embedder.mlp.0.weight"]
    assert first.abs().max() < 1e-6
    assert set(back) == set(theirs.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsedit", "dydit"])
def test_other_methods_start_from_a_sit(method: str) -> None:
    theirs = released()
    ours = converted(theirs, method=method)
    expected = from_sit(theirs.state_dict())
    for key in ("t_embedder.mlp.0.weight", "final_layer.linear.weight"):
        assert torch.equal(ours.state_dict()[key], expected[key])


def test_what_is_no_sit_comes_back_unchanged() -> None:
    state = released().state_dict()
    for weights, model in (
        (Weights(state, "file"), "DiT-T/2"),
        (Weights(state, "file", {"step": 1}), NAME),
        (Weights(network("sprint", tiny(**FLOW)).state_dict(), "file"), NAME),
    ):
        assert as_ours(weights, model) is weights


def test_what_sit_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="SiT embeds the flow time itself; leave out --time-scale 1000"):
        as_ours(Weights(released().state_dict(), "file"), NAME, 1000.0)
    with pytest.raises(InputError, match="--objective flow predicts no variance"):
        Backbone.named("SiT-S/2", (16, 16), learn_sigma=True)
    with pytest.raises(InputError, match="SiT-S/2 is a backbone of --objective flow; for ddpm give --model DiT-S/2"):
        Backbone.named("SiT-S/2", (16, 16), objective="ddpm")
    with pytest.raises(InputError, match="SiT-S/2 is a backbone of --objective flow"):
        recognized(as_ours(Weights(released().state_dict(), "file"), NAME), "SiT-S/2", (16, 16), "ddpm")


@pytest.mark.parametrize("key", ["t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"])
def test_a_sit_that_is_not_whole_is_refused_by_its_keys(key: str) -> None:
    state = {name: value for name, value in released().state_dict().items() if name != key}
    plan = blueprint("dense", tiny(learn_sigma=False, objective="flow", time_scale=1.0), {})
    with pytest.raises(InputError, match=f"missing: {key}"):
        fit_weights(as_ours(Weights(state, "file"), NAME), plan)
    odd = {**released().state_dict(), "t_embedder.mlp.0.weight": torch.zeros(48, 255)}
    with pytest.raises(InputError, match=r"of another shape: .*t_embedder\.mlp\.0\.weight"):
        fit_weights(as_ours(Weights(odd, "file"), NAME), plan)


def test_half_precision_is_not_rounded_twice() -> None:
    state = {key: value.half() for key, value in released().state_dict().items()}
    converted = as_ours(Weights(state, "file"), NAME).state["t_embedder.mlp.0.weight"]
    exact = as_ours(Weights({key: value.float() for key, value in state.items()}, "file"), NAME).state
    assert torch.equal(converted, exact["t_embedder.mlp.0.weight"])


@torch.no_grad()
@pytest.mark.parametrize(("channels", "model"), [(4, "DiT-T/2"), (3, "DiT-T/2"), (4, "DiT-48x8x4/4")])
def test_a_ddpm_network_starts_a_flow_one_without_its_variance(channels: int, model: str) -> None:
    theirs = network("dense", tiny(model, in_channels=channels))
    plan = blueprint("dense", tiny(model, in_channels=channels, learn_sigma=False, objective="flow"), {})
    ours, loading = build_with(plan, Weights(theirs.state_dict(), "file"))
    assert loading.notes == ("the variance outputs are left out",)
    batch = inputs(theirs.backbone)
    assert distance(ours(*batch), theirs(*batch)[:, :channels]) < 1e-5


@torch.no_grad()
def test_sprint_under_ddpm_with_variance_goes_to_its_layout_and_back() -> None:
    original = network("sprint", tiny())
    state = export(original, original.released_layout)
    _, loading = fit_weights(Weights(state, "file"), blueprint("sprint", tiny(), {}))
    assert loading.new == loading.notes == ()
    back, _ = build_with(blueprint("sprint", tiny(), {}), Weights(state, "file"))
    assert torch.equal(back(*inputs(tiny())), original(*inputs(tiny())))
