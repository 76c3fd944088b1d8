"""What only a CUDA device can show. `make gpu-test`, or `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.gaussian import EpsilonObjective, Timesteps
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DiT, checkpoint_blocks, create_model
from runtime.sampling import SamplingSettings, sample_latents
from runtime.seeding import Keys, normal
from runtime.training import Batch, TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


GRIDS = "8,5,4,2@0,200,400,700"
"""On a map of 8 x 8 tokens; 5 does not divide it."""


def randomised(method: str, density: str | None = None) -> DiT:
    """A fresh DiT is the zero function; this one is not."""
    torch.manual_seed(0)
    options = {} if density is None else {"density": density}
    network = create_model(method, Backbone.named("DiT-S/2", (16, 16), num_classes=10), options)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.03)
    return network.cuda()


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.arange(count, device="cuda")
    return normal(Keys(0, 0, index), "test", (4, 16, 16)), index * 100, index % 10


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_is_near_float32(method: str) -> None:
    network, inputs = randomised(method), batch()
    with torch.no_grad():
        exact = network(*inputs)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rounded = network(*inputs)
    assert exact.abs().max() > 0.1
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu(method: str) -> None:
    network, inputs = randomised(method), batch()
    with torch.no_grad():
        there = network(*inputs).cpu()
        here = copy.deepcopy(network).cpu()(*(part.cpu() for part in inputs))
    assert (there - here).abs().max() < 1e-3 * here.abs().max()


def test_draws_are_those_of_the_cpu() -> None:
    index = torch.arange(1000)
    there = normal(Keys(3, 5, index.cuda()), "device", (17,)).cpu()
    assert (there - normal(Keys(3, 5, index), "device", (17,))).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_in_bf16_with_checkpointing_has_finite_gradients(method: str) -> None:
    network = randomised(method)
    checkpoint_blocks(network)
    step = TrainingStep(network, EpsilonObjective(NoiseSchedule.linear(), 5.0, learned_variance=True), seed=0)
    latents, _, labels = batch()
    start, stop = torch.tensor([0, 1000], device="cuda")
    part = Batch(latents, labels, torch.arange(8, device="cuda"), Timesteps(start, stop), network.plan(0))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _ = step(part, torch.tensor(0, device="cuda"))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


def gradients(network: DiT, timesteps: range) -> dict[str, torch.Tensor]:
    """Those of a training pass within `timesteps`, under their plan."""
    network.zero_grad()
    step = TrainingStep(network, EpsilonObjective(NoiseSchedule.linear(), 5.0, learned_variance=True), seed=0)
    latents, _, labels = batch()
    bounds = Timesteps(*(torch.tensor(bound, device="cuda") for bound in (timesteps.start, timesteps.stop)))
    part = Batch(latents, labels, torch.arange(8, device="cuda"), bounds, network.plan(timesteps.start))
    step(part, torch.tensor(0, device="cuda"))[0].backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def test_a_step_of_two_plans_trains_every_weight() -> None:
    network = randomised("sparsedit", GRIDS)
    optimizer = torch.optim.SGD([parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters() if parameter.requires_grad}
    for timesteps, _ in (network.training_plans()[1], network.training_plans()[3]):
        found = gradients(network, timesteps)
        assert set(found) == set(before)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        optimizer.step()
    assert all(not torch.equal(before[name], network.get_parameter(name)) for name in before)


def test_backward_of_a_grid_that_divides_the_map_is_the_same_each_time() -> None:
    """Attention aside, whose fast kernels may add in any order."""
    network = randomised("sparsedit", GRIDS)
    with sdpa_kernel(SDPBackend.MATH):
        first = gradients(network, range(400, 700))
        again = gradients(network, range(400, 700))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_several_grids_are_those_of_the_cpu() -> None:
    network, inputs = randomised("sparsedit", GRIDS), batch()
    with torch.no_grad():
        there = network(*inputs).cpu()
        here = copy.deepcopy(network).cpu()(*(part.cpu() for part in inputs))
    assert len({network.plan(int(t)) for t in inputs[1]}) == 4
    assert (there - here).abs().max() < 1e-3 * here.abs().max()


@pytest.mark.parametrize(("method", "density"), [*((method, None) for method in METHODS), ("sparsedit", GRIDS)])
def test_sampling_depends_on_seed_and_index_alone(method: str, density: str | None) -> None:
    network, device = randomised(method, density).eval(), torch.device("cuda")
    settings = SamplingSettings(num_sampling_steps="4")
    index = torch.arange(6)
    whole = sample_latents(network, settings, index % 10, index, 0, device)
    part = sample_latents(network, settings, index[2:4] % 10, index[2:4], 0, device)
    assert (whole[2:4] - part).abs().max() < 1e-2 * whole.abs().max()
