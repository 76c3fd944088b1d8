"""What two processes compute is what one computes; and the comparisons would notice if it were not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LiteralRun
from small_runs import QUICK, ROOT, SHORT, call, header_at, metrics, run, state_at, succeed, torchrun
from torch import Tensor

from runtime import sampling
from runtime.seeding import Keys, normal

RATE, STEPS = 1e-4, 6
TRAVELLED = RATE * STEPS
"""How far AdamW can move a weight in this training: about its rate a step."""

DYNAMIC = ["--density", "4,3,2,1@0,150,500,750"]
DECIDING = ["--method", "dydit", "--pretrained", "none", "--complete-steps", "3", "--target-warmup", "4"]
"""Two passes a step, then one."""

DROPPING = ["--method", "sprint", "--pretrained", "none", "--path-drop", "0.5"]
"""Tokens and paths are dropped, and flow times drawn, sample by sample."""
PATH_DROP = ["--guidance", "path-drop", "--guidance-interval", "0", "0.8"]

DRIVER = '''
"""Several trainings and samplings in one pair of processes: as they are, and each with one bug."""
import functools, os, signal, sys

sys.path.insert(0, sys.argv.pop(1))
import accelerate, torch
import train, sample_ddp
from runtime import sampling, training as step_loop
from runtime.seeding import Keys, normal
from runtime.settings import parse_training
from runtime.training import Trainer

accelerate.Accelerator.end_training = lambda self: None  # the pair stays for the next training
rank = int(os.environ["RANK"])
ends = [0, *(place for place, word in enumerate(sys.argv) if word == "--"), len(sys.argv)]
parts = [sys.argv[start + 1 : end] for start, end in zip(ends, ends[1:])]
flags, dynamic, deciding, dropping, sampling_flags, dropped_flags = parts


def training(name, *more):
    train.train(*parse_training([*flags, "--run-name", name, *more]))


training("accumulated", "--gradient-accumulation", "2")
training("dynamic", *dynamic)
training("deciding", *deciding)
training("dropping", *dropping)
sys.argv = ["sample_ddp.py", *dropped_flags]
sample_ddp.main()

compile_ = torch.compile
torch.compile = lambda function, **chosen: compile_(function, dynamic=False, backend="aot_eager")
training("fast", "--compile", "default", "--gradient-checkpointing", "selective", "--prefetch")
torch.compile = compile_

group_of = step_loop.group_of
step_loop.group_of = lambda position, batch, groups: 0
training("dynamic-not-turned", *dynamic)
step_loop.group_of = lambda position, batch, groups: groups - 1 - group_of(position, batch, groups)
training("dynamic-by-another-rank", *dynamic)
step_loop.group_of = group_of

process_index = accelerate.Accelerator.process_index
accelerate.Accelerator.process_index = property(lambda self: 0)
training("same-positions")
training("deciding-at-same-positions", *deciding)
training("dropping-at-same-positions", *dropping)
accelerate.Accelerator.process_index = process_index

as_it_is = Trainer.__init__


def without_the_wrapper(self, *arguments):
    as_it_is(self, *arguments)
    self.step_module = self.step_module.module


Trainer.__init__ = without_the_wrapper
training("not-synchronised")
Trainer.__init__ = as_it_is

sampling.normal = lambda keys, *rest: normal(Keys(keys.seed + rank, keys.step, keys.index), *rest)
sys.argv = ["sample_ddp.py", *sampling_flags]
sample_ddp.main()

# A scheduler's SIGTERM does not reach all processes within the same step.
batch_at = train.TrainingData.batch_at


def then_terminated(self, step, *rest):
    if step == (2 if rank else 3):
        os.kill(os.getpid(), signal.SIGTERM)
    return batch_at(self, step, *rest)


train.TrainingData.batch_at = then_terminated
training("terminated", "--max-steps", "200")
# On a GPU each learns of it a step later.
Trainer.__init__ = functools.partialmethod(as_it_is, lag=1)
training("terminated-late", "--max-steps", "200", "--log-every", "50", "--checkpoint-every", "50")
print("left in peace", flush=True)
'''


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, features: Path, pretrained: Path) -> Path:
    """The training of `literal_run` in one process."""
    results = tmp_path_factory.mktemp("one")
    succeed("train", *training_flags(features, pretrained, results))
    return results / "DiT-T-2-sparsedit-64"


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory, features: Path, pretrained: Path) -> Path:
    """A training with a token density, in one process and two micro-batches."""
    results = tmp_path_factory.mktemp("dynamic")
    succeed(
        "train", *training_flags(features, pretrained, results), *DYNAMIC, "--gradient-accumulation", "2", "--run-name", "run"
    )
    return results / "run"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory, features: Path, pretrained: Path, one_process: Path) -> Path:
    """The folder in which DRIVER ran in two processes."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "driver.py").write_text(DRIVER)
    words = [
        *training_flags(features, pretrained, folder),
        "--",
        *DYNAMIC,
        "--",
        *DECIDING,
        "--",
        *DROPPING,
        "--",
        *sampling_flags(one_process, folder / "rank-keyed"),
        "--",
        *sampling_flags(folder / "dropping", folder / "dropped"),
        *PATH_DROP,
    ]
    result = run(torchrun(2, "driver.py", ROOT, *words), folder, timeout=180)
    (folder / "outcome.json").write_text(json.dumps({"out": result.out, "err": result.err}))
    return folder


def training_flags(features: Path, pretrained: Path, results: Path) -> list[str]:
    return ["--model", "DiT-T/2", "--pretrained", str(pretrained), "--feature-path", str(features), "--image-size", "64",
            "--results-dir", str(results), *SHORT]  # fmt: skip


def sampling_flags(run_folder: Path, samples: Path) -> list[str]:
    return ["--ckpt", str(run_folder / "checkpoints" / "0000006.safetensors"), "--num-fid-samples", "12", "--seed", "1",
            "--sample-dir", str(samples), *QUICK]  # fmt: skip


def distances(run_folder: Path, reference: Path) -> tuple[float, float]:
    """Largest difference of a weight, in units of how far it can have travelled; and of a first moment (an average of
    gradients), relative to the largest of its tensor.
    """
    ours, theirs = state_at(run_folder), state_at(reference)
    assert set(ours) == set(theirs)
    weights = max(float((ours[name] - theirs[name]).abs().max()) for name in ours if name.startswith("model/"))
    moments = max(relative(ours[name], theirs[name]) for name in ours if name.endswith("/exp_avg"))
    return weights / TRAVELLED, moments


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_equal_up_to_rounding(run_folder: Path, reference: Path) -> None:
    """Summing gradients in another order changes their last bits: 1e-6 of the largest in a tensor, measured 1e-6 to 3e-6
    after six steps. AdamW divides a gradient by its own size, so weights whose gradient is rounding alone (the keys'
    biases: softmax does not see them) move by a part of the rate: measured 0.4 % of the way, hence 3 %.
    """
    weights, moments = distances(run_folder, reference)
    assert moments < 3e-5
    assert weights < 0.03


def assert_another_training(run_folder: Path, reference: Path) -> None:
    """More than ten times what `assert_equal_up_to_rounding` lets pass, by either measure."""
    weights, moments = distances(run_folder, reference)
    assert moments > 3e-4
    assert weights > 0.3


def test_training_in_two_processes_equals_one(literal_run: LiteralRun, one_process: Path) -> None:
    assert literal_run.training.code == 0, literal_run.training.err
    assert_equal_up_to_rounding(literal_run.run_folder, one_process)
    for ours, theirs in zip(metrics(literal_run.run_folder), metrics(one_process), strict=True):
        # Losses are averages over all processes, not those of the first.
        for name in ("loss", "mse", "vlb", "gradient_norm", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_weights_moved_in_that_training(one_process: Path) -> None:
    first, last = state_at(one_process, 4), state_at(one_process)
    moved = [float((last[name] - first[name]).abs().max()) for name in first if name.startswith("model/blocks")]
    assert min(moved) > RATE / 2


def test_accumulating_gradients_equals_both(variants: Path, one_process: Path, literal_run: LiteralRun) -> None:
    assert_equal_up_to_rounding(variants / "accumulated", one_process)
    assert_equal_up_to_rounding(variants / "accumulated", literal_run.run_folder)
    assert header_at(variants / "accumulated")["settings"]["gradient_accumulation"] == 2


@pytest.mark.parametrize("bug", ["same-positions", "not-synchronised"])
def test_the_comparison_of_trainings_notices(bug: str, variants: Path, one_process: Path) -> None:
    assert_another_training(variants / bug, one_process)


def test_token_counts_dealt_to_two_processes_are_those_of_two_micro_batches(variants: Path, dynamic: Path) -> None:
    assert_equal_up_to_rounding(variants / "dynamic", dynamic)
    assert header_at(variants / "dynamic")["settings"]["density_groups"] == 2
    for ours, theirs in zip(metrics(variants / "dynamic"), metrics(dynamic), strict=True):
        assert set(ours) == set(theirs)
        for name in ("loss", *(name for name in ours if name.startswith("loss_at_t/"))):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert len({name for line in metrics(dynamic) for name in line if name.startswith("loss_at_t/")}) > 2


def test_two_processes_go_on_as_two_micro_batches(
    variants: Path, dynamic: Path, features: Path, pretrained: Path, tmp_path: Path
) -> None:
    shutil.copytree(variants / "dynamic", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0000006.safetensors").unlink()
    words = [*training_flags(features, pretrained, tmp_path), *DYNAMIC, "--run-name", "run"]
    assert "2 density groups cannot be dealt to 1 parts of the batch" in call("train", *words).err
    assert "at step 4" in succeed("train", *words, "--gradient-accumulation", "2").out
    assert_equal_up_to_rounding(tmp_path / "run", dynamic)


def test_what_samples_decide_in_two_processes_is_that_of_two_micro_batches(
    variants: Path, features: Path, pretrained: Path, tmp_path: Path
) -> None:
    """DyDiT's penalty looks at the samples that one process computes at once: half of the batch each."""
    words = [*training_flags(features, pretrained, tmp_path), *DECIDING, "--run-name", "run"]
    succeed("train", *words, "--gradient-accumulation", "2")
    assert_equal_up_to_rounding(variants / "deciding", tmp_path / "run")
    assert_another_training(variants / "deciding-at-same-positions", tmp_path / "run")
    for ours, theirs in zip(metrics(variants / "deciding"), metrics(tmp_path / "run"), strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            if "per_second" not in name and name != "memory_gib":
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert {"complete/loss", "flops", "layers/tokens_kept/07"} <= set(metrics(tmp_path / "run")[0])


def test_what_is_dropped_in_two_processes_is_what_two_micro_batches_drop(
    variants: Path, features: Path, pretrained: Path, tmp_path: Path
) -> None:
    words = [*training_flags(features, pretrained, tmp_path), *DROPPING, "--run-name", "run"]
    succeed("train", *words, "--gradient-accumulation", "2")
    assert_equal_up_to_rounding(variants / "dropping", tmp_path / "run")
    assert_another_training(variants / "dropping-at-same-positions", tmp_path / "run")


def test_sampling_under_flow_in_two_processes_gives_the_bytes_of_one(variants: Path, tmp_path: Path) -> None:
    said = succeed("sample_ddp", *sampling_flags(variants / "dropping", tmp_path), *PATH_DROP).out
    assert "guidance 1.5 at 4 of 5 steps: 9 network passes" in said
    assert next(tmp_path.glob("*.npz")).read_bytes() == next((variants / "dropped").glob("*.npz")).read_bytes()


@pytest.mark.parametrize("bug", ["dynamic-not-turned", "dynamic-by-another-rank"])
def test_the_comparison_of_token_counts_notices(bug: str, variants: Path, dynamic: Path) -> None:
    assert_another_training(variants / bug, dynamic)


def test_sigterm_that_reaches_the_processes_in_different_steps_saves(variants: Path) -> None:
    outcome = json.loads((variants / "outcome.json").read_text())
    assert outcome["out"].count("left in peace") == 2, outcome["err"][-2000:]
    assert "stopped by " in outcome["out"]  # by its own signal or by the other process's, whichever came first
    assert header_at(variants / "terminated")["step"] in (3, 4)
    assert header_at(variants / "terminated-late")["step"] in (4, 5)


def test_compiled_checkpointed_and_read_ahead_equals_plain(variants: Path, one_process: Path) -> None:
    assert_equal_up_to_rounding(variants / "fast", one_process)


def test_sampling_in_two_processes_gives_the_bytes_of_one(literal_run: LiteralRun, tmp_path: Path) -> None:
    assert literal_run.sampling.code == 0, literal_run.sampling.err
    succeed("sample_ddp", *sampling_flags(literal_run.run_folder, tmp_path))
    assert next(tmp_path.glob("*.npz")).read_bytes() == literal_run.packed.read_bytes()


def test_the_comparison_of_samples_notices(variants: Path, one_process: Path, tmp_path: Path) -> None:
    succeed("sample_ddp", *sampling_flags(one_process, tmp_path))
    right, wrong = pictures(tmp_path), pictures(variants / "rank-keyed")
    equal = (right == wrong).all(axis=(1, 2, 3))
    assert equal[:4].all()  # of rank 0, whose seed is the right one
    assert not equal[4:8].any()


def test_another_batch_size_gives_the_same_pictures_to_one_grey_level(
    one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in ("4", "5", "12"):
        succeed("sample_ddp", *sampling_flags(one_process, tmp_path / batch), "--per-proc-batch-size", batch)
    by_four = pictures(tmp_path / "4")
    assert by_four.std() > 20  # else one grey level would say little
    assert np.abs(by_four[1:] - by_four[:-1]).mean() > 5
    assert np.abs(by_four - pictures(tmp_path / "5")).max() <= 1
    assert np.abs(by_four - pictures(tmp_path / "12")).max() <= 1
    # Planted bug: noise named by the place in the batch.
    monkeypatch.setattr(
        sampling, "normal", lambda keys, *rest: normal(replace(keys, index=torch.arange(len(keys.index))), *rest)
    )
    succeed("sample_ddp", *sampling_flags(one_process, tmp_path / "bug"))
    assert np.abs(by_four - pictures(tmp_path / "bug")).max() > 20


def test_keys_name_noise_whatever_shares_the_batch() -> None:
    alone = normal(Keys(1, 2, torch.tensor([7])), "step noise", (4, 8, 8))
    together = normal(Keys(1, 2, torch.arange(12)), "step noise", (4, 8, 8))
    assert torch.equal(alone[0], together[7])


def pictures(samples: Path) -> np.ndarray:
    """-> (N, H, W, 3) int64"""
    return np.load(next(samples.glob("*.npz")))["arr_0"].astype(np.int64)
