"""`--profile`: a trace and a table of some steps, and training goes on."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import call, differing, state_at, succeed

RUN = "DiT-T-2-sparsedit-64"


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64",
            "--max-steps", "7", "--global-batch-size", "4", "--results-dir", str(tmp_path)]  # fmt: skip


def test_trace_and_table_of_the_steps_after_the_warm_up(words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--profile", "2").out
    folder = tmp_path / RUN / "profile"
    (line,) = [line for line in said.splitlines() if line.startswith("profile of")]
    assert line.startswith(f"profile of 2 steps in {folder} (trace.json, table.txt): ")
    assert re.fullmatch(r"(.+ [0-9]+%, ){3}.+ [0-9]+%", line.partition("): ")[2])
    assert "ProfilerStep#" not in line
    assert sorted(path.name for path in folder.iterdir()) == ["table.txt", "trace.json"]
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::addmm" in (folder / "table.txt").read_text()
    succeed("train", *words, "--run-name", "plain")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "plain")) == []


@pytest.mark.parametrize(("steps", "told"), [("5", "profile of 3 steps in "), ("2", "profile of 2 steps in ")])
def test_a_training_that_ends_first_writes_what_there_is(steps: str, told: str, words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--max-steps", "6", "--profile", steps).out
    assert told in said
    assert (tmp_path / RUN / "profile" / "table.txt").is_file()


def test_a_training_too_short_says_so(words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--max-steps", "2", "--profile").out
    assert "--profile: training ended before there was a step to record" in said
    assert not any((tmp_path / RUN / "profile").iterdir())


def test_what_stands_in_the_way_is_said_before_training(words: list[str], tmp_path: Path) -> None:
    (tmp_path / RUN / "profile" / "trace.json").mkdir(parents=True)
    result = call("train", *words, "--profile", "2")
    assert result.code == 2
    assert "--profile: " in result.err
    assert "trace.json is a folder" in result.err
    assert not list((tmp_path / RUN).glob("checkpoints/*"))


def test_a_full_disk_costs_the_profile_alone(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("runtime.profiling.atomic_write", full)
    said = succeed("train", *words, "--profile", "2").out
    assert "WARNING: the profile cannot be written" in said
    assert state_at(tmp_path / RUN)


def test_a_number_below_zero_is_refused(words: list[str]) -> None:
    result = call("train", *words, "--profile", "-1")
    assert result.code == 2
    assert "--profile is -1; it must be at least 0." in result.err
