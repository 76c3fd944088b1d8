"""Gaussian data, for which everything a diffusion does is known in closed form. Oracles here are written from the
definitions, in float64 numpy, and share no code with `diffusion`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule

SHAPE = (1, 2, 2)  # one latent; its four numbers in memory order are the dimensions below
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, covariance) in four dimensions."""

    mean: np.ndarray  # (4,)
    covariance: np.ndarray  # (4, 4)

    def denoise(self, x: Tensor, timestep: int, v: float | np.ndarray) -> Tensor:
        """The exact E[epsilon | x_t] of latents (N, 1, 2, 2), and `v` as variance channels. -> (N, 2, 2, 2)"""
        a = ALPHAS_CUMPROD[timestep]
        marginal = a * self.covariance + (1 - a) * np.eye(4)
        matrix = torch.from_numpy(np.sqrt(1 - a) * np.linalg.inv(marginal)).float()
        epsilon = (x.flatten(1) - torch.from_numpy(np.sqrt(a) * self.mean).float()) @ matrix
        variance = torch.from_numpy(np.broadcast_to(v, 4).copy()).float().expand(len(x), 4)
        return torch.cat((epsilon.reshape(-1, *SHAPE), variance.reshape(-1, *SHAPE)), dim=1)

    def optimal_v(self, schedule: NoiseSchedule, timestep: int) -> np.ndarray:
        """Variance channels that make the reverse step the exact p(x_{t-1} | x_t); for diagonal covariance. -> (4,)"""
        index = schedule.timesteps.index(timestep)
        if index == 0:
            return np.zeros(4)
        a, previous = ALPHAS_CUMPROD[timestep], ALPHAS_CUMPROD[schedule.timesteps[index - 1]]
        variance, _, weight_x0 = posterior(a, previous)
        spread = np.diag(self.covariance)
        unknown = spread * (1 - a) / (a * spread + 1 - a)  # Var(x_0 | x_t)
        wanted, beta = variance + weight_x0**2 * unknown, 1 - a / previous
        return 2 * (np.log(wanted) - np.log(variance)) / (np.log(beta) - np.log(variance)) - 1

    def ancestral(self, timesteps: tuple[int, ...], v: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance that ancestral sampling has in exact arithmetic: the recursion of a linear Gaussian chain."""
        mean, covariance = np.zeros(4), np.eye(4)
        for index in reversed(range(len(timesteps))):
            a = ALPHAS_CUMPROD[timesteps[index]]
            marginal = a * self.covariance + (1 - a) * np.eye(4)
            gain = np.sqrt(a) * self.covariance @ np.linalg.inv(marginal)  # E[x_0 | x_t] = mean + gain (x_t - sqrt(a) mean)
            weight_x, weight_x0, added = 0.0, 1.0, 0.0
            if index > 0:
                previous = ALPHAS_CUMPROD[timesteps[index - 1]]
                variance, weight_x, weight_x0 = posterior(a, previous)
                added = np.exp((1 + v) / 2 * np.log(1 - a / previous) + (1 - v) / 2 * np.log(variance))
            linear = weight_x0 * gain + weight_x * np.eye(4)
            mean = linear @ mean + weight_x0 * (self.mean - np.sqrt(a) * gain @ self.mean)
            covariance = linear @ covariance @ linear.T + added * np.eye(4)
        return mean, covariance

    def probability_flow(self, x: Tensor) -> np.ndarray:
        """Where the exact probability-flow ODE takes x at timestep 999, at time 0. (N, 1, 2, 2) -> (N, 4) float64"""
        a = ALPHAS_CUMPROD[-1]
        scale, basis = np.linalg.eigh(self.covariance)
        centered = (x.flatten(1).double().numpy() - np.sqrt(a) * self.mean) @ basis
        return self.mean + (centered * np.sqrt(scale / (a * scale + 1 - a))) @ basis.T


@dataclass(frozen=True)
class FlowData(GaussianData):
    """The same data on the linear path x_t = (1 - t) x_0 + t e, where the exact velocity is affine in x."""

    def velocity(self, x: Tensor, timestep: float) -> Tensor:
        """E[e - x_0 | x_t] of latents (N, 1, 2, 2), in their type, at the time timestep / 1000."""
        t, points = timestep / 1000, x.flatten(1).double().numpy()  # (N, 4)
        marginal = (1 - t) ** 2 * self.covariance + t**2 * np.eye(4)
        gain = (t * np.eye(4) - (1 - t) * self.covariance) @ np.linalg.inv(marginal)
        v = -self.mean + (points - (1 - t) * self.mean) @ gain.T
        return torch.from_numpy(v).to(x.dtype).reshape(x.shape)

    def reversed(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance after Euler steps of the SDE with diffusion 2 t from `times[0]` on, the last without noise.

        The recursion of a linear chain, with the velocity and the score -grad log p_t of Gaussians.
        """
        mean, covariance = np.zeros(4), np.eye(4)
        for t, end in pairwise(times):
            inverse = np.linalg.inv((1 - t) ** 2 * self.covariance + t**2 * np.eye(4))
            slope = (t * np.eye(4) - (1 - t) * self.covariance) @ inverse + t * inverse  # of v - t score, affine in x
            linear = np.eye(4) + (end - t) * slope
            mean = linear @ mean + (end - t) * (-self.mean - slope @ ((1 - t) * self.mean))
            added = 0.0 if end == times[-1] else 2 * t * (t - end)
            covariance = linear @ covariance @ linear.T + added * np.eye(4)
        return mean, covariance

    def transported(self, x: Tensor) -> np.ndarray:
        """Where the exact probability flow takes noise x (N, 1, 2, 2), at time 0. -> (N, 4) float64"""
        scale, basis = np.linalg.eigh(self.covariance)
        return self.mean + (x.flatten(1).double().numpy() @ basis * np.sqrt(scale)) @ basis.T


def posterior(a: float, previous: float) -> tuple[float, float, float]:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule, from alphas_cumprod of both steps: variance, weight of x_t, weight of x_0."""
    alpha = a / previous
    variance = 1 / (1 / (1 - previous) + alpha / (1 - alpha))
    return variance, variance * np.sqrt(alpha) / (1 - alpha), variance * np.sqrt(previous) / (1 - previous)


def largest_z_score(samples: Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """How many standard errors the mean and covariance of samples (N, 1, 2, 2) are off, at worst; whitened, so that the
    smallest direction counts as much as the largest."""
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    white = (samples.flatten(1).double().numpy() - mean) @ whiten.T
    count = len(white)
    of_mean = np.abs(white.mean(0)) * np.sqrt(count)
    deviation = np.cov(white.T) - np.eye(4)
    of_covariance = np.abs(deviation) * np.sqrt(count / (1 + np.eye(4)))
    return float(max(of_mean.max(), of_covariance.max()))


def full() -> GaussianData:
    """Correlated, off centre, far outside [-1, 1] in places, with standard deviations from 0.02 to 2."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    return GaussianData(np.array([1.5, -2.0, 0.3, 0.8]), rotation * np.array([4.0, 1.0, 0.2, 5e-4]) @ rotation.T)


def flow_data() -> FlowData:
    """Correlated and off centre, with standard deviations from 0.3 to 2."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    return FlowData(np.array([1.5, -2.0, 0.3, 0.8]), rotation * np.array([4.0, 1.0, 0.3, 0.09]) @ rotation.T)


def diagonal() -> GaussianData:
    """Independent dimensions with standard deviations from 0.15 to 1.5."""
    return GaussianData(np.array([1.5, -2.0, 0.3, 0.8]), np.diag([2.0, 1.0, 0.2, 0.02]))
