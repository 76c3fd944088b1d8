"""Networks, sampling and the update on CUDA tensors without storage: what would mix devices or wait for the host raises.

Torch's fake tensors follow a GPU's rules, autocast's types included. A build for CPUs knows no CUDA device, so a process of its
own is told of one that does nothing. Backward and streams need a real one: tests/test_gpu*.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule, Timesteps
from models import Backbone, DiT, Plan, create_model
from models.slices import SliceableLinear
from runtime.averages import LossAverages
from runtime.cuda_graphs import PlanGraphs
from runtime.execution import Execution, numerics
from runtime.optimizer_step import make_optimizer, update
from runtime.sampling import SamplingSettings, plain_forward, sample_latents
from runtime.settings import TrainingSettings
from runtime.training_step import Batch, TrainingStep

ROOT = Path(__file__).parents[1]
DEVICE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
extern "C" void pretend() { impl::registerDeviceGuard(kCUDA, new impl::NoOpDeviceGuardImpl<DeviceType::CUDA>()); }
"""
CUDA = torch.device("cuda", 0)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.skipif(shutil.which("g++") is None or torch.cuda.is_available(), reason="needs g++, and a GPU makes it needless")
def test_nothing_mixes_devices_or_waits_for_the_host(tmp_path: Path) -> None:
    (tmp_path / "device.cpp").write_text(DEVICE)
    parts = Path(torch.__file__).parent
    build = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{parts / 'include'}", "device.cpp", f"-L{parts / 'lib'}", "-lc10"]
    subprocess.run([*build, f"-Wl,-rpath,{parts / 'lib'}", "-o", "device.so"], cwd=tmp_path, check=True)
    words, environment = [sys.executable, __file__, str(tmp_path / "device.so")], {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


class NoCopies(TorchDispatchMode):
    """Copies between host and device, for which the host waits, are an error; fake tensors let them pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if len(met := {part.device for part in tree_leaves((args, kwargs, made)) if isinstance(part, Tensor)}) > 1:
            raise RuntimeError(f"{function} meets {met}")
        return made


def main(library: str) -> None:
    ctypes.CDLL(library).pretend()
    # Autocast and the gradient scaler switch themselves off where torch finds no GPU.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *arguments, **named: True

    def network(method: str, options: dict[str, Any]) -> DiT:
        with CUDA:
            return create_model(method, Backbone.named("DiT-T/2", (16, 16), num_classes=10), options)

    several = {"density": "8,5,2@0,300,600", "readd_position": True}
    with FakeTensorMode():
        there = torch.zeros(3, device=CUDA)
        with pytest.raises(RuntimeError, match="same device"):  # the checks themselves work
            there + torch.zeros(3)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with NoCopies(), pytest.raises(RuntimeError, match="meets"):
            there.to("cpu")
        check_sampling(network("sparsedit", several).requires_grad_(False), "bf16")
        check_dynamic_sampling(network("dydit", {}).requires_grad_(False))
        check_training_forward(network("dense", {}), "fp16")
        check_training_forward(network("sparsedit", several), "bf16")
        check_training_forward(network("dydit", {"complete_steps": None}), "bf16")
        check_training_forward(network("sprint", {}), "bf16")
        check_update(network("sparsedit", {}))


def halved(dit: Any, precision: str) -> Any:
    """The network's forward as an execution in half precision runs it."""
    for module in dit.modules():  # as `convert_linears`, whose way torch has not for fake tensors
        if type(module) in (torch.nn.Linear, SliceableLinear):
            module.weight, module.bias = (
                torch.nn.Parameter(p.to(HALF[precision]), False) for p in (module.weight, module.bias)
            )

    def predict(*given: Any) -> Tensor:
        with numerics(Execution(CUDA, precision)):
            output = plain_forward(dit, *given)
        assert output.dtype == torch.float32
        return output

    return predict


def check_dynamic_sampling(dit: Any) -> None:
    """Two widths; which tokens are on is given, as their number cannot be known here."""
    plans = [Plan(("sliced",), selection=(((0, 2), groups),) * 8) for groups in ((0, 1, 3), (0, 1, 2, 3))]
    dit.plan = lambda t: plans[t < 500]
    for block in dit.blocks:
        block.select = lambda logits: torch.arange(0, logits.numel(), 2, device=logits.device)
    settings, index = SamplingSettings(4.0, guidance_interval=(0.2, 0.8), num_sampling_steps="4"), torch.arange(6, device=CUDA)
    arguments = dit, settings, index, index, 0, CUDA, halved(dit, "bf16")
    sample_latents(*arguments)  # cuts the slices
    with NoCopies():
        assert sample_latents(*arguments).device == CUDA


def check_sampling(dit: Any, precision: str) -> None:
    """Steps with and without guidance, of several grids."""
    predict = halved(dit, precision)
    graphs = PlanGraphs(predict, lambda run: (run(), lambda: None))
    settings = SamplingSettings(4.0, guidance_interval=(0.2, 0.8), num_sampling_steps="4")
    NoiseSchedule.linear().respaced("4").tables(CUDA)  # copied once
    for count, run in ((6, predict), (16, graphs)):  # fewer samples than classes, and more
        index = torch.arange(count, device=CUDA)
        with NoCopies():
            latents = sample_latents(dit, settings, index % 10, index, 0, CUDA, run)
        assert latents.device == CUDA


def check_training_forward(dit: Any, precision: str) -> None:
    """Draws, noising, forward, losses and their averages."""
    NoiseSchedule.linear().tables(CUDA)
    step = TrainingStep(dit, EpsilonObjective(NoiseSchedule.linear(), 5.0, True), 0)
    bounds = Timesteps(*(torch.full((), bound, device=CUDA) for bound in (200, 400)))
    index = torch.arange(8, device=CUDA)
    plan = next(plan for interval, plan in dit.training_plans() if 200 in interval)
    batch = Batch(torch.zeros(8, 4, 16, 16, device=CUDA), index, index, bounds, plan)
    averages = LossAverages([range(500), range(500, 1000)], cast(Any, SimpleNamespace(device=CUDA)))
    with NoCopies():
        with torch.autocast("cuda", HALF[precision]):
            loss, parts = step(batch, torch.full((), 3, device=CUDA))
        averages.add(parts, 0, 1.0)
        averages.end_step(torch.isfinite(loss))


def check_update(dit: Any) -> None:
    """Unscaling, norm, clipping, optimizer, scaler."""
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    settings = TrainingSettings(gradient_clip=1.0, skip_gradient_norm=200.0)
    adamw, scaler = make_optimizer(trained, settings), torch.amp.GradScaler("cuda")
    # Stands in for accelerate's, which makes no fake ones.
    accelerator: Any = SimpleNamespace(scaler=scaler, unscale_gradients=lambda given: scaler.unscale_(given.optimizer))
    wrapped = SimpleNamespace(optimizer=adamw, zero_grad=adamw.zero_grad, param_groups=adamw.param_groups)
    average = SimpleNamespace(update=lambda *_: None)
    with NoCopies():
        for number in range(2):
            scaler.scale(torch.ones(1, device=CUDA))
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            outcome = update(dit, wrapped, cast(Any, average), settings, number, accelerator)
    assert {part.device for part in outcome} == {CUDA}
    assert all(state["step"].device == CUDA for state in adamw.state.values())


if __name__ == "__main__":
    main(sys.argv[1])
