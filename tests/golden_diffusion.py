"""Every field of the reference vectors of diffusion.npz, and of further files of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, keys, label, npz_files
from torch import Tensor

import diffusion.gaussian as gaussian
from diffusion.gaussian import EpsilonObjective, predicted_moments, q_sample
from diffusion.samplers import ddim, ddpm
from diffusion.schedule import NoiseSchedule, respaced_timesteps

TOLERANCE = 2e-5


FILES = [path for path in npz_files() if "posterior_log_variance_clipped" in keys(path)]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(params=FILES, ids=label)
def golden(request) -> dict[str, np.ndarray]:
    return arrays(request.param)


@pytest.fixture
def schedule(golden) -> NoiseSchedule:
    return NoiseSchedule.linear(len(golden["betas"]))


def model(x: Tensor, t: Tensor) -> Tensor:
    """The closed-form network of golden/README.md. x (N, C, H, W), t (N,) original timesteps -> (N, 2C, H, W)"""
    c = torch.cos(0.01 * t.float()).reshape(-1, 1, 1, 1)
    epsilon = 0.9 * torch.tanh(x) * c + 0.05 * torch.roll(x, 1, dims=-1)
    return torch.cat((epsilon, 0.5 * torch.sin(x + c)), dim=1)


def denoise(x: Tensor, timestep: int) -> Tensor:
    return model(x, torch.full((len(x),), timestep))


def error(ours: Tensor, reference: np.ndarray) -> float:
    assert ours.dtype == torch.float32
    assert tuple(ours.shape) == reference.shape
    return float(np.abs(ours.numpy() - reference).max() / np.abs(reference).max())


def losses(golden: dict[str, np.ndarray], schedule: NoiseSchedule, name: str) -> dict[str, Tensor]:
    gamma = None if name == "dit" else float(name.removeprefix("min_snr"))
    x0, noise, t = (torch.from_numpy(golden[field]) for field in ("x0", "noise", "t"))
    output = model(q_sample(schedule, x0, t, noise), t)
    result = EpsilonObjective(schedule, gamma, learned_variance=True)(output, x0, t, noise)
    return {"loss": result.total, "mse": result.mse, "vb": result.vlb}


@pytest.mark.parametrize("name", ["betas", "posterior_variance", "posterior_log_variance_clipped"])
def test_tables(golden, schedule, name):
    ours = getattr(schedule, name)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, golden[name], rtol=1e-10, atol=0)


def test_respacing(golden, schedule):
    specs = [name.removeprefix("timesteps/") for name in golden if name.startswith("timesteps/")]
    assert specs
    for spec in specs:
        np.testing.assert_array_equal(respaced_timesteps(spec, len(schedule)), golden[f"timesteps/{spec}"], err_msg=spec)
        respaced = schedule.respaced(spec)
        assert list(respaced.timesteps) == golden[f"timesteps/{spec}"].tolist()
        np.testing.assert_allclose(respaced.betas, golden[f"betas/{spec}"], rtol=1e-10, atol=0, err_msg=spec)


def test_x_t(golden, schedule):
    x0, noise, t = (torch.from_numpy(golden[field]) for field in ("x0", "noise", "t"))
    assert error(q_sample(schedule, x0, t, noise), golden["x_t"]) <= TOLERANCE


def test_losses(golden, schedule):
    names = [field.removeprefix("loss_") for field in golden if field.startswith("loss_")]
    assert names
    for name in names:
        for part, ours in losses(golden, schedule, name).items():
            if f"{part}_{name}" in golden:
                assert error(ours, golden[f"{part}_{name}"]) <= TOLERANCE, f"{part}_{name}"


def test_ancestral_sampling(golden, schedule):
    for field in [field for field in golden if re.fullmatch(r"ddpm\d+", field)]:
        noise, step_noise = torch.from_numpy(golden["z"]), torch.from_numpy(golden["step_noise"])
        ours = ddpm(denoise, noise, schedule.respaced(field.removeprefix("ddpm")), lambda k, noises=step_noise: noises[k])
        assert error(ours, golden[field]) <= TOLERANCE


def test_ddim_sampling(golden, schedule):
    for field in [field for field in golden if re.fullmatch(r"ddim\d+_eta0", field)]:
        steps = field.removeprefix("ddim").removesuffix("_eta0")
        assert error(ddim(denoise, torch.from_numpy(golden["z"]), schedule.respaced(steps)), golden[field]) <= TOLERANCE


def test_predicted_moments(golden, schedule):
    steps = next(field for field in golden if re.fullmatch(r"ddpm\d+", field)).removeprefix("ddpm")
    respaced = schedule.respaced(steps)
    z, index = torch.from_numpy(golden["z"]), torch.from_numpy(golden["pmv_t"])
    moments = predicted_moments(respaced, model(z, torch.tensor(respaced.timesteps)[index]), z, index)
    assert error(moments.mean, golden["pmv_mean"]) <= TOLERANCE
    assert error(moments.log_variance, golden["pmv_log_variance"]) <= TOLERANCE
    assert error(moments.x0, golden["pmv_pred_xstart"]) <= TOLERANCE


def test_the_tolerance_tells_the_exact_normal_distribution_apart(monkeypatch):
    golden = arrays(GOLDEN / "diffusion.npz")
    monkeypatch.setattr(gaussian, "_normal_cdf", torch.special.ndtr)
    assert error(losses(golden, NoiseSchedule.linear(), "dit")["vb"], golden["vb_dit"]) > 10 * TOLERANCE
