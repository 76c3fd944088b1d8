"""Training of DyDiT: the target, its two stages, what is logged, what is left out, and that the ratio comes to the target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import alone, call, differing, header_at, metrics, random_network, recorded, state_at, succeed
from torch import Tensor, nn

import models
from diffusion.gaussian import EpsilonObjective
from diffusion.schedule import NoiseSchedule
from models import Backbone, DyDiT
from models.dydit import COMPLETE, DECISIONS
from models.work import CountedWork
from runtime import optimizer_step
from runtime.checkpoint import checkpoints
from runtime.seeding import Keys, integers, normal
from runtime.settings import TrainingSettings, training_parser
from runtime.training import Trainer
from runtime.work_report import measured_ratio, probe

RUN = "DiT-T-2-dydit-64"
TINY = Backbone.named("DiT-48x4x8/2", (8, 8), num_classes=3)


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Six steps, of which the first three train the network with everything on too."""
    return ["--model", "DiT-T/2", "--method", "dydit", "--complete-steps", "3", "--target-warmup", "4", "--feature-path",
            str(features), "--image-size", "64", "--max-steps", "6", "--global-batch-size", "8", "--log-every", "1",
            "--checkpoint-every", "3", "--keep-checkpoints", "9", "--results-dir", str(tmp_path)]  # fmt: skip


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling beside checkpoints takes longer than these trainings."""
    monkeypatch.setattr("train.work_meter", lambda *arguments: None)


class Synthetic:
    """Labels as brightness, and a little noise."""

    def __len__(self) -> int:
        return 64

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        keys = Keys(0, step, positions)
        labels = integers(keys, "labels", 3)
        return 0.3 * normal(keys, "latents", (4, 8, 8)) + (labels - 1.0)[:, None, None, None], labels


@contextmanager
def trainer(run: Path, network: models.DiT, **chosen: Any) -> Iterator[Trainer]:
    settings = TrainingSettings(
        **{"global_batch_size": 8, "max_steps": 6, "density_groups": 1, "learning_rate": 1e-3, "timestep_strata": 4, **chosen}
    )
    with alone():
        objective = EpsilonObjective(NoiseSchedule.linear(), None, True, settings.timestep_strata)
        made = Trainer(settings, Accelerator(cpu=True), network, objective, Synthetic(), run, {})
        yield made
        made.close()


# The target ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "warmup"), [(0.5, 1000), (0.7, 5000), (0.5, 40), (0.3, 0)])
def test_the_target_falls_from_one(target: float, warmup: int) -> None:
    network = blueprint(flops_target=target, target_warmup=warmup)
    for step in (0, 1, 39, 99, 100, 500, 999, 1000, 4999, 5000, 100_000):
        expected = 1 - (1 - target) * min(1, step / warmup) if warmup else target
        if step < min(100, warmup):
            expected = 1.0
        assert float(network.target_at(step)) == pytest.approx(expected)
        assert float(network.target_at(step)) == float(network.target_at(torch.tensor(step)))
    assert warmup < 100 or float(network.target_at(99)) == 1.0 > float(network.target_at(100))


def blueprint(model: str = "DiT-T/2", **options: Any) -> DyDiT:
    with torch.device("meta"):
        network = models.create_model("dydit", Backbone.named(model, (32, 32)), options)
    assert isinstance(network, DyDiT)
    return network


COSTS = {"S": (0.2013, 0.3020), "B": (0.7046, 1.2080), "XL": (1.5099, 2.7179)}
"""Published GMACs of a layer's attention and MLP at 256."""


@pytest.mark.parametrize("size", COSTS)
def test_the_ratio_counts_the_backbones_own_costs(size: str) -> None:
    network, (attention, mlp) = blueprint(f"DiT-{size}/2"), COSTS[size]
    depth, heads, tokens = network.backbone.depth, network.backbone.num_heads, network.backbone.tokens
    everything = torch.ones(1, depth, heads), torch.ones(1, depth, heads), torch.ones(1, depth, tokens)

    def ratio(**changed: Tensor) -> float:
        return float(network.flops_ratio(dict(zip(DECISIONS, everything, strict=True)) | changed))

    assert ratio() == pytest.approx(1)
    assert ratio(heads=torch.zeros(1, depth, heads)) == pytest.approx(mlp / (attention + mlp), rel=2e-4)
    half = torch.ones(1, depth, tokens)
    half[:, :, ::2] = 0
    assert ratio(tokens=half, channels=everything[1] / 2) == pytest.approx((attention + mlp / 4) / (attention + mlp), rel=2e-4)
    half[:, 1:] = 1  # in one layer alone
    assert ratio(tokens=half) == pytest.approx(1 - mlp / 2 / depth / (attention + mlp), rel=1e-4)


def test_the_penalty_is_of_the_batchs_mean() -> None:
    network = random_network("dydit", TINY, {"target_warmup": 0})
    assert isinstance(network, DyDiT)
    features = {name: torch.rand(6, 4, count) for name, count in zip(DECISIONS, (8, 8, 16), strict=True)}
    ratios = network.flops_ratio(features)
    expected = 2 * (ratios.mean() - 0.5) ** 2
    torch.testing.assert_close(network.extra_losses(features, 7)["flops"], expected)
    assert float(expected) != pytest.approx(float((2 * (ratios - 0.5) ** 2).mean()))  # of each sample's own


# Stages --------------------------------------------------------------------------------------------------------------


def test_the_second_pass_ends_inside_the_run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    monkeypatch.setattr(DyDiT, "predict", noting_plans(DyDiT.predict, plans))
    said = succeed("train", *words, "--checkpoint-every", "9").out
    assert [plan == COMPLETE for plan in plans[:9]] == [False, True] * 3 + [False] * 3
    assert "two passes a training step until step 3: the second one has everything on" in said
    *lines, sampled = metrics(tmp_path / RUN)
    assert set(sampled) == {"step", "flops_ratio/sampled"}
    parts = {"complete/loss", "complete/mse", "complete/vlb"}
    assert [parts & set(line) for line in lines] == [parts] * 3 + [set()] * 3
    for line in lines:
        total = line["denoising/loss"] + line.get("complete/loss", 0) + line["flops"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["denoising/loss"] == pytest.approx(line["mse"] + line["vlb"], rel=1e-5)
        assert line["flops_ratio/measured"] == pytest.approx(1, abs=1e-3)
        assert {f"layers/{name}_kept/{layer:02d}" for name in DECISIONS for layer in range(8)} <= set(line)
    assert [line["flops_ratio/target"] for line in lines] == pytest.approx([1, 1, 1, 1, 0.5, 0.5])
    assert "flops_ratio/target 0.5" in said
    assert "layers/" not in said
    assert state_at(tmp_path / RUN)["model/blocks.0.attn_rate.router.weight"].abs().max() > 0  # a gradient came through


def noting_plans(predict: Any, plans: list[Any]) -> Any:
    def wrapper(self: Any, x: Tensor, t: Tensor, y: Tensor, plan: Any, *rest: Any) -> Any:
        plans.append(plan)
        return predict(self, x, t, y, plan, *rest)

    return wrapper


def test_each_stage_is_the_training_that_knows_no_other(tmp_path: Path) -> None:
    """To the switch as if the second pass went on for ever, from there as if there had been none."""
    networks = {}
    for steps in (3, None, 0):
        torch.manual_seed(0)
        networks[steps] = random_network("dydit", TINY, {"complete_steps": steps})
    for steps, network in networks.items():
        with trainer(tmp_path / str(steps), network) as made:
            if steps == 0:
                made.restore(checkpoints(tmp_path / "3")[0])
            while made.step < (3 if steps is None else 6):
                made.optimize()
                if made.step == 3:
                    made.save()
            made.save()
    assert differing(state_at(tmp_path / "3", 3), state_at(tmp_path / "None", 3)) == []
    assert differing(state_at(tmp_path / "3", 6), state_at(tmp_path / "0", 6)) == []
    with trainer(tmp_path / "on", networks[None]) as made:  # known bad: the second pass does not end
        made.restore(checkpoints(tmp_path / "3")[0])
        while made.step < 6:
            made.optimize()
        made.save()
    assert differing(state_at(tmp_path / "3", 6), state_at(tmp_path / "on", 6)) != []


def test_a_run_resumed_at_the_switch_ends_as_the_whole_one(words: list[str], tmp_path: Path, unprobed: None) -> None:
    words = [*words, "--checkpoint-every", "1"]
    succeed("train", *words, "--run-name", "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / RUN)
    for path in checkpoints(tmp_path / RUN)[3:]:
        path.unlink()
    assert "at step 3" in succeed("train", *words).out
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "whole")) == []
    assert [line["loss"] for line in metrics(tmp_path / RUN)] == [line["loss"] for line in metrics(tmp_path / "whole")]
    refused = call("train", *words, "--complete-steps", "5")
    assert (refused.code, "complete_steps (3, not 5)" in refused.err) == (2, True)


def test_checkpointing_changes_no_bit(words: list[str], tmp_path: Path, unprobed: None) -> None:
    succeed("train", *words, "--run-name", "plain")
    succeed("train", *words, "--gradient-checkpointing", "selective")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "plain")) == []


# Updates that are left out -------------------------------------------------------------------------------------------


def test_large_gradients_are_counted_logged_saved_and_told_of(words: list[str], tmp_path: Path, unprobed: None) -> None:
    words = [*words, "--skip-gradient-norm", "1e-6", "--log-every", "3"]
    said = succeed("train", *words).out
    assert [line["large_gradient_steps"] for line in metrics(tmp_path / RUN)] == [3, 6]
    assert [line["skipped_steps"] for line in metrics(tmp_path / RUN)] == [0, 0]
    assert said.count("WARNING: 3 of the last 3 updates were left out, their gradient norms were above "
                      "--skip-gradient-norm 1e-06; lower --learning-rate, or raise the limit.") == 2  # fmt: skip
    state = {name: value for name, value in state_at(tmp_path / RUN).items() if name.startswith("model/")}
    assert differing(state, {name: state_at(tmp_path / RUN, 3)[name] for name in state}) == []
    assert header_at(tmp_path / RUN)["large_gradient_steps"] == 6
    checkpoints(tmp_path / RUN)[-1].unlink()
    succeed("train", *words)
    assert [line["large_gradient_steps"] for line in metrics(tmp_path / RUN)] == [3, 6]


@pytest.mark.parametrize("large", [1, 2])
def test_a_warning_is_of_more_than_half(
    large: int, words: list[str], tmp_path: Path, unprobed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[Tensor] = []
    total_norm = recorded(optimizer_step.get_total_norm, norms)
    monkeypatch.setattr(
        optimizer_step, "get_total_norm", lambda gradients: total_norm(gradients) + 1000 * (len(norms) <= large)
    )
    words = [*words, "--max-steps", "3", "--log-every", "3"]
    said = succeed("train", *words).out
    assert metrics(tmp_path / RUN)[0]["large_gradient_steps"] == large  # above 200, the method's recipe
    assert ("WARNING: 2 of the last 3 updates were left out" in said) == (large == 2)
    succeed("train", *words, "--run-name", "free", "--skip-gradient-norm", "none")
    assert "large_gradient_steps" not in metrics(tmp_path / "free")[0]


# Probes --------------------------------------------------------------------------------------------------------------


def test_what_sampling_computes_is_measured_beside_each_checkpoint(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--max-steps", "5"]
    succeed("train", *words)
    sampled = [(line["step"], line.get("flops_ratio/sampled")) for line in metrics(tmp_path / RUN)]
    assert sampled == [(1, None), (2, None), (3, None), (3, 1.0), (4, None), (5, None), (5, 1.0)]
    assert (tmp_path / RUN / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert [int(path.stem) for path in checkpoints(tmp_path / RUN)] == [3, 5]


def test_probes_do_not_touch_the_training(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Any] = []
    monkeypatch.setattr("train.probe", recorded(probe, probed))
    succeed("train", *words)
    assert [work.passes for work in probed] == [2 * 8 * 25] * 2
    monkeypatch.setattr("train.work_meter", lambda *arguments: None)
    succeed("train", *words, "--run-name", "unmeasured")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "unmeasured")) == []
    assert not (tmp_path / "unmeasured" / "kept.png").exists()


def test_no_slice_outlives_a_probe(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Any] = []

    def keeping(network: DyDiT, *rest: Any) -> Any:
        probed.append(network)
        work = probe(network, *rest)
        assert network.blocks[0].mlp.fc1._slices
        return work

    monkeypatch.setattr("train.probe", keeping)
    succeed("train", *words)
    assert len(probed) == 2
    assert [layer for block in probed[0].blocks for layer in block.sliceable if layer._slices] == []


def test_a_share_without_all_quarters_is_refused(words: list[str]) -> None:
    refused = call("train", *words, "--gradient-accumulation", "4")
    assert (refused.code, "2 samples are computed at once (batch 8 / 4)" in refused.err) == (2, True)


def test_a_training_that_ends_before_its_target_is_told_of(words: list[str], unprobed: None) -> None:
    said = succeed("train", *words, "--max-steps", "2", "--target-warmup", "50").out
    assert "WARNING: this training ends at step 2, before it reaches its target" in said


def test_help_shows_the_recipe() -> None:
    shown = " ".join(training_parser(DyDiT, "train.py").format_help().split())
    assert "none: all count (default: 200.0)" in shown
    assert "none: all count (default: none)" in " ".join(training_parser(models.DiT, "train.py").format_help().split())


def test_the_recipe_s_strata_reach_the_draws(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    strata: list[int] = []
    noised = EpsilonObjective.noised

    def noting(self: EpsilonObjective, x0: Tensor, keys: Keys, timesteps: Any = None) -> Any:
        drawn = noised(self, x0, keys, timesteps)
        strata.extend((drawn.t // 250 - keys.index % 4).tolist())
        return drawn

    monkeypatch.setattr(EpsilonObjective, "noised", noting)
    succeed("train", *words)
    assert len(strata) >= 20
    assert set(strata) == {0}


def test_a_method_whose_plan_says_it_all_is_not_probed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.probe", lambda *arguments: pytest.fail("probed"))
    place = words.index("--method")
    succeed("train", *words[:place], "--method", "dense", *words[place + 6 :])
    assert not list(tmp_path.rglob("kept.png"))


# The ratio comes to the target ---------------------------------------------------------------------------------------


def started(target: float) -> DyDiT:
    """Routers as after a long training at another target: far from undecided, most of everything on."""
    torch.manual_seed(0)
    network = random_network("dydit", TINY, {"flops_target": 0.85, "target_warmup": 0, "complete_steps": 0})
    assert isinstance(network, DyDiT)
    generator = torch.Generator().manual_seed(0)
    network.imitate_training(torch.randn(64, 4, 8, 8, generator=generator), torch.arange(64) * 15, torch.arange(64) % 3)
    timestep = network.t_embedder(torch.arange(1000))
    with torch.no_grad():
        for block in network.blocks:
            last = block.token_selection.mlp_head[2]
            assert isinstance(last, nn.Linear)
            for router, spread in (
                (block.attn_rate.router, 6 / block.attn_rate(timestep).std()),
                (block.mlp_rate.router, 6 / block.mlp_rate(timestep).std()),
                (last, torch.tensor(6.0)),
            ):
                router.weight.mul_(spread)
                router.bias.mul_(spread)
    network.options = replace(network.options, flops_target=target)
    return network


def trained_ratio(target: float, run: Path, steps: int) -> float:
    """What the averaged network computes after so many steps, tokens gathered and weights sliced."""
    chosen = {"max_steps": steps, "learning_rate": 1e-2, "learning_rate_schedule": "cosine", "ema_decay": 0.9}
    with trainer(run, started(target), global_batch_size=16, **chosen) as made:
        for _ in range(steps):
            made.optimize()
        return on_data(made.ema.network)


def on_data(network: models.DiT) -> float:
    """The measured ratio over timesteps of noised data."""
    objective, network.work = EpsilonObjective(NoiseSchedule.linear(), None, True), CountedWork(network.backbone.depth)
    index = torch.arange(16)
    for t in range(0, 1000, 25):
        latents, labels = Synthetic().batch_at(10**6 + t, index, torch.device("cpu"))
        noised = objective.noised(latents, Keys(5, t, index), range(t, t + 1))
        with torch.no_grad():
            network(noised.x_t, torch.tensor([t]), labels, network.plan(t))
    return measured_ratio(network, network.work)


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_the_measured_ratio_comes_to_the_target(target: float, tmp_path: Path) -> None:
    assert on_data(started(target)) > target + 0.1
    assert trained_ratio(target, tmp_path, 250) == pytest.approx(target, abs=0.02)


def linear_penalty(self: DyDiT, features: Any, step: Any) -> dict[str, Tensor]:
    return {"flops": 2 * (self.flops_ratio(features).mean() - self.target_at(step))}


def ignored_target(self: DyDiT, step: Any) -> Tensor:
    return torch.as_tensor(1.0)


@pytest.mark.parametrize(("name", "bug"), [("extra_losses", linear_penalty), ("target_at", ignored_target)])
def test_a_wrong_penalty_misses_it(name: str, bug: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DyDiT, name, bug)
    assert abs(trained_ratio(0.5, tmp_path, 120) - 0.5) > 0.05
