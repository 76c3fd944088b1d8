"""Training that accelerate compiles: one graph for every grid, and the numbers of training that is not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from accelerate.utils import DynamoBackend
from counted_graphs import Graphs, counted_graphs
from small_runs import differing, metrics, state_at, succeed

from models import Plan
from runtime import seeding, training
from runtime.compilation import allow_graphs

RUN = "DiT-16x2x2-2-sparsedit-64"
TEN_OF_NINE = "4,4x3,3x4,3,3x2,2x3,4,2,2x1,1@0,100,200,300,400,500,600,700,800,900"
"""Ten intervals of nine grids, as many as the 512 preset has; 4 occurs twice. torch's own limit is eight graphs."""


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Twenty-four steps of two groups, in the smallest network that there is: every interval is drawn."""
    return ["--model", "DiT-16x2x2/2", "--poolingformer-blocks", "0", "--modules", "1", "--module-blocks", "1,0,1,0",
            "--top-blocks", "0", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64", "--density",
            TEN_OF_NINE, "--max-steps", "24", "--global-batch-size", "4", "--gradient-accumulation", "2", "--log-every", "8",
            "--lr", "1e-3", "--results-dir", str(tmp_path)]  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """What `accelerate launch --dynamo_backend eager` starts, with each graph counted."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(seeding, "_ROUNDS", 2)  # tracing a generator of ten rounds takes most of a second
    with counted_graphs(monkeypatch) as made:
        yield made


def test_one_graph_for_every_grid_and_the_numbers_of_eager(words: list[str], graphs: Graphs, tmp_path: Path) -> None:
    succeed("train", *words)
    assert len(graphs.runs) == 9
    assert sum(graphs.runs) == 48  # nothing ran outside them: 24 steps of two micro-batches
    assert graphs.symbolic == 0
    assert torch._dynamo.config.recompile_limit == 9
    drawn = {name for line in metrics(tmp_path / RUN) for name in line if name.startswith("loss_at_t/")}
    assert len(drawn) == 10
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("ACCELERATE_DYNAMO_BACKEND")
        succeed("train", *words, "--run-name", "eager")
    assert sum(graphs.runs) == 48
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "eager")) == []


def test_a_limit_that_stays_would_be_noticed(words: list[str], graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "allow_graphs", lambda accelerator, plans: allow_graphs(accelerator, plans[:1]))
    succeed("train", *words)
    assert len(graphs.runs) == 8
    assert sum(graphs.runs) < 48


def test_a_fixed_density_has_one_graph(words: list[str], graphs: Graphs) -> None:
    succeed("train", *words, "--density", "2", "--max-steps", "4")
    assert len(graphs.runs) == 1
    assert torch._dynamo.config.recompile_limit == 8


def step_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = training.TrainingStep.forward
    monkeypatch.setattr(training.TrainingStep, "forward", lambda self, batch, step: forward(self, batch, step.item()))


def bounds_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Timesteps", lambda start, stop: range(int(start), int(stop)))


def hash_not_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(seeding.key_words, "_dynamo_marked_constant", raising=False)
    monkeypatch.setattr(torch.compiler, "assume_constant_result", lambda function: function)


def grids_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(accelerator: Any, plans: Any) -> None:
        allow_graphs(accelerator, plans)
        accelerator.state.dynamo_plugin.dynamic = None

    monkeypatch.setattr(training, "allow_graphs", planted)


FEW = ("--density", "4,3,2,4@0,250,500,750", "--max-steps", "6")


def test_few_grids(words: list[str], graphs: Graphs) -> None:
    succeed("train", *words, *FEW)
    assert (len(graphs.runs), sum(graphs.runs), graphs.symbolic) == (3, 12, 0)


@pytest.mark.parametrize("bug", [step_as_a_number, bounds_as_numbers, hash_not_constant, grids_as_variables])
def test_the_count_notices(
    bug: Callable[[pytest.MonkeyPatch], None], words: list[str], graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    succeed("train", *words, *FEW)
    assert (len(graphs.runs), sum(graphs.runs), graphs.symbolic) != (3, 12, 0)


def test_torch_is_told_nothing_where_nothing_is_compiled() -> None:
    plans = [Plan(("sparse grid", place, place)) for place in range(20)]
    plugin = SimpleNamespace(backend=DynamoBackend.NO, dynamic=None)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=plugin))
    with torch._dynamo.config.patch(recompile_limit=3):
        allow_graphs(accelerator, plans)
        assert (torch._dynamo.config.recompile_limit, plugin.dynamic) == (3, None)
        plugin.backend = DynamoBackend.INDUCTOR
        allow_graphs(accelerator, plans)
        assert (torch._dynamo.config.recompile_limit, plugin.dynamic) == (20, False)
        plugin.dynamic = True  # asked for
        allow_graphs(accelerator, plans[:2])
        assert (torch._dynamo.config.recompile_limit, plugin.dynamic) == (20, True)
