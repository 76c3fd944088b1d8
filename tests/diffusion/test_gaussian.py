from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.gaussian import (
    EpsilonObjective,
    Timesteps,
    discretized_gaussian_nll,
    posterior_mean,
    predicted_moments,
    q_sample,
    split_output,
)
from diffusion.schedule import NoiseSchedule
from runtime.config import InputError
from runtime.seeding import Keys, integers

SCHEDULE = NoiseSchedule.linear()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, error, v = torch.randn(4, 6, 4, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 20, 300, 700, 999])
    output = torch.cat((noise + 0.3 * error, v.clamp(-1.5, 1.5)), dim=1)
    return {"output": output, "x0": x0, "t": t, "noise": noise}


def test_noising_keeps_the_stated_mean_and_variance():
    t = torch.full((20_000,), 400)
    x0 = torch.full((20_000, 1, 1, 1), 3.0)
    x_t = q_sample(SCHEDULE, x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    a = SCHEDULE.alphas_cumprod[400]
    assert x_t.mean().item() == pytest.approx(3 * math.sqrt(a), abs=5 * math.sqrt((1 - a) / 20_000))
    assert x_t.var().item() == pytest.approx(1 - a, rel=5 * math.sqrt(2 / 20_000))


def test_variance_channels_interpolate_the_logarithm(batch):
    epsilon, t = batch["noise"], batch["t"]
    x_t = q_sample(SCHEDULE, batch["x0"], t, epsilon)
    for v, expected in [
        (-1.0, SCHEDULE.posterior_log_variance_clipped),
        (1.0, np.log(SCHEDULE.betas)),
        (0.5, 0.75 * np.log(SCHEDULE.betas) + 0.25 * SCHEDULE.posterior_log_variance_clipped),
    ]:
        moments = predicted_moments(SCHEDULE, torch.cat((epsilon, torch.full_like(epsilon, v)), dim=1), x_t, t)
        for n, step in enumerate(t.tolist()):
            np.testing.assert_allclose(moments.log_variance[n].numpy(), expected[step], rtol=1e-6)
        # 999: the prediction of x0 is amplified 157 times there.
        torch.testing.assert_close(moments.x0, batch["x0"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.mean, posterior_mean(SCHEDULE, batch["x0"], x_t, t), rtol=1e-5, atol=1e-5)


def test_without_variance_channels_the_variance_is_beta(batch):
    moments = predicted_moments(SCHEDULE, batch["noise"], batch["x0"], batch["t"])
    expected = np.log([SCHEDULE.posterior_variance[1], *SCHEDULE.betas[[1, 20, 300, 700, 999]]])
    assert moments.log_variance.shape == batch["x0"].shape
    np.testing.assert_allclose(moments.log_variance[:, 0, 0, 0].numpy(), expected, rtol=1e-6)


def test_x0_is_not_clipped():
    x_t = torch.full((1, 4, 2, 2), 3.0)
    moments = predicted_moments(SCHEDULE, torch.full((1, 8, 2, 2), -3.0), x_t, torch.tensor([900]))
    assert moments.x0.min() > 100


def test_bound_is_the_textbook_divergence(batch):
    losses = EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch)
    x0, noise, t = batch["x0"].double(), batch["noise"].double(), batch["t"]
    epsilon, v = batch["output"].double().chunk(2, dim=1)
    for n, step in enumerate(t.tolist()[1:], start=1):
        a, previous, beta = SCHEDULE.alphas_cumprod[step], SCHEDULE.alphas_cumprod[step - 1], SCHEDULE.betas[step]
        x_t = math.sqrt(a) * x0[n] + math.sqrt(1 - a) * noise[n]
        x0_hat = (x_t - math.sqrt(1 - a) * epsilon[n]) / math.sqrt(a)
        weight_x0 = math.sqrt(previous) * beta / (1 - a)
        weight_x = math.sqrt(1 - beta) * (1 - previous) / (1 - a)
        variance = beta * (1 - previous) / (1 - a)
        deviation = torch.exp(0.25 * ((1 + v[n]) * math.log(beta) + (1 - v[n]) * math.log(variance)))
        q = Normal(weight_x0 * x0[n] + weight_x * x_t, math.sqrt(variance))
        p = Normal(weight_x0 * x0_hat + weight_x * x_t, deviation)
        expected = kl_divergence(q, p).mean().item() / math.log(2)
        assert losses.vlb[n].item() == pytest.approx(expected, rel=2e-6), f"t = {step}"


def test_likelihood_at_step_0_is_the_mass_of_each_bin():
    """Against scipy's exact distribution, bin by bin; the loss's approximation of it is off by less than 2e-4 at an edge."""
    x = torch.linspace(-1.2, 1.2, 49).reshape(1, 1, 7, 7)
    generator = torch.Generator().manual_seed(0)
    mean = x + 0.02 * torch.randn(x.shape, generator=generator)
    log_variance = torch.empty(x.shape).uniform_(-9.8, -7, generator=generator)
    ours = discretized_gaussian_nll(x, x - mean, log_variance).flatten().tolist()
    compared = 0
    entries = zip(ours, x.flatten().tolist(), mean.flatten().tolist(), log_variance.flatten().tolist(), strict=True)
    for value, place, middle, log_var in entries:
        gaussian = norm(middle, math.exp(0.5 * log_var))
        low = -math.inf if place < -0.999 else place - 1 / 255
        high = math.inf if place > 0.999 else place + 1 / 255
        mass = gaussian.cdf(high) - gaussian.cdf(low)
        if mass > 0.01:
            assert math.exp(-value) == pytest.approx(mass, abs=4e-4)
            compared += 1
    assert compared > 25
    far = discretized_gaussian_nll(torch.zeros(1), torch.ones(1), torch.full((1,), -9.8))
    assert far.item() == pytest.approx(-math.log(1e-12), rel=1e-6)


def test_step_0_enters_the_bound_in_bits(batch):
    losses = EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch)
    epsilon, v = batch["output"][:1].chunk(2, dim=1)
    x_t = q_sample(SCHEDULE, batch["x0"][:1], batch["t"][:1], batch["noise"][:1])
    moments = predicted_moments(SCHEDULE, torch.cat((epsilon, v), dim=1), x_t, batch["t"][:1])
    nll = discretized_gaussian_nll(batch["x0"][:1], batch["x0"][:1] - moments.mean, moments.log_variance)
    assert losses.vlb[0].item() == pytest.approx(nll.mean().item() / math.log(2), rel=1e-4)


def test_min_snr_weights_the_squared_error_alone(batch):
    plain = EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch)
    weighted = EpsilonObjective(SCHEDULE, 5.0, learned_variance=True)(**batch)
    weight = np.minimum(SCHEDULE.snr, 5) / SCHEDULE.snr
    np.testing.assert_allclose((weighted.mse / plain.mse).numpy(), weight[batch["t"].numpy()], rtol=1e-6)
    assert weight[0] < 1e-3
    assert weight[999] == 1
    torch.testing.assert_close(weighted.vlb, plain.vlb, rtol=0, atol=0)
    torch.testing.assert_close(weighted.total, weighted.mse + weighted.vlb, rtol=0, atol=0)


def gradients(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the bound, with respect to epsilon and to the variance channels."""
    output = batch["output"].clone().requires_grad_()
    EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch | {"output": output}).vlb.sum().backward()
    return output.grad.chunk(2, dim=1)


def test_only_the_variance_channels_learn_from_the_bound(batch):
    of_epsilon, of_v = gradients(batch)
    assert of_epsilon.abs().max() == 0
    assert (of_v.flatten(1).abs().amin(1) > 0).all()


def test_a_mean_that_is_not_detached_would_be_noticed(batch, monkeypatch):
    monkeypatch.setattr(Tensor, "detach", lambda self: self)
    of_epsilon, _ = gradients(batch)
    assert of_epsilon.abs().max() > 1e-3


def test_the_squared_error_reaches_epsilon_alone(batch):
    output = batch["output"].clone().requires_grad_()
    EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch | {"output": output}).mse.sum().backward()
    of_epsilon, of_v = output.grad.chunk(2, dim=1)
    torch.testing.assert_close(of_epsilon, 2 * (batch["output"][:, :4] - batch["noise"]) / 64)
    assert of_v.abs().max() == 0


@pytest.mark.parametrize("learned_variance", [True, False])
def test_half_precision_outputs_are_computed_in_float32(batch, learned_variance):
    objective = EpsilonObjective(SCHEDULE, 5.0, learned_variance)
    low = (batch["output"] if learned_variance else batch["output"][:, :4]).bfloat16()
    expected = objective(**batch | {"output": low.float()})
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(**batch | {"output": low})
    for ours, reference in zip(losses, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    moments = predicted_moments(SCHEDULE, low, batch["x0"].half(), batch["t"])
    assert {part.dtype for part in moments} == {torch.float32}


def test_without_learned_variance_there_is_no_bound(batch):
    losses = EpsilonObjective(SCHEDULE, None, learned_variance=False)(**batch | {"output": batch["output"][:, :4]})
    assert losses.vlb.abs().max() == 0
    torch.testing.assert_close(losses.total, losses.mse, rtol=0, atol=0)


def test_extreme_outputs_leave_finite_losses_and_gradients(batch):
    for scale in (30.0, 1e4):
        output = (scale * batch["output"]).clone()
        output[:, 4:].clamp_(-8, 8)
        output.requires_grad_()
        losses = EpsilonObjective(SCHEDULE, 5.0, learned_variance=True)(**batch | {"output": output})
        losses.total.sum().backward()
        assert torch.isfinite(losses.total).all()
        assert torch.isfinite(output.grad).all()


def test_samples_do_not_depend_on_their_batch(batch):
    objective = EpsilonObjective(SCHEDULE, 5.0, learned_variance=True)
    together = objective(**batch).total
    alone = [objective(**{name: tensor[n : n + 1] for name, tensor in batch.items()}).total for n in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)


def test_training_noise_depends_on_each_samples_key_alone():
    objective = EpsilonObjective(SCHEDULE, None, learned_variance=True)
    x0 = torch.randn(500, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    index = torch.arange(500)
    noised = objective.noised(x0, Keys(seed=3, step=7, index=index))
    alone = objective.noised(x0[40:42], Keys(seed=3, step=7, index=index[40:42]))
    for ours, reference in zip(alone, noised, strict=True):
        torch.testing.assert_close(ours, reference[40:42], rtol=0, atol=0)
    assert not torch.equal(noised.t, objective.noised(x0, Keys(seed=3, step=8, index=index)).t)
    assert noised.t.min() < 20
    assert noised.t.max() > 980
    assert abs(noised.noise.mean().item()) < 0.03
    assert noised.x_t.dtype == torch.float32
    torch.testing.assert_close(noised.x_t, q_sample(SCHEDULE, x0, noised.t, noised.noise), rtol=0, atol=0)


@pytest.mark.parametrize("timesteps", [range(250, 257), range(999, 1000), range(1)])
def test_timesteps_are_drawn_within_an_interval(timesteps):
    objective, x0 = EpsilonObjective(SCHEDULE, None, learned_variance=True), torch.zeros(500, 4, 4, 4)
    keys = Keys(seed=3, step=7, index=torch.arange(500))
    noised = objective.noised(x0, keys, timesteps)
    assert set(noised.t.tolist()) == set(timesteps)
    in_tensors = objective.noised(x0, keys, Timesteps(torch.tensor(timesteps.start), torch.tensor(timesteps.stop)))
    for ours, reference in zip(in_tensors, noised, strict=True):
        assert torch.equal(ours, reference)
    assert torch.equal(noised.noise, objective.noised(x0, keys).noise)


def test_the_whole_schedule_is_an_interval_like_any_other():
    """What trainings drew before there were intervals."""
    objective, keys = EpsilonObjective(SCHEDULE, None, learned_variance=True), Keys(seed=3, step=7, index=torch.arange(500))
    plain, interval = (objective.noised(torch.zeros(500, 1, 1, 1), keys, *given) for given in ((), (range(1000),)))
    assert torch.equal(plain.t, integers(keys, "timestep", 1000))
    assert torch.equal(plain.t, interval.t)


def test_each_stratum_gets_its_share_of_every_run_of_positions():
    objective = EpsilonObjective(SCHEDULE, None, learned_variance=True, strata=4)
    for start in (0, 4, 8, 3):  # a process's part of the batch, and one that does not begin at a multiple
        keys = Keys(seed=3, step=7, index=torch.arange(start, start + 8))
        t = objective.noised(torch.zeros(8, 1, 1, 1), keys).t
        assert torch.equal(t // 250, keys.index % 4)
    alone = objective.noised(torch.zeros(1, 1, 1, 1), Keys(3, 7, torch.tensor([10]))).t  # whoever computes it
    assert torch.equal(alone, t[7:])


def test_timesteps_of_strata_are_uniform(monkeypatch):
    """Enumerated: every number that can be drawn, at the places of one turn, names each timestep once. Known bad: one stratum
    for all."""
    drawn, turn = torch.arange(250).repeat_interleave(4), torch.arange(4).repeat(250)
    monkeypatch.setattr("diffusion.gaussian.integers", lambda keys, name, high: drawn if high == 250 else drawn * 4 % high)
    for strata, expected in ((4, list(range(1000))), (1, None)):
        objective = EpsilonObjective(SCHEDULE, None, learned_variance=True, strata=strata)
        t = objective.noised(torch.zeros(1000, 1, 1, 1), Keys(0, 0, turn)).t
        assert (sorted(t.tolist()) == expected) == (strata == 4)


def test_one_stratum_is_as_before_there_were_any():
    keys, x0 = Keys(seed=3, step=7, index=torch.arange(500)), torch.zeros(500, 1, 1, 1)
    one = EpsilonObjective(SCHEDULE, None, learned_variance=True, strata=1).noised(x0, keys)
    assert torch.equal(one.t, integers(keys, "timestep", 1000))
    four = EpsilonObjective(SCHEDULE, None, learned_variance=True, strata=4).noised(x0, keys)
    assert torch.equal(one.noise, four.noise)
    assert not torch.equal(one.t, four.t)


def test_named_losses_are_those_of_the_call(batch):
    for learned_variance in (True, False):
        objective = EpsilonObjective(SCHEDULE, 5.0, learned_variance)
        noised = objective.noised(batch["x0"], Keys(seed=0, step=0, index=torch.arange(6)))
        output = batch["output"] if learned_variance else batch["output"][:, :4]
        losses = objective.losses(output, noised)
        assert list(losses) == ["loss", "mse", "vlb"]
        for ours, reference in zip(losses.values(), objective(output, noised.x0, noised.t, noised.noise), strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_a_respaced_schedule_is_refused_for_training():
    with pytest.raises(ValueError, match="before respacing"):
        EpsilonObjective(SCHEDULE.respaced("250"), None, learned_variance=True)


def test_wrong_channel_counts_are_refused(batch):
    with pytest.raises(ValueError, match="4 or 8 channels, not 5"):
        split_output(torch.zeros(1, 5, 2, 2), 4)
    with pytest.raises(ValueError, match="learned_variance is False"):
        EpsilonObjective(SCHEDULE, None, learned_variance=False)(**batch)
    with pytest.raises(ValueError, match="learned_variance is True"):
        EpsilonObjective(SCHEDULE, None, learned_variance=True)(**batch | {"output": batch["output"][:, :4]})


@pytest.mark.parametrize("gamma", [0.0, -5.0, math.nan])
def test_unusable_gamma_is_refused(gamma):
    with pytest.raises(InputError, match="gamma"):
        EpsilonObjective(SCHEDULE, gamma, learned_variance=True)


def test_the_loss_reads_nothing_back_from_the_device(batch):
    """Meta tensors have no values: any read would raise."""
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    assert EpsilonObjective(SCHEDULE, 5.0, learned_variance=True)(**meta).total.shape == (6,)


def test_the_loss_compiles_into_one_graph(batch):
    objective = EpsilonObjective(NoiseSchedule.linear(), 5.0, learned_variance=True)
    compiled = torch.compile(lambda *tensors: objective(*tensors).total, fullgraph=True, backend="eager")
    tensors = [batch[name] for name in ("output", "x0", "t", "noise")]
    for _ in range(2):
        torch.testing.assert_close(compiled(*tensors), objective(*tensors).total)
