"""benchmark.py on a method whose work depends on what it sees: what passes computed is counted, not planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Result, call, succeed
from torch import Tensor, nn

from benchmarks import ceiling, counted, forward, options, sampling, training, waits
from benchmarks.contestants import contestants, execution_notes
from benchmarks.result import Work
from models import DiT
from models.dydit import DyDiT
from models.dynamic_block import DynamicBlock
from models.work import CountedWork
from runtime.execution import Execution
from runtime.sampling import SamplingSettings
from runtime.work_report import dense_block_macs

CPU = torch.device("cpu")
TINY = ("--method", "dydit", "--model", "DiT-T/2", "--latent", "4", "16", "16", "--num-classes", "5", "--rounds", "2")
NETWORK = options.NetworkSettings(model="DiT-T/2", latent=(4, 16, 16), num_classes=5, method="dydit")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large product takes a second for each precision; what is divided by it does not depend on its size."""
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)


def measured(what: str, folder: Path, *words: object) -> tuple[dict[str, Any], Result]:
    """The JSON that a measurement left, and what it said."""
    ended = succeed("benchmark", what, *TINY, *words, "--output", folder)
    return json.loads((folder / f"{what}.json").read_text()), ended


def ratio(network: DiT, counts: CountedWork) -> float:
    return counts.block_macs / counts.passes / dense_block_macs(network)


def test_forward_counts_the_passes_of_all_timesteps(tmp_path: Path) -> None:
    result, ended = measured("forward", tmp_path, "--batch-size", "3", "--timesteps", "4", "--no-pack-weights")
    row, found = result["rows"]["dydit, plain"], result["counted_work"]["dydit, plain"]
    assert result["at"] == [0, 333, 666, 999]
    assert found["passes"] == 3 * 4 * 3  # rounds with the warm-up, timesteps, pictures
    assert found["flops_ratio"] == pytest.approx(0.5, abs=0.06)  # of so small a network the widths come in quarters
    assert row["gmacs"] == found["gmacs_per_pass"]
    assert row["tflops"] == pytest.approx(2 * 3 * row["gmacs"] / 1000 / row["seconds"]["median"])
    planned = NETWORK.blueprints()[1].macs() / 1e9
    assert row["gmacs"] < 0.7 * planned  # known bad: what the blueprint's plans say
    assert result["counted_work"].keys() == {"dydit, plain"}
    assert "dydit, plain, measured over 36 passes" in ended.out
    assert "attention and MLP alone, which FLOPs ratios are of" in ended.out


def test_seconds_of_several_timesteps_are_those_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a pass whose time is its timestep's."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("benchmarks.timing.perf_counter", lambda: float(next(ticks)))  # each run takes one second
    result, _ = measured("forward", tmp_path, "--timesteps", "4", "--no-pack-weights")
    assert [row["seconds"]["median"] for row in result["rows"].values()] == [0.25, 0.25]


def test_rows_of_one_network_are_counted_apart(tmp_path: Path) -> None:
    words = (
        "--batch-size",
        "2",
        "--steps",
        "8",
        "--timed-steps",
        "4",
        "--guidance-interval",
        "0.2",
        "0.7",
        "--no-pack-weights",
    )
    result, ended = measured("sample", tmp_path, *words)
    rows, found = result["rows"], result["counted_work"]
    assert [*rows] == ["dense, plain", "dydit, plain", "dydit, plain, interval"]
    assert {name: one["passes"] for name, one in found.items()} == {
        "dydit, plain": 3 * 2 * 8,  # rounds with the warm-up, pictures, passes of four guided steps
        "dydit, plain, interval": 3 * 2 * 6,
    }
    for name, passes in (("dydit, plain", 8), ("dydit, plain, interval", 6)):
        assert rows[name]["gmacs"] == found[name]["gmacs_per_pass"]
        assert rows[name]["tflops"] == pytest.approx(
            2 * 2 * passes * rows[name]["gmacs"] / 1000 / rows[name]["seconds"]["median"]
        )
        assert found[name]["flops_ratio"] == pytest.approx(0.5, abs=0.06)
    assert "dydit, plain, interval, measured over 36 passes" in ended.out


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_decisions_fall_as_often_as_training_would_make_them(target: float) -> None:
    """On what sampling shows, to which drawn weights lead away from noise. Known bad: decisions made for noise alone."""
    settings = SamplingSettings(num_sampling_steps="6")
    blueprints = options.NetworkSettings(
        model="DiT-96x8x8/2", latent=(4, 16, 16), method="dydit", options=f"flops_target={target}"
    ).blueprints()

    def noise(network: DiT) -> tuple[Tensor, Tensor, Tensor]:
        return forward.inputs(network, 1, range(0, 1000, 166), CPU)

    reached = []
    for seen in (lambda network: sampling.inputs(network, settings, CPU), noise):
        contestant = contestants(blueprints, Execution(CPU), seen)["dydit, plain"]
        run = counted.CountedRun.of(contestant.network, sampling.run_of(contestant, settings, 2, CPU))
        run()
        assert run.counts is not None
        reached.append(ratio(contestant.network, run.counts))
    assert abs(reached[0] - target) < 0.05
    assert abs(reached[0] - target) < abs(reached[1] - target)


def test_a_run_is_counted_on_its_own_and_the_work_of_plans_is_kept_elsewhere() -> None:
    dense, dydit = (contestants(NETWORK.blueprints(), Execution(CPU), inputs)[f"{name}, plain"] for name in ("dense", "dydit"))
    runs = [counted.CountedRun.of(one.network, forward.run_of(one, 2, [500], CPU)) for one in (dense, dydit, dydit)]
    with torch.no_grad():
        for run in (*runs, runs[2]):
            run()
    planned = Work(images=2, gmacs=1.0, total_gmacs=2.0)
    assert runs[0].counts is None
    assert runs[0].measured(planned) == planned
    assert [run.counts.passes for run in runs[1:] if run.counts is not None] == [2, 4]
    one, two = (run.measured(planned) for run in runs[1:])
    assert one == two
    assert one.total_gmacs == pytest.approx(2 * (one.gmacs or 0))
    assert counted.counted({"dense": runs[0]}) == {"counted_work": {}, "counted_lines": []}


def inputs(network: DiT) -> tuple[Tensor, Tensor, Tensor]:
    return forward.inputs(network, 2, [0, 500], CPU)


def test_inputs_are_what_runs_show() -> None:
    """The same latents and labels at every timestep; and along a sampling, both guidance halves."""
    blueprint = NETWORK.blueprints()[1]
    x, t, y = forward.inputs(blueprint, 2, [0, 500], CPU)
    assert torch.equal(x[:2], x[2:])
    assert (t.tolist(), y.tolist()) == ([0, 0, 500, 500], [0, 1, 0, 1])
    network = contestants(NETWORK.blueprints(), Execution(CPU), inputs)["dydit, plain"].network
    x, t, y = sampling.inputs(network, SamplingSettings(num_sampling_steps="3"), CPU)
    assert (t.tolist(), y.tolist()) == ([999, 999, 500, 500, 0, 0], [0, 5] * 3)
    assert torch.equal(x[::2], x[1::2])
    assert x[4].std() > 2 * x[0].std()  # drawn weights make no pictures


@pytest.mark.parametrize(("stage", "passes"), [("complete_steps=0", 1), ("complete_steps=none", 2)])
def test_training_counts_the_passes_of_its_stage(stage: str, passes: int, tmp_path: Path) -> None:
    words = ("--latent", "4", "8", "8", "--batch-size", "2", "--options", stage)
    result, _ = measured("train", tmp_path, *words)
    dense = result["rows"]["dense, plain"]["gmacs"]
    for name in ("dydit, plain", "dydit, ours"):
        assert result["rows"][name]["gmacs"] == pytest.approx(passes * dense, rel=0.02)  # routers are small
    assert result["largest_difference"] < 1e-4


@pytest.mark.parametrize("density", ["3", "3,1@0,500"])
def test_where_plans_say_it_all_training_counts_what_they_say(density: str) -> None:
    network = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), density=density).blueprints()[1]
    assert training.training_gmacs(training.trainable(network, CPU)) == pytest.approx(network.mean_macs() / 1e9)


def test_attention_says_that_steps_run_fewer_heads(tmp_path: Path) -> None:
    result, _ = measured("attention", tmp_path)
    assert result["notes"][-1] == "dydit with all heads on; its steps run as many of them as their plans say"


def test_rows_without_graphs_are_named() -> None:
    """Only where the others have some. Known bad: the line of the execution alone, which promises them."""
    recorded = Execution(torch.device("cuda"), "tf32", cuda_graphs=True)
    (said,) = execution_notes(NETWORK.blueprints(), recorded)
    assert "sizes of dydit depend on what it sees" in said
    assert execution_notes(NETWORK.blueprints(), Execution(CPU, "bf16")) == []
    sparse = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8)).blueprints()
    assert execution_notes(sparse, recorded) == []


def test_blocks_are_told_what_they_would_choose(tmp_path: Path) -> None:
    result, ended = measured("waits", tmp_path, "--batch-size", "2", "--timesteps", "3")
    assert [*result["rows"]] == ["chosen", "told"]
    assert "us in each of 8 blocks" in ended.out
    refused = call("benchmark", "waits", "--method", "sparsedit", "--model", "DiT-T/2", "--output", tmp_path)
    assert (refused.code, "--method sparsedit chooses nothing while it runs" in refused.err) == (2, True)


@torch.no_grad()
def test_what_is_told_is_what_was_chosen() -> None:
    """Planted: other logits at the same places make another result; and afterwards blocks choose again."""
    network = contestants(NETWORK.blueprints(), Execution(CPU), inputs)["dydit, plain"].network
    blocks = [block for block in network.modules() if isinstance(block, DynamicBlock)]
    outputs = []

    def run() -> None:
        for t in (0, 500):
            x, _, y = forward.inputs(network, 2, [t], CPU)
            outputs.append(network(x, torch.tensor([t]), y, network.plan(t)))

    run_told = waits.told(blocks, run)
    run_told()
    assert all(torch.equal(one, other) for one, other in zip(outputs[:2], outputs[2:], strict=True))
    for block in blocks:
        last = block.token_selection.mlp_head[2]
        assert isinstance(last, nn.Linear)
        last.bias.add_(100)  # all on
    run_told()
    assert all(torch.equal(one, other) for one, other in zip(outputs[:2], outputs[4:], strict=True))
    run()
    assert not torch.allclose(outputs[0], outputs[6], atol=1e-4)


def test_options_reach_the_method() -> None:
    settings = options.NetworkSettings(
        model="DiT-T/2", latent=(4, 8, 8), method="dydit", options="flops_target=0.7 complete-steps=none"
    )
    network = settings.blueprints()[1]
    assert isinstance(network, DyDiT)
    assert (network.options.flops_target, network.options.complete_steps) == (0.7, None)
    both = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), density="3", options="top_blocks=1 readd-position=true")
    assert both.method_options() == {"density": "3", "top_blocks": 1, "readd_position": True}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--options", "flops_target"), "--options 'flops_target' is not KEY=VALUE"),
        (("--options", "flops_target=0.5 flops_target=0.7"), "--options: flops_target is given twice"),
        (
            ("--options", "flops_targe=0.5"),
            "--options of --method dydit: unknown key 'flops_targe'; did you mean 'flops_target'?",
        ),
        (("--options", "flops_target=half"), "--options of --method dydit: flops_target must be a number, not 'half'."),
        (("--options", "flops_target=2"), "--flops-target is 2.0; it must be above 0 and at most 1."),
        (("--density", "3"), "--density: --method dydit has none"),
        (("--timestep", "5", "--timesteps", "5"), "--timestep and --timesteps both say where passes are timed"),
        (("--timesteps", "1001"), "1001"),
        (("--timesteps", "0"), "--timesteps must be at least 1, not 0."),
    ],
)
def test_wrong_input_is_one_sentence(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = call("benchmark", "forward", *TINY, *words, "--output", tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
