from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffusion.guidance as guidance
from diffusion.guidance import Interval, combine, guided, label_rows
from diffusion.samplers import SAMPLERS
from diffusion.schedule import NoiseSchedule
from runtime.config import InputError

NULL = 10


class Recorder:
    """A network whose output depends on every input, and the calls made to it: timesteps, each sample's label, plan."""

    def __init__(self, learned_variance: bool = True) -> None:
        self.learned_variance = learned_variance
        self.calls: list[tuple[list[int], list[int], object]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, plan: object, index: Tensor | None) -> Tensor:
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


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (None, 4), (4, 4), (9, 4)])
def test_the_chosen_channels_are_guided_and_no_others(x, channels, guided):
    recorder = Recorder()
    result = guided(recorder, LABELS, NULL, 4.0, channels)(x, 700)
    c, u = halves(x)
    assert result.shape == (3, 8, 5, 5)
    torch.testing.assert_close(result[:, :guided], (u + 4 * (c - u))[:, :guided])
    torch.testing.assert_close(result[:, guided:], c[:, guided:], rtol=0, atol=0)
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

SCHEDULE = NoiseSchedule.linear().respaced("10")  # timesteps 0, 111, .. 999


def sampled(name: str, x: Tensor, interval: Interval | None, recorder: Recorder, plans: guidance.Plans | None = None) -> Tensor:
    """Latents of a sampler that adds the same noise each time."""
    denoise = guided(recorder, LABELS, NULL, 4.0, plans=plans, interval=interval)
    return SAMPLERS[name](denoise, x, SCHEDULE, step_noise=lambda step: torch.cos((step + 1) * x))


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_outside_the_interval_make_no_unconditional_pass(name: str, x: Tensor) -> None:
    recorder = Recorder()
    sampled(name, x, Interval(0.2, 0.7), recorder)
    assert [(t, len(labels)) for (t,), labels, _ in recorder.calls] == [
        (999, 3), (888, 3), (777, 3), (666, 6), (555, 6), (444, 6), (333, 6), (222, 6), (111, 3), (0, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_interval_a_step_is_that_of_scale_1_and_inside_the_guided_one(name: str, x: Tensor) -> None:
    def by_hand(x: Tensor, timestep: int) -> Tensor:
        scale = 4.0 if 200 <= timestep <= 700 else 1.0
        return guided(Recorder(), LABELS, NULL, scale)(x, timestep)

    expected = SAMPLERS[name](by_hand, x, SCHEDULE, step_noise=lambda step: torch.cos((step + 1) * x))
    assert torch.equal(sampled(name, x, Interval(0.2, 0.7), Recorder()), expected)
    assert not torch.equal(sampled(name, x, None, Recorder()), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_whole_interval_is_none(name: str, x: Tensor) -> None:
    assert torch.equal(sampled(name, x, Interval(0.0, 1.0), Recorder()), sampled(name, x, None, Recorder()))


def test_the_interval_with_different_plans(x: Tensor) -> None:
    recorder = Recorder()
    sampled("ddim", x, Interval(0.4, 0.5), recorder, lambda t: (("full", t), ("short", t)))
    assert [plan for _, _, plan in recorder.calls if plan[0] == "short"] == [("short", 444)]
    assert len(recorder.calls) == 11


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
