"""What only a CUDA device can show. `make gpu-test`, or `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.gaussian import EpsilonObjective, Timesteps
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DiT, checkpoint_blocks, create_model
from runtime.distributed import set_numerics
from runtime.execution import Execution, ExecutionSettings, Executor, resolve_execution
from runtime.sampling import SamplingSettings, sample_latents
from runtime.seeding import Keys, normal
from runtime.training_step import Batch, TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def own_process() -> None:
    """What tests before this one leave to the process: TF32, and compiled blocks, which count against torch's limit."""
    set_numerics(tf32=False)
    torch.compiler.reset()


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
    plan = network.training_plans()[0][1]
    part = Batch(latents, labels, torch.arange(8, device="cuda"), Timesteps(start, stop), plan)
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


# Execution of sampling -----------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")
FORMS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": "default"},
    "graphs": {"cuda_graphs": True},
    "compiled graphs": {"compile": "default", "cuda_graphs": True},
    "efficient": {"attention": "efficient"},
    "math": {"attention": "math"},
}
HALF_FORMS = {**FORMS, "cudnn": {"attention": "cudnn"}, "flash": {"attention": "flash"}}
QUICK = SamplingSettings(4.0, guidance_interval=(0.2, 0.9), num_sampling_steps="8")


def sampled(network: DiT, execution: Execution) -> torch.Tensor:
    """Latents of six pictures by a copy of the network: guided and unguided steps, of several grids where it has them."""
    index = torch.arange(6, device="cuda")
    executor = Executor(copy.deepcopy(network), execution)
    return sample_latents(executor.network, QUICK, index % 10, index, 0, CUDA, executor)


def forwarded(network: DiT, execution: Execution) -> torch.Tensor:
    """One step as guidance runs it."""
    x, _, _ = batch()
    labels, rows = torch.tensor([1, 2, 10], device="cuda"), torch.arange(8, device="cuda") % 3
    with torch.no_grad():
        timestep = torch.tensor([450], device="cuda")
        return Executor(copy.deepcopy(network), execution)(x, timestep, labels, network.plan(450), rows)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


@contextmanager
def reads_raise() -> Iterator[None]:
    """Any operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "density"), [("dense", None), ("sparsedit", GRIDS), ("dydit", None)])
def test_a_fast_form_in_float32_is_the_plain_one(method: str, density: str | None, form: str) -> None:
    network = randomised(method, density).eval()
    plain = forwarded(network, Execution(CUDA))
    assert plain.abs().max() > 0.1
    assert error(forwarded(network, Execution(CUDA, **FORMS[form])), plain) < 1e-5


@pytest.mark.parametrize("form", HALF_FORMS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_fast_form_in_half_precision_is_as_near_to_float32_as_autocast_is(method: str, precision: str, form: str) -> None:
    network = randomised(method).eval()
    exact = forwarded(network, Execution(CUDA))
    x, _, _ = batch()
    labels, rows = torch.tensor([1, 2, 10], device="cuda"), torch.arange(8, device="cuda") % 3
    set_numerics(tf32=True)  # as an executor does: what autocast leaves in float32 is then rounded more than float16 is
    with torch.no_grad(), torch.autocast("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        plain = network(x, torch.tensor([450], device="cuda"), labels, network.plan(450), index=rows)
    ours = forwarded(network, Execution(CUDA, precision, **HALF_FORMS[form]))
    assert 0 < error(ours, exact) < 1.1 * error(plain, exact)


@pytest.mark.parametrize("form", ["graphs", "compiled graphs"])
def test_sampling_through_graphs_is_sampling_without(form: str) -> None:
    """Several graphs that share memory, replayed in turn."""
    network = randomised("sparsedit", GRIDS).eval()
    without = Execution(CUDA, **{**FORMS[form], "cuda_graphs": False})
    plain = sampled(network, without)
    assert error(sampled(network, Execution(CUDA, **FORMS[form])), plain) < 1e-4


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_never_waits_for_the_device(sampler: str, graphs: bool) -> None:
    network = randomised("sparsedit", GRIDS).eval()
    executor = Executor(network, Execution(CUDA, "bf16", cuda_graphs=graphs))
    settings = SamplingSettings(4.0, guidance_interval=(0.2, 0.9), num_sampling_steps="8", sampler=sampler)  # type: ignore[arg-type]
    index = torch.arange(6, device="cuda")
    arguments = network, settings, index % 10, index, 0, CUDA, executor
    first = sample_latents(*arguments)  # records; noise tables and timesteps go to the device
    with reads_raise():
        again = sample_latents(*arguments)
    assert error(again, first) < 1e-2


def test_a_read_is_noticed() -> None:
    with reads_raise(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def test_what_is_on_by_default_runs() -> None:
    execution = resolve_execution(ExecutionSettings(), CUDA)
    assert execution.cuda_graphs
    network = randomised("sparsedit", GRIDS).eval()
    assert error(sampled(network, execution), sampled(network, Execution(CUDA))) < 0.1


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="no torchao")
@pytest.mark.parametrize("form", ["compiled", "compiled graphs"])
@pytest.mark.parametrize("method", ["dense", "sparsedit"])
def test_fp8_is_near_float32(method: str, form: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU that does not multiply in fp8")
    network = randomised(method).eval()
    exact = forwarded(network, Execution(CUDA))
    bf16, fp8 = (forwarded(network, Execution(CUDA, precision, **FORMS[form])) for precision in ("bf16", "fp8"))
    assert error(bf16, exact) < error(fp8, exact) < 0.1
