"""Sampling that skips work: the same pictures as by masks, for any batch and process, and what it computed is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counted_graphs import counted_graphs
from dydit_networks import dydit, saved
from sampling_runs import assert_refused
from small_runs import ROOT, Result, call, random_network, recorded, run, succeed, torchrun
from torch import Tensor, nn

import sample_ddp
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DyDiT
from models.dit import zero
from models.dydit import COMPLETE, MASKED
from models.work import CountedWork
from runtime import execution
from runtime.checkpoint import read_header, save_checkpoint
from runtime.networks import dense_blueprint
from runtime.sampling import SamplingSettings, draw_labels, sample_latents
from tests.models.random_networks import distance
from tests.models.random_networks import one_thread as one_thread

CPU = torch.device("cpu")
SAMPLERS = {
    "DDPM": SamplingSettings(num_sampling_steps="10"),
    "DDIM": SamplingSettings(sampler="ddim", num_sampling_steps="10"),
    "sections": SamplingSettings(num_sampling_steps="10,15,20"),
    "strided": SamplingSettings(sampler="ddim", num_sampling_steps="ddim25"),
    "interval": SamplingSettings(num_sampling_steps="10", guidance_interval=(0.3, 0.8)),
}


def latents(model: nn.Module, settings: SamplingSettings, index: Tensor) -> Tensor:
    return sample_latents(model, settings, index % 4, index, 7, CPU)


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_each_step_is_one_call_under_the_plan_of_its_timestep(sampler: str, bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of guidance in it. Planted bug: the unconditional half has a plan of its own."""
    model, settings, seen = dydit(), SAMPLERS[sampler], []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, t, _, plan = arguments
        seen.append((int(t), plan.timestep, len(x), plan.selection))

    model.register_forward_pre_hook(note)
    if bug:
        monkeypatch.setattr(model, "guidance_plans", lambda t: (model.plan(t), COMPLETE))
    latents(model, settings, torch.arange(3))
    low, high = settings.guidance_interval or (0, 1)
    timesteps = reversed(NoiseSchedule.linear().respaced(settings.num_sampling_steps).timesteps)
    expected = [(t, t, 6 if low <= t / 1000 <= high else 3, model.plan(t).selection) for t in timesteps]
    assert len({selection for *_, selection in expected}) > 5
    assert (seen == expected) is not bug


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_is_left_out_changes_no_picture(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against masks, which compute everything. Known-bad variant: everything is on."""
    model, index = dydit(), torch.arange(3)
    made = latents(model, SAMPLERS[sampler], index)
    assert 0.2 < model.work.block_macs / model.work.passes / model._width_macs(model.everything) < 0.8
    monkeypatch.setattr(model, "guidance_plans", lambda t: (MASKED, MASKED))
    assert distance(made, latents(model, SAMPLERS[sampler], index)) < 1e-4
    monkeypatch.setattr(model, "guidance_plans", lambda t: (COMPLETE, COMPLETE))
    assert distance(made, latents(model, SAMPLERS[sampler], index)) > 1e-2


@pytest.mark.parametrize("bug", [False, True])
def test_routers_of_width_are_asked_once_for_all_batches(bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: weights count as changed after every step."""
    model, asked = dydit(), list[Any]()
    monkeypatch.setattr(model, "_plans", recorded(model._plans, asked))
    if bug:
        model.register_forward_pre_hook(lambda *_: zero(model.t_embedder.mlp[0].bias))  # type: ignore[arg-type]
    for part in torch.arange(4).split(2):
        latents(model, SAMPLERS["DDPM"], part)
    assert (len(asked) == 1) is not bug


@pytest.mark.parametrize("sampler", ["DDPM", "DDIM"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str) -> None:
    model = dydit()
    together = latents(model, SAMPLERS[sampler], torch.arange(6))
    apart = torch.cat([latents(model, SAMPLERS[sampler], part) for part in torch.arange(6).split([1, 3, 2])])
    assert distance(apart, together) < 1e-4
    assert distance(together[1:], together[:-1]) > 0.1


# sample_ddp.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dydit") / "small.safetensors", dydit())


def words(checkpoint: Path, folder: Path, count: int = 10, batch: int = 4, steps: str = "3") -> list[str | Path]:
    return ["--ckpt", checkpoint, "--num-fid-samples", str(count), "--num-sampling-steps", steps,
            "--per-proc-batch-size", str(batch), "--sample-dir", folder, "--sample-name", "set"]  # fmt: skip


def sampled(checkpoint: Path, folder: Path, *more: str, count: int = 10, batch: int = 4, steps: str = "3") -> Result:
    return succeed("sample_ddp", *words(checkpoint, folder, count, batch, steps), *more)


def pictures(folder: Path) -> np.ndarray:
    with np.load(folder / "set.npz") as content:
        made: np.ndarray = content["arr_0"].astype(int)
    return made


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "set.json").read_text())
    assert json.loads((folder / "set" / "protocol.json").read_text()) == content
    return content


FLAGS = {
    "DDPM": ("--num-sampling-steps", "5"),
    "DDIM": ("--num-sampling-steps", "5", "--sampler", "ddim"),
    "sections": ("--num-sampling-steps", "10,15,20"),
    "strided": ("--num-sampling-steps", "ddim25", "--sampler", "ddim"),
    "interval": ("--num-sampling-steps", "5", "--guidance-interval", "0.3", "0.8"),
}


@pytest.mark.parametrize(("sampler", "bug"), [("DDPM", False), ("interval", False), ("DDPM", True)])
def test_processes_in_turn_make_the_bytes_of_one(
    sampler: str, bug: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: plans that know the process."""
    flags = FLAGS[sampler]
    sampled(checkpoint, tmp_path / "one", *flags)
    plan, blocks = METHODS["dydit"].plan, sample_ddp.sample_blocks

    def as_three(settings: Any, executor: Any, codec: Any, target: Path, state: Any) -> None:
        for rank in range(3):
            if bug:
                monkeypatch.setattr(METHODS["dydit"], "plan", lambda self, t, rank=rank: plan(self, (t + 400 * rank) % 1000))
            alike = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=False, device=state.device)
            blocks(settings, executor, codec, target, alike)

    monkeypatch.setattr(sample_ddp, "sample_blocks", as_three)
    sampled(checkpoint, tmp_path / "three", *flags)
    one, three = ((tmp_path / name / "set.npz").read_bytes() for name in ("one", "three"))
    assert (one == three) is not bug


def test_two_processes_count_what_one_counts(checkpoint: Path, tmp_path: Path) -> None:
    sampled(checkpoint, tmp_path / "one")
    ended = run(torchrun(2, ROOT / "sample_ddp.py", *words(checkpoint, tmp_path / "two")), tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("measured over 72 passes") == 1
    assert (tmp_path / "one" / "set.npz").read_bytes() == (tmp_path / "two" / "set.npz").read_bytes()
    assert record(tmp_path / "one")["measured"] == record(tmp_path / "two")["measured"]


def test_batch_and_layout_of_weights_change_a_grey_level_at_most(checkpoint: Path, tmp_path: Path) -> None:
    """Known-bad variant: another seed."""
    for name, more, batch in (("four", (), 4), ("five", ("--no-pack-weights",), 5), ("seed", ("--seed", "1"), 4)):
        sampled(checkpoint, tmp_path / name, *more, batch=batch, steps="5")
    four, five, seed = (pictures(tmp_path / name) for name in ("four", "five", "seed"))
    assert abs(four - five).max() <= 1
    assert abs(four - seed).max() > 20


# What was measured ---------------------------------------------------------------------------------------------------


def by_hand(start: int, stop: int) -> CountedWork:
    """The counts of the blocks of 4 pictures from `start` on."""
    model, settings = dydit(), SamplingSettings(num_sampling_steps="3")
    for index in torch.arange(start, stop).split(4):
        sample_latents(model, settings, draw_labels("random", 4, 0, index), index, 0, CPU)
    return model.work


def test_what_was_computed_is_told_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    """Beforehand the plans' cost is told as what it is, the most."""
    said = sampled(checkpoint, tmp_path).out
    before, after = said.split("10 pictures of 8 x 8 into")
    assert before.count("at most") == 3
    assert "measured" not in before
    work, model = by_hand(0, 12), dydit()
    assert work.passes == 3 * 4 * 2 * 3  # padded places of the last block included
    gmacs, dense = work.macs / work.passes / 1e9, dense_blueprint(model).macs() / 1e9
    assert f"measured over 72 passes: {gmacs:.4g} GMACs per image and pass in full ({gmacs / dense:.1%} of the" in after
    made = record(tmp_path)
    assert made["gmacs_per_pass"] == made["measured"]["gmacs_per_pass"] == gmacs
    assert made["gmacs_per_pass"] < 0.95 * model.mean_macs([0, 500, 999]) / 1e9  # tokens passed the MLP by
    blocks = model._width_macs(model.everything)
    assert made["measured"]["attention_and_mlp_gmacs_per_pass"] == work.block_macs / work.passes / 1e9
    assert made["measured"]["flops_ratio"] == pytest.approx(work.block_macs / work.passes / blocks, rel=1e-12)
    assert 0.2 < made["measured"]["flops_ratio"] < 0.8
    assert (tmp_path / "set.kept.png").exists()


def test_a_network_that_leaves_nothing_out_measures_its_whole_cost(tmp_path: Path) -> None:
    whole = DyDiT(Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4))
    sampled(saved(tmp_path / "whole.safetensors", whole), tmp_path)
    made = record(tmp_path)
    assert made["measured"]["flops_ratio"] == 1.0
    assert made["gmacs_per_pass"] == whole.macs(whole.everything) / 1e9


@pytest.mark.parametrize("bug", [False, True])
def test_a_set_taken_up_again_adds_and_a_complete_one_keeps(
    bug: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted by passes. Planted bug: what earlier runs counted is forgotten."""
    sampled(checkpoint, tmp_path, count=8)
    if bug:
        monkeypatch.setattr(sample_ddp, "read_work", lambda path, depth: CountedWork(depth))
    sampled(checkpoint, tmp_path, count=12)
    whole = by_hand(0, 12)
    assert (record(tmp_path)["measured"]["passes"] == whole.passes) is not bug
    if bug:
        return
    assert record(tmp_path)["gmacs_per_pass"] == whole.macs / whole.passes / 1e9
    files = ("set.json", "set.kept.png", "set/work.npz", "set/protocol.json")
    before = [(tmp_path / name).read_bytes() for name in files]
    assert "measured over 72 passes" in sampled(checkpoint, tmp_path, count=12).out
    assert [(tmp_path / name).read_bytes() for name in files] == before


def test_a_set_whose_run_was_killed_says_what_was_measured_since(checkpoint: Path, tmp_path: Path) -> None:
    """A run counts when it ends: until then nothing was measured, and that is what the record says."""
    sampled(checkpoint, tmp_path)
    (tmp_path / "set" / "work.npz").unlink()
    sampled(checkpoint, tmp_path)
    assert (record(tmp_path)["gmacs_per_pass"], record(tmp_path)["measured"]) == (None, None)
    for index in (8, 9):
        (tmp_path / "set" / f"{index:06d}.png").unlink()
    assert "these are not all passes of 10 pictures" in sampled(checkpoint, tmp_path).out
    assert record(tmp_path)["measured"]["passes"] == 4 * 2 * 3


def test_what_was_counted_survives_a_failure_to_pack(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sample_ddp, "pack_pictures", lambda *arguments: (_ for _ in ()).throw(OSError(28, "disk full")))
        assert call("sample_ddp", *words(checkpoint, tmp_path)).code != 0
    said = sampled(checkpoint, tmp_path).out
    assert "measured over 72 passes" in said
    assert "these are not all" not in said


def test_damaged_counts_are_refused_before_any_sampling(checkpoint: Path, tmp_path: Path) -> None:
    sampled(checkpoint, tmp_path)
    (tmp_path / "set" / "work.npz").write_bytes(b"PK")
    assert_refused(call("sample_ddp", *words(checkpoint, tmp_path, 12)), "work.npz is damaged", "delete it")


def test_records_of_other_methods_know_nothing_measured(tmp_path: Path) -> None:
    made = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4))
    said = sampled(saved(tmp_path / "other.safetensors", made), tmp_path).out
    assert "measured" not in said
    assert "at most" not in said
    assert "measured" not in record(tmp_path)
    assert not list(tmp_path.glob("**/*.kept.png")) + list(tmp_path.glob("**/work.npz"))


# Checkpoints and flags -----------------------------------------------------------------------------------------------


def test_sample_tells_what_its_pictures_cost(checkpoint: Path, tmp_path: Path) -> None:
    said = succeed("sample", "--ckpt", checkpoint, "--num-sampling-steps", "3", "--output", tmp_path / "grid.png").out
    assert said.count("at most") == 3
    assert "measured over 24 passes: " in said.split("first pictures after")[1]


def test_released_weights_need_model_and_size_alone(tmp_path: Path) -> None:
    """In the layout of the authors, with the prefix of their wrapper; no codec is needed for the latents."""
    made = dydit(channels=4)
    torch.save({f"module.{name}": values for name, values in made.state_dict().items()}, tmp_path / "released.pt")
    given = sample_ddp.SampleSettings(ckpt=str(tmp_path / "released.pt"), model="DiT-T/2", image_size=64)
    opened, spec = sample_ddp.open_checkpoint(given, str(given.ckpt))
    loaded, index = opened.build().network, torch.arange(2)
    assert (type(loaded), opened.kind, spec.name) == (DyDiT, "released", "ema")
    assert [loaded.plan(t) for t in (0, 500, 999)] == [made.plan(t) for t in (0, 500, 999)]
    assert torch.equal(latents(loaded, SAMPLERS["DDPM"], index), latents(made, SAMPLERS["DDPM"], index))


def test_half_precision_makes_nearly_the_same_pictures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, in few graphs for all timesteps and batches. Known-bad variant: another seed."""
    monkeypatch.setattr(execution, "check_compiler", lambda device: None)
    sampled(checkpoint, tmp_path / "fp32", steps="10")
    with counted_graphs(monkeypatch) as graphs:
        sampled(checkpoint, tmp_path / "bf16", "--precision", "bf16", "--compile", "default", steps="10")
    sampled(checkpoint, tmp_path / "seed", "--seed", "1", steps="10")
    whole, half, seed = (pictures(tmp_path / name) for name in ("fp32", "bf16", "seed"))
    assert 0 < abs(whole - half).mean() < abs(whole - seed).mean() / 5
    ratios = [record(tmp_path / name)["measured"]["flops_ratio"] for name in ("fp32", "bf16")]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)
    assert graphs.made <= 6
    assert graphs.ran > 100


def test_raw_and_averaged_weights_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    """Each with the plans of its own routers."""
    averaged, header = dydit(), read_header(checkpoint)
    assert header is not None
    raw = dydit(flops_target=0.3)
    both = {f"{kind}/{name}": values for kind, made in (("model", raw), ("ema", averaged))
            for name, values in made.state_dict().items()}  # fmt: skip
    save_checkpoint(tmp_path / "run.safetensors", both, header)
    sampled(checkpoint, tmp_path / "alone")
    for weights in ("ema", "raw"):
        sampled(tmp_path / "run.safetensors", tmp_path / weights, "--weights", weights)
    alone, ema, least = (record(tmp_path / name)["measured"]["flops_ratio"] for name in ("alone", "ema", "raw"))
    assert alone == ema > least + 0.1
    assert (pictures(tmp_path / "alone") == pictures(tmp_path / "ema")).all()


def test_fp8_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "check_fp8", lambda device: None)
    assert_refused(call("sample_ddp", *words(checkpoint, tmp_path), "--precision", "fp8"), "--precision fp8", "choose bf16.")


@pytest.mark.parametrize("script", ["sample", "sample_ddp"])
def test_a_density_is_refused(script: str, checkpoint: Path, tmp_path: Path) -> None:
    place = ["--output", tmp_path / "x.png"] if script == "sample" else ["--sample-dir", tmp_path]
    refused = call(script, "--ckpt", checkpoint, *place, "--density", "2")
    assert_refused(refused, "--density 2: a network of --method dydit has no token density to choose;")
