"""What execution and guidance interval change of a sampling: record, name, costs, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_runs import assert_refused
from sampling_runs import checkpoint as checkpoint
from sampling_runs import words as words
from small_runs import call, random_network, succeed
from torch import Tensor

import sample_ddp
from models import Backbone, DiT
from runtime.execution import Execution, resolve_execution
from runtime.sampling import CheckpointSettings, SamplingSettings, plain_forward, sample_latents, sampling_cost
from runtime.startup import FirstPictures
from sample import GridSettings

CPU = torch.device("cpu")


# Costs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> DiT:
    backbone = Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4)
    return random_network("sparsedit", backbone, {"density": "4,2@0,250"}).eval().requires_grad_(False)


def counted(network: DiT, settings: SamplingSettings) -> tuple[int, int]:
    """Passes and multiply-accumulates per picture, noted while two are sampled."""
    passes, macs, index = 0, 0, torch.arange(2)

    def predict(x: Tensor, t: Tensor, y: Tensor, plan: Any, rows: Tensor | None) -> Tensor:
        nonlocal passes, macs
        passes += len(x)
        macs += len(x) * network.macs(plan)
        return plain_forward(network, x, t, y, plan, rows)

    sample_latents(network, settings, index, index, 0, CPU, predict)
    return passes // 2, macs // 2


COSTS = {
    "guidance 1.5 at all 10 steps: 20 network passes and ": SamplingSettings(num_sampling_steps="10"),
    "guidance 1.5 at 5 of 10 steps: 15 network passes and ": SamplingSettings(
        num_sampling_steps="10", guidance_interval=(0.3, 0.8)
    ),
    "guidance 4 at 2 of 5 steps: 7 network passes and ": SamplingSettings(
        cfg_scale=4.0, num_sampling_steps="ddim5", sampler="ddim", guidance_interval=(0.2, 0.5)
    ),
    "no guidance: 6 network passes and ": SamplingSettings(cfg_scale=1.0, num_sampling_steps="1,2,3"),
}


@pytest.mark.parametrize("said", list(COSTS))
def test_what_a_picture_costs_is_what_its_sampling_computes(said: str, network: DiT) -> None:
    """Known-bad variant: steps of one mean plan, which a density makes of different cost."""
    cost = sampling_cost(network, COSTS[said])
    assert str(cost).startswith(said)
    assert str(cost).endswith(f"{cost.macs / 1e12:.4g} TMACs per picture")
    assert (cost.passes, cost.macs) == counted(network, COSTS[said])
    assert cost.macs != pytest.approx(cost.passes * network.mean_macs(), rel=1e-3)


# The record and the name of a set --------------------------------------------------------------------------------------


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "set" / "protocol.json").read_text())
    return content


def test_an_interval_is_said_named_and_recorded(words: list[str], tmp_path: Path) -> None:
    said = succeed("sample_ddp", *words[:-2], "--guidance-interval", "0.25", "0.75").out
    assert "guidance 1.5 at 1 of 3 steps: 4 network passes and " in said
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-interval-0.25-0.75")
    made = json.loads(path.read_text())
    assert made["guidance"] == {"kind": "classifier-free", "scale": 1.5, "channels": "3", "interval": [0.25, 0.75]}
    assert made["passes_per_picture"] == 4


def test_guidance_everywhere_is_the_same_set_and_an_interval_another(words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words)
    made = (tmp_path / "set.npz").read_bytes()
    assert_refused(call("sample_ddp", *words, "--guidance-interval", "0.25", "0.75"), "another guidance;", "--sample-name")
    succeed("sample_ddp", *words, "--guidance-interval", "0.25", "0.75", "--sample-name", "other")
    assert (tmp_path / "other.npz").read_bytes() != made
    succeed("sample_ddp", *words, "--guidance-interval", "0", "1", "--sample-name", "everywhere")
    assert (tmp_path / "everywhere.npz").read_bytes() == made


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--precision", "bf16"], "another precision, packed_weights; add --precision fp32 --pack-weights to go on with"),
        (["--no-pack-weights"], "another packed_weights; add --pack-weights to go on with them, or give another --sample-name"),
        (["--attention", "math"], "another attention; add --attention auto to go on with them, or give"),
        (["--attention", "math", "--seed", "5"], "another seed, attention; give another --sample-name or"),
    ],
)
def test_a_set_is_executed_in_one_way(more: list[str], named: str, words: list[str]) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    assert_refused(call("sample_ddp", *words, *more), named)


def test_compiled_blocks_are_another_set_and_cuda_graphs_are_not(words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    before = record(tmp_path)
    execution = {**before["execution"], "cuda_graphs": True}
    assert sample_ddp.identity({**before, "execution": execution}) == sample_ddp.identity(before)
    execution = {**before["execution"], "compile": "default"}
    assert sample_ddp.identity({**before, "execution": execution}) != sample_ddp.identity(before)


def made_before(folder: Path) -> None:
    """Turns the record of a set into what it was before execution and interval were to choose."""
    content = record(folder)
    del content["execution"], content["guidance"]["interval"], content["passes_per_picture"]
    (folder / "set" / "protocol.json").write_text(json.dumps(content))


@pytest.mark.parametrize("bug", [False, True])
def test_a_set_from_before_is_gone_on_with(
    bug: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: records are compared as they stand."""
    words.append("--no-pack-weights")  # as an older one multiplied
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    made_before(tmp_path)
    if bug:
        monkeypatch.setattr(sample_ddp, "upgraded", lambda before, network: before)
    result = call("sample_ddp", *words)
    assert (result.code == 0) is not bug, result.err
    assert (record(tmp_path).get("passes_per_picture") == 6) is not bug


@pytest.mark.parametrize("more", [["--guidance-interval", "0.25", "0.75"], ["--precision", "bf16"], ["--attention", "math"]])
def test_a_set_from_before_is_not_gone_on_with_otherwise(more: list[str], words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    made_before(tmp_path)
    assert_refused(call("sample_ddp", *words, *more), "holds pictures made with another")


# Start-up ------------------------------------------------------------------------------------------------------------


def test_the_time_to_the_first_pictures_is_said_once(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    said = succeed("sample_ddp", *words).out
    assert said.count("first pictures after ") == 1
    assert " s until sampling began (imports, checkpoint, weights), " in said
    assert said.index("10 pictures of 8 x 8 into") < said.index("first pictures after ") < said.index("set.npz: arr_0")
    assert "first pictures" not in succeed("sample_ddp", *words).out  # all were there
    grid = succeed(
        "sample", "--ckpt", checkpoint, "--num-sampling-steps", "2", "--batch-size", "1", "--output", tmp_path / "g.png"
    )
    assert grid.out.count("first pictures after ") == 1


@pytest.mark.parametrize(
    ("execution", "ending"),
    [
        (Execution(CPU), "decode its first pictures"),
        (Execution(CPU, compile="default"), "decode its first pictures, compilation included"),
        (
            Execution(CPU, compile="default", cuda_graphs=True),
            "decode its first pictures, compilation and recording of CUDA graphs included",
        ),
    ],
)
def test_the_time_to_the_first_pictures_names_what_is_done_once(execution: Execution, ending: str) -> None:
    first = FirstPictures(execution)
    assert first.line().endswith(ending)
    assert 0 < first.before < 3600 * 24


def test_a_grid_starts_at_once_also_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    gpu = torch.device("cuda")
    assert resolve_execution(GridSettings(), gpu).compile == "none"
    assert resolve_execution(CheckpointSettings(), gpu).compile == "default"


# Wrong inputs --------------------------------------------------------------------------------------------------------

WRONG = {
    "bounds the wrong way": (["--guidance-interval", "0.7", "0.2"], "--guidance-interval is 0.7 0.2; give LOW HIGH"),
    "one bound": (["--guidance-interval", "0.7"], "--guidance-interval: expected 2 arguments"),
    "text": (["--guidance-interval", "low", "high"], "guidance_interval must be a number, not 'low'"),
    "below 0": (["--guidance-interval", "-0.1", "0.5"], "--guidance-interval is -0.1 0.5;"),
    "timesteps": (["--guidance-interval", "200", "800"], "--guidance-interval is 200.0 800.0;"),
    "not a number": (["--guidance-interval", "nan", "1"], "--guidance-interval is nan 1.0;"),
    "TF32 and not": (["--precision", "fp32", "--tf32"], "--precision fp32 and --tf32 contradict each other"),
    "not TF32 and so": (["--precision", "tf32", "--no-tf32"], "--precision tf32 and --no-tf32 contradict each other"),
    "precision": (["--precision", "fp31"], "choose from auto, fp32, tf32, bf16, fp16, fp8; did you mean 'fp32'?"),
    "fp8": (["--precision", "fp8"], "--precision fp8 needs a GPU"),
    "no compiler": (["--compile", "default"], "--compile needs a C++ compiler, and none is found; install g++"),
    "a GPU's kernel": (["--attention", "cudnn"], "--attention cudnn "),
}


@pytest.mark.parametrize("script", ["sample", "sample_ddp"])
@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_executions_are_refused_before_the_checkpoint_is_read(
    case: str, script: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_found() -> None:
        raise InvalidCxxCompiler

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    monkeypatch.setattr("runtime.sampling.read_weights", lambda *arguments: pytest.fail("it was read"))
    more, named = WRONG[case]
    assert_refused(call(script, "--ckpt", checkpoint, *more), named)


def test_overlapped_decoding_with_a_kernel_is_refused(words: list[str]) -> None:
    result = call("sample_ddp", *words, "--overlap-decoding", "--attention", "math")
    assert_refused(result, "--overlap-decoding and --attention math exclude each other")
