"""The commands of DESIGN.md as they are typed, and every wrong input: one sentence, exit code 2, before a network is built."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LiteralRun
from PIL import Image
from small_runs import ROOT, Result, call, header_at, metrics, random_network, run, succeed

from models import Backbone
from models.weights import without_variance
from runtime.checkpoint import checkpoints
from runtime.seeding import Keys, integers
from runtime.settings import TrainingSettings
from sample import GridSettings
from sample_ddp import SampleSettings

# As typed ------------------------------------------------------------------------------------------------------------


def test_the_training_command(literal_run: LiteralRun, pretrained: Path, features: Path) -> None:
    said = literal_run.training.out
    assert literal_run.training.code == 0, literal_run.training.err
    assert "Traceback" not in literal_run.training.err
    for once in ("sparsedit DiT-T/2", f"24 pictures of 3 classes from {features}", f"{pretrained}: 96 tensors loaded"):
        assert said.count(once) == 1  # one of the two processes speaks
    assert "batch 8 = 2 processes x 1 accumulation x 4" in said
    header = header_at(literal_run.run_folder)
    assert header["step"] == 6
    assert (header["network"]["model"], header["network"]["method"]) == ("DiT-T/2", "sparsedit")
    assert [path.stem for path in checkpoints(literal_run.run_folder)] == ["0000004", "0000006"]
    assert [line["step"] for line in metrics(literal_run.run_folder)] == [2, 4, 6]
    assert len(list(literal_run.run_folder.glob("events.out.tfevents.*"))) == 1


def test_the_sampling_command_finds_the_newest_run(literal_run: LiteralRun) -> None:
    said = literal_run.sampling.out
    assert literal_run.sampling.code == 0, literal_run.sampling.err
    assert "Traceback" not in literal_run.sampling.err
    assert said.count("results/DiT-T-2-sparsedit-64/checkpoints/0000006.safetensors (EMA of step 6)") == 1
    pictures = np.load(literal_run.packed)["arr_0"]
    assert pictures.shape == (12, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert pictures.std() > 20
    record = json.loads(literal_run.packed.with_suffix(".json").read_text())
    assert (record["seed"], record["count"], record["guidance"]["scale"]) == (1, 12, 1.5)
    assert record["checkpoint"]["path"].startswith("results/")


def test_two_processes_go_on_in_one(literal_run: LiteralRun, pretrained: Path, features: Path, tmp_path: Path) -> None:
    shutil.copytree(literal_run.run_folder, tmp_path / literal_run.run_folder.name)
    result = succeed("train", "--model", "DiT-T/2", "--pretrained", pretrained, "--feature-path", features, "--image_size",
                     "64", "--max-steps", "8", "--global_batch_size", "8", "--results_dir", tmp_path)  # fmt: skip
    assert "at step 6" in result.out
    assert header_at(tmp_path / literal_run.run_folder.name)["step"] == 8


def test_from_pictures_to_a_grid(tmp_path: Path) -> None:
    """extract_features.py, train.py, sample.py, each with what the one before wrote."""
    colours = integers(Keys(0, 0, torch.arange(8)), "test", 256, (3,)).numpy().astype(np.uint8)
    for index, colour in enumerate(colours):
        folder = tmp_path / "pictures" / ("red fox" if index % 2 else "lynx")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), tuple(map(int, colour))).save(folder / f"{index}.png")
    succeed("extract_features", "--data-path", tmp_path / "pictures", "--features-path", tmp_path / "features",
            "--vae", "pixels", "--image-size", "16", "--batch-size", "4", "--num-workers", "1")  # fmt: skip
    succeed("train", "--model", "DiT-T/2", "--feature-path", tmp_path / "features", "--image-size", "16", "--max-steps", "2",
            "--global-batch-size", "4", "--results-dir", tmp_path / "results")  # fmt: skip
    grid = tmp_path / "grid.png"
    said = succeed("sample", "--results-dir", tmp_path / "results", "--class-labels", "red fox,0", "--num-sampling-steps", "2",
                   "--output", grid).out  # fmt: skip
    assert "classes 1 red fox, 0 lynx" in said
    assert np.asarray(Image.open(grid)).shape == (16, 34, 3)


@pytest.mark.parametrize(
    ("script", "config"), [("train", TrainingSettings), ("sample_ddp", SampleSettings), ("sample", GridSettings)]
)
def test_help_names_every_flag_with_its_default(script: str, config: Any) -> None:
    result = call(script, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    for field in fields(config):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf" {flag}[ ,].*?\(default: ", text[text.index("options:") :]) is not None, flag
        assert field.metadata["help"][:20] in text, flag


def test_help_of_export() -> None:
    assert "--layout {ours,released}" in call("train", "export", "--help").out


def test_help_shows_the_flags_of_the_method() -> None:
    for flag in ("--density TEXT", "--sparse-grid TEXT"):  # the older name of the same
        assert flag in call("train", "--help").out
        assert flag not in call("train", "--method", "dense", "--help").out


# Wrong inputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a network with storage fails the test."""
    for place in ("train.build", "runtime.networks.build"):
        monkeypatch.setattr(place, lambda plan: pytest.fail("a network was built"))


@pytest.fixture
def good(features: Path, tmp_path: Path) -> list[str]:
    """A command that works: each test below spoils it."""
    return ["--model", "DiT-T/2", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64",
            "--max-steps", "2", "--global-batch-size", "4", "--results-dir", str(tmp_path / "results")]  # fmt: skip


def test_the_good_command_works(good: list[str]) -> None:
    succeed("train", *good)


@pytest.mark.usefixtures("no_network")
def test_building_would_be_noticed(good: list[str], pretrained: Path) -> None:
    for words in ([], ["--pretrained", str(pretrained)]):
        with pytest.raises(pytest.fail.Exception, match="a network was built"):
            call("train", *good, *words)


def assert_refused(result: Result, *named: str) -> None:
    """One sentence that names the thing, exit code 2, nothing else on stderr."""
    assert result.code == 2, (result.code, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    for word in ("error: ", *named):
        assert word in lines[0]


WRONG_FLAGS = {
    "unknown flag": (["--learning-rat", "1"], ["--learning-rat", "'--learning-rate'"]),
    "unknown model": (["--model", "DiT-XXL/2"], ["DiT-XXL/2", "'DiT-XL/2'"]),
    "unknown patch": (["--model", "DiT-XL/3"], ["DiT-XL/3"]),
    "unknown method": (["--method", "sparsdit"], ["sparsdit", "'sparsedit'"]),
    "flag of another method": (["--method", "dense", "--sparse-grid", "2"], ["--sparse-grid"]),
    "batch not divisible": (["--gradient-accumulation", "3"], ["4", "3 accumulation", "multiple of 3"]),
    "no batch": (["--global-batch-size", "0"], ["--global-batch-size", "at least 1"]),
    "no number": (["--global-batch-size", "many"], ["global_batch_size", "whole number", "many"]),
    "missing value": (["--feature-path"], ["--feature-path", "expected one argument"]),
    "no epochs": (["--max-steps", "none", "--epochs", "0"], ["--epochs"]),
    "no limit": (["--non-finite-limit", "0"], ["--non-finite-limit"]),
    "no grid": (["--sample-every", "1", "--sample-count", "0"], ["--sample-count"]),
    "negative interval": (["--sample-every", "-1"], ["--sample-every"]),
    "negative warm-up": (["--warmup-steps", "-1"], ["--warmup-steps"]),
    "negative clip": (["--gradient-clip", "-1"], ["--gradient-clip"]),
    "negative decay": (["--weight-decay", "-1"], ["--weight-decay"]),
    "infinite rate": (["--learning-rate", "inf"], ["--learning-rate"]),
    "unknown schedule": (["--learning-rate-schedule", "cosin"], ["learning_rate_schedule", "'cosine'"]),
    "unknown precision": (["--precision", "fp8"], ["fp8", "fp16"]),
    "gamma": (["--min-snr-gamma", "0"], ["min-SNR gamma"]),
    "label drop": (["--label-drop", "1.5"], ["--label-drop", "1.5"]),
    "sampling steps": (["--sample-steps", "ddim"], ["ddim"]),
    "sparse grid": (["--sparse-grid", "5"], ["5x5", "4x4"]),
    "density": (["--density", "4,2@0,1000"], ["4,2@0,1000", "below 1000"]),
    "split": (["--modules", "2"], ["14 blocks", "8"]),
    "missing features": (["--feature-path", "nothing here"], ["nothing here", "extract_features.py"]),
    "wrong latent size": (["--image-size", "32"], ["--image-size is 32", "--image-size 64"]),
    "no multiple of 8": (["--image-size", "60"], ["60"]),
    "class count": (["--num-classes", "7"], ["3 classes", "--num-classes is 7"]),
    "missing weights": (["--pretrained", "nothing.pt"], ["nothing.pt"]),
    "missing folder of weights": (["--pretrained", "a/b/c"], ["a/b/c"]),
    "unknown codec": (["--sample-every", "1", "--vae", "taesdd"], ["taesdd", "'taesd'"]),
    "resume": (["--resume", "nothing.safetensors"], ["nothing.safetensors"]),
    "config": (["--config", "nothing.yaml"], ["nothing.yaml"]),
    "results that are a file": (["--results-dir", "file"], ["file"]),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", list(WRONG_FLAGS))
def test_wrong_flags_are_refused(case: str, good: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "file")
    words, named = WRONG_FLAGS[case]
    assert_refused(call("train", *good, *words), *named)
    assert not (tmp_path / "results").exists()


WRONG_YAML = {
    "unknown key": ("gloabl_batch_size: 4\n", ["gloabl_batch_size", "'global_batch_size'"]),
    "unknown option": ("options:\n  densiyt: 2\n", ["densiyt", "'density'"]),
    "unknown method": ("method: sparsdit\n", ["sparsdit", "'sparsedit'"]),
    "method that is a number": ("method: 3\n", ["3", "sparsedit"]),
    "method that is a list": ("method: [dense]\n", ["method"]),
    "wrong type": ("global_batch_size: [4]\n", ["global_batch_size", "whole number"]),
    "fraction": ("global_batch_size: 4.5\n", ["global_batch_size", "4.5"]),
    "truth": ("learn_sigma: 3\n", ["learn_sigma", "true or false"]),
    "list": ("- a\n- b\n", ["key: value"]),
    "empty": ("", ["key: value"]),
    "no YAML": ("a: [b\n", ["config.yaml"]),
    "not text": ("\x00\x01", ["config.yaml"]),
    "options": ("options: 3\n", ["options"]),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", list(WRONG_YAML))
def test_wrong_yaml_is_refused(case: str, good: list[str], tmp_path: Path) -> None:
    text, named = WRONG_YAML[case]
    (tmp_path / "config.yaml").write_text(text)
    assert_refused(call("train", *good, "--config", tmp_path / "config.yaml"), *named)


def truncated(path: Path, target: Path) -> Path:
    whole = path.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    return target


def sparse_checkpoint(folder: Path) -> Path:
    network = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), num_classes=3))
    torch.save(network.state_dict(), folder / "sparse.pt")
    return folder / "sparse.pt"


def text_file(path: Path) -> Path:
    path.write_text("not a checkpoint\n")
    return path


def without_a_key(path: Path, target: Path) -> Path:
    state = torch.load(path, weights_only=True)
    del state["blocks.3.attn.qkv.weight"]
    torch.save(state, target)
    return target


def without_sigma(path: Path, target: Path) -> Path:
    torch.save(without_variance(torch.load(path, weights_only=True)), target)
    return target


class Harmful:
    """What a pickle could run."""


def pickled_object(target: Path) -> Path:
    torch.save({"model": Harmful()}, target)
    return target


def one_tensor(target: Path) -> Path:
    torch.save(torch.zeros(3), target)
    return target


WRONG_WEIGHTS: dict[str, tuple[Callable[[Path, Path], Path], list[str], list[str]]] = {
    "truncated .pt": (lambda p, f: truncated(p, f / "half.pt"), [], ["half.pt", "truncated"]),
    "of another method": (lambda p, f: sparse_checkpoint(f), ["--method", "dense"], ["sparse.pt", "sparsedit", "dense"]),
    "of another backbone": (lambda p, f: p, ["--model", "DiT-S/2"], ["64x64.pt"]),
    "text": (lambda p, f: text_file(f / "text.pt"), [], ["text.pt"]),
    "text as safetensors": (lambda p, f: text_file(f / "text.safetensors"), [], ["text.safetensors"]),
    "a key is missing": (lambda p, f: without_a_key(p, f / "less.pt"), [], ["less.pt", "blocks.3.attn.qkv.weight"]),
    "pickled code": (lambda p, f: pickled_object(f / "harm.pt"), [], ["harm.pt", "could run code"]),
    "one tensor": (lambda p, f: one_tensor(f / "one.pt"), [], ["one.pt"]),
    "empty folder": (lambda p, f: f, [], ["diffusion_pytorch_model.safetensors"]),
    "without a variance to learn from": (
        lambda p, f: without_sigma(p, f / "flow.pt"),
        [],
        ["flow.pt: the weights predict no variance", "--objective flow; give that objective", "or for ddpm --no-learn-sigma."],
    ),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", list(WRONG_WEIGHTS))
def test_wrong_weights_are_refused(case: str, good: list[str], pretrained: Path, tmp_path: Path) -> None:
    make, words, named = WRONG_WEIGHTS[case]
    folder = tmp_path / "weights"
    folder.mkdir()
    assert_refused(call("train", *good, *words, "--pretrained", make(pretrained, folder)), *named)
    assert not (tmp_path / "results").exists()


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


WRONG_FEATURES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty folder": (emptied, ["manifest.json"]),
    "no array": (lambda folder: os.remove(folder / "latents.npy"), ["latents.npy", "missing"]),
    "truncated array": (lambda folder: truncated(folder / "latents.npy", folder / "latents.npy"), ["latents.npy", "bytes"]),
    "damaged manifest": (lambda folder: truncated(folder / "manifest.json", folder / "manifest.json"), ["manifest.json"]),
    "text as labels": (lambda folder: text_file(folder / "labels.npy"), ["labels.npy"]),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", list(WRONG_FEATURES))
def test_wrong_features_are_refused(case: str, good: list[str], features: Path, tmp_path: Path) -> None:
    shutil.copytree(features, tmp_path / "features")
    spoil, named = WRONG_FEATURES[case]
    spoil(tmp_path / "features")
    assert_refused(call("train", *good, "--feature-path", tmp_path / "features"), str(tmp_path / "features"), *named)


WRONG_SAMPLING = {
    "no run": ([], ["results", "train.py"]),
    "no run of this size": (["--results-dir", "RESULTS", "--image-size", "32"], ["size 32", "train.py"]),
    "no run of this model": (["--results-dir", "RESULTS", "--model", "DiT-S/2"], ["DiT-S/2", "train.py"]),
    "another model": (["--ckpt", "CHECKPOINT", "--model", "DiT-S/2"], ["--model DiT-T/2"]),
    "another size": (["--ckpt", "CHECKPOINT", "--image-size", "32"], ["--image-size 64"]),
    "class count": (["--ckpt", "CHECKPOINT", "--num-classes", "1000"], ["3 classes", "--num-classes 1000"]),
    "codec that does not fit": (["--ckpt", "CHECKPOINT", "--vae", "pixels"], ["pixels"]),
    "unknown codec": (["--ckpt", "CHECKPOINT", "--vae", "taesdd"], ["'taesd'"]),
    "truncated": (["--ckpt", "HALF"], ["half.safetensors", "truncated"]),
    "text": (["--ckpt", "TEXT", "--model", "DiT-T/2", "--image-size", "64"], ["text.pt"]),
    "missing": (["--ckpt", "nothing.pt"], ["nothing.pt"]),
    "steps": (["--ckpt", "CHECKPOINT", "--num-sampling-steps", "2000"], ["2000"]),
    "density that is none": (["--ckpt", "CHECKPOINT", "--density", "few"], ["'few'", "0.61:0.86"]),
    "density too large": (["--ckpt", "CHECKPOINT", "--density", "9"], ["9x9", "4x4"]),
    "count": (["--ckpt", "CHECKPOINT", "--num-fid-samples", "0"], ["--num-fid-samples"]),
    "unknown flag": (["--per-proc-batchsize", "4"], ["--per-proc-batchsize", "'--per-proc-batch-size'"]),
    "samples into a file": (["--ckpt", "CHECKPOINT", "--sample-dir", "text.pt"], ["text.pt"]),
    "unknown label mode": (["--labels", "balancd"], ["'balanced'"]),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", list(WRONG_SAMPLING))
def test_wrong_sampling_is_refused(case: str, literal_run: LiteralRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoints(literal_run.run_folder)[-1]
    places = {
        "RESULTS": literal_run.folder / "results",
        "CHECKPOINT": checkpoint,
        "HALF": truncated(checkpoint, tmp_path / "half.safetensors"),
        "TEXT": text_file(tmp_path / "text.pt"),
    }
    words, named = WRONG_SAMPLING[case]
    assert_refused(call("sample_ddp", *[places.get(word, word) for word in words]), *named)
    assert not (tmp_path / "samples").exists()


def test_a_damaged_run_does_not_stop_the_search_for_another(literal_run: LiteralRun, tmp_path: Path) -> None:
    """Only the run that is chosen must be whole."""
    shutil.copytree(literal_run.folder / "results", tmp_path / "results")
    other = tmp_path / "results" / "DiT-S-2-dense-64"
    shutil.copytree(literal_run.run_folder, other)
    config = json.loads((other / "config.json").read_text())
    config["network"]["model"] = "DiT-S/2"
    (other / "config.json").write_text(json.dumps(config))
    truncated(checkpoints(other)[-1], checkpoints(other)[-1])
    succeed("sample_ddp", "--results-dir", tmp_path / "results", "--model", "DiT-T/2", "--num-fid-samples", "1",
            "--num-sampling-steps", "1", "--sample-dir", tmp_path / "samples")  # fmt: skip


def test_a_refusal_as_the_user_sees_it(tmp_path: Path) -> None:
    """In a process of its own: no traceback, no warnings of libraries, exit code 2."""
    result = run([ROOT / "train.py", "--model", "DiT-T/2", "--feature-path", "nothing"], tmp_path)
    assert_refused(result, "train.py: error: ", "nothing")
    assert result.out == ""
