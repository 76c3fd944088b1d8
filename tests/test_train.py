"""train.py in one process: what it says, what it learns, what it leaves, and when it stops. Resuming: test_resume.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import WithScaler, call, differing, header_at, metrics, random_network, state_at, succeed

import models
import train
from data import latents
from diffusion.gaussian import EpsilonObjective
from runtime import distributed, settings
from runtime.checkpoint import checkpoints
from runtime.networks import build, described
from runtime.optimizer_step import learning_rate
from runtime.training import Trainer

RUN = "DiT-T-2-sparsedit-64"


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Six steps of SparseDiT on random latents."""
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64",
            "--max-steps", "6", "--global-batch-size", "8", "--log-every", "2", "--results-dir", str(tmp_path)]  # fmt: skip


@pytest.fixture(scope="session")
def learned(pixel_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training on easy data, with two sample grids."""
    results = tmp_path_factory.mktemp("learned")
    succeed("train", "--model", "DiT-T/2", "--method", "dense", "--feature-path", pixel_features, "--image-size", "8",
            "--results-dir", results, "--max-steps", "60", "--lr", "3e-3", "--ema-decay", "0.9", "--global-batch-size", "16",
            "--log-every", "10", "--sample-every", "30", "--sample-steps", "5", "--sample-count", "5",
            "--learning-rate-schedule", "cosine", "--warmup-steps", "5")  # fmt: skip
    return results / "DiT-T-2-dense-8"


# What it says --------------------------------------------------------------------------------------------------------


def test_before_the_first_step_it_says_what_will_happen(words: list[str], pretrained: Path, features: Path) -> None:
    lines = succeed("train", *words, "--pretrained", pretrained, "--gradient-accumulation", "2").out.splitlines()
    before = "\n".join(lines[: next(place for place, line in enumerate(lines) if line.startswith("step "))])
    with torch.device("meta"):
        backbone = models.Backbone.named("DiT-T/2", (8, 8), num_classes=3)
        sparse, dense = models.create_model("sparsedit", backbone), models.create_model("dense", backbone)
    parameters = sum(parameter.numel() for parameter in sparse.parameters())
    for said in ("sparsedit DiT-T/2", f"{parameters:,} parameters", f"{sparse.macs() / 1e9:.4g} GMACs",
                 f"{sparse.macs() / dense.macs():.1%} of the dense backbone's {dense.macs() / 1e9:.4g}"):  # fmt: skip
        assert said in before
    assert f"24 pictures of 3 classes from {features}" in before
    assert "batch 8 = 1 processes x 2 accumulation x 4, cpu, precision fp32, 6 steps" in before
    assert f"{pretrained}: 96 tensors loaded from DiT weights; new: blocks.5.merged_layer1.weight" in before
    assert "left out: blocks.0.attn.qkv" in before  # the queries and keys of the pooling block
    assert lines.index(next(line for line in lines if line.startswith("sparsedit "))) == 0


def test_new_weights_are_said_to_be_new(words: list[str]) -> None:
    assert "weights newly initialised (--pretrained none)" in succeed("train", *words, "--max-steps", "1").out


def test_another_class_count_is_warned_of(words: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = random_network("dense", models.Backbone.named("DiT-T/2", (8, 8), num_classes=7))
    torch.save(network.state_dict(), tmp_path / "seven.pt")
    said = succeed("train", *words, "--pretrained", tmp_path / "seven.pt", "--max-steps", "1").out
    assert "WARNING: the label table is re-initialised: the checkpoint has 7 classes, this network 3" in said


def test_half_precision_without_a_gpu_is_warned_of(words: list[str]) -> None:
    assert "WARNING: fp16 needs a CUDA device" in succeed("train", *words, "--precision", "fp16", "--max-steps", "1").out


def test_metrics_are_the_same_on_console_in_json_and_tensorboard(words: list[str], tmp_path: Path) -> None:
    said = succeed("train", *words, "--max-steps", "5").out
    lines = metrics(tmp_path / RUN)
    assert [line["step"] for line in lines] == [2, 4, 5]
    names = {"step", "loss", "mse", "vlb", "gradient_norm", "learning_rate", "steps_per_second", "images_per_second",
             "memory_gib", "skipped_steps"}  # fmt: skip
    assert all(set(line) == names for line in lines)
    for line in lines:
        assert f"step {line['step']}  loss {line['loss']:.4g}  mse {line['mse']:.4g}" in said
        assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"])
        assert line["loss"] == pytest.approx(line["mse"] + line["vlb"], rel=1e-5)
        assert 0 < line["memory_gib"] < 100
    assert scalars(tmp_path / RUN)["loss"] == pytest.approx({line["step"]: line["loss"] for line in lines})


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    return {name: {entry.step: entry.value for entry in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_config_is_saved_beside_and_in_the_checkpoint(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words, "--density", "1x2", "--max-steps", "1")
    saved, header = json.loads((tmp_path / RUN / "config.json").read_text()), header_at(tmp_path / RUN)
    assert saved["settings"] == header["settings"]
    assert saved["settings"]["min_snr_gamma"] == 5.0  # the method's recipe
    assert header["network"]["options"]["density"] == "1x2"
    assert header["samples_seen"] == 8
    network = described(header["network"])
    assert network.options.density == "1x2"


def test_precedence_is_recipe_then_yaml_then_flags(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr: 1\n")
    assert call("train", *words, "--config", file).code == 2  # YAML knows the full names alone
    file.write_text("learning_rate: 2e-4\nema-decay: 0.5\nmin_snr_gamma: none\noptions:\n  density: 1x2\n")
    chosen, options = settings.parse_training([*words, "--config", str(file), "--ema_decay", "0.75"])
    assert (chosen.learning_rate, chosen.ema_decay, chosen.min_snr_gamma) == (2e-4, 0.75, None)
    assert options == {"density": "1x2"}


# What it learns ------------------------------------------------------------------------------------------------------


def test_the_loss_of_easy_data_goes_down(learned: Path) -> None:
    losses = [line["mse"] for line in metrics(learned)]
    assert losses[-1] < losses[0] / 2
    assert losses[-1] < 0.35


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_learning_rates_in_closed_form(name: str) -> None:
    chosen = settings.TrainingSettings(learning_rate=2.0, warmup_steps=4, learning_rate_schedule=name)  # type: ignore[arg-type]
    rates = [learning_rate(chosen, step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [2.0] * 8 if name == "constant" else [1 + math.cos(math.pi * step / 8) for step in range(8)]
    assert rates[4:] == pytest.approx(expected)


def test_the_optimizer_uses_those_rates(learned: Path) -> None:
    chosen = settings.TrainingSettings(learning_rate=3e-3, warmup_steps=5, learning_rate_schedule="cosine")
    for line in metrics(learned):
        assert line["learning_rate"] == pytest.approx(learning_rate(chosen, line["step"] - 1, 60))


def test_gradients_are_clipped(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    norms = gradient_norms_at_the_optimizer(monkeypatch)
    succeed("train", *words, "--gradient-clip", "0.05", "--max-steps", "3")
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)
    norms.clear()
    succeed("train", *words, "--run-name", "free", "--max-steps", "3")
    assert min(norms) > 0.1


def gradient_norms_at_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def measuring(self: torch.optim.AdamW, *arguments: object) -> object:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", measuring)
    return norms


def test_the_average_follows_the_weights(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words, "--ema-decay", "0.8", "--checkpoint-every", "1", "--keep-checkpoints", "6", "--no-ema-warmup")
    states = [state_at(tmp_path / RUN, step) for step in range(1, 7)]
    name = "blocks.1.mlp.fc1.weight"
    average = states[0][f"ema/{name}"]
    for state in states[1:]:
        average = 0.8 * average + 0.2 * state[f"model/{name}"]
        torch.testing.assert_close(state[f"ema/{name}"], average, rtol=1e-6, atol=1e-8)
    assert not torch.equal(average, states[-1][f"model/{name}"])


def test_gradient_checkpointing_trains_identically(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words)
    succeed("train", *words, "--gradient-checkpointing", "--run-name", "recomputed")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "recomputed")) == []
    succeed("train", *words, "--seed", "1", "--run-name", "another-seed")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "another-seed")) != []


def test_bf16_trains_and_keeps_float32_weights(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words, "--precision", "bf16", "--max-steps", "2")
    assert {tensor.dtype for tensor in state_at(tmp_path / RUN).values()} == {torch.float32}


def test_legacy_features_train(words: list[str], legacy_features: Path, tmp_path: Path) -> None:
    said = succeed("train", *words, "--feature_path", legacy_features, "--max_steps", "2").out
    assert f"10 pictures from the legacy folder {legacy_features}" in said
    assert header_at(tmp_path / RUN)["network"]["backbone"]["num_classes"] == 1000
    assert call("train", *words, "--feature-path", legacy_features, "--num-classes", "2").code == 2


@pytest.mark.parametrize(("flags", "steps"), [(["--epochs", "2"], 5), (["--epochs", "2", "--max-steps", "3"], 3)])
def test_length_by_epochs_or_steps(flags: list[str], steps: int, words: list[str], tmp_path: Path) -> None:
    place = words.index("--max-steps")
    rest = [*words[:place], *words[place + 2 :]]
    succeed("train", *rest, "--global-batch-size", "10", *flags)  # 24 pictures: 4.8 batches of 10 in two epochs
    assert header_at(tmp_path / RUN)["step"] == steps


# Numbers that are not finite -----------------------------------------------------------------------------------------


def losses_not_finite_at(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    losses = EpsilonObjective.losses

    def planted(self: EpsilonObjective, *arguments: object) -> dict[str, torch.Tensor]:
        calls.append(len(calls))
        result = losses(self, *arguments)  # type: ignore[arg-type]
        return {name: value * math.nan for name, value in result.items()} if calls[-1] in steps else result

    monkeypatch.setattr(EpsilonObjective, "losses", planted)


def test_a_step_that_is_not_finite_is_skipped(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_not_finite_at(range(3, 4), monkeypatch)
    monkeypatch.setattr(Trainer, "_spoilt", False)  # so that the step's state is saved and can be compared
    succeed("train", *words, "--checkpoint-every", "1", "--keep-checkpoints", "6")
    run = tmp_path / RUN
    left = differing(state_at(run, 3), state_at(run, 4))
    assert all(name.startswith("ema/") for name in left)  # for the average, the weights stood still for a step
    assert len(differing(state_at(run, 4), state_at(run, 5))) > 100
    assert [line["skipped_steps"] for line in metrics(run)] == [0, 1, 1]
    assert header_at(run)["skipped_steps"] == 1
    assert all("loss" not in line or math.isfinite(line["loss"]) for line in metrics(run))


def test_nothing_is_saved_while_steps_are_not_finite(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What made a gradient infinite may be in the weights already; the last good checkpoint must stay."""
    losses_not_finite_at(range(3, 4), monkeypatch)
    succeed("train", *words, "--checkpoint-every", "1", "--keep-checkpoints", "9")
    assert [int(path.stem) for path in checkpoints(tmp_path / RUN)] == [1, 2, 3, 5, 6]


def test_several_in_a_row_stop_and_name_the_last_good_checkpoint(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_not_finite_at(range(3, 100), monkeypatch)
    result = call("train", *words, "--max-steps", "50", "--checkpoint-every", "3", "--non-finite-limit", "2")
    assert result.code == 2
    message = result.err.strip().splitlines()[-1]
    assert "not finite 2 steps in a row" in message
    good = re.search(r"the last good checkpoint is (\S+);", message)
    assert good is not None
    state = state_at(tmp_path / RUN)
    assert Path(good[1]) == checkpoints(tmp_path / RUN)[-1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_gradient_scaler_may_search_for_its_scale(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflowing steps are a scaler's business until its scale has come down to 1."""
    monkeypatch.setattr(distributed, "Accelerator", WithScaler)
    losses_not_finite_at(range(100), monkeypatch)
    result = call("train", *words, "--max-steps", "50", "--non-finite-limit", "2")
    assert result.code == 2
    assert "not finite 8 steps in a row" in result.err


def test_it_stops_before_any_checkpoint_too(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    losses_not_finite_at(range(100), monkeypatch)
    result = call("train", *words, "--max-steps", "50")
    assert result.code == 2
    assert "not finite 5 steps in a row; no checkpoint was written yet" in result.err


# Sample grids --------------------------------------------------------------------------------------------------------


def test_grids_are_written_as_png(learned: Path) -> None:
    grids = sorted((learned / "samples").glob("*"))
    assert len(grids) == 2
    assert all(grid.suffix == ".png" for grid in grids)
    shapes = {np.asarray(Image.open(grid)).shape for grid in grids}
    assert shapes == {(2 * 8 + 2, 3 * 8 + 4, 3)}  # five pictures in rows of three, two pixels apart
    assert np.asarray(Image.open(grids[0])).std() > 20


def exploding(*arguments: object) -> None:
    raise AssertionError("a codec was loaded")


def test_no_codec_is_loaded_unless_grids_are_asked_for(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_codec", exploding)
    monkeypatch.setattr(latents, "load_codec", exploding)
    succeed("train", *words)
    with pytest.raises(AssertionError, match="a codec was loaded"):
        call("train", *words, "--run-name", "grids", "--sample-every", "2", "--sample-steps", "2")


def test_a_codec_that_does_not_fit_is_refused_before_the_first_step(words: list[str], tmp_path: Path) -> None:
    result = call("train", *words, "--sample-every", "5", "--vae", "pixels")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (tmp_path / RUN / "metrics.jsonl").exists()


def test_grids_do_not_touch_the_training(words: list[str], tmp_path: Path) -> None:
    succeed("train", *words)
    succeed("train", *words, "--run-name", "grids", "--sample-every", "1", "--sample-steps", "2", "--sample-count", "2")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "grids")) == []


def test_grids_of_a_resumed_run_are_those_of_the_whole_one(words: list[str], tmp_path: Path) -> None:
    """The grid between checkpoint and kill is made again, not once more."""
    words = [*words, "--checkpoint-every", "3", "--keep-checkpoints", "9", "--sample-every", "2", "--sample-steps", "1"]
    succeed("train", *words)
    grids = {path.name: path.read_bytes() for path in (tmp_path / RUN / "samples").glob("*.png")}
    assert len(grids) == 3
    (tmp_path / RUN / "samples" / sorted(grids)[2]).unlink()
    checkpoints(tmp_path / RUN)[-1].unlink()  # as a kill in step 5 leaves it
    succeed("train", *words)
    assert {path.name: path.read_bytes() for path in (tmp_path / RUN / "samples").glob("*.png")} == grids


# Processes -----------------------------------------------------------------------------------------------------------


def test_it_refuses_when_fewer_processes_joined_than_were_promised(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("train", *words)
    assert result.code == 2
    assert "started 2 processes but only 1 joined" in result.err
    assert checkpoints(tmp_path / RUN) == []


def test_nothing_but_forward_is_called_on_the_wrapped_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Data parallelism, autocast and compilation wrap `forward` alone."""
    as_it_is = Trainer.__init__

    def guarded(self: Trainer, *arguments: object) -> None:
        as_it_is(self, *arguments)  # type: ignore[arg-type]
        module = self.step_module
        self.step_module = type("Forward", (), {"__call__": lambda _, *inputs: module(*inputs)})()

    monkeypatch.setattr(Trainer, "__init__", guarded)
    succeed("train", *words, "--max-steps", "2")


def test_the_network_is_built_once(words: list[str], pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    def counted(plan: models.DiT) -> models.DiT:
        built.append(plan)
        return build(plan)

    monkeypatch.setattr("train.build", counted)
    succeed("train", *words, "--pretrained", pretrained, "--max-steps", "1")
    assert len(built) == 1
