"""Samplers against Gaussian data, for which the best denoiser and the outcome are known, and against diffusers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import diffusion.samplers as samplers
from diffusion.gaussian import Moments, posterior_mean, predicted_moments
from diffusion.samplers import SAMPLERS, ddim, ddpm
from diffusion.schedule import NoiseSchedule
from runtime.config import InputError
from tests.diffusion.gaussian_data import SHAPE, GaussianData, diagonal, full, largest_z_score
from tests.models.random_networks import one_thread as one_thread

COUNT = 20_000
# Of 14 numbers, each normal; a right sampler passes with probability 1 - 1e-5, and the seeds are fixed.
LIMIT = 5.0


def start(seed: int = 0, count: int = COUNT) -> tuple[Tensor, samplers.StepNoise]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), lambda step: torch.randn(count, *SHAPE, generator=generator)


def sample_with_optimal_variance(data: GaussianData, schedule: NoiseSchedule) -> Tensor:
    noise, step_noise = start()
    return ddpm(lambda x, t: data.denoise(x, t, data.optimal_v(schedule, t)), noise, schedule, step_noise)


@pytest.mark.parametrize("steps", ["1000", "250", "25", "20,10,10"])
def test_ddpm_reproduces_the_data(steps):
    """Given the exact mean and the exact variance of each step, any number of steps does, up to the unnoised last step,
    which drops at most 1e-4 of variance: 0.5 % of the smallest here, half a standard error."""
    data = diagonal()
    samples = sample_with_optimal_variance(data, NoiseSchedule.linear().respaced(steps))
    assert largest_z_score(samples, data.mean, data.covariance) < LIMIT


@pytest.mark.parametrize(("steps", "v"), [("1000", 1.0), ("250", 1.0), ("250", -1.0), ("250", 0.3), ("20,10,10", 0.0)])
def test_ddpm_follows_the_exact_recursion(steps, v):
    data, schedule = full(), NoiseSchedule.linear().respaced(steps)
    noise, step_noise = start()
    samples = ddpm(lambda x, t: data.denoise(x, t, v), noise, schedule, step_noise)
    assert largest_z_score(samples, *data.ancestral(schedule.timesteps, v)) < LIMIT


@pytest.mark.parametrize(("steps", "v", "discretization"), [("1000", 1.0, 0.038), ("250", 1.0, 0.49), ("250", -1.0, 0.52)])
def test_the_recursion_ends_at_the_data(steps, v, discretization):
    """The oracle's own check. The error is that of a variance which is not the best one: relative, in the worst direction,
    which has standard deviation 0.02. With 1000 steps beta (v = 1) is right to 3.8 % there and to 0.2 % elsewhere."""
    data = full()
    mean, covariance = data.ancestral(NoiseSchedule.linear().respaced(steps).timesteps, v)
    whiten = np.linalg.inv(np.linalg.cholesky(data.covariance))
    assert np.abs(whiten @ (mean - data.mean)).max() < 1e-4
    assert 0.9 * discretization < np.abs(whiten @ covariance @ whiten.T - np.eye(4)).max() < discretization


def clipped(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: int) -> Moments:
    right = predicted_moments(schedule, output, x_t, t)
    x0 = right.x0.clamp(-1, 1)
    return Moments(posterior_mean(schedule, x0, x_t, t), right.log_variance, x0)


def interpolated_variance(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: int) -> Moments:
    right, weight = predicted_moments(schedule, output, x_t, t), (output[:, 1:] + 1) / 2
    tables = schedule.tables(x_t.device)
    betas, variances = torch.exp(tables.log_betas[t]), torch.exp(tables.posterior_log_variance_clipped[t])
    return right._replace(log_variance=torch.log(weight * betas + (1 - weight) * variances))


def unlearned_variance(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: int) -> Moments:
    return predicted_moments(schedule, output[:, :1], x_t, t)


def swapped_variance(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: int) -> Moments:
    return predicted_moments(schedule, torch.cat((output[:, :1], -output[:, 1:]), dim=1), x_t, t)


def variance_as_deviation(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: int) -> Moments:
    right = predicted_moments(schedule, output, x_t, t)
    return right._replace(log_variance=2 * right.log_variance)


@pytest.mark.parametrize(
    "bug",
    [clipped, interpolated_variance, unlearned_variance, swapped_variance, variance_as_deviation],
    ids=lambda bug: bug.__name__,
)
def test_planted_bugs_in_the_step_are_caught(bug, monkeypatch):
    monkeypatch.setattr(samplers, "predicted_moments", bug)
    data = diagonal()
    samples = sample_with_optimal_variance(data, NoiseSchedule.linear().respaced("25"))
    assert largest_z_score(samples, data.mean, data.covariance) > 2 * LIMIT


def test_a_network_that_receives_the_index_is_caught():
    data, schedule = full(), NoiseSchedule.linear().respaced("250")
    noise, step_noise = start()
    wrong = NoiseSchedule(schedule.betas, tuple(range(250)))
    samples = ddpm(lambda x, t: data.denoise(x, t, 1.0), noise, wrong, step_noise)
    assert not largest_z_score(samples, *data.ancestral(schedule.timesteps, 1.0)) < 2 * LIMIT


def test_noise_at_the_last_step_is_caught():
    data, schedule = full(), NoiseSchedule.linear().respaced("250")
    noise, step_noise = start()
    samples = ddpm(lambda x, t: data.denoise(x, t, 1.0), noise, schedule, step_noise)
    samples = samples + np.exp(0.5 * schedule.log_betas[0]) * step_noise(249)
    assert largest_z_score(samples, *data.ancestral(schedule.timesteps, 1.0)) > LIMIT


def test_ddim_reproduces_the_data():
    """With 1000 steps its covariance is 1.9 % too small in the worst direction, less than two standard errors here."""
    data = diagonal()
    noise, _ = start(count=8000)
    samples = ddim(lambda x, t: data.denoise(x, t, 0.0), noise, NoiseSchedule.linear())
    assert largest_z_score(samples, data.mean, data.covariance) < LIMIT


STEP_COUNTS = (20, 40, 80, 160)


def ddim_errors(denoise: samplers.Denoise, data: GaussianData) -> np.ndarray:
    """Largest distance from the exact solution of the probability-flow ODE, for each of STEP_COUNTS."""
    noise, _ = start(count=64)
    exact = data.probability_flow(noise)
    results = [ddim(denoise, noise, NoiseSchedule.linear().respaced(str(steps))) for steps in STEP_COUNTS]
    return np.array([np.abs(result.flatten(1).double().numpy() - exact).max() for result in results])


def order(errors: np.ndarray) -> float:
    return -float(np.polyfit(np.log(STEP_COUNTS), np.log(errors), 1)[0])


def test_ddim_converges_at_first_order():
    data = full()
    errors = ddim_errors(lambda x, t: data.denoise(x, t, 0.0), data)
    assert 0.8 < order(errors) < 1.3
    assert errors[-1] < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda data, x, t: data.denoise(x, max(t - 40, 0), 0.0),
        lambda data, x, t: 0.97 * data.denoise(x, t, 0.0),
        lambda data, x, t: torch.where(torch.tensor(t > 500), 0.0, data.denoise(x, t, 0.0)),
    ],
    ids=["wrong time", "wrong scale", "half the path"],
)
def test_a_denoiser_that_is_off_does_not_converge(wrong):
    data = full()
    assert not 0.8 < order(ddim_errors(partial(wrong, data), data)) < 1.3


def test_clipping_in_ddim_is_caught(monkeypatch):
    right = samplers.predicted_x0
    monkeypatch.setattr(samplers, "predicted_x0", lambda *arguments: right(*arguments).clamp(-1, 1))
    data = full()
    assert not 0.8 < order(ddim_errors(lambda x, t: data.denoise(x, t, 0.0), data)) < 1.3


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance():
    data, schedule = full(), NoiseSchedule.linear().respaced("100")
    denoise = partial(data.denoise, v=-1.0)
    noise, step_noise = start(count=100)
    expected = ddpm(denoise, noise, schedule, step_noise)
    noise, step_noise = start(count=100)
    torch.testing.assert_close(ddim(denoise, noise, schedule, 1.0, step_noise), expected, rtol=1e-4, atol=1e-4)


def network(x: Tensor, timestep: float) -> Tensor:
    """Nothing in particular, and nothing that a scheduler could be tuned to. (N, C, H, W) -> (N, 2C, H, W)"""
    c = np.cos(0.01 * timestep)
    return torch.cat((0.9 * torch.tanh(x) * c + 0.05 * x.roll(1, -1), 0.8 * torch.sin(x + c)), dim=1)


def test_ddpm_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type="learned_range", timestep_spacing="linspace", clip_sample=False
    )
    scheduler.set_timesteps(250)
    generator = torch.Generator().manual_seed(1)
    noise = x = torch.randn(2, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t)), t, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    torch.randn(noise.shape, generator=generator)
    schedule = NoiseSchedule.linear().respaced("250")
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()[::-1]
    ours = ddpm(network, noise, schedule, lambda step: torch.randn(noise.shape, generator=generator))
    assert (ours - x).abs().max() < 3e-4 * x.abs().max()


def test_ddim_agrees_with_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="leading", clip_sample=False)
    scheduler.set_timesteps(50)
    noise = x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t))[:, :4], t, x, eta=0.0).prev_sample
    ours = ddim(network, noise, NoiseSchedule.linear().respaced("ddim50"))
    assert (ours - x).abs().max() < 3e-4 * x.abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_every_sampler_promises(name):
    """Original timesteps, noisiest first; float32 for the network; the callback once a step; noise for all steps but the last;
    latents in float32, or as exact as the sampler's state."""
    flow = SAMPLERS[name].objective == "flow"
    seen: dict[str, list] = {"timesteps": [], "noises": [], "steps": []}

    def denoise(x: Tensor, timestep: float) -> Tensor:
        assert x.dtype == torch.float32
        seen["timesteps"].append(timestep)
        return network(x, timestep)[:, : 4 if flow else 8].bfloat16()

    def step_noise(step: int) -> Tensor:
        seen["noises"].append(step)
        return torch.randn(2, 4, 4, 4)

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        assert x.shape == x0.shape == (2, 4, 4, 4)
        seen["steps"].append(step)
        seen["last"] = [x, x0]

    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    result = SAMPLERS[name].run(denoise, noise, "10", step_noise, callback)
    assert seen["timesteps"] == SAMPLERS[name].timesteps("10")
    assert flow or seen["timesteps"] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert seen["steps"] == list(range(10))
    assert seen["noises"] == (list(range(9)) if name in ("ddpm", "euler-maruyama") else [])
    assert result.dtype == (torch.float64 if flow else torch.float32)
    assert not result.requires_grad
    torch.testing.assert_close(seen["last"][0], result, rtol=0, atol=0)
    if name in ("ddpm", "ddim", "euler"):  # whose last step returns its prediction
        torch.testing.assert_close(seen["last"][1], result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_read_nothing_back_from_the_device(name):
    """Meta tensors have no values: any read would raise."""
    noise = torch.empty(2, 4, 4, 4, device="meta")
    channels = 4 if SAMPLERS[name].objective == "flow" else 8

    def denoise(x: Tensor, timestep: float) -> Tensor:
        return network(x, timestep)[:, :channels]

    assert SAMPLERS[name].run(denoise, noise, "10", lambda step: torch.empty_like(noise)).shape == noise.shape


def test_noise_is_kept_by_ddim_with_eta():
    schedule, asked = NoiseSchedule.linear().respaced("10"), []
    ddim(network, torch.zeros(1, 4, 2, 2), schedule, 0.5, lambda step: asked.append(step) or torch.zeros(1, 4, 2, 2))
    assert asked == list(range(9))


def test_unusable_eta_is_refused():
    schedule = NoiseSchedule.linear().respaced("10")
    with pytest.raises(InputError, match="step_noise"):
        ddim(network, torch.zeros(1, 4, 2, 2), schedule, eta=0.5)
    with pytest.raises(InputError, match="between 0"):
        ddim(network, torch.zeros(1, 4, 2, 2), schedule, eta=-1)
