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
from models import Backbone, DiT, create_model
from runtime.averages import LossAverages
from runtime.cuda_graphs import PlanGraphs
from runtime.execution import Execution, numerics
from runtime.optimizer_step import make_optimizer, update
from runtime.sampling import SamplingSettings, plain_forward, sample_latents
from runtime.settings import TrainingSettings
from runtime.training import Batch, TrainingStep

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
        check_training_forward(network("dense", {}), "fp16")
        check_training_forward(network("sparsedit", several), "bf16")
        check_update(network("sparsedit", {}))


def check_sampling(dit: Any, precision: str) -> None:
    """Steps with and without guidance, of several grids."""
    for module in dit.modules():  # as `convert_linears`, whose way torch has not for fake tensors
        if type(module) is torch.nn.Linear:
            module.weight, module.bias = (
                torch.nn.Parameter(p.to(HALF[precision]), False) for p in (module.weight, module.bias)
            )

    def predict(*given: Any) -> Tensor:
        with numerics(Execution(CUDA, precision)):
            output = plain_forward(dit, *given)
        assert output.dtype == torch.float32
        return output

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
    batch = Batch(torch.zeros(8, 4, 16, 16, device=CUDA), index, index, bounds, dit.plan(200))
    averages = LossAverages([range(500), range(500, 1000)], cast(Any, SimpleNamespace(device=CUDA)))
    with NoCopies():
        with torch.autocast("cuda", HALF[precision]):
            loss, parts = step(batch, torch.full((), 3, device=CUDA))
        averages.add(parts, 0, 1.0)
        averages.end_step(torch.isfinite(loss))


def check_update(dit: Any) -> None:
    """Unscaling, norm, clipping, optimizer, scaler."""
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    adamw, scaler = make_optimizer(trained, TrainingSettings()), torch.amp.GradScaler("cuda")
    # Stands in for accelerate's, which makes no fake ones.
    accelerator: Any = SimpleNamespace(scaler=scaler, unscale_gradients=lambda given: scaler.unscale_(given.optimizer))
    wrapped, average = SimpleNamespace(optimizer=adamw, zero_grad=adamw.zero_grad), SimpleNamespace(update=lambda *_: None)
    with NoCopies():
        for number in range(2):
            scaler.scale(torch.ones(1, device=CUDA))
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            norm, finite = update(dit, wrapped, cast(Any, average), 1.0, number, accelerator)
    assert norm.device == finite.device == CUDA
    assert all(state["step"].device == CUDA for state in adamw.state.values())


if __name__ == "__main__":
    main(sys.argv[1])
