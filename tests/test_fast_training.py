"""Training without waiting for the device: nothing is read back within a step, and late news change nothing that counts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import WithScaler, alone, call, differing, header_at, metrics, random_network, recorded, state_at, succeed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train
from diffusion import flow
from diffusion.gaussian import EpsilonObjective
from models import Backbone, DyDiT
from runtime import distributed, lagged_reads, training
from runtime.checkpoint import checkpoints
from runtime.config import InputError
from runtime.objectives import make_objective
from runtime.seeding import Keys, integers, normal
from runtime.settings import TrainingSettings, with_objective
from runtime.training import Trainer

RUN = "DiT-T-2-sparsedit-64"


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Eight steps of SparseDiT on random latents."""
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64",
            "--max-steps", "8", "--global-batch-size", "8", "--log-every", "2", "--checkpoint-every", "3",
            "--keep-checkpoints", "9", "--lr", "1e-3", "--results-dir", str(tmp_path)]  # fmt: skip


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has: the host learns of a step when the next one is under way."""
    monkeypatch.setattr(Trainer, "__init__", partialmethod(Trainer.__init__, lag=1))


def not_finite_at(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    losses = EpsilonObjective.losses

    def planted(self: EpsilonObjective, *arguments: Any) -> dict[str, Tensor]:
        calls.append(len(calls))
        result = losses(self, *arguments)
        return {name: value * float("nan") for name, value in result.items()} if calls[-1] in steps else result

    monkeypatch.setattr(EpsilonObjective, "losses", planted)


# Nothing is read -----------------------------------------------------------------------------------------------------


class HostRead(AssertionError):
    """A number was read from what stands for the device."""


class NoReads(TorchDispatchMode):
    """On a CPU no read makes anybody wait; here it raises, whether it is spelt .item(), bool(), a mask or a list."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).split(".")[1] in self.READS:
            raise HostRead(str(function))
        return function(*args, **(kwargs or {}))


class NoLists(TorchFunctionMode):
    """What does not pass the dispatcher: a CPU tensor's memory is simply looked at."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tolist", "numpy", "__array__", "cpu"):
            raise HostRead(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it a read raises, but of copies that have arrived, and of what is computed on the host in any case."""

    def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return function(*arguments)

        return wrapper

    with monkeypatch.context() as patched, NoReads(), NoLists():
        patched.setattr(lagged_reads, "on_host", on_the_host(lagged_reads.on_host))
        patched.setattr(training, "group_timestep", on_the_host(training.group_timestep))
        yield


class Synthetic:
    """Data that is made on the device."""

    def __len__(self) -> int:
        return 64

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        keys = Keys(0, step, positions).on(device)
        return normal(keys, "latents", (4, 8, 8)), integers(keys, "labels", 3)


VARYING = {"density": "4,2@0,500"}


@contextlib.contextmanager
def trainer(
    run: Path, make: Any = Accelerator, lag: int = 1, method: str = "sparsedit", options: Any = VARYING, **chosen: Any
) -> Iterator[Trainer]:
    """A trainer on synthetic data."""
    settings = with_objective(
        TrainingSettings(global_batch_size=8, max_steps=20, density_groups=2, gradient_accumulation=2, **chosen)
    )
    with alone():
        backbone = Backbone.named(
            "DiT-T/2", (8, 8), num_classes=3, learn_sigma=bool(settings.learn_sigma), objective=str(settings.objective)
        )
        network = random_network(method, backbone, options)
        accelerator = make(cpu=True, gradient_accumulation_steps=2)
        made = Trainer(settings, accelerator, network, make_objective(settings), Synthetic(), run, {}, lag=lag)
        yield made
        made.close()


STAGES: dict[str, Any] = {"method": "dydit", "options": {"complete_steps": 2}, "skip_gradient_norm": 200.0}
FLOW: dict[str, Any] = {"objective": "flow"}
CASES = [
    {"min_snr_gamma": 5.0},
    {"gradient_clip": 0.1},
    {"gradient_checkpointing": "selective"},
    {"make": WithScaler},
    STAGES,
    FLOW,
    {**FLOW, "flow_times": "uniform", "method": "sprint", "options": {}},
    {**FLOW, "method": "sprint", "options": {"drop_pattern": "random"}, "timestep_strata": 2},
]


@pytest.mark.parametrize("chosen", CASES)
def test_a_step_reads_nothing(chosen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer(tmp_path, **chosen) as made:
        made.optimize()
        with nothing_is_read(monkeypatch):
            for _ in range(3):
                made.optimize()
        made.settle()
        assert made.skipped_steps == 0
        assert 0 < made.losses.take()["loss"] < 100


def finite_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    update = training.update
    monkeypatch.setattr(training, "update", lambda *arguments: (out := update(*arguments), bool(out[1]))[0])


def loss_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    add = training.LossAverages.add
    monkeypatch.setattr(
        training.LossAverages, "add", lambda self, parts, *rest: (parts["loss"].item(), add(self, parts, *rest))
    )


def test_a_read_of_the_step_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target_at = DyDiT.target_at
    monkeypatch.setattr(DyDiT, "target_at", lambda self, step: target_at(self, int(step)))
    with trainer(tmp_path, **STAGES) as made, nothing_is_read(monkeypatch), pytest.raises(HostRead):
        made.optimize()


def norm_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    update = training.update
    monkeypatch.setattr(training, "update", lambda *arguments: (out := update(*arguments), out[0].tolist())[0])


def verdict_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put = lagged_reads.LaggedReads.put
    monkeypatch.setattr(
        lagged_reads.LaggedReads, "put", lambda self, step, values: (put(self, step, values), values.tolist())[0]
    )


def test_a_read_of_the_drawn_times_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_at = flow.time_at
    monkeypatch.setattr(flow, "time_at", lambda times, share: time_at(times, share) * (share.max() < 2).item())
    chosen = {**FLOW, "method": "sprint", "options": {}}
    with trainer(tmp_path, **chosen) as made, nothing_is_read(monkeypatch), pytest.raises(HostRead):
        made.optimize()


@pytest.mark.parametrize("bug", [finite_on_the_host, loss_on_the_host, norm_in_a_list, verdict_at_once])
def test_a_read_is_noticed(bug: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with trainer(tmp_path) as made, nothing_is_read(monkeypatch), pytest.raises(HostRead):
        made.optimize()


# Late news -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [range(0), range(4, 5), range(5, 7)])
def test_late_news_change_no_bit(broken: range, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, average, moments, which checkpoints there are, and every logged number but the speed."""
    for name, lag in (("at-once", 0), ("late", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "__init__", partialmethod(Trainer.__init__, lag=lag))
            not_finite_at(broken, patched)
            succeed("train", *words, "--run-name", name)
    assert_same_run(tmp_path / "late", tmp_path / "at-once")
    assert header_at(tmp_path / "late")["skipped_steps"] == len(broken)
    saved = [int(path.stem) for path in checkpoints(tmp_path / "late")]
    assert saved == [step for step in (3, 6, 8) if step - 1 not in broken]


def assert_same_run(one: Path, other: Path) -> None:
    assert [path.name for path in checkpoints(one)] == [path.name for path in checkpoints(other)]
    assert differing(state_at(one), state_at(other)) == []
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for name in ours.keys() | theirs.keys():
            assert "per_second" in name or name == "memory_gib" or ours[name] == theirs[name]


def test_a_limit_met_late_names_its_step(
    words: list[str], lagging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_finite_at(range(3, 100), monkeypatch)
    result = call("train", *words, "--log-every", "50", "--non-finite-limit", "2", "--max-steps", "50")
    assert result.code == 2
    assert "training stopped at step 5: the gradients were not finite 2 steps in a row" in result.err
    assert f"the last good checkpoint is {tmp_path}/{RUN}/checkpoints/0000003.safetensors" in result.err
    assert [int(path.stem) for path in checkpoints(tmp_path / RUN)] == [3]


def test_a_scaler_searches_as_far(words: list[str], lagging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Accelerator", WithScaler)
    not_finite_at(range(100), monkeypatch)
    result = call("train", *words, "--max-steps", "50", "--log-every", "50", "--checkpoint-every", "50")
    assert result.code == 2
    assert "stopped at step 8: the gradients were not finite 8 steps in a row" in result.err


def test_broken_features_are_named_late(words: list[str], lagging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_at = train.TrainingData.batch_at

    def broken(self: Any, step: int, positions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        latents, labels = batch_at(self, step, positions, *rest)
        return latents * (float("nan") if step == 4 and positions[0] == 0 else 1.0), labels  # the first micro-batch alone

    monkeypatch.setattr(train.TrainingData, "batch_at", broken)
    result = call("train", *words, "--log-every", "50", "--checkpoint-every", "50", "--gradient-accumulation", "2")
    assert result.code == 2
    assert "holds numbers that are not finite (met at step 5); extract it again." in result.err


def test_a_signal_met_late_saves_and_continues(
    words: list[str], lagging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_at = train.TrainingData.batch_at

    def terminated(self: Any, step: int, *rest: Any) -> tuple[Tensor, Tensor]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(self, step, *rest)

    succeed("train", *words, "--run-name", "whole")
    with monkeypatch.context() as patched:
        patched.setattr(train.TrainingData, "batch_at", terminated)
        said = succeed("train", *words, "--log-every", "50", "--checkpoint-every", "50").out
    assert "stopped by SIGTERM; saved at step 5" in said  # one step after the one that it came in
    succeed("train", *words)
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "whole")) == []


def test_a_checkpoint_of_skipped_steps_alone_continues(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a scaler searches, moments exist before the first step that counts."""
    monkeypatch.setattr(distributed, "Accelerator", WithScaler)
    with monkeypatch.context() as patched:
        not_finite_at(range(3), patched)
        succeed("train", *words, "--max-steps", "3")
        assert header_at(tmp_path / RUN)["skipped_steps"] == 3
    with monkeypatch.context() as patched:
        not_finite_at(range(3), patched)
        succeed("train", *words, "--run-name", "whole")
    succeed("train", *words)
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "whole")) == []


def test_a_step_that_does_not_count_leaves_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself does nothing, in the first step too; known bad: without its flag the weights are lost."""
    step = torch.optim.AdamW.step

    def without_its_flag(self: torch.optim.AdamW) -> None:
        self.found_inf = None  # type: ignore[attr-defined]
        step(self)

    not_finite_at(range(100), monkeypatch)
    for flagged in (True, False):
        with trainer(tmp_path) as made, monkeypatch.context() as patched:
            if not flagged:
                patched.setattr(torch.optim.AdamW, "step", without_its_flag)
            before = {name: value.clone() for name, value in made.network.state_dict().items()}
            made.optimize()
            after = made.network.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before) == flagged


# Batches ahead of time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--gradient-accumulation", "2", "--density", "4,3,2,1@0,150,500,750"]])
def test_batches_made_ahead_are_the_same(
    more: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, list[tuple[Tensor, Tensor]]] = {"no-prefetch": [], "prefetch": []}
    threads = threading.active_count()
    for flag, batches in made.items():
        with monkeypatch.context() as patched:
            patched.setattr(train.TrainingData, "batch_at", recorded(train.TrainingData.batch_at, batches))
            succeed("train", *words, *more, f"--{flag}", "--run-name", flag)
    assert threading.active_count() == threads
    assert_same_run(tmp_path / "prefetch", tmp_path / "no-prefetch")
    for ours, theirs in zip(made["prefetch"], made["no-prefetch"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    checkpoints(tmp_path / "prefetch")[-1].unlink()
    succeed("train", *words, *more, "--prefetch", "--run-name", "prefetch")
    assert differing(state_at(tmp_path / "prefetch"), state_at(tmp_path / "no-prefetch")) == []


def test_what_fails_in_the_thread_ends_the_run_in_its_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    batch_at = train.TrainingData.batch_at

    def failing(self: Any, step: int, *rest: Any) -> tuple[Tensor, Tensor]:
        if step == 4:
            raise InputError("features/labels.npy was cut short; extract it again.")
        return batch_at(self, step, *rest)

    monkeypatch.setattr(train.TrainingData, "batch_at", failing)
    threads = threading.active_count()
    result = call("train", *words, "--prefetch")
    assert (result.code, "error: features/labels.npy was cut short; extract it again." in result.err) == (2, True)
    assert "step 4" in result.out  # the batches before it were trained on
    assert threading.active_count() == threads
