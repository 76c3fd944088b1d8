"""Graphs per plan and batch shape, with a stand-in for the recorder: what it "recorded" is run again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Plan
from runtime import cuda_graphs, execution
from runtime.cuda_graphs import PlanGraphs
from runtime.execution import Execution, Executor
from runtime.sampling import SamplingSettings, sample_latents
from tests.models.random_networks import network, tiny
from tests.models.random_networks import one_thread as one_thread


class Recorder:
    """In CudaCapture's place: a replay writes into the memory of the first run, whatever became of its result."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.replays: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        output, place = run(), len(self.recorded)
        self.recorded.append(output)

        def replay() -> None:
            self.replays.append(place)
            output.copy_(run())

        return output, replay


def plain(x: Tensor, t: Tensor, y: Tensor, plan: Plan, index: Tensor | None) -> Tensor:
    """A network whose output depends on all that it is given, and whose plan's signature is a constant of the graph."""
    labels = y if index is None else y[index]
    weight = sum((value.sum() for value in plan.tensors.values()), torch.tensor(0.0))
    return (x + plan.signature[0]) * labels[:, None] + 0.001 * t + weight


def given(seed: int, count: int = 3, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x (N, 2), t (1,), y (R,) and index (N,); no index where rows is None."""
    draw = torch.Generator().manual_seed(seed)
    x, t = torch.randn(count, 2, generator=draw), torch.randint(1000, (1,), generator=draw)
    y = torch.randint(1, 9, (rows or count,), generator=draw)
    return x, t, y, None if rows is None else torch.randint(rows, (count,), generator=draw)


def plan_of(grid: int, tensors: Mapping[str, Tensor] | None = None) -> Plan:
    return Plan((grid,), tensors or {})


def call(run: Callable[..., Tensor], inputs: tuple[Any, ...], plan: Plan) -> Tensor:
    x, t, y, index = inputs
    return run(x, t, y, plan, index)


def test_one_graph_for_each_plan_and_shape_whatever_the_values() -> None:
    recorder = Recorder()
    graphs = PlanGraphs(plain, recorder)
    shapes: list[tuple[int, int | None]] = [(3, None), (6, None), (6, 4), (6, 2)]
    for seed in range(3):
        for count, rows in shapes:
            for grid in (8, 6):
                inputs, plan = given(seed, count, rows), plan_of(grid)
                assert torch.equal(call(graphs, inputs, plan), call(plain, inputs, plan))
    assert len(graphs) == len(recorder.recorded) == 8
    assert sorted(recorder.replays) == sorted([*range(8)] * 3)


def results_stay(graphs: PlanGraphs) -> bool:
    """Whether a result is still right after the next step has run through the same graph."""
    first, second = given(0), given(1)
    kept = call(graphs, first, plan_of(8))
    call(graphs, second, plan_of(8))
    return torch.equal(kept, call(plain, first, plan_of(8)))


def test_a_result_outlives_the_next_replay() -> None:
    assert results_stay(PlanGraphs(plain, Recorder()))


def test_a_result_that_is_not_copied_is_caught() -> None:
    def uncopied(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        output, replay = Recorder()(run)
        output.clone = lambda: output  # type: ignore[method-assign]
        return output, replay

    assert not results_stay(PlanGraphs(plain, uncopied))


def test_what_is_given_is_neither_kept_nor_changed() -> None:
    graphs, inputs = PlanGraphs(plain, Recorder()), given(0, 4, 2)
    before = [None if value is None else value.clone() for value in inputs]
    call(graphs, inputs, plan_of(8))
    call(graphs, given(1, 4, 2), plan_of(8))
    assert all(value is None or torch.equal(value, old) for value, old in zip(inputs, before, strict=True))


def plan_tensors_are_data() -> bool:
    """Whether plans of one signature share a graph and each is followed."""
    recorder = Recorder()
    graphs, inputs = PlanGraphs(plain, recorder), given(0)
    plans = [plan_of(8, {"kept": torch.tensor([value, 2.0])}) for value in (1.0, 5.0)]
    right = [torch.equal(call(graphs, inputs, plan), call(plain, inputs, plan)) for plan in plans]
    return len(recorder.recorded) == 1 and all(right)


def test_tensors_of_a_plan_are_data() -> None:
    assert plan_tensors_are_data()


def test_a_plan_that_is_recorded_with_its_values_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = plan_of(8, {"kept": torch.tensor([1.0, 2.0])})
    monkeypatch.setattr(cuda_graphs, "Plan", lambda signature, tensors: recorded)
    assert not plan_tensors_are_data()


def test_the_least_recently_used_graph_goes() -> None:
    recorder = Recorder()
    graphs = PlanGraphs(plain, recorder, most=2)
    recordings = []
    for grid in (8, 6, 8, 4, 8, 6):
        call(graphs, given(0), plan_of(grid))
        recordings.append(len(recorder.recorded))
        assert len(graphs) <= 2
    assert recordings == [1, 2, 2, 3, 3, 4]  # 4 takes the place of 6, not of 8, which was used since


@pytest.mark.parametrize(("sampler", "graphs"), [("ddpm", 4), ("ddim", 4)])
def test_sampling_through_graphs_is_sampling(sampler: str, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two grids, each at guided and at unguided steps."""
    model = network("sparsedit", tiny(), {"density": "3,2@0,500"})
    recorder = Recorder()
    monkeypatch.setattr(execution, "CudaCapture", lambda: recorder)
    settings = SamplingSettings(4.0, guidance_interval=(0.2, 0.7), num_sampling_steps="8", sampler=sampler)  # type: ignore[arg-type]
    index = torch.arange(3)
    arguments = model, settings, index, index, 0, torch.device("cpu")
    expected = sample_latents(*arguments)
    executor = Executor(model, Execution(torch.device("cpu"), cuda_graphs=True))
    assert torch.equal(sample_latents(*arguments, predict=executor), expected)
    assert len(recorder.recorded) == graphs
    assert len(recorder.replays) == 8


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_path_drop_guidance_records_a_graph_for_each_of_its_plans(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance at three of eight steps, each by a whole and a cheap call."""
    model = network("sprint", tiny(learn_sigma=False, objective="flow", time_scale=1.0))
    recorder, index = Recorder(), torch.arange(3)
    monkeypatch.setattr(execution, "CudaCapture", lambda: recorder)
    settings = SamplingSettings(
        4.0, guidance="path-drop", guidance_interval=(0.3, 0.7), num_sampling_steps="8", sampler=sampler
    ).under("flow")
    arguments = model, settings, index, index, 0, torch.device("cpu")
    expected = sample_latents(*arguments)
    executor = Executor(model, Execution(torch.device("cpu"), cuda_graphs=True))
    assert torch.equal(sample_latents(*arguments, predict=executor), expected)
    assert len(recorder.recorded) == 2  # the whole pass is the one of unguided steps too
    assert sorted(recorder.replays.count(graph) for graph in range(2)) == [3, 8]
