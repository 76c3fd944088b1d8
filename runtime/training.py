"""One training loop, the same for every method and objective."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.schedule import Timesteps
from models import DiT
from runtime.alignment import Alignment
from runtime.averages import LossAverages
from runtime.checkpoint import checkpoint_path, checkpoints, keep_last, read_header, read_tensors, save_checkpoint
from runtime.compilation import allow_graphs, plans_of_training, prepare_blocks, training_execution
from runtime.config import InputError, to_mapping
from runtime.density_groups import group_of, group_timestep, interval_of
from runtime.ema import ExponentialMovingAverage
from runtime.lagged_reads import LaggedReads
from runtime.logs import RunLog, memory_gib, say
from runtime.objectives import Objective
from runtime.optimizer_step import Outcome, learning_rate, make_optimizer, update
from runtime.prefetch import Prefetcher
from runtime.profiling import StepProfiler
from runtime.settings import TrainingSettings
from runtime.training_step import Batch, TrainingStep

ALIGNMENT = "alignment/"
"""What the names of the projector's tensors in a checkpoint begin with."""


class Data(Protocol):
    """Where batches come from: position j of step s names its sample, whoever asks."""

    def __len__(self) -> int: ...

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """positions (n,) int64 in the global batch, on the CPU -> latents (n, C, H, W) float32, labels (n,), and for a training
        that aligns targets (n, T, width), on `device`
        """


class Trainer:
    """Runs `TrainingStep` from the current step to the last, logging, averaging, and saving everything in one file.

    On a GPU the host stays a step ahead of the device: what a step found comes to it one step later.
    """

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
        probe: Callable[[DiT], Mapping[str, float]] | None = None,
        alignment: Alignment | None = None,
        lag: int | None = None,
    ) -> None:
        """`header` goes into every checkpoint; `grid` makes the sample picture (H, W, 3) of the averaged network and step;
        `probe` measures the averaged network beside each checkpoint, numbers by name for the log; `alignment` is trained along;
        `lag` is after how many steps the host learns whether one was finite (None: 1 on a GPU, else 0).

        `settings.density_groups` is a number that `check_groups` lets pass.
        """
        assert settings.density_groups is not None
        self.settings, self.accelerator, self.data, self.run_folder = settings, accelerator, data, run
        self.header, self.grid, self.probe = dict(header), grid, probe
        self.device = accelerator.device
        gpu = self.device.type == "cuda"
        self.network = network.to(self.device)
        self.groups, self.intervals = settings.density_groups, [interval for interval, _ in network.training_plans()]
        self.ema = ExponentialMovingAverage(self.network, settings.ema_decay, settings.ema_warmup)
        # After the average was copied, which runs as it is.
        prepare_blocks(self.network, settings.gradient_checkpointing, training_execution(settings, self.device).compile)
        self.objective = objective
        self.alignment = None if alignment is None else alignment.to(self.device)
        parameters = list(self._trained().values())
        step_module = TrainingStep(self.network, objective, settings.seed, self.alignment)
        allow_graphs(accelerator, plans_of_training(self.network))
        self.step_module, self.optimizer = accelerator.prepare(step_module, make_optimizer(parameters, settings))
        self.last_step = settings.max_steps or math.ceil(settings.epochs * len(data) / settings.global_batch_size)
        self.share = settings.global_batch_size // (accelerator.num_processes * settings.gradient_accumulation)
        self.step = 0
        self.skipped_steps = 0
        self.large_steps = 0
        self._saved_step = -1
        self._skipped_in_a_row = 0
        self._signals: list[int] = []
        self._leaving = False
        self._verdicts = LaggedReads(int(gpu) if lag is None else lag)
        ahead = gpu if settings.prefetch is None else settings.prefetch
        batches = self.last_step * settings.gradient_accumulation
        self._prefetcher = Prefetcher(self._read_batch, batches, self.device) if ahead else None
        self.losses = LossAverages(self.intervals, accelerator)

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the last step; a SIGTERM or a first Ctrl-C saves a checkpoint and leaves."""
        main = self.accelerator.is_main_process
        if self.step >= self.last_step and main:
            say(f"nothing to do: the run is at step {self.step} of {self.last_step}; raise --max-steps to train on.")

        def stop(number: int, frame: Any) -> None:
            self._signals.append(number)
            if number == signal.SIGINT:  # a second Ctrl-C does not wait for the step; a second SIGTERM is a launcher's habit
                signal.signal(number, previous[signal.SIGINT])

        signals = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            signal.signal(number, stop)
        log = RunLog(self.run_folder, self.step) if main else None
        bar = tqdm(total=self.last_step, initial=self.step, desc="train", unit="step", disable=not main, dynamic_ncols=True)
        steps = min(self.settings.profile, self.last_step - self.step)
        profiler = StepProfiler(self.run_folder / "profile", steps, self.device) if main and steps > 0 else None
        self._start_measuring()
        try:
            while self.step < self.last_step and not self._leaving:
                gradient_norm = self.optimize()
                bar.update()
                self._after_step(gradient_norm, bar, log)
                if profiler and profiler.step():
                    self._start_measuring()
            self.settle()
            if self._spoilt:
                raise InputError(self._not_finite(self.step))
            if main and self.step != self._saved_step:
                self.save()
            if main and self.step < self.last_step:
                by = signal.Signals(self._signals[0]).name if self._signals else "a signal to another process"
                say(f"stopped by {by}; saved at step {self.step}, the same command continues.")
        finally:
            for number in signals:
                signal.signal(number, previous[number])
            bar.close()
            self.close()
            if profiler:
                profiler.close()
            if log:
                log.close()

    def _after_step(self, gradient_norm: Tensor, bar: tqdm[Any], log: RunLog | None) -> None:
        """Log line, checkpoint and sample grid of the current step, where they are due."""
        settings, step = self.settings, self.step
        logged = step % settings.log_every == 0 or step == self.last_step
        saved = step % settings.checkpoint_every == 0 or step == self.last_step
        if logged or saved:
            self.settle()  # on every process at the same steps: what is found may end the run
        if logged:
            values = self._averages(gradient_norm)
            bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}")
            if log:
                log.scalars(step, values)
        if log and saved and not self._spoilt:
            self.save()
            if self.probe:
                log.scalars(step, self.probe(self.ema.network))
        if log and step in self.network.training_stages()[1:]:
            say(f"step {step}: the next stage of this training begins")
        if log and self.grid and step % settings.sample_every == 0:
            log.picture(step, "samples", self.grid(self.ema.network, step))
        self.ema.network.forget()  # what sampling kept is memory, and of no use to the next weights

    def optimize(self) -> Tensor:
        """One optimizer step: forward and backward over this process's share, then the update. -> gradient norm ()

        Nothing in it waits for the device, but the verdict on the step `lag` before. InputError where that ends the run.
        """
        rate = learning_rate(self.settings, self.step, self.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        accumulation = self.settings.gradient_accumulation
        sound: list[Tensor] = []
        number = torch.full((), self.step, dtype=torch.int64, device=self.device)
        for micro in range(accumulation):
            start = self._start_of(micro)
            place = self.step * accumulation + micro
            latents, labels, *targets = self._prefetcher.take(place) if self._prefetcher else self._read_batch(place)
            sound += [torch.isfinite(values).all() for values in (latents, *targets)]
            interval = self._interval_at(start)
            timesteps, plan = self.network.training_plans(self.step)[interval]
            bounds = (torch.full((), b, dtype=torch.int64, device=self.device) for b in (timesteps.start, timesteps.stop))
            positions = torch.arange(start, start + self.share, device=self.device)
            batch = Batch(latents, labels, positions, Timesteps(*bounds), plan, *targets)
            with self.accelerator.accumulate(self.step_module):
                loss, parts = self.step_module(batch, number)
                self.accelerator.backward(loss)
            self.losses.add(parts, interval, 1 / accumulation)
        outcome = update(self.network, self.optimizer, self.ema, self.settings, self.step, self.accelerator)
        self.losses.end_step(outcome.finite)
        self.step += 1
        for step, verdict in self._verdicts.put(self.step, self._verdict(outcome, torch.stack(sound).all())):
            self._judge(step, *verdict)
        return outcome.norm

    def settle(self) -> None:
        """Waits for the verdicts on all steps so far. InputError where one of them ends the run."""
        for step, verdict in self._verdicts.settle():
            self._judge(step, *verdict)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        if self._prefetcher:
            self._prefetcher.close()

    def _start_of(self, micro: int) -> int:
        """The first position in the global batch of this process's part of a micro-batch."""
        return (micro * self.accelerator.num_processes + self.accelerator.process_index) * self.share

    def _read_batch(self, place: int) -> tuple[Tensor, ...]:
        """Latents, labels and, where the training aligns, targets of this process's part of the run's micro-batch `place`."""
        step, micro = divmod(place, self.settings.gradient_accumulation)
        start = self._start_of(micro)
        return self.data.batch_at(step, torch.arange(start, start + self.share), self.device)

    def _interval_at(self, position: int) -> int:
        """The interval of timesteps from which the group of a position draws its timesteps at this step."""
        if len(self.intervals) == 1:
            return 0
        group = group_of(position, self.settings.global_batch_size, self.groups)
        timestep = group_timestep(self.settings.seed, self.step, group, self.groups, self.objective.timestep_at)
        return interval_of(self.intervals, timestep)

    def _verdict(self, outcome: Outcome, sound: Tensor) -> Tensor:
        """What the host must know of a step, all processes together: how many had gradients that were not finite, too large
        ones, data that were not finite, a signal to stop; and the gradient scaler's scale. -> (5,) float32
        """
        stopped = torch.full((), float(bool(self._signals)), device=self.device)
        found = torch.stack(((~outcome.finite).float(), outcome.large.float(), (~sound).float(), stopped))
        counts = self.accelerator.reduce(found, reduction="sum")
        one, scaler = torch.ones((1,), device=self.device), self.accelerator.scaler
        return torch.cat((counts, one if scaler is None else scaler.scale(one)))

    def _judge(self, step: int, not_finite: float, large: float, unsound: float, stopped: float, scale: float) -> None:
        """Counts a step in or as skipped. InputError where its data are broken or too many in a row were not finite."""
        self._leaving = self._leaving or stopped > 0
        self.large_steps += large > 0
        if not not_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self.skipped_steps += 1
        if unsound:
            raise InputError(
                f"{self.settings.feature_path} holds numbers that are not finite (met at step {step}); extract it again."
            )
        # While a scaler finds its scale, overflowing steps are its business.
        if self._skipped_in_a_row >= self.settings.non_finite_limit and scale <= 1.0:
            raise InputError(self._not_finite(step))

    @property
    def _spoilt(self) -> bool:
        """In a row of steps that are not finite the weights may be spoilt already; with a scaler that is its search."""
        return self._skipped_in_a_row > 0 and self.accelerator.scaler is None

    def _not_finite(self, step: int) -> str:
        saved = checkpoints(self.run_folder)
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        return (
            f"training stopped at step {step}: the gradients were not finite {self._skipped_in_a_row} steps in a row; "
            f"{good}; lower --learning-rate, set --gradient-clip, or use bf16 or fp32."
        )

    def _averages(self, gradient_norm: Tensor) -> dict[str, float]:
        """Mean losses of the finite steps since the last call, over all processes, and the speed."""
        values = self.losses.take()
        if torch.isfinite(gradient_norm):  # JSON has no NaN; skipped_steps tells of it
            values["gradient_norm"] = float(gradient_norm)
        speed = (self.step - self._logged_step) / (time.perf_counter() - self._started)
        values |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "steps_per_second": speed,
            "images_per_second": speed * self.settings.global_batch_size,
            "memory_gib": memory_gib(),
            "skipped_steps": self.skipped_steps,
        }
        if self.settings.skip_gradient_norm is not None:
            values["large_gradient_steps"] = self.large_steps
            self._warn_of_large_steps()
        self._start_measuring()
        return values

    def _warn_of_large_steps(self) -> None:
        """A training of which most updates are left out looks alive and learns next to nothing."""
        steps, large = self.step - self._logged_step, self.large_steps - self._logged_large
        if 2 * large > steps and self.accelerator.is_main_process:
            say(
                f"WARNING: {large} of the last {steps} updates were left out, their gradient norms were above "
                f"--skip-gradient-norm {self.settings.skip_gradient_norm:g}; lower --learning-rate, or raise the limit."
            )

    def _start_measuring(self) -> None:
        """From here on what the next log line says of steps, and on a GPU of the peak of memory, is measured."""
        self._started, self._logged_step, self._logged_large = time.perf_counter(), self.step, self.large_steps
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    # State -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint of the current step and removes the oldest beyond those to keep."""
        tensors = {f"model/{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"ema/{key}": value for key, value in self.ema.network.state_dict().items()}
        if self.alignment:
            tensors |= {f"{ALIGNMENT}{key}": value for key, value in self.alignment.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        for place, name in enumerate(self._trained()):
            for moment, value in state.get(place, {}).items():
                tensors[f"optimizer/{name}/{moment}"] = value
        scaler = self.accelerator.scaler
        header = {
            **self.header,
            "step": self.step,
            "samples_seen": self.step * self.settings.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "large_gradient_steps": self.large_steps,
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
        moments, state, trained = read_tensors(path, "optimizer/"), self.optimizer.state_dict(), self._trained()
        names = {name: place for place, name in enumerate(trained)}
        expected = {f"{name}/{moment}": like.shape for name, like in trained.items() for moment in ("exp_avg", "exp_avg_sq")}
        expected |= {f"{name}/step": torch.Size() for name in trained}
        stepped = header["step"] > header["skipped_steps"]  # before the first step that counts there may be no moments
        if {key: value.shape for key, value in moments.items()} != expected and (moments or stepped):
            raise InputError(f"{path} lacks optimizer state; delete it, and the same command continues from the one before.")
        saved: dict[str, nn.Module] = {"model/": self.network, "ema/": self.ema.network}
        for prefix, module in (saved | ({ALIGNMENT: self.alignment} if self.alignment else {})).items():
            tensors, own = read_tensors(path, prefix), module.state_dict()
            if {key: value.shape for key, value in tensors.items()} != {key: value.shape for key, value in own.items()}:
                raise InputError(f"{path} lacks weights; delete it, and the same command continues from the one before.")
            module.load_state_dict(tensors)
        state["state"] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            state["state"].setdefault(names[name], {})[moment] = value
        self.optimizer.load_state_dict(state)
        if self.accelerator.scaler is not None and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.step, self.skipped_steps = header["step"], header["skipped_steps"]
        self.large_steps = header.get("large_gradient_steps", 0)  # older checkpoints could not skip them
        if path.parent == checkpoint_path(self.run_folder, self.step).parent:
            self._saved_step = self.step

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by the names under which a checkpoint holds its moments."""
        named = dict(self.network.named_parameters())
        if self.alignment:
            named |= {f"{ALIGNMENT}{name}": parameter for name, parameter in self.alignment.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}
