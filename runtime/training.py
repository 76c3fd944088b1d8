"""One training step and one training loop, the same for every method and objective."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from diffusion.schedule import Timesteps
from models import DiT, Plan
from runtime.averages import LossAverages
from runtime.checkpoint import checkpoint_path, checkpoints, keep_last, read_header, read_tensors, save_checkpoint
from runtime.config import InputError, to_mapping
from runtime.density_groups import group_of, group_timestep, interval_of
from runtime.ema import ExponentialMovingAverage
from runtime.logs import RunLog, memory_gib, say
from runtime.seeding import Keys, key_words
from runtime.settings import TrainingSettings


class Objective(Protocol):
    """What is noised and predicted, and the loss of a prediction."""

    def noised(self, x0: Tensor, keys: Keys, timesteps: Timesteps) -> Any:
        """Draws timesteps within `timesteps`, and noise: an object with `x_t` (N, C, H, W), `t` (N,) that `losses` takes."""

    def losses(self, output: Tensor, noised: Any) -> Mapping[str, Tensor]:
        """Losses per sample, each (N,): "loss" is the total, the others are its parts."""


class Data(Protocol):
    """Where batches come from: position j of step s names its sample, whoever asks."""

    def __len__(self) -> int: ...

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """positions (n,) int64 in the global batch, on the CPU -> latents (n, C, H, W) float32, labels (n,), on `device`"""


class Batch(NamedTuple):
    """What one process computes at once. All its timesteps lie in one interval of the token density, whose plan this is."""

    latents: Tensor  # (n, C, H, W)
    labels: Tensor  # (n,)
    positions: Tensor  # (n,) int64, in the global batch
    timesteps: Timesteps
    plan: Plan


class TrainingStep(nn.Module):
    """Draw, noise, predict, score. This is what accelerate wraps; nothing but its `forward` is called on the wrapped module.

    Compiled, it makes one graph for each signature of a plan: what else changes from step to step comes in tensors.
    """

    def __init__(self, network: DiT, objective: Objective, seed: int) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.seed = seed

    def forward(self, batch: Batch, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """step () int64 -> scalar loss, its parts by name"""
        keys = Keys(self.seed, step, batch.positions)
        noised = self.objective.noised(batch.latents, keys, batch.timesteps)
        outputs, features = self.network.training_forward(
            noised.x_t, noised.t, batch.labels, batch.plan, self.network.draw(keys)
        )
        total, parts = batch.latents.new_zeros(()), {}
        for name, (output, weight) in outputs.items():
            for part, values in self.objective.losses(output, noised).items():
                parts[part if len(outputs) == 1 else f"{name}/{part}"] = values.mean().detach()
                total = total + weight * values.mean() if part == "loss" else total
        for name, value in self.network.extra_losses(features, step).items():
            parts[name], total = value.detach(), total + value
        return total, {**parts, "loss": total.detach()}


def allow_graphs(accelerator: Accelerator, plans: Sequence[tuple[range, Plan]]) -> None:
    """Where the launcher asks for compilation (`accelerate launch --dynamo_backend`): one graph for each signature."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    import torch._dynamo  # a second, which others need not wait

    torch.compiler.assume_constant_result(key_words)
    if plugin.dynamic is None:  # torch's default would make the second grid met a variable, and slow graphs for any grid
        plugin.dynamic = False
    signatures = {plan.signature for _, plan in plans}
    # Beyond its limit, of 8, torch goes back to running uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(signatures))


class Trainer:
    """Runs `TrainingStep` from the current step to the last, logging, averaging, and saving everything in one file."""

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        network: DiT,
        objective: Objective,
        data: Data,
        run: Path,
        header: Mapping[str, Any],
        grid: Callable[[nn.Module, int], Tensor] | None = None,
    ) -> None:
        """`header` goes into every checkpoint; `grid` makes the sample picture (H, W, 3) of the averaged network and step.

        `settings.density_groups` is a number that `check_groups` lets pass.
        """
        assert settings.density_groups is not None
        self.settings, self.accelerator, self.data, self.run_folder = settings, accelerator, data, run
        self.header, self.grid = dict(header), grid
        self.network = network.to(accelerator.device)
        self.groups, self.plans = settings.density_groups, network.training_plans()
        self.ema = ExponentialMovingAverage(self.network, settings.ema_decay, settings.ema_warmup)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        step_module = TrainingStep(self.network, objective, settings.seed)
        allow_graphs(accelerator, self.plans)
        self.step_module, self.optimizer = accelerator.prepare(step_module, optimizer)
        self.last_step = settings.max_steps or math.ceil(settings.epochs * len(data) / settings.global_batch_size)
        self.step = 0
        self.skipped_steps = 0
        self._saved_step = -1
        self._skipped_in_a_row = 0
        self.losses = LossAverages([timesteps for timesteps, _ in self.plans], accelerator)

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the last step; a SIGTERM or a first Ctrl-C saves a checkpoint and leaves."""
        main = self.accelerator.is_main_process
        if self.step >= self.last_step and main:
            say(f"nothing to do: the run is at step {self.step} of {self.last_step}; raise --max-steps to train on.")
        terminated: list[int] = []

        def stop(number: int, frame: Any) -> None:
            terminated.append(number)
            if number == signal.SIGINT:  # a second Ctrl-C does not wait for the step; a second SIGTERM is a launcher's habit
                signal.signal(number, previous[signal.SIGINT])

        signals = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            signal.signal(number, stop)
        log = RunLog(self.run_folder, self.step) if main else None
        bar = tqdm(total=self.last_step, initial=self.step, desc="train", unit="step", disable=not main, dynamic_ncols=True)
        self._started, self._logged_step = time.perf_counter(), self.step
        try:
            while self.step < self.last_step and not self._agreed(bool(terminated)):
                gradient_norm = self.optimize()
                bar.update()
                if self.step % self.settings.log_every == 0 or self.step == self.last_step:
                    values = self._averages(gradient_norm)
                    bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}")
                    if log:
                        log.scalars(self.step, values)
                if main and self.step % self.settings.checkpoint_every == 0 and not self._spoilt:
                    self.save()
                if log and self.grid and self.step % self.settings.sample_every == 0:
                    log.picture(self.step, "samples", self.grid(self.ema.network, self.step))
            if self._spoilt:
                raise InputError(self._not_finite())
            if main and self.step != self._saved_step:
                self.save()
            if main and self.step < self.last_step:
                by = signal.Signals(terminated[0]).name if terminated else "a signal to another process"
                say(f"stopped by {by}; saved at step {self.step}, the same command continues.")
        finally:
            for number in signals:
                signal.signal(number, previous[number])
            bar.close()
            if log:
                log.close()

    def _agreed(self, terminated: bool) -> bool:
        """Whether any process was told to stop: they must leave at the same step, or the rest would wait for the gone."""
        if self.accelerator.num_processes == 1:
            return terminated
        flag = torch.tensor(float(terminated), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def optimize(self) -> Tensor:
        """One optimizer step: forward and backward over this process's share, then the update. -> gradient norm ()"""
        rate = learning_rate(self.settings, self.step, self.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device, processes = self.accelerator.device, self.accelerator.num_processes
        accumulation = self.settings.gradient_accumulation
        share = self.settings.global_batch_size // (processes * accumulation)
        seen: list[Tensor] = []
        number = torch.full((), self.step, dtype=torch.int64, device=device)
        for micro in range(accumulation):
            start = (micro * processes + self.accelerator.process_index) * share
            positions = torch.arange(start, start + share)
            latents, labels = self.data.batch_at(self.step, positions, device)
            seen.append(latents)
            interval = self._interval_at(start)
            timesteps, plan = self.plans[interval]
            bounds = (torch.full((), bound, dtype=torch.int64, device=device) for bound in (timesteps.start, timesteps.stop))
            batch = Batch(latents, labels, positions.to(device), Timesteps(*bounds), plan)
            with self.accelerator.accumulate(self.step_module):
                loss, parts = self.step_module(batch, number)
                self.accelerator.backward(loss)
            self.losses.add(parts, interval, 1 / accumulation)
        norm = self._update()
        if self._skipped_in_a_row and not all(bool(torch.isfinite(latents).all()) for latents in seen):
            raise InputError(
                f"{self.settings.feature_path} holds numbers that are not finite (met at step {self.step}); extract it again."
            )
        return norm

    def _interval_at(self, position: int) -> int:
        """The interval of `self.plans` from which the group of a position draws its timesteps at this step."""
        if len(self.plans) == 1:
            return 0
        group = group_of(position, self.settings.global_batch_size, self.groups)
        timestep = group_timestep(self.settings.seed, self.step, group, self.groups)
        return interval_of([timesteps for timesteps, _ in self.plans], timestep)

    def _update(self) -> Tensor:
        """Applies the accumulated gradients, unless they are not finite; then the average and the logged losses follow."""
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        # Gradients are reduced over the processes, so all of them decide alike.
        finite = bool(torch.isfinite(norm))
        if finite and self.settings.gradient_clip is not None:
            clip_grads_with_norm_(self.parameters, self.settings.gradient_clip, norm)
        if finite:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers its scale
        self.optimizer.zero_grad()
        if finite:
            self.ema.update(self.network, self.step)
        self.losses.end_step(finite)
        self._count_skipped(finite)
        self.step += 1
        return norm

    def _count_skipped(self, finite: bool) -> None:
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.skipped_steps += not finite
        if self._skipped_in_a_row < self.settings.non_finite_limit:
            return
        scaler = self.accelerator.scaler
        # While a scaler finds its scale, overflowing steps are its business.
        if scaler is None or scaler.get_scale() <= 1.0:
            raise InputError(self._not_finite())

    @property
    def _spoilt(self) -> bool:
        """In a row of steps that are not finite the weights may be spoilt already; with a scaler that is its search."""
        return self._skipped_in_a_row > 0 and self.accelerator.scaler is None

    def _not_finite(self) -> str:
        saved = checkpoints(self.run_folder)
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        return (
            f"training stopped at step {self.step}: the gradients were not finite {self._skipped_in_a_row} steps in a row; "
            f"{good}; lower --learning-rate, set --gradient-clip, or use bf16 or fp32."
        )

    def _averages(self, gradient_norm: Tensor) -> dict[str, float]:
        """Mean losses of the finite steps since the last call, over all processes, and the speed."""
        values = self.losses.take()
        seconds = time.perf_counter() - self._started
        speed = (self.step - self._logged_step) / seconds
        if torch.isfinite(gradient_norm):  # JSON has no NaN; skipped_steps tells of it
            values["gradient_norm"] = float(gradient_norm)
        values |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "steps_per_second": speed,
            "images_per_second": speed * self.settings.global_batch_size,
            "memory_gib": memory_gib(),
            "skipped_steps": self.skipped_steps,
        }
        self._started, self._logged_step = time.perf_counter(), self.step
        return values

    # State -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint of the current step and removes the oldest beyond those to keep."""
        tensors = {f"model/{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"ema/{key}": value for key, value in self.ema.network.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        for place, name in enumerate(self._parameter_names()):
            for moment, value in state.get(place, {}).items():
                tensors[f"optimizer/{name}/{moment}"] = value
        scaler = self.accelerator.scaler
        header = {
            **self.header,
            "step": self.step,
            "samples_seen": self.step * self.settings.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "scaler": scaler.state_dict() if scaler else None,
            "settings": to_mapping(self.settings),
        }
        save_checkpoint(checkpoint_path(self.run_folder, self.step), tensors, header)
        keep_last(self.run_folder, self.settings.keep_checkpoints)
        self._saved_step = self.step

    def restore(self, path: Path) -> None:
        """Takes up weights, average, optimizer, scaler, counters and position from a checkpoint.

        There are no random states beside: every draw is a function of (seed, step, position in the batch).
        """
        header = read_header(path)
        if header is None:
            raise InputError(f"{path} is no training checkpoint of ours; give it as --pretrained to start from its weights.")
        moments, state = read_tensors(path, "optimizer/"), self.optimizer.state_dict()
        names = {name: place for place, name in enumerate(self._parameter_names())}
        stepped = names if header["step"] > header["skipped_steps"] else ()
        if {key.rpartition("/")[0] for key in moments} != set(stepped):
            raise InputError(f"{path} lacks optimizer state; delete it, and the same command continues from the one before.")
        for prefix, network in (("model/", self.network), ("ema/", self.ema.network)):
            tensors = read_tensors(path, prefix)
            if tensors.keys() != network.state_dict().keys():
                raise InputError(f"{path} lacks weights; delete it, and the same command continues from the one before.")
            network.load_state_dict(tensors)
        state["state"] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            state["state"].setdefault(names[name], {})[moment] = value
        self.optimizer.load_state_dict(state)
        if self.accelerator.scaler is not None and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.step, self.skipped_steps = header["step"], header["skipped_steps"]
        if path.parent == checkpoint_path(self.run_folder, self.step).parent:
            self._saved_step = self.step

    def _parameter_names(self) -> list[str]:
        return [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]


def learning_rate(settings: TrainingSettings, step: int, last_step: int) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then constant or a half cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, last_step - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
