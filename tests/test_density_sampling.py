"""Sampling under a token density that varies: every step under the plan of its original timestep, for any batch and process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Result, call, random_network, succeed
from torch import Tensor, nn

import sample_ddp
from diffusion.schedule import NoiseSchedule
from models import METHODS, Backbone, DiT
from runtime.checkpoint import save_checkpoint
from runtime.networks import describe
from runtime.sampling import SamplingSettings, sample_latents
from runtime.seeding import Keys, normal
from tests.models.random_networks import distance
from tests.models.random_networks import one_thread as one_thread

VARYING = "4,2x3,1@0,300,700"
PIXELS = {"name": "pixels", "architecture": "pixels", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
CPU = torch.device("cpu")
STEPS = ["50", "10,15,20", "ddim25"]


def network(method: str = "sparsedit", density: str | None = None) -> DiT:
    """A random network for pictures of 8 x 8, 4 x 4 tokens; the same weights whatever the density."""
    torch.manual_seed(0)
    options = {} if density is None else {"density": density}
    made = random_network(method, Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4), options)
    return made.eval().requires_grad_(False)


def latents(model: nn.Module, sampler: Any, steps: str, index: Tensor, scale: float = 1.5) -> Tensor:
    settings = SamplingSettings(cfg_scale=scale, sampler=sampler, num_sampling_steps=steps)
    return sample_latents(model, settings, index % 4, index, 7, CPU)


# The plan of each step -----------------------------------------------------------------------------------------------


def passes(model: DiT, **settings: Any) -> list[tuple[int, int, tuple[Any, ...]]]:
    """(timestep, samples, signature of the plan) of every pass that sampling three pictures makes."""
    seen = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, t, _, plan = arguments
        assert len(set(t.tolist())) == 1
        seen.append((int(t[0]), len(x), plan.signature))

    hook = model.register_forward_pre_hook(note)
    latents(model, index=torch.arange(3), **settings)
    hook.remove()
    return seen


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_every_step_follows_the_plan_of_its_original_timestep(
    sampler: str, steps: str, bug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves of guidance alike, in one batch. Planted bug: the plan of the step's index."""
    model, timesteps = network(density=VARYING), NoiseSchedule.linear().respaced(steps).timesteps
    if bug:
        plan = model.plan
        monkeypatch.setattr(model, "guidance_plans", lambda t: (plan(timesteps.index(t)),) * 2)
    density = model.density
    assert density is not None
    expected = [(t, 6, ("sparse grid", *density.grid_at(t))) for t in reversed(timesteps)]
    assert len({signature for _, _, signature in expected}) == 3
    assert (passes(model, sampler=sampler, steps=steps) == expected) is not bug


def test_without_guidance_there_is_one_half() -> None:
    counts = {count for _, count, _ in passes(network(density=VARYING), sampler="ddpm", steps="5", scale=1.0)}
    assert counts == {3}


def by_hand(steps: str, sampler: str, index: Tensor, grid_of: Callable[[int], str]) -> Tensor:
    """The whole sampling in plain arithmetic; each step by a network of one density, `grid_of` its timestep."""
    fixed: dict[str, DiT] = {}
    schedule = NoiseSchedule.linear().respaced(steps)
    x, labels = normal(Keys(7, 0, index), "start noise", (3, 8, 8)), index % 4
    for step, place in enumerate(reversed(range(len(schedule)))):
        t = schedule.timesteps[place]
        model = fixed.setdefault(grid_of(t), network(density=grid_of(t)))
        conditional, unconditional = (model(x, torch.full((len(x),), t), y) for y in (labels, torch.full_like(labels, 4)))
        epsilon = unconditional[:, :3] + 1.5 * (conditional[:, :3] - unconditional[:, :3])
        kept, before = float(schedule.alphas_cumprod[place]), float(schedule.alphas_cumprod_previous[place])
        x0 = (x - (1 - kept) ** 0.5 * epsilon) / kept**0.5
        if sampler == "ddim":
            x = before**0.5 * x0 + (1 - before) ** 0.5 * epsilon
            continue
        beta, weight = 1 - kept / before, (conditional[:, 3:] + 1) / 2
        x = beta * before**0.5 / (1 - kept) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - kept) * x
        if place:
            smallest = np.log(beta * (1 - before) / (1 - kept))
            noise = normal(Keys(7, step, index), "step noise", (3, 8, 8))
            x = x + torch.exp((weight * np.log(beta) + (1 - weight) * smallest) / 2) * noise
    return x


@pytest.mark.parametrize("steps", ["10", "2,3,4", "ddim10"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_latents_are_those_of_a_loop_by_hand(sampler: str, steps: str) -> None:
    """Over networks of one density each. Known-bad variant: the steps of the middle interval take the clean one's grid."""
    index = torch.arange(3)
    made = latents(network(density=VARYING), sampler, steps, index)
    right = by_hand(steps, sampler, index, lambda t: "4" if t < 300 else "2x3" if t < 700 else "1")
    wrong = by_hand(steps, sampler, index, lambda t: "4" if t < 700 else "1")
    assert distance(made, right) < 2e-5
    assert distance(made, wrong) > 2e-3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str) -> None:
    model = network(density=VARYING)
    together = latents(model, sampler, "10", torch.arange(6))
    apart = torch.cat([latents(model, sampler, "10", part) for part in torch.arange(6).split([1, 3, 2])])
    assert distance(apart, together) < 1e-4
    assert distance(together[1:], together[:-1]) > 0.1


# sample_ddp.py and sample.py -----------------------------------------------------------------------------------------


def header_of(made: DiT) -> dict[str, Any]:
    data = {"image_size": 8, "codec": PIXELS, "classes": None}
    return {"network": describe(made, "DiT-T/2"), "data": data, "step": 7}


def saved(path: Path, made: DiT) -> Path:
    save_checkpoint(path, made.state_dict(), header_of(made))
    return path


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("varying") / "varying.safetensors", network(density=VARYING))


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 2 x 2."""
    return saved(tmp_path_factory.mktemp("fixed") / "fixed.safetensors", network())


def sampled(checkpoint: Path, folder: Path, *more: str, count: int = 6) -> Result:
    return succeed("sample_ddp", *words(checkpoint, folder, count), *more)


def words(checkpoint: Path, folder: Path, count: int = 6) -> list[object]:
    return ["--ckpt", checkpoint, "--num-fid-samples", count, "--num-sampling-steps", "2,1", "--per-proc-batch-size", 4,
            "--sample-dir", folder]  # fmt: skip


def record(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def packed(folder: Path) -> bytes:
    (path,) = folder.glob("*.npz")
    return path.read_bytes()


def test_a_varying_density_is_told_drawn_and_recorded(varying: Path, tmp_path: Path) -> None:
    said = sampled(varying, tmp_path).out
    assert f"token density {VARYING}" in said
    assert "over the 3 sampled timesteps" in said
    assert said.index("sparsedit DiT-T/2") < said.index("mean GMACs") < said.index("6 pictures of 8 x 8")
    (plot,) = tmp_path.glob("*.png")
    assert plot.name == f"{next(tmp_path.glob('*.npz')).stem}.density.png"
    made, model = record(tmp_path), network(density=VARYING)
    assert made["density"] == {"sampled": VARYING, "trained": VARYING, "note": None}
    timesteps = [0, 499, 500]  # of the steps "2,1": two of the clean half, one of the noisy
    assert list(NoiseSchedule.linear().respaced("2,1").timesteps) == timesteps
    assert made["gmacs_per_pass"] == pytest.approx(sum(model.macs(model.plan(t)) for t in timesteps) / 3e9)
    assert made["gmacs_per_pass"] != pytest.approx(model.mean_macs() / 1e9, rel=1e-3)


@pytest.mark.parametrize("bug", [False, True])
def test_two_processes_make_the_bytes_of_one(bug: bool, varying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process samples its blocks in turn, as two would at once. Planted bug: plans that know the process."""
    sampled(varying, tmp_path / "one", count=12)
    plan, blocks = METHODS["sparsedit"].plan, sample_ddp.sample_blocks

    def as_two(settings: Any, executor: Any, codec: Any, target: Path, state: Any) -> None:
        for rank in range(2):
            if bug:
                monkeypatch.setattr(METHODS["sparsedit"], "plan", lambda self, t, rank=rank: plan(self, t * (1 - rank)))
            alike = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=False, device=state.device)
            blocks(settings, executor, codec, target, alike)

    monkeypatch.setattr(sample_ddp, "sample_blocks", as_two)
    sampled(varying, tmp_path / "two", count=12)
    assert (packed(tmp_path / "one") == packed(tmp_path / "two")) is not bug


def test_a_checkpoint_is_sampled_under_another_density(fixed: Path, tmp_path: Path) -> None:
    assert "Sampled under" not in sampled(fixed, tmp_path / "trained").out
    assert list((tmp_path / "trained").glob("*.png")) == []  # one interval makes no plot
    said = sampled(fixed, tmp_path / "other", "--density", VARYING).out
    note = f"Sampled under token density {VARYING}, trained with 2."
    assert note in said
    made = record(tmp_path / "other")
    assert made["density"] == {"sampled": VARYING, "trained": "2", "note": note}
    assert made["options"]["density"] == VARYING
    assert len(list((tmp_path / "other").glob("*.density.png"))) == 1
    assert packed(tmp_path / "other") != packed(tmp_path / "trained")
    # The weights know no density: they are those of a network trained under this one.
    again = saved(tmp_path / "again.safetensors", network(density=VARYING))
    sampled(again, tmp_path / "again")
    assert packed(tmp_path / "other") == packed(tmp_path / "again")


@pytest.mark.parametrize("same", ["2", "2x2", "2,2@0,500", "0.75:0.75"])
def test_the_density_trained_with_is_nothing_new(same: str, fixed: Path, tmp_path: Path) -> None:
    sampled(fixed, tmp_path)
    before = packed(tmp_path), record(tmp_path)
    assert "Sampled under" not in sampled(fixed, tmp_path, "--density", same).out  # the same set, finished already
    assert (packed(tmp_path), record(tmp_path)) == before


def test_the_name_of_a_set_tells_its_density(fixed: Path, tmp_path: Path) -> None:
    densities = ["3", "3x2", "3,2@0,250", "3,2@0,2", "3x2,2@0,2", "3,2,1@0,2,5", "0.1:0.9", "0.1:0.9/4"]
    for density in densities:
        sampled(fixed, tmp_path, "--density", density, count=1)
    names = sorted(path.stem for path in tmp_path.glob("*.npz"))
    assert len(names) == len(densities)
    assert all("-density-" in name for name in names)
    assert any(name.endswith("-density-3x2-2-0-2") for name in names)


def many_intervals(first: str) -> str:
    """A density of 300 intervals, too long for the name of a file."""
    return ",".join([first, *("2" if place % 2 else "1" for place in range(1, 300))]) + "@" + ",".join(map(str, range(300)))


def test_densities_of_many_intervals_leave_room_for_every_name(fixed: Path, tmp_path: Path) -> None:
    densities = ["0.1:0.9/60", many_intervals("3"), many_intervals("4")]
    for density in densities:
        assert ".npz: arr_0 (1, 8, 8, 3)" in sampled(fixed, tmp_path, "--density", density, count=1).out
    names = {path.name.removesuffix(".npz") for path in tmp_path.glob("*.npz")}
    assert len(names) == len(densities)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{name}.density.png" for name in names}
    assert max(len(name) for name in names) < 120
    endings = sorted(name.rpartition("-density-")[2] for name in names)
    assert "0.1-0.9-60" in endings
    assert sum(re.fullmatch("[0-9a-f]{12}", ending) is not None for ending in endings) == 2


def test_a_set_of_another_density_is_not_gone_on_with(fixed: Path, tmp_path: Path) -> None:
    sampled(fixed, tmp_path, "--sample-name", "set")
    result = call("sample_ddp", *words(fixed, tmp_path), "--sample-name", "set", "--density", "3")
    assert result.code == 2
    assert "made with another options, density; give another --sample-name" in result.err


def test_a_method_without_density_is_named(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense.safetensors", network("dense"))
    result = call("sample_ddp", *words(dense, tmp_path / "samples"), "--density", "2")
    assert result.code == 2
    assert "--density 2: a network of --method dense has no token density to choose; leave the flag out" in result.err
    sampled(dense, tmp_path / "samples")
    assert record(tmp_path / "samples")["density"] == {"sampled": None, "trained": None, "note": None}


@pytest.fixture(scope="module")
def released(tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A file without our header, trained under a density that it does not say, and the flags to sample it."""
    made = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), num_classes=4), {"density": VARYING})
    path = tmp_path_factory.mktemp("released") / "released.pt"
    torch.save(made.state_dict(), path)
    return path, ["--model", "DiT-T/2", "--image-size", "64", "--vae", str(tiny_vae)]


@pytest.mark.parametrize(
    ("flags", "density", "ending"),
    [
        ([], "2", "under 2 (the default); give --density if it was another."),
        (["--density", "2"], "2", "under 2 (--density)."),
        (["--density", VARYING], VARYING, f"under {VARYING} (--density)."),
    ],
)
def test_weights_that_do_not_say_their_density_are_said_not_to(
    flags: list[str], density: str, ending: str, released: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, common = released
    said = sampled(path, tmp_path, *common, *flags, count=1).out
    made = record(tmp_path)["density"]
    assert (made["sampled"], made["trained"]) == (density, None)
    assert made["note"] == f"These weights do not say under which token density they were trained; sampled {ending}"
    assert made["note"] in said
    assert ("-density-" in next(tmp_path.glob("*.npz")).stem) is bool(flags)


def test_sample_tells_and_follows_the_density(fixed: Path, tmp_path: Path) -> None:
    common = ["--ckpt", fixed, "--num-sampling-steps", "2", "--output"]
    said = succeed("sample", *common, tmp_path / "varying.png", "--density", VARYING).out
    assert f"token density {VARYING}" in said
    assert "Sampled under token density" in said
    assert "Sampled under" not in succeed("sample", *common, tmp_path / "trained.png").out
    assert (tmp_path / "varying.png").read_bytes() != (tmp_path / "trained.png").read_bytes()


# From before token density -------------------------------------------------------------------------------------------


def test_headers_from_before_are_read(fixed: Path, tmp_path: Path) -> None:
    header = header_of(network())
    header["network"]["options"]["sparse_grid"] = [2, 2]
    del header["network"]["options"]["density"]
    save_checkpoint(tmp_path / "old.safetensors", network().state_dict(), header)
    sampled(tmp_path / "old.safetensors", tmp_path / "old")
    sampled(fixed, tmp_path / "new")
    assert packed(tmp_path / "old") == packed(tmp_path / "new")
    assert record(tmp_path / "old")["options"] == record(tmp_path / "new")["options"]


def made_before(folder: Path, **options: Any) -> None:
    """Turns the record of a finished set into what it was before token density."""
    (path,) = folder.glob("*/protocol.json")
    content = json.loads(path.read_text())
    del content["density"], content["options"]["density"]
    content["options"].update(options)
    path.write_text(json.dumps(content))


def test_a_set_from_before_of_weights_that_do_not_say_is_gone_on_with(released: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, flags = released
    sampled(path, tmp_path, *flags, count=2)
    made_before(tmp_path, sparse_grid=[2, 2])
    sampled(path, tmp_path, *flags, count=3)
    assert record(tmp_path)["count"] == 3
    assert record(tmp_path)["density"]["trained"] is None
    same = next(tmp_path.glob("*.npz")).stem
    other = call("sample_ddp", *words(path, tmp_path), *flags, "--density", "3", "--sample-name", same)
    assert "made with another options, density; give" in other.err


@pytest.mark.parametrize("bug", [False, True])
def test_a_set_from_before_is_gone_on_with(bug: bool, fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: records are compared as they stand."""
    sampled(fixed, tmp_path)
    made_before(tmp_path, sparse_grid=[2, 2])
    if bug:
        density = {"density": {"sampled": "2"}}
        monkeypatch.setattr(sample_ddp, "upgraded", lambda before, network: {**density, **before})
    result = call("sample_ddp", *words(fixed, tmp_path, 9))
    assert (result.code == 0) is not bug, result.err
    if not bug:
        assert record(tmp_path)["density"] == {"sampled": "2", "trained": "2", "note": None}
        assert record(tmp_path)["count"] == 9


def test_a_set_from_before_of_another_grid_or_method_is_refused(fixed: Path, tmp_path: Path) -> None:
    sampled(fixed, tmp_path)
    made_before(tmp_path, sparse_grid=[3, 3])
    result = call("sample_ddp", *words(fixed, tmp_path))
    assert result.code == 2
    assert "made with another options, density; give" in result.err
    (path,) = tmp_path.glob("*/protocol.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "dense", "options": {}}))
    result = call("sample_ddp", *words(fixed, tmp_path))
    assert result.code == 2
    assert "made with another method, options, density; give" in result.err
