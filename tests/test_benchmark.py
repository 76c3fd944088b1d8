"""benchmark.py end to end, at sizes that tell nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Result, call, succeed

import benchmark
from benchmarks import attention, ceiling, contestants, density, forward, options, sampling, training
from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone
from runtime.execution import Execution
from runtime.sampling import SamplingSettings, sampling_cost

CPU = torch.device("cpu")
TINY = ("--model", "DiT-T/2", "--latent", "4", "8", "8", "--num-classes", "5", "--rounds", "1")
SPARSE = ("--density", "3,1@0,500")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large product takes a second for each precision; what is divided by it does not depend on its size."""
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)


def measured(what: str, folder: Path, *words: object) -> tuple[dict[str, Any], Result]:
    """The JSON that a measurement left, and what it said."""
    ended = succeed("benchmark", what, *words, "--output", folder)
    assert (folder / f"{what}.png").is_file()
    return json.loads((folder / f"{what}.json").read_text()), ended


def sparse_network(num_classes: int = 1000) -> Any:
    backbone = Backbone.named("DiT-T/2", (8, 8), num_classes=num_classes)
    return METHODS["sparsedit"](backbone, METHODS["sparsedit"].options_type(density="3,1@0,500"))


def test_sampling(tmp_path: Path) -> None:
    words = (*TINY, *SPARSE, "--batch-size", "2", "--timed-steps", "4", "--steps", "8", "--guidance-interval", "0.2", "0.7")
    result, ended = measured("sample", tmp_path, *words, "--precision", "bf16")
    rows = result["rows"]
    names = ["dense, plain", "dense, ours", "sparsedit, plain", "sparsedit, ours", "sparsedit, ours, interval"]
    assert [*rows] == names
    network = sparse_network()
    for name, where, passes in (("sparsedit, ours", None, 8), ("sparsedit, ours, interval", (0.2, 0.7), 6)):
        seconds = rows[name]["seconds"]["median"]
        cost, whole = (
            sampling_cost(network, SamplingSettings(num_sampling_steps=steps, guidance_interval=where)) for steps in ("4", "8")
        )
        assert cost.passes == passes
        assert rows[name]["tflops"] == pytest.approx(2 * 2 * cost.macs / seconds / 1e12)
        # Of all 8 steps. Known bad: half of them counted as half of the work, of which more is guided than of all.
        assert rows[name]["images_per_second"] == pytest.approx(2 * cost.macs / whole.macs / seconds)
        assert (cost.macs / whole.macs == pytest.approx(4 / 8, rel=1e-3)) is (where is None)
        # The mean over all steps too: 8 of them make a picture.
        assert 8 * rows[name]["ms_per_step"] / 1000 == pytest.approx(2 / rows[name]["images_per_second"])
        assert rows[name]["share_of_ceiling"] == pytest.approx(rows[name]["tflops"] / result["ceiling"]["bf16"])
    assert rows["dense, plain"]["ratio"] == {"median": 1, "fastest": 1, "slowest": 1}
    assert result["ceiling"].keys() == {"bf16", "fp32"}
    assert result["settings"]["batch_size"] == 2
    assert "output" not in result["settings"]
    assert "guidance interval: 3 of all 8 steps are guided, 2 of the 4 timed ones" in ended.out
    assert "execution: cpu, bf16, blocks not compiled" in ended.out


def test_sampling_with_path_drop(tmp_path: Path) -> None:
    """Both kinds of guidance by one network, in the same steps. Known bad: a cheap half that costs a whole pass."""
    words = (*TINY, "--method", "sprint", "--timed-steps", "3", "--steps", "6", "--guidance-interval", "0.2", "0.7")
    result, ended = measured("sample", tmp_path, *words, "--no-pack-weights", "--guidance", "path-drop", "--sampler", "euler")
    rows, best = result["rows"], "sprint, plain"
    names = ["dense, plain", best, f"{best}, interval", f"{best}, path-drop", f"{best}, path-drop, interval"]
    assert [*rows] == names
    network = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), method="sprint").blueprints()[1]
    full, cheap = network.macs(network.plan(0)), network.macs(network.cheap_plan(0))
    assert rows[f"{best}, path-drop"]["gmacs"] == pytest.approx((full + cheap) / 2 / 1e9)
    assert rows[best]["gmacs"] == pytest.approx(full / 1e9)
    assert f"{best}, path-drop / classifier-free: time ratio" in ended.out
    assert f"MACs ratio {(full + cheap) / 2 / full:.3f}" in ended.out
    assert result["sampler"] == "euler"
    assert "batch 1, euler, guidance 1.5, 3 of 6 steps timed" in ended.out


def test_sampling_with_decoding(tmp_path: Path, tiny_vae: Path) -> None:
    words = ("--model", "DiT-T/2", "--image-size", "64", "--num-classes", "5", "--rounds", "1", "--steps", "2",
             "--no-pack-weights")  # fmt: skip
    result, ended = measured("sample", tmp_path, *words, "--timed-steps", "2", "--vae", tiny_vae)
    rows = result["rows"]
    assert [*rows] == ["dense, plain", "sparsedit, plain", "sparsedit, plain, decoded", "sparsedit, plain, decoded beside"]
    decoded = rows["sparsedit, plain, decoded"]
    assert decoded["images_per_second"] == pytest.approx(1 / decoded["seconds"]["median"])  # a batch of 1, all its steps
    assert "of 3 in a row" in ended.out
    refused = call("benchmark", "sample", "--output", tmp_path, *words, "--timed-steps", "1", "--vae", tiny_vae)
    assert (refused.code, "--vae: decoding has its share" in refused.err) == (2, True)
    refused = call(
        "benchmark", "sample", "--output", tmp_path, *words, "--timed-steps", "2", "--vae", tiny_vae, "--latent", "3", "8", "8"
    )
    assert (refused.code, "give --latent or --image-size to fit" in refused.err) == (2, True)


def test_what_is_off_is_not_measured_twice(tmp_path: Path) -> None:
    result, ended = measured("sample", tmp_path, *TINY, "--timed-steps", "1", "--no-pack-weights")
    assert [*result["rows"]] == ["dense, plain", "sparsedit, plain"]
    assert "there are no rows of ours" in ended.out
    assert contestants.is_plain(Execution(CPU, note="computed in float32"))
    assert not contestants.is_plain(Execution(CPU, compile="default"))
    assert not contestants.is_plain(Execution(torch.device("cuda"), "tf32", cuda_graphs=True))
    assert contestants.is_plain(Execution(torch.device("cuda"), "tf32"))


def test_an_executor_converts_a_copy_of_its_own() -> None:
    """In place, it would make the plain rows those of half precision."""
    blueprints = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), num_classes=5).blueprints()
    found = contestants.contestants(blueprints, Execution(CPU, "bf16"), lambda network: pytest.fail("its plans say it all"))
    types = {name: {parameter.dtype for parameter in one.network.parameters()} for name, one in found.items()}
    assert types["dense, plain"] == types["sparsedit, plain"] == {torch.float32}
    assert torch.bfloat16 in types["sparsedit, ours"]
    assert all(bool((parameter != 0).any()) for parameter in found["dense, plain"].network.parameters())


def test_a_batch_that_does_not_fit_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 32:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert sampling.fitting_batch(attempt, 128) == 32
    assert tried == [128, 64, 32]
    assert "batch 128 does not fit into this GPU's memory: reduced to 32" in capsys.readouterr().out
    assert sampling.fitting_batch(attempt, 20) == 20
    assert capsys.readouterr().out == ""


def test_training(tmp_path: Path) -> None:
    """Our loop and the plain one make the same losses."""
    words = (*TINY, *SPARSE, "--rounds", "3", "--batch-size", "3", "--steps-per-round", "2")
    result, ended = measured("train", tmp_path, *words)
    assert [*result["rows"]] == ["dense, plain", "sparsedit, plain", "sparsedit, ours"]
    assert [len(curve) for curve in result["losses"].values()] == [4, 4, 4]
    assert result["largest_difference"] < 1e-4
    row, parameters = result["rows"]["sparsedit, ours"], sum(one.numel() for one in sparse_network(num_classes=5).parameters())
    assert row["images_per_second"] == pytest.approx(6 / row["seconds"]["median"])
    assert row["gmacs"] == pytest.approx(3 * sparse_network().mean_macs() / 1e9, rel=0.01)  # it has other classes
    assert row["peak_memory_gib"] >= 4 * 4 * parameters / 2**30  # weights, average and two moments, float32
    assert result["rows"]["sparsedit, plain"]["ratio"]["median"] == 1
    assert "loss curves of sparsedit, ours and plain: at most" in ended.out
    assert training.largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)


def test_training_against_other_options_of_the_method(tmp_path: Path) -> None:
    """Known bad: the dense network under the rival's name, or the same options on both sides."""
    words = (*TINY, "--method", "sprint", "--options", "drop_ratio=0.75 encoder_blocks=1", "--against", "drop_ratio=0")
    result, ended = measured("train", tmp_path, *words, "--batch-size", "2")
    rows, rival = result["rows"], "sprint drop_ratio=0"
    assert [*rows] == [f"{rival}, plain", "sprint, plain", f"{rival}, ours", "sprint, ours"]
    given = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), method="sprint", options="encoder_blocks=1")
    network = given.blueprints()[1]
    for kind in ("plain", "ours"):
        assert rows[f"{rival}, {kind}"]["gmacs"] == pytest.approx(3 * network.macs(network.plan(0)) / 1e9)
        ((_, plan),) = network.training_plans()
        assert rows[f"sprint, {kind}"]["gmacs"] == pytest.approx(3 * network.macs(plan) / 1e9)
    ratio = network.macs(plan) / network.macs(network.plan(0))
    assert f"ours: sprint / {rival}: time ratio" in ended.out
    assert ended.out.count(f"MACs ratio {ratio:.3f}") == 2
    assert result["losses"][f"{rival}, ours"] == pytest.approx(result["losses"][f"{rival}, plain"], rel=1e-4)
    assert result["losses"][f"{rival}, ours"] != result["losses"]["sprint, ours"]


@pytest.mark.parametrize("method", ["dense", "sparsedit"])
def test_networks_compete_under_either_objective(method: str, tmp_path: Path) -> None:
    for objective, sigma in (("ddpm", True), ("flow", False)):
        settings = options.NetworkSettings(model="DiT-T/2", latent=(4, 8, 8), method=method, objective=objective)
        assert {one.backbone.learn_sigma for one in settings.blueprints()} == {sigma}
        assert {one.backbone.objective for one in settings.blueprints()} == {objective}
    result, _ = measured("train", tmp_path, *TINY, "--method", method, "--objective", "flow", "--batch-size", "2")
    assert result["largest_difference"] < 1e-4
    assert result["settings"]["objective"] == "flow"


def test_no_gradients_stand_between_the_rounds_of_the_plain_loop() -> None:
    """They would be missing in the memory that its rounds add, and be counted in those of ours."""
    blueprint = sparse_network()
    network = training.trainable(blueprint, CPU)
    objective = EpsilonObjective(NoiseSchedule.linear(), None, True)
    loop = training.PlainLoop(network, objective, training.RandomData(blueprint), 2, CPU)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    loop.optimize()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in network.named_parameters())


def test_a_loop_that_learns_otherwise_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a trainer whose learning rate is another."""
    monkeypatch.setattr("runtime.training.learning_rate", lambda settings, step, last_step: 0.01)
    words = (*TINY, *SPARSE, "--rounds", "3", "--batch-size", "3", "--steps-per-round", "2")
    result, _ = measured("train", tmp_path, *words)
    assert result["largest_difference"] > 1e-3


@pytest.mark.parametrize("timestep", [0, 999])
def test_forward_times_the_plan_of_a_timestep(timestep: int, tmp_path: Path) -> None:
    result, ended = measured("forward", tmp_path, *TINY, *SPARSE, "--num-classes", "1000", "--timestep", timestep)
    network = sparse_network()
    gmacs = network.macs(network.plan(timestep)) / 1e9
    assert result["rows"]["sparsedit, plain"]["gmacs"] == gmacs
    ratio = gmacs / result["rows"]["dense, plain"]["gmacs"]
    grid, mean = "3x3" if timestep == 0 else "1x1", f"{network.mean_macs() / 1e9:.4g} GMACs in the mean over all 1,000"
    assert f"token density 3,1@0,500: {grid} at timestep {timestep}; {mean} timesteps" in ended.out
    assert f"MACs ratio {ratio:.3f}" in ended.out


@pytest.mark.parametrize(("method", "density"), [("sparsedit", "3"), ("dense", None)])
def test_forward_names_no_mean_where_nothing_varies(method: str, density: str | None) -> None:
    settings = forward.ForwardSettings(model="DiT-T/2", latent=(4, 8, 8), rounds=1, method=method, density=density)
    result = benchmark.headed("forward", "", forward.measure(settings))
    shown = forward.show(result)
    assert "in the mean" not in shown
    assert ("token density 3: 3x3 at timestep 0" in shown) is (density is not None)


def test_attention(tmp_path: Path) -> None:
    words = ("--model", "DiT-48x8x2/2", "--latent", "4", "8", "8", "--rounds", "1", "--density", "2")
    result, ended = measured("attention", tmp_path, *words)
    names = [*result["rows"]]
    assert names[:2] == ["16 x 16, auto, heads of 24", "16 x 16, auto, heads of 24 as 32"]
    assert {name.partition(",")[0] for name in names} == {"16 x 16", "4 x 16", "4 x 4", "16 x 4"}
    assert "cudnn: no row for 8 of the shapes and paddings, which this device has no such kernel for" in ended.out
    row = result["rows"]["4 x 16, math, heads of 24"]
    assert row["gmacs"] == 2 * 2 * 4 * 16 * 24 / 1e9
    called = row["ms_per_step"] / 1000  # seconds of one call
    assert row["tflops"] == pytest.approx(2 * row["gmacs"] / 1000 / called)


def test_padded_heads_attend_as_they_are() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 24).unbind()
    whole = attention.attend(q, k, v, "math", 24)
    assert torch.allclose(attention.attend(q, k, v, "auto", 32), whole, atol=1e-6)
    wrong = torch.nn.functional.pad(q, (0, 8)), torch.nn.functional.pad(k, (0, 8))
    planted = torch.nn.functional.scaled_dot_product_attention(*wrong, v)  # with the scale of the padded size
    assert not torch.allclose(planted, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("what", "words", "row"),
    [
        ("data", ("--count", "256", "--image-size", "64"), "memory map, samples"),
        ("pack", ("--count", "8", "--image-size", "16"), "packed"),
    ],
)
def test_data_and_packing(what: str, words: tuple[str, ...], row: str, tmp_path: Path) -> None:
    result, _ = measured(what, tmp_path, *words, "--rounds", "1")
    assert result["rows"][row]["images_per_second"] > 0
    assert result["settings"]["count"] == int(words[1])


# Command line --------------------------------------------------------------------------------------------------------


def test_quick_reduces_what_is_not_given() -> None:
    reduced = {"model": "DiT-S/2", "rounds": 3, "timed_steps": 3}
    settings, lines = options.settings_of(sampling.SampleSettings, {"quick": True, "rounds": "7"}, reduced)
    assert (settings.model, settings.rounds, settings.timed_steps) == ("DiT-S/2", 7, 3)
    assert lines == ["model DiT-S/2 in place of DiT-XL/2", "timed steps 3 in place of the default"]
    unchanged, lines = options.settings_of(sampling.SampleSettings, {}, reduced)
    assert unchanged == sampling.SampleSettings()
    assert lines == []


@pytest.mark.parametrize("what", benchmark.MEASUREMENTS)
def test_quick_names_settings_that_there_are(what: str) -> None:
    measurement = benchmark.MEASUREMENTS[what]
    for quick in (measurement.quick_cpu, measurement.quick_gpu):
        settings, lines = options.settings_of(measurement.settings, {"quick": True}, quick)
        assert len(lines) == len(quick) > 0
        assert settings != measurement.settings(quick=True)


def test_quick_says_what_it_reduced(tmp_path: Path) -> None:
    _, ended = measured("pack", tmp_path, "--quick", "--image-size", "8", "--count", "4")
    assert "--quick" not in ended.out  # everything that it would reduce is given
    _, ended = measured("forward", tmp_path, *TINY[:-2], "--quick")
    assert "--quick: image size 256 in place of 512, rounds 3 in place of 5" in ended.out


def test_quick_density(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(density, "main", given.append)
    assert call("benchmark", "density", "--seeds", "2", "--quick").code == 0
    assert call("benchmark", "density", "--seeds", "2").code == 0
    assert given[0][-2:] == ["--seeds", "2"]  # the last one counts
    assert given[0][: len(benchmark.QUICK_DENSITY)] == [*benchmark.QUICK_DENSITY]
    assert given[1] == ["--seeds", "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sampel",), "benchmark.py 'sampel' is no measurement; did you mean 'sample'?"),
        (("sample", "--rounds", "0"), "--rounds must be at least 1, not 0."),
        (("sample", "--timed-steps", "300"), "--timed-steps is 300, more than the 250 --steps"),
        (("sample", "--guidance-interval", "0.7", "0.2"), "--guidance-interval is 0.7 0.2"),
        (("sample", "--method", "sparse"), "--method 'sparse' is not known"),
        (("sample", "--method", "dense", "--density", "8"), "--density: --method dense has none"),
        (("sample", "--image-size", "100"), "--image-size is 100; it must be a multiple of 8."),
        (("sample", "--device", "cuda"), "--device cuda: torch finds no such device"),
        (("sample", "--json", "x"), "unknown argument '--json'"),
        (("sample", "--guidance", "path-drop"), "--guidance path-drop needs a network with a cheap path"),
        (("sample", "--sampler", "euler"), "--sampler euler is not for networks trained under ddpm; choose from ddpm, ddim."),
        (("sample", "--model", "SiT-S/2", "--sampler", "ddim"), "--sampler ddim is not for networks trained under flow"),
        (("train", "--method", "sprint", "--against", "drop_ratio"), "--against 'drop_ratio' is not KEY=VALUE"),
        (("train", "--method", "sprint", "--against", "drop_rati=0"), "--against of --method sprint: unknown key 'drop_rati'"),
        (("forward", "--timestep", "1000"), "--timestep is 1000; give one of 0 to 999."),
        (("forward", "--output", "/proc/none"), "--output: /proc/none cannot be written"),
        (("attention", "--precision", "tf32"), "choose from fp32, bf16, fp16"),
        (("compare", "a.json", "b.json"), "a.json: no such file"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call("benchmark", *words)
    assert ended.code == 2
    assert said in ended.err
    assert ended.out == ""


def test_help_lists_every_measurement() -> None:
    shown = call("benchmark", "--help").out
    assert all(f"\n  {name} " in shown for name in (*benchmark.MEASUREMENTS, "density", "compare"))
    own = call("benchmark", "forward", "--help").out
    assert "--timestep" in own
    assert "--cfg-scale" not in own


def test_compare_ends_with_1_where_something_got_slower(tmp_path: Path) -> None:
    measured("forward", tmp_path, *TINY)
    before = tmp_path / "forward.json"
    content = json.loads(before.read_text())
    for row in content["rows"].values():
        row["seconds"] = {name: [9.0] if name == "rounds" else 9.0 for name in row["seconds"]}
    after = tmp_path / "after.json"
    after.write_text(json.dumps(content))
    assert call("benchmark", "compare", before, after).code == 1
    assert call("benchmark", "compare", after, before).code == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_our_execution_competes() -> None:
    settings = sampling.SampleSettings(model="DiT-T/2", latent=(4, 8, 8), rounds=2, batch_size=4, timed_steps=3)
    result = sampling.measure(settings)
    assert [*result["rows"]] == ["dense, plain", "dense, ours", "sparsedit, plain", "sparsedit, ours"]
    assert all(row["peak_memory_gib"] > 0 for row in result["rows"].values())
    kernels = attention.measure(attention.AttentionSettings(model="DiT-S/2", latent=(4, 8, 8), rounds=1))
    assert any(", flash, " in name for name in kernels["rows"])
