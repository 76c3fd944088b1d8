"""Training as only a CUDA device shows it. `make gpu-test`, or `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import forget_accelerate, random_network
from torch import Tensor

from diffusion.flow import FlowObjective
from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule
from models import Backbone, checkpoint_blocks
from runtime.alignment import Alignment
from runtime.prefetch import Prefetcher
from runtime.seeding import Keys, integers, normal
from runtime.settings import TrainingSettings
from runtime.training import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Synthetic:
    """Data that is made on the device; one number of one step may be broken."""

    broken_step = -1

    def __len__(self) -> int:
        return 64

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(len(positions), device=device)
        keys = Keys(0, step, index)
        latents = normal(keys, "latents", (4, 16, 16))
        return latents * float("nan") if step == self.broken_step else latents, integers(keys, "labels", 10)


@contextmanager
def trainer(run: Path, precision: str = "bf16", **chosen: Any) -> Iterator[Trainer]:
    forget_accelerate()
    torch.manual_seed(0)
    settings = TrainingSettings(global_batch_size=16, max_steps=40, density_groups=1, learning_rate=1e-3, **chosen)
    network = random_network("sparsedit", Backbone.named("DiT-S/2", (16, 16), num_classes=10), {"density": "4"})
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    objective = EpsilonObjective(NoiseSchedule.linear(), 5.0, True)
    made = Trainer(settings, accelerator, network, objective, Synthetic(), run, {})
    try:
        yield made
    finally:
        made.close()
        torch.cuda.set_sync_debug_mode("default")
        forget_accelerate()


def losses(made: Trainer, steps: int) -> list[float]:
    curve = []
    for _ in range(steps):
        made.optimize()
        made.settle()
        curve.append(made.losses.take()["loss"])
    return curve


class Aligned(Synthetic):
    """With targets of representation alignment."""

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        keys = Keys(0, step, torch.arange(len(positions), device=device))
        return *super().batch_at(step, positions, device), normal(keys, "targets", (64, 32)).half()


@pytest.mark.parametrize("compiled", ["none", "default"])
def test_alignment_waits_for_nothing_and_is_learned(compiled: str, tmp_path: Path) -> None:
    forget_accelerate()
    torch.manual_seed(0)
    settings = TrainingSettings(
        global_batch_size=16, max_steps=40, density_groups=1, learning_rate=1e-3, compile=compiled, alignment=0.5,
        alignment_block=4,
    )  # fmt: skip
    backbone = Backbone.named("SiT-S/2", (16, 16), num_classes=10, learn_sigma=False, objective="flow")
    network = random_network("sprint", backbone)
    alignment = Alignment(network, 4, 0.5, 32)
    accelerator, objective = Accelerator(mixed_precision="bf16"), FlowObjective("logit-normal", 1)
    made = Trainer(settings, accelerator, network, objective, Aligned(), tmp_path, {}, None, None, alignment)
    try:
        for _ in range(4):  # allocates, compiles
            made.optimize()
        before = made.losses.take()["alignment"]
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(30):
            made.optimize()
        torch.cuda.set_sync_debug_mode("default")
        assert made.losses.take()["alignment"] < before
    finally:
        torch.cuda.set_sync_debug_mode("default")
        made.close()
        forget_accelerate()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("chosen", [{"compile": "none"}, {"compile": "default"}, {"compile": "none", "gradient_clip": 1.0}])
def test_nothing_waits_for_the_device(precision: str, chosen: dict[str, Any], tmp_path: Path) -> None:
    with trainer(tmp_path, precision, **chosen) as made:
        for _ in range(4):  # allocates, compiles, copies tables
            made.optimize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(6):
            made.optimize()
        with pytest.raises(RuntimeError, match="synchroniz"):  # the check itself works
            made.losses.take()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_training_is_eager_training(checkpointing: str, tmp_path: Path) -> None:
    with trainer(tmp_path, "fp32", compile="none") as made:
        eager = losses(made, 8)
    with trainer(tmp_path, "fp32", compile="default", gradient_checkpointing=checkpointing) as made:
        assert losses(made, 8) == pytest.approx(eager, rel=1e-3)


def test_bf16_trains_as_float32_with_float32_weights(tmp_path: Path) -> None:
    with trainer(tmp_path, "fp32", compile="none") as made:
        exact = losses(made, 8)
    with trainer(tmp_path, "bf16", compile="none") as made:
        assert losses(made, 8) == pytest.approx(exact, rel=0.03)
        assert {parameter.dtype for parameter in made.network.parameters()} == {torch.float32}
        moments = [value for state in made.optimizer.state.values() for value in state.values()]
        assert {moment.dtype for moment in moments} == {torch.float32}


def test_a_scaler_finds_its_scale_without_reads(tmp_path: Path) -> None:
    with trainer(tmp_path, "fp16", compile="none") as made:
        scaler = made.accelerator.scaler
        assert scaler is not None
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
        made.optimize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(35):
            made.optimize()
        torch.cuda.set_sync_debug_mode("default")
        made.settle()
        assert 5 < made.skipped_steps < 36
        assert all(bool(torch.isfinite(parameter).all()) for parameter in made.network.parameters())


def test_a_step_that_is_not_finite_leaves_weights_and_moments(tmp_path: Path) -> None:
    with trainer(tmp_path, "bf16", compile="none", non_finite_limit=9) as made:
        made.optimize()
        made.optimize()
        before = copy.deepcopy(made.optimizer.state_dict()["state"]), [p.clone() for p in made.network.parameters()]
        made.data.broken_step = 2  # type: ignore[attr-defined]
        made.close()
        made._prefetcher = None  # it has read the step already
        made.optimize()
        after = made.optimizer.state_dict()["state"]
        assert all(torch.equal(a, b) for a, b in zip(before[1], made.network.parameters(), strict=True))
        assert all(torch.equal(value, after[place][name]) for place in after for name, value in before[0][place].items())
        with pytest.raises(ValueError, match="not finite"):
            made.settle()


def test_batches_made_ahead_are_whole_when_they_are_taken() -> None:
    device = torch.device("cuda")

    def make(number: int) -> tuple[Tensor, ...]:
        large = torch.zeros(2**26, device=device)
        for _ in range(20):
            large += number / 20
        return (large,)

    ahead = Prefetcher(make, 12, device)
    for number in range(12):
        (batch,) = ahead.take(number)
        total = batch.double().mean()
        del batch  # whose memory the thread may take
        torch.cuda._sleep(10_000_000)
        assert float(total) == pytest.approx(number, abs=1e-3)
    ahead.close()


def test_checkpointing_saves_memory() -> None:
    peaks = {}
    for mode in ("none", "selective", "full"):
        torch.manual_seed(0)
        network = random_network("dense", Backbone.named("DiT-S/2", (32, 32), num_classes=10)).cuda()
        if mode != "none":
            checkpoint_blocks(network, selective=mode == "selective")
        x, t = torch.randn(32, 4, 32, 32, device="cuda"), torch.arange(32, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            network(x, t, t % 10, network.plan(0)).square().mean().backward()
        peaks[mode] = torch.cuda.max_memory_allocated()
        del network
        torch.cuda.empty_cache()
    assert peaks["full"] < peaks["selective"] < peaks["none"]
