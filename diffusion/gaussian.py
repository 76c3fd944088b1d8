"""The Gaussian steps of a diffusion: noising, posterior, what a network's output says of it, and DiT's training loss.

In this file `t` (N,) int64, or an int where the batch shares it, is the index of a step in the schedule that is
passed along. Everything is computed in float32, whatever the precision of the network's output.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule, Timesteps, at
from runtime.config import InputError
from runtime.seeding import Keys, integers, normal


class Moments(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) that a network predicts, and the clean latent behind it; each (N, C, H, W) float32."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class Noised(NamedTuple):
    """A training batch: what the network sees, and what its prediction is scored against."""

    x_t: Tensor  # (N, C, H, W) float32
    t: Tensor  # (N,) int64
    x0: Tensor  # (N, C, H, W)
    noise: Tensor  # (N, C, H, W) float32


class Losses(NamedTuple):
    """One number per sample, (N,) float32: total = mse + vlb. `mse` carries its weight, `vlb` is in bits per dimension."""

    total: Tensor
    mse: Tensor
    vlb: Tensor


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t drawn from q(x_t | x_0) (DDPM, equation 4). x0, noise (N, C, H, W), t (N,) -> (N, C, H, W) float32"""
    tables = schedule.tables(x0.device)
    signal, spread = at(tables.sqrt_alphas_cumprod, t, x0), at(tables.sqrt_one_minus_alphas_cumprod, t, x0)  # (N, 1, 1, 1)
    return signal * x0.float() + spread * noise.float()


def posterior_mean(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7). x0, x_t (N, C, H, W), t (N,) -> (N, C, H, W) float32"""
    tables = schedule.tables(x_t.device)
    return at(tables.posterior_mean_x0, t, x_t) * x0.float() + at(tables.posterior_mean_x_t, t, x_t) * x_t.float()


def predicted_x0(schedule: NoiseSchedule, epsilon: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
    """The clean latent that a predicted epsilon implies; never clipped, as latents have no natural range. -> (N, C, H, W)"""
    tables = schedule.tables(x_t.device)
    return at(tables.x0_from_x_t, t, x_t) * x_t.float() - at(tables.x0_from_epsilon, t, x_t) * epsilon.float()


def predicted_moments(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor | int) -> Moments:
    """The reverse step that a network's output describes (DDPM, equation 11; Improved DDPM, equation 15).

    output (N, C, H, W) epsilon, or (N, 2C, H, W) epsilon and v; x_t (N, C, H, W); t (N,).
    v in about [-1, 1] interpolates the log variance between the posterior's and log beta. Without v the variance is beta
    (the posterior's of the second step at step 0), which is an assumption: published DiT weights all have v, and this is
    what their code would do.
    """
    tables = schedule.tables(x_t.device)
    epsilon, v = split_output(output, x_t.shape[1])
    x0 = predicted_x0(schedule, epsilon, x_t, t)
    mean = posterior_mean(schedule, x0, x_t, t)
    if v is None:
        return Moments(mean, at(tables.fixed_log_variance, t, x_t).expand_as(mean), x0)
    lower, upper = at(tables.posterior_log_variance_clipped, t, x_t), at(tables.log_betas, t, x_t)  # (N, 1, 1, 1)
    weight = (v + 1) / 2
    return Moments(mean, weight * upper + (1 - weight) * lower, x0)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's output as float32 epsilon (N, channels, H, W) and variance channels, None where it has none."""
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"a network on {channels} channels returns {channels} or {2 * channels} channels, not {output.shape[1]}"
        )
    epsilon, v = output.float().split((channels, output.shape[1] - channels), dim=1)
    return epsilon, v if v.shape[1] else None


class EpsilonObjective:
    """DiT's training loss: mean squared error of epsilon, plus the variational bound for the variance channels.

    The hybrid loss of Improved DDPM (equation 16) without its factor 1/1000. `min_snr_gamma` weights the squared error,
    and that alone, by min(snr, gamma) / snr (Hang et al. 2023, section 3.4); None leaves the weight at 1.
    `learned_variance`: the output's second half are variance channels; otherwise the bound is left out (zeros).
    `strata`: the timesteps are cut into so many equal parts, and the sample at place i of the batch draws from part i mod
    `strata`; it divides their number.
    """

    def __init__(self, schedule: NoiseSchedule, min_snr_gamma: float | None, learned_variance: bool, strata: int = 1) -> None:
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise InputError(f"min-SNR gamma must be above 0, not {min_snr_gamma}; `none` turns the weighting off.")
        if schedule.timesteps != tuple(range(len(schedule))):
            raise ValueError("training takes the schedule before respacing: there a step's index is the network's timestep")
        self.schedule = schedule
        self.min_snr_gamma = min_snr_gamma
        self.learned_variance = learned_variance
        self.strata = strata

    def noised(self, x0: Tensor, keys: Keys, timesteps: range | Timesteps | None = None) -> Noised:
        """Draws timesteps, uniform over `timesteps` (None: the whole schedule), and noise for a training batch x0 (N, C, H, W).

        What each sample draws is a function of its key and of `timesteps`; over the whole schedule, of its key alone.
        """
        drawn = range(len(self.schedule)) if timesteps is None else timesteps
        width = (drawn.stop - drawn.start) // self.strata
        t = drawn.start + keys.index % self.strata * width + integers(keys, "timestep", width)  # (N,)
        noise = normal(keys, "noise", tuple(x0.shape[1:]))  # (N, C, H, W)
        return Noised(q_sample(self.schedule, x0, t, noise), t, x0, noise)

    def timestep_at(self, share: float) -> int:
        """The timestep, 0 .. 999, of which `share` of the draws are smaller."""
        return int(share * len(self.schedule))

    def losses(self, output: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Losses per sample, (N,) each: "loss" is the total, "mse" and "vlb" its parts."""
        total, mse, vlb = self(output, noised.x0, noised.t, noised.noise)
        return {"loss": total, "mse": mse, "vlb": vlb}

    def __call__(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Losses:
        """output (N, C or 2C, H, W) of the network at x_t = q_sample(x0, t, noise); x0, noise (N, C, H, W); t (N,)."""
        epsilon, v = split_output(output, x0.shape[1])
        if (v is not None) != self.learned_variance:
            raise ValueError(f"learned_variance is {self.learned_variance}, yet the network returns {output.shape[1]} channels")
        error = epsilon - noise.float()  # (N, C, H, W)
        mse = error.square().flatten(1).mean(1)  # (N,)
        if self.min_snr_gamma is not None:
            snr = self.schedule.tables(x0.device).snr[t]  # (N,)
            mse = mse * (self.min_snr_gamma / snr).clamp(max=1)
        # Only the variance channels learn from the bound: through the mean its noisy gradient would swamp the simple loss.
        vlb = torch.zeros_like(mse) if v is None else variational_bound(self.schedule, error.detach(), v, x0, t)
        return Losses(mse + vlb, mse, vlb)


def variational_bound(schedule: NoiseSchedule, error: Tensor, v: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Terms L_0 .. L_{T-1} of the bound on the likelihood (Improved DDPM, equations 4 to 7), averaged over dimensions.

    error = predicted minus true epsilon, v, x0 (N, C, H, W); t (N,) -> (N,) bits per dimension: at t = 0 the negative log
    likelihood of x0, elsewhere KL(q(x_{t-1} | x_t, x_0) || p).
    """
    tables = schedule.tables(error.device)
    lower, upper = at(tables.posterior_log_variance_clipped, t, error), at(tables.log_betas, t, error)  # (N, 1, 1, 1)
    # Both means share their x_t, so they differ by a multiple of the epsilon error. Taking it from there, and the two log
    # variances' difference from v, subtracts no nearly equal float32 numbers.
    excess = (v + 1) / 2 * (upper - lower)  # log variance of p minus that of q
    shift = at(tables.mean_error, t, error) * error  # difference of the means in standard deviations of q
    kl = 0.5 * (excess + torch.expm1(-excess) + shift.square() * torch.exp(-excess))  # (N, C, H, W)
    deviation = at(tables.x0_from_epsilon, t, error) * error  # x0 minus its prediction, the mean of p at t = 0
    nll = discretized_gaussian_nll(x0.float(), deviation, lower + excess)  # (N, C, H, W)
    first = (t == 0).reshape(-1, *[1] * (error.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def discretized_gaussian_nll(x: Tensor, deviation: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass that a Gaussian puts on the bin x +- 1/255 (DDPM, equation 13). All (N, C, H, W); nats, float32.

    `deviation` = x minus the mean. Bins at |x| > 0.999 extend to infinity, as for pictures in [-1, 1]: latents are no
    pictures, but DiT's loss is defined so. No mass counts as less than 1e-12. The plain differences below lose digits
    beyond five standard deviations; published losses contain exactly that, so a more careful form would disagree with them.
    """
    scale = torch.exp(-0.5 * log_variance)
    below, above = _normal_cdf(scale * (deviation - 1 / 255)), _normal_cdf(scale * (deviation + 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Page's approximation (1977), off by less than 2e-4. DiT's loss is defined with it; the exact one moves it by 6e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
