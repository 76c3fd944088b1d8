"""train.py where token counts differ between timesteps: what it says, what a batch holds, what is logged, what resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Result, call, differing, header_at, metrics, random_network, recorded, state_at, succeed
from torch import Tensor

import train
from diffusion.gaussian import EpsilonObjective
from models import Backbone, DiT, Plan
from runtime.checkpoint import checkpoints, read_tensors, save_checkpoint
from runtime.density_groups import group_timestep, interval_of
from runtime.training import TrainingStep

DENSITY = "4,3,2,1@0,150,500,750"
INTERVALS = [range(150), range(150, 500), range(500, 750), range(750, 1000)]
NAMES = [f"loss_at_t/{timesteps.start}-{timesteps.stop - 1}" for timesteps in INTERVALS]


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Nine steps of two micro-batches each."""
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64", "--density",
            DENSITY, "--max-steps", "9", "--global-batch-size", "8", "--gradient-accumulation", "2", "--log-every", "3",
            "--checkpoint-every", "4", "--lr", "1e-3", "--run-name", "run", "--results-dir", str(tmp_path)]  # fmt: skip


def refused(result: Result, *named: str) -> None:
    """One sentence, exit code 2."""
    assert result.code == 2, result.err
    (line,) = result.err.strip().splitlines()
    for word in ("error: ", *named):
        assert word in line


# What it says --------------------------------------------------------------------------------------------------------


def test_before_the_first_step_it_says_what_each_interval_costs(words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--max-steps", "1").out
    before = said[: said.index("step 1 ")]
    for text in ("0-149", "4x4", "750-999", "mean GMACs", "2 density groups, one for every process and accumulation step"):
        assert text in before
    assert (tmp_path / "run" / "density.png").read_bytes().startswith(b"\x89PNG")


def test_a_fixed_density_speaks_of_no_groups(words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--density", "2", "--max-steps", "3").out
    assert "density group" not in said
    assert not (tmp_path / "run" / "density.png").exists()
    assert header_at(tmp_path / "run")["settings"]["density_groups"] == 1
    assert not any(name.startswith("loss_at_t") for line in metrics(tmp_path / "run") for name in line)


def test_fewer_groups_than_shares(words: list[str]) -> None:
    said = succeed("train", *words, "--gradient-accumulation", "4", "--density-groups", "2", "--max-steps", "1").out
    assert "2 density groups, one for every 2 of 4 processes x accumulation steps" in said


def test_the_number_of_groups_is_saved(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words, "--max-steps", "1")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["settings"]["density_groups"] == header_at(tmp_path / "run")["settings"]["density_groups"] == 2
    assert saved["network"]["options"]["density"] == DENSITY


def test_strata_beside_a_varying_density_are_refused(words: list[str]) -> None:
    refused(call("train", *words, "--timestep-strata", "4"), "--timestep-strata", "leave the flag out")
    succeed("train", *words, "--timestep-strata", "4", "--density", "2", "--max-steps", "1")


# What a batch holds --------------------------------------------------------------------------------------------------


Pass = tuple[Tensor, Plan]


def passes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Timesteps and plan of every forward pass of a training."""
    seen: list[Pass] = []
    forward = DiT.training_forward

    def noting(self: DiT, x: Tensor, t: Tensor, y: Tensor, plan: Plan, draws: Any) -> Any:
        seen.append((t, plan))
        return forward(self, x, t, y, plan, draws)

    monkeypatch.setattr(DiT, "training_forward", noting)
    succeed("train", *words)
    return seen


def held_by_groups(seen: list[Pass]) -> bool:
    """Whether pass i held group i % 2 of step i // 2: its interval's plan, and its interval's timesteps alone."""
    grids = [(4, 4), (3, 3), (2, 2), (1, 1)]
    places = [interval_of(INTERVALS, group_timestep(0, i // 2, i % 2, 2)) for i in range(len(seen))]
    return all(
        plan == Plan(("sparse grid", *grids[place])) and all(int(timestep) in INTERVALS[place] for timestep in t)
        for place, (t, plan) in zip(places, seen, strict=True)
    )


def test_every_pass_has_one_grid_and_its_timesteps(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes([*words, "--max-steps", "24"], monkeypatch)
    assert [len(t) for t, _ in seen] == [4] * 48
    assert held_by_groups(seen)
    assert len({plan.signature for _, plan in seen}) == 4
    assert all(len(set(t.tolist())) > 1 for t, _ in seen)  # samples draw within the interval, they do not share one timestep


def timesteps_of_the_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    noised = EpsilonObjective.noised
    monkeypatch.setattr(EpsilonObjective, "noised", lambda self, x0, keys, timesteps: noised(self, x0, keys))


def groups_by_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.training.group_of", lambda position, batch, groups: 0)


@pytest.mark.parametrize("bug", [timesteps_of_the_whole_range, groups_by_step_alone])
def test_the_test_of_passes_notices(
    bug: Callable[[pytest.MonkeyPatch], None], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    assert not held_by_groups(passes([*words, "--max-steps", "6"], monkeypatch))


# What is logged ------------------------------------------------------------------------------------------------------


def losses_by_hand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """The interval and the loss of every pass of a training, in order."""
    seen: list[tuple[int, float]] = []
    forward = TrainingStep.forward

    def noting(self: TrainingStep, batch: Any, step: Tensor) -> Any:
        loss, parts = forward(self, batch, step)
        seen.append((interval_of(INTERVALS, int(batch.timesteps.start)), float(loss.detach())))
        return loss * (torch.nan if step == 4 else 1), parts

    monkeypatch.setattr(TrainingStep, "forward", noting)
    succeed("train", *words)
    return seen


def test_losses_of_intervals_are_means_over_their_passes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, lines = losses_by_hand(words, monkeypatch), metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    absent = 0
    for line, first in zip(lines, (0, 3, 6), strict=True):
        counted = [entry for step in range(first, first + 3) for entry in seen[2 * step : 2 * step + 2] if step != 4]
        for place, name in enumerate(NAMES):
            losses = [loss for interval, loss in counted if interval == place]
            absent += not losses
            assert (name in line) == bool(losses)
            assert line.get(name) == (pytest.approx(sum(losses) / len(losses), rel=1e-5) if losses else None)
        assert line["loss"] == pytest.approx(sum(loss for _, loss in counted) / len(counted), rel=1e-5)
    assert 0 < absent < len(lines) * len(NAMES)


def test_losses_of_intervals_are_in_tensorboard(words: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed("train", *words)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    shown = {(name, entry.step): entry.value for name in NAMES for entry in events.Scalars(name)}
    logged = {(name, line["step"]): line[name] for line in metrics(tmp_path / "run") for name in NAMES if name in line}
    assert shown == pytest.approx(logged)


# Resuming ------------------------------------------------------------------------------------------------------------


def stopped_at_4(whole: Path, run: Path) -> Path:
    """A copy of a run's folder as a kill after its checkpoint of step 4 leaves it."""
    shutil.copytree(whole, run)
    for path in checkpoints(run):
        if int(path.stem) > 4:
            path.unlink()
    return run


@pytest.fixture
def whole(words: list[str], tmp_path: Path) -> Path:
    succeed("train", *words, "--run-name", "whole")
    return tmp_path / "whole"


def test_a_resumed_run_ends_as_the_whole_one(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_at_4(whole, tmp_path / "run")
    timesteps: list[int] = []
    monkeypatch.setattr("runtime.training.group_timestep", recorded(group_timestep, timesteps))
    assert "at step 4" in succeed("train", *words).out
    assert timesteps == [group_timestep(0, step, group, 2) for step in range(4, 9) for group in range(2)]
    assert differing(state_at(run), state_at(whole)) == []
    assert [line.keys() for line in metrics(run)] == [line.keys() for line in metrics(whole)]


def test_a_resumed_run_that_draws_anew_would_be_noticed(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_at_4(whole, tmp_path / "run")
    monkeypatch.setattr("runtime.training.group_timestep", lambda seed, step, *rest: group_timestep(seed, step - 4, *rest))
    succeed("train", *words)
    assert differing(state_at(run), state_at(whole)) != []


def test_a_resumed_run_keeps_its_groups(words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_at_4(whole, tmp_path / "run")
    monkeypatch.setattr(train, "build", lambda plan: pytest.fail("a network was built"))
    refused(call("train", *words, "--density-groups", "1"), "density_groups (2, not 1)")
    refused(call("train", *words, "--density", "2"), "density (4,3,2,1@0,150,500,750, not 2)", "--run-name")
    alone = call("train", *words, "--gradient-accumulation", "1")
    refused(alone, "2 density groups cannot be dealt to 1 parts of the batch", "--gradient-accumulation")
    monkeypatch.undo()
    succeed("train", *words, "--gradient-accumulation", "4")
    assert header_at(run)["settings"]["density_groups"] == 2
    ours, theirs = state_at(run), state_at(whole)
    # Rounding alone, as in test_resume.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours if name.startswith("model/")) < 1e-4


def test_a_checkpoint_from_before_token_density_resumes(words: list[str], tmp_path: Path) -> None:
    fixed = [*words, "--density", "2x3"]
    succeed("train", *fixed, "--run-name", "whole")
    run = stopped_at_4(tmp_path / "whole", tmp_path / "run")
    (path,) = checkpoints(run)
    tensors, header = read_tensors(path, ""), header_at(run)
    del header["settings"]["density_groups"]
    del header["network"]["options"]["density"]
    header["network"]["options"]["sparse_grid"] = [2, 3]
    save_checkpoint(path, tensors, header)
    refused(call("train", *words, "--density", "2"), "density (2x3, not 2)")
    succeed("train", *fixed)
    assert differing(state_at(run), state_at(tmp_path / "whole")) == []


# Starting ------------------------------------------------------------------------------------------------------------


def test_groups_that_cannot_be_dealt_are_refused_first(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "build", lambda plan: pytest.fail("a network was built"))
    refused(call("train", *words, "--density-groups", "3"), "3 density groups", "accumulation steps, 1 x 2)")
    refused(call("train", *words, "--density-groups", "0"), "--density-groups is 0")
    refused(call("train", *words, "--density", "2", "--density-groups", "2"), "--density-groups is 2", "one token count")
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(call("train", *words, "--density-groups", "16"), "accumulation steps, 4 x 2)", "divides 8")


def test_a_fixed_network_is_tuned_into_a_dynamic_one(words: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), num_classes=3), {"density": "2"})
    torch.save(network.state_dict(), tmp_path / "released.pt")
    succeed("train", *words, "--density", "2", "--pretrained", tmp_path / "released.pt", "--run-name", "fixed")
    trained = checkpoints(tmp_path / "fixed")[-1]
    said = succeed("train", *words, "--pretrained", trained, "--density", "0.61:0.86", "--max-steps", "1", "--lr", "1e-9").out
    assert f"not as in {trained}: density (2, not " in said
    assert "tensors loaded from SparseDiT weights" in said
    assert "new:" not in said
    now, before = state_at(tmp_path / "run"), read_tensors(trained, "ema/")
    assert max(float((now[f"model/{name}"] - value).abs().max()) for name, value in before.items()) < 1e-7
    assert "@" in header_at(tmp_path / "run")["network"]["options"]["density"]


def test_options_that_are_not_given_are_those_of_the_checkpoint(words: list[str], tmp_path: Path) -> None:
    split = ["--poolingformer-blocks", "2", "--module-blocks", "1,2,1,1"]
    succeed("train", *words, *split, "--max-steps", "1", "--run-name", "first")
    bare = [word for word in words if word not in ("--density", DENSITY)]
    started = [*bare, "--pretrained", checkpoints(tmp_path / "first")[-1], "--run-name", "second"]
    said = succeed("train", *started, "--max-steps", "1").out
    assert "not as in" not in said
    succeed("train", *started, "--max-steps", "2")  # the same command goes on
    first, second = (header_at(tmp_path / name)["network"]["options"] for name in ("first", "second"))
    assert first == second
    assert second["density"] == DENSITY
    assert second["module_blocks"] == [1, 2, 1, 1]
