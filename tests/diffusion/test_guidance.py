from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.guidance import classifier_free_guidance, combine
from diffusion.samplers import ddim
from diffusion.schedule import NoiseSchedule
from runtime.config import InputError

NULL = 10


class Recorder:
    """A network whose output depends on every input, and the calls made to it."""

    def __init__(self, learned_variance: bool = True) -> None:
        self.learned_variance = learned_variance
        self.calls: list[tuple[list[int], list[int], object]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, plan: object) -> Tensor:
        assert len(x) == len(t) == len(y)
        self.calls.append((t.tolist(), y.tolist(), plan))
        epsilon = torch.tanh(x + 0.1 * y.reshape(-1, 1, 1, 1)) + 0.001 * t.reshape(-1, 1, 1, 1)
        return torch.cat((epsilon, 0.3 * torch.sin(epsilon)), dim=1) if self.learned_variance else epsilon


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([1, 2, 3])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.full((3,), 700)
    return Recorder()(x, t, LABELS, None), Recorder()(x, t, torch.full((3,), NULL), None)


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (None, 4), (4, 4), (9, 4)])
def test_the_chosen_channels_are_guided_and_no_others(x, channels, guided):
    recorder = Recorder()
    result = classifier_free_guidance(recorder, LABELS, NULL, 4.0, channels)(x, 700)
    c, u = halves(x)
    assert result.shape == (3, 8, 5, 5)
    torch.testing.assert_close(result[:, :guided], (u + 4 * (c - u))[:, :guided])
    torch.testing.assert_close(result[:, guided:], c[:, guided:], rtol=0, atol=0)
    assert (c - u).abs().mean() > 0.1
    assert recorder.calls == [([700] * 6, [1, 2, 3, 10, 10, 10], None)]


def test_three_channels_are_the_default(x):
    default = classifier_free_guidance(Recorder(), LABELS, NULL, 4.0)(x, 700)
    torch.testing.assert_close(default, classifier_free_guidance(Recorder(), LABELS, NULL, 4.0, 3)(x, 700), rtol=0, atol=0)
    assert not torch.equal(default, classifier_free_guidance(Recorder(), LABELS, NULL, 4.0, None)(x, 700))


def test_variance_of_few_channel_latents_is_not_guided():
    """With one latent channel, "the first three channels" of an output would reach into the variance."""
    c, u = torch.ones(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    result = combine(c, u, 4.0, epsilon_channels=1, channels=3)
    assert result[:, 0].unique().item() == 4
    assert result[:, 1].unique().item() == 1


def test_networks_without_variance_channels(x):
    result = classifier_free_guidance(Recorder(learned_variance=False), LABELS, NULL, 2.0)(x, 5)
    assert result.shape == x.shape


def test_scale_1_makes_no_unconditional_pass(x):
    recorder = Recorder()
    result = classifier_free_guidance(recorder, LABELS, NULL, 1.0, plans=lambda t: ("sparse", "dense"))(x, 700)
    torch.testing.assert_close(result, halves(x)[0], rtol=0, atol=0)
    assert recorder.calls == [([700] * 3, [1, 2, 3], "sparse")]


def test_scale_0_is_unconditional(x):
    result = classifier_free_guidance(Recorder(), LABELS, NULL, 0.0, None)(x, 700)
    torch.testing.assert_close(result[:, :4], halves(x)[1][:, :4])


def test_equal_plans_share_one_batch(x):
    recorder = Recorder()
    classifier_free_guidance(recorder, LABELS, NULL, 4.0, plans=lambda t: (("grid", t), ("grid", t)))(x, 700)
    assert recorder.calls == [([700] * 6, [1, 2, 3, 10, 10, 10], ("grid", 700))]


def test_different_plans_make_two_calls_with_the_same_result(x):
    recorder = Recorder()
    result = classifier_free_guidance(recorder, LABELS, NULL, 4.0, plans=lambda t: ("full", "short"))(x, 700)
    assert recorder.calls == [([700] * 3, [1, 2, 3], "full"), ([700] * 3, [10] * 3, "short")]
    torch.testing.assert_close(result, classifier_free_guidance(Recorder(), LABELS, NULL, 4.0)(x, 700))


def test_half_precision_outputs_are_combined_in_float32(x):
    c, u = (half.bfloat16() for half in halves(x))
    result = combine(c, u, 4.0, 4, 3)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, combine(c.float(), u.float(), 4.0, 4, 3), rtol=0, atol=0)


def test_guidance_drives_a_sampler_without_reading_the_device():
    def predict(x: Tensor, t: Tensor, y: Tensor, plan: object) -> Tensor:
        return torch.cat((x + y.reshape(-1, 1, 1, 1), x + t.reshape(-1, 1, 1, 1)), dim=1)

    denoise = classifier_free_guidance(predict, torch.empty(2, dtype=torch.long, device="meta"), NULL, 1.5)
    noise = torch.empty(2, 4, 3, 3, device="meta")
    assert ddim(denoise, noise, NoiseSchedule.linear().respaced("5")).shape == noise.shape


@pytest.mark.parametrize("channels", [0, -1])
def test_unusable_channels_are_refused(channels):
    with pytest.raises(InputError, match="at least 1 channel"):
        classifier_free_guidance(Recorder(), LABELS, NULL, 4.0, channels)
