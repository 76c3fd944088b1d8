from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion.guidance as guidance
from diffusion.guidance import Interval, combine, guided, label_rows
from diffusion.samplers import SAMPLERS, Denoise
from runtime.config import InputError

NULL = 10


class Recorder:
    """A network whose output depends on every input, and the calls made to it: timesteps, each sample's label, plan."""

    def __init__(self, learned_variance: bool = True) -> None:
        self.learned_variance = learned_variance
        self.calls: list[tuple[list[float], list[int], Any]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, plan: Any, index: Tensor | None) -> Tensor:
        assert len(t) == 1
        y = y if index is None else y[index]
        assert len(y) == len(x)
        self.calls.append((t.tolist(), y.tolist(), plan))
        epsilon = torch.tanh(x + 0.1 * y.reshape(-1, 1, 1, 1)) + 0.001 * t.reshape(-1, 1, 1, 1)
        return torch.cat((epsilon, 0.3 * torch.sin(epsilon)), dim=1) if self.learned_variance else epsilon


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([1, 2, 3])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tensor([700])
    return Recorder()(x, t, LABELS, None, None), Recorder()(x, t, torch.full((3,), NULL), None, None)


@pytest.mark.parametrize(("channels", "count"), [(3, 3), (1, 1), (None, 4), (4, 4), (9, 4)])
def test_the_chosen_channels_are_guided_and_no_others(x, channels, count):
    recorder = Recorder()
    result = guided(recorder, LABELS, NULL, 4.0, channels)(x, 700)
    c, u = halves(x)
    assert result.shape == (3, 8, 5, 5)
    torch.testing.assert_close(result[:, :count], (u + 4 * (c - u))[:, :count])
    torch.testing.assert_close(result[:, count:], c[:, count:], rtol=0, atol=0)
    assert (c - u).abs().mean() > 0.1
    assert recorder.calls == [([700], [1, 2, 3, 10, 10, 10], None)]


def test_three_channels_are_the_default(x):
    default = guided(Recorder(), LABELS, NULL, 4.0)(x, 700)
    torch.testing.assert_close(default, guided(Recorder(), LABELS, NULL, 4.0, 3)(x, 700), rtol=0, atol=0)
    assert not torch.equal(default, guided(Recorder(), LABELS, NULL, 4.0, None)(x, 700))


def test_variance_of_few_channel_latents_is_not_guided():
    """With one latent channel, "the first three channels" of an output would reach into the variance."""
    c, u = torch.ones(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    result = combine(c, u, 4.0, epsilon_channels=1, channels=3)
    assert result[:, 0].unique().item() == 4
    assert result[:, 1].unique().item() == 1


def test_networks_without_variance_channels(x):
    result = guided(Recorder(learned_variance=False), LABELS, NULL, 2.0)(x, 5)
    assert result.shape == x.shape


def test_scale_1_makes_no_unconditional_pass(x):
    recorder = Recorder()
    result = guided(recorder, LABELS, NULL, 1.0, plans=lambda t: ("sparse", "dense"))(x, 700)
    torch.testing.assert_close(result, halves(x)[0], rtol=0, atol=0)
    assert recorder.calls == [([700], [1, 2, 3], "sparse")]


def test_scale_0_is_unconditional(x):
    result = guided(Recorder(), LABELS, NULL, 0.0, None)(x, 700)
    torch.testing.assert_close(result[:, :4], halves(x)[1][:, :4])


def test_equal_plans_share_one_batch(x):
    recorder = Recorder()
    guided(recorder, LABELS, NULL, 4.0, plans=lambda t: (("grid", t), ("grid", t)))(x, 700)
    assert recorder.calls == [([700], [1, 2, 3, 10, 10, 10], ("grid", 700))]


def test_different_plans_make_two_calls_with_the_same_result(x):
    recorder = Recorder()
    result = guided(recorder, LABELS, NULL, 4.0, plans=lambda t: ("full", "short"))(x, 700)
    assert recorder.calls == [([700], [1, 2, 3], "full"), ([700], [10] * 3, "short")]
    torch.testing.assert_close(result, guided(Recorder(), LABELS, NULL, 4.0)(x, 700))


def test_half_precision_outputs_are_combined_in_float32(x):
    c, u = (half.bfloat16() for half in halves(x))
    result = combine(c, u, 4.0, 4, 3)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, combine(c.float(), u.float(), 4.0, 4, 3), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [0, -1])
def test_unusable_channels_are_refused(channels):
    with pytest.raises(InputError, match="at least 1 channel"):
        guided(Recorder(), LABELS, NULL, 4.0, channels)


# The interval --------------------------------------------------------------------------------------------------------

DDPM_CALLS: list[tuple[float, int]] = [
    (999, 3), (888, 3), (777, 3), (666, 6), (555, 6), (444, 6), (333, 6), (222, 6), (111, 3), (0, 3),
]  # fmt: skip
"""Timestep and size of the passes of 10 steps with guidance from 0.2 to 0.7."""
EULER_CALLS: list[tuple[float, int]] = [
    (1000, 3), (900, 3), (800, 3), (700, 6), (600, 6), (500, 6), (400, 6), (300, 6), (200, 6), (100, 3),
]  # fmt: skip
CALLS: dict[str, list[tuple[float, int]]] = {
    "ddpm": DDPM_CALLS,
    "ddim": DDPM_CALLS,
    "euler": EULER_CALLS,
    "heun": [*(one for one in EULER_CALLS for _ in range(2)), (0, 3)][1:],  # the end of a step is where the next begins
    "euler-maruyama": [
        (1000, 3), (893 + 1 / 3, 3), (786 + 2 / 3, 3), (680, 6), (573 + 1 / 3, 6), (466 + 2 / 3, 6), (360, 6), (253 + 1 / 3, 6),
        (146 + 2 / 3, 3), (40, 3),
    ],
}  # fmt: skip


def run(name: str, denoise: Denoise, x: Tensor) -> Tensor:
    """Latents of 10 steps of a sampler, which adds the same noise each time."""
    return SAMPLERS[name].run(denoise, x, "10", lambda step: torch.cos((step + 1) * x))


def network(name: str) -> Recorder:
    return Recorder(learned_variance=SAMPLERS[name].objective == "ddpm")


def sampled(name: str, x: Tensor, interval: Interval | None, recorder: Recorder, plans: guidance.Plans | None = None) -> Tensor:
    return run(name, guided(recorder, LABELS, NULL, 4.0, plans=plans, interval=interval), x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_outside_the_interval_make_no_unconditional_pass(name: str, x: Tensor) -> None:
    recorder = network(name)
    sampled(name, x, Interval(0.2, 0.7), recorder)
    timesteps, sizes = zip(*CALLS[name], strict=True)
    assert [t for (t,), _, _ in recorder.calls] == pytest.approx(timesteps)
    assert tuple(len(labels) for _, labels, _ in recorder.calls) == sizes


def test_the_edges_of_the_interval_are_exact_where_the_steps_of_a_flow_meet_them() -> None:
    """Of 10, 20, 50 steps, whose ends are the multiples of 0.1, 0.05, 0.02; half a millionth beside them is outside."""
    for steps in ("10", "20", "50"):
        timesteps = SAMPLERS["euler"].timesteps(steps)
        for edge in range(1, int(steps)):
            low = round(edge / int(steps), 2)  # as a user writes it: 0.3
            assert sum(Interval(0, low).holds(t) for t in timesteps) == edge
            assert sum(Interval(low, 1).holds(t) for t in timesteps) == int(steps) - edge + 1
            assert sum(Interval(0, low - 5e-7).holds(t) for t in timesteps) == edge - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_interval_a_step_is_that_of_scale_1_and_inside_the_guided_one(name: str, x: Tensor) -> None:
    def by_hand(x: Tensor, timestep: float) -> Tensor:
        scale = 4.0 if 200 <= timestep <= 700 else 1.0
        return guided(network(name), LABELS, NULL, scale)(x, timestep)

    expected = run(name, by_hand, x)
    assert torch.equal(sampled(name, x, Interval(0.2, 0.7), network(name)), expected)
    assert not torch.equal(sampled(name, x, None, network(name)), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_whole_interval_is_none(name: str, x: Tensor) -> None:
    assert torch.equal(sampled(name, x, Interval(0.0, 1.0), network(name)), sampled(name, x, None, network(name)))


def test_the_interval_with_different_plans(x: Tensor) -> None:
    recorder = Recorder()
    sampled("ddim", x, Interval(0.4, 0.5), recorder, lambda t: (("full", t), ("short", t)))
    assert [plan for _, _, plan in recorder.calls if plan[0] == "short"] == [("short", 444)]
    assert len(recorder.calls) == 11


# Path-drop -----------------------------------------------------------------------------------------------------------


class Planned:
    """What a network says of its passes; `cheap`: whether it has a cheap path."""

    def __init__(self, cheap: bool = True) -> None:
        self.cheap = cheap

    def plan(self, t: int) -> tuple[str, int]:
        assert t in range(1000)
        return "full", t

    def guidance_plans(self, t: int) -> tuple[tuple[str, int], tuple[str, int]]:
        return self.plan(t), self.plan(t)

    def cheap_plan(self, t: int) -> tuple[str, int] | None:
        return ("cheap", t) if self.cheap else None


@pytest.mark.parametrize("name", SAMPLERS)
def test_path_drop_takes_the_cheap_path_for_the_unconditional_half_alone(name: str, x: Tensor) -> None:
    recorder = network(name)
    sampled(name, x, None, recorder, guidance.GUIDANCE["path-drop"](Planned()))
    asked = SAMPLERS[name].timesteps("10")
    assert len(recorder.calls) == 2 * len(asked)
    for t, whole, cheap in zip(asked, recorder.calls[::2], recorder.calls[1::2], strict=True):
        assert whole == ([pytest.approx(t)], [1, 2, 3], ("full", min(int(t), 999)))
        assert cheap == ([pytest.approx(t)], [NULL] * 3, ("cheap", min(int(t), 999)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_path_drop_outside_the_interval_makes_no_cheap_pass(name: str, x: Tensor) -> None:
    recorder = network(name)
    sampled(name, x, Interval(0.2, 0.7), recorder, guidance.GUIDANCE["path-drop"](Planned()))
    cheap = [t for (t,), _, plan in recorder.calls if plan[0] == "cheap"]
    assert cheap == pytest.approx([t for t, size in CALLS[name] if size == 6])
    assert len(recorder.calls) == len(CALLS[name]) + len(cheap)


def test_path_drop_without_guidance_makes_no_cheap_pass(x: Tensor) -> None:
    recorder = Recorder()
    guided(recorder, LABELS, NULL, 1.0, plans=guidance.GUIDANCE["path-drop"](Planned()))(x, 700)
    assert recorder.calls == [([700], [1, 2, 3], ("full", 700))]


def test_the_cheap_half_is_what_guidance_leads_away_from(x: Tensor) -> None:
    """Known-bad variant: the halves' plans in the other order."""

    def predict(x: Tensor, t: Tensor, y: Tensor, plan: tuple[str, int], index: Tensor | None) -> Tensor:
        return torch.full_like(x, 5.0 if plan[0] == "full" else 2.0)

    plans = guidance.GUIDANCE["path-drop"](Planned())
    assert guided(predict, LABELS, NULL, 3.0, None, plans)(x, 700).unique().tolist() == [2 + 3 * (5 - 2)]
    assert guided(predict, LABELS, NULL, 3.0, None, lambda t: plans(t)[::-1])(x, 700).unique().tolist() == [5 + 3 * (2 - 5)]


def test_path_drop_needs_a_cheap_path() -> None:
    assert guidance.GUIDANCE["classifier-free"](Planned(cheap=False))(3) == (("full", 3), ("full", 3))
    with pytest.raises(InputError, match=r"--guidance path-drop needs a network with a cheap path.*; leave the flag out\."):
        guidance.GUIDANCE["path-drop"](Planned(cheap=False))


@pytest.mark.parametrize("t", [1000.0, 680.0, 40.0, 0.5])
def test_guided_velocities_are_guided_drifts(t: float, x: Tensor) -> None:
    """The published SDE mixes the halves' drifts; the drift v - t score is affine in v, and guidance an affine combination."""
    c, u = (half[:, :4].double() for half in halves(x))
    time, x = t / 1000, x.double()

    def drift(v: Tensor) -> Tensor:
        return v - time * (-(1 - time) * v - x) / (time**2 + (1 - time) * time)

    torch.testing.assert_close(drift(u + 3 * (c - u)), drift(u) + 3 * (drift(c) - drift(u)))


def test_both_ends_of_the_interval_are_inside() -> None:
    interval = Interval.of((0.25, 0.75))
    assert [t for t in range(1000) if interval.holds(t)] == list(range(250, 751))
    assert [t for t in range(1000) if Interval.of(None).holds(t)] == list(range(1000))
    assert [t for t in range(1000) if Interval.of((0.3, 0.3)).holds(t)] == [300]


@pytest.mark.parametrize("bounds", [(0.7, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5), (0.1, float("nan"))])
def test_impossible_intervals_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"--guidance-interval is .*; give LOW HIGH with 0 <= LOW <= HIGH <= 1"):
        Interval.of(bounds)


def test_an_interval_that_is_ignored_would_be_noticed(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interval, "holds", lambda self, timestep: True)
    recorder = Recorder()
    sampled("ddim", x, Interval(0.2, 0.7), recorder)
    assert [len(labels) for _, labels, _ in recorder.calls] == [6] * 10


# Each different label once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 2, 3], [2, 2, 2], [0], [9] * 4, list(range(10)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
def test_rows_name_the_label_of_every_sample(labels: list[int]) -> None:
    alone, both, null = label_rows(torch.tensor(labels), NULL)
    spread = [(rows if row_of is None else rows[row_of]).tolist() for rows, row_of in (alone, both, null)]
    assert spread == [labels, labels + [NULL] * len(labels), [NULL] * len(labels)]
    assert len(alone.rows) <= NULL + 1
    assert len(both.rows) == min(len(labels), NULL) + 1  # never twice the batch
    assert len(null.rows) == 1
