"""Every file in configs/ is read by the training parser and builds its network on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffusion.gaussian import EpsilonObjective
from diffusion.samplers import SAMPLERS
from models import Backbone, DiT
from runtime.config import InputError, load_yaml
from runtime.density_report import PUBLISHED, published_row
from runtime.networks import method_name
from runtime.objectives import make_objective
from runtime.resuming import network_of
from runtime.settings import TrainingSettings, parse_training

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.y*ml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

PUBLISHED_PARAMETERS = {
    ("dense", 256): 675_129_632,
    ("dense", 512): 676_014_368,
    ("sparsedit", 256): 683_099_168,
    ("sparsedit", 512): 681_327_392,
}
"""Of DiT-XL/2, by method and picture size: the released checkpoints."""


DYNAMIC = {
    "dydit-xl-2-256-f50": (0.5, 1_000, 30_000, 200_000, 1e-4, 200.0, "57.88 (dense: 118.69); the target is 59.19"),
    "dydit-xl-2-256-f70": (0.7, 5_000, None, 150_000, 2.5e-5, 50.0, "84.33 (dense: 118.69); the target is 82.87"),
    "dydit-b-2-256-f50": (0.5, 1_000, 0, 100_000, 1e-4, 200.0, ""),
    "dydit-b-2-256-f70": (0.7, 5000, None, 100_000, 2.5e-5, 50.0, ""),
    "dydit-s-2-256-f70": (0.7, 5000, None, 50_000, 2.5e-5, 50.0, ""),
    "dydit-s-2-256-f50": (0.5, 1_000, 0, 50_000, 1e-4, 200.0, ""),
}
"""DyDiT's trainings: target, warm-up, steps of the second pass, steps, rate, largest gradient norm, GMACs told of."""


DENSITIES = {
    "sparsedit-xl-2-256-r44-61": ([12, 11, 10], 82.91),
    "sparsedit-xl-2-256-r61-86": ([10, 9, 8, 7, 6], 69.04),
    "sparsedit-xl-2-512-r61-86": ([20, 19, 18, 17, 16, 15, 14, 13, 12], 292.57),
    "sparsedit-xl-2-512-r90-96": ([10, 9, 8, 7, 6], 227.30),
}
"""Of the paper's rows with varying density: the sides of the grids from clean to noise, and our mean GMACs."""


FLOW = {
    "sprint-xl-2-256": (677_476_816, 119.3, 256, 1e-4, 2_000_000, 0.75),
    "sprint-xl-2-256-full": (677_476_816, 119.3, 1024, 2e-4, 200_000, 0.0),
    "sprint-xl-2-256-repa": (677_476_816, 119.3, 256, 1e-4, 2_000_000, 0.75),
    "sprint-xl-2-512": (677_476_816, 527.2, 256, 1e-4, 2_000_000, 0.75),
    "sprint-xl-2-512-full": (677_476_816, 527.2, 1024, 1.5e-4, 200_000, 0.0),
    "sprint-b-2-256": (131_486_224, 23.3, 256, 1e-4, 400_000, 0.75),
    "sit-xl-2-256": (675_129_632 - 18_448, 118.6, 256, 1e-4, 7_000_000, None),
    "sparsedit-xl-2-256-flow": (683_099_168 - 18_448, 67.28, 256, 1e-4, 400_000, None),
}
"""Trainings under flow: parameters, GMACs of a full pass, batch, rate, steps, drop ratio. DiT's variance outputs are gone."""


def network(path: Path) -> tuple[TrainingSettings, DiT]:
    """A file's settings and the blueprint of its network. Small pictures are their own latents, others those of an SD VAE."""
    settings, options = parse_training(["--config", str(path)])
    pixels = settings.image_size < 64
    side = settings.image_size if pixels else settings.image_size // 8
    backbone = Backbone.named(
        settings.model,
        (side, side),
        in_channels=3 if pixels else 4,
        num_classes=settings.num_classes or 1000,
        learn_sigma=settings.learn_sigma,
        label_drop=settings.label_drop,
        objective=settings.objective,
    )
    return settings, network_of(settings, backbone, options, None)


def test_the_published_runs_and_the_demo_are_here() -> None:
    told = {(settings.model, settings.method, settings.image_size) for settings, _ in map(network, CONFIGS)}
    assert {("DiT-XL/2", "sparsedit", 256), ("DiT-XL/2", "sparsedit", 512)} <= told
    assert {method for _, method, size in told if size < 64} == {"dense", "dydit", "sparsedit", "sprint"}


@every_config
def test_config_builds(path: Path) -> None:
    settings, plan = network(path)
    assert all(parameter.is_meta for parameter in plan.parameters())
    objective = make_objective(settings)
    assert isinstance(objective, EpsilonObjective) is (settings.objective == "ddpm") is plan.backbone.learn_sigma
    assert SAMPLERS[{"ddpm": "ddpm", "flow": "euler"}[str(settings.objective)]].timesteps(settings.sample_steps)
    assert settings.max_steps or "max_steps" not in load_yaml(path)


@every_config
def test_published_configs_hold_the_published_recipe(path: Path) -> None:
    settings, plan = network(path)
    if settings.model != "DiT-XL/2" or settings.objective != "ddpm":
        pytest.skip("a config of ours, or one that another test knows")
    if path.stem not in (*DENSITIES, *DYNAMIC):  # no weights of these were published, or no count of them
        expected = PUBLISHED_PARAMETERS[settings.method, settings.image_size]
        assert sum(parameter.numel() for parameter in plan.parameters()) == expected
        assert len(plan.training_plans()) == 1
    rate = DYNAMIC[path.stem][4] if path.stem in DYNAMIC else 1e-4
    assert (settings.global_batch_size, settings.learning_rate, settings.weight_decay) == (256, rate, 0.0)
    assert (settings.ema_decay, settings.label_drop) == (0.9999, 0.1)
    assert settings.min_snr_gamma == (5.0 if settings.method == "sparsedit" else None)
    if settings.method == "sparsedit" and path.stem not in DENSITIES:
        assert plan.plan(0).signature == ("sparse grid", 8, 8)


@pytest.mark.parametrize("name", DYNAMIC)
def test_trainings_of_dydit(name: str) -> None:
    """Each holds the paper's recipe; XL says the paper's GMACs, and what the target is in ours."""
    path = ROOT / "configs" / f"{name}.yaml"
    settings, plan = network(path)
    target, warmup, complete, steps, rate, largest, gmacs = DYNAMIC[name]
    assert (plan.options.flops_target, plan.options.target_warmup, plan.options.complete_steps) == (target, warmup, complete)
    assert (settings.max_steps, settings.learning_rate, settings.skip_gradient_norm) == (steps, rate, largest)
    assert (settings.global_batch_size, settings.timestep_strata, settings.ema_warmup) == (256, 4, False)
    assert gmacs in path.read_text(encoding="utf-8")
    if gmacs:
        assert (
            f"target {target:g} of attention and MLP, reached at step {warmup:,}: {gmacs[-5:]} of" in plan.training_lines()[0]
        )


@pytest.mark.parametrize("name", FLOW)
def test_trainings_under_flow(name: str) -> None:
    settings, plan = network(ROOT / "configs" / f"{name}.yaml")
    parameters, gmacs, batch, rate, steps, drop = FLOW[name]
    assert sum(parameter.numel() for parameter in plan.parameters()) == parameters
    assert plan.macs(plan.plan(0)) / 1e9 == pytest.approx(gmacs, rel=5e-4)
    assert (settings.global_batch_size, settings.learning_rate, settings.max_steps) == (batch, rate, steps)
    assert (settings.ema_decay, settings.ema_warmup, settings.label_drop) == (0.9999, False, 0.1)
    assert settings.flow_times == ("uniform" if name.startswith("sit") else "logit-normal")
    assert plan.backbone.time_scale == (1000 if settings.model.startswith("DiT") else 1)
    if method_name(plan) == "sprint":
        assert (plan.options.drop_ratio, settings.gradient_clip) == (drop, 1.0)
        assert plan.options.encoder_blocks == plan.options.decoder_blocks == 2
        assert settings.warmup_steps == (5_000 if name.endswith("full") else 0)


def test_every_training_under_flow_is_known() -> None:
    told = {path.stem for path in CONFIGS if network(path)[0].objective == "flow"}
    assert {name for name in told if not name.startswith("demo-")} == {*FLOW}


@pytest.mark.parametrize("size", [256, 512])
def test_the_second_stage_has_a_folder_of_its_own_and_the_network_of_the_first(size: int) -> None:
    first, second = (network(ROOT / "configs" / f"sprint-xl-2-{size}{end}.yaml") for end in ("", "-full"))
    assert first[1].backbone == second[1].backbone
    assert second[0].run_name not in (None, f"SiT-XL-2-sprint-{size}", first[0].run_name)
    said = (ROOT / "configs" / f"sprint-xl-2-{size}-full.yaml").read_text(encoding="utf-8")
    assert f"results/SiT-XL-2-sprint-{size}/checkpoints/{first[0].max_steps}.safetensors" in said


@pytest.mark.parametrize("name", DENSITIES)
def test_rows_of_varying_density(name: str) -> None:
    """Each holds the paper's split and schedule, and says the paper's GMACs and ours."""
    path = ROOT / "configs" / f"{name}.yaml"
    settings, plan = network(path)
    sides, gmacs = DENSITIES[name]
    assert plan.density is not None
    assert plan.density.grids == tuple((side, side) for side in sides)
    assert plan.mean_macs() / 1e9 == pytest.approx(gmacs, abs=0.005)
    row = published_row(plan, settings.model)
    assert row is not None
    assert name.endswith(f"{8 * row.latent_side}-r{row.rates.replace('0.', '').replace(':', '-')}")
    said = path.read_text(encoding="utf-8")
    assert f"the paper prints {row.gmacs:g} (dense: {row.dense_gmacs:g}), here the mean over timesteps is {gmacs:.2f}" in said
    assert settings.max_steps == 400_000


def test_every_published_row_has_a_file() -> None:
    rows = {published_row(plan, settings.model) for settings, plan in map(network, CONFIGS)}
    assert rows == {None, *PUBLISHED}


@every_config
def test_a_misspelt_key_is_caught(path: Path, tmp_path: Path) -> None:
    """The known-bad variants of each file: a key that does not exist, and a network that does not add up."""
    content = path.read_text(encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(content + "\nglobal_batchsize: 4\n")
    with pytest.raises(InputError, match="unknown key 'global_batchsize'; did you mean 'global_batch_size'"):
        network(tmp_path / "bad.yaml")
    if "method: sparsedit" in content:
        settings = yaml.safe_load(content)
        settings["options"] = {**settings.get("options", {}), "modules": 5}
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(InputError, match="blocks and the backbone has"):
            network(tmp_path / "bad.yaml")
