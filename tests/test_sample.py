"""sample_ddp.py and sample.py in one process: draws, restarts, records, refusals. Two processes: test_two_processes.py."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LiteralRun
from PIL import Image
from sampling_runs import COUNT, assert_refused, flags
from sampling_runs import checkpoint as checkpoint
from sampling_runs import words as words
from small_runs import ROOT, call, kill, start, succeed, write_features

import sample_ddp
from data.latents import PIXELS
from data.manifest import FeatureSettings
from diffusion import samplers
from runtime import sampling
from runtime.checkpoint import checkpoints, read_weights
from runtime.config import InputError, from_mapping
from runtime.files import sha256
from runtime.pictures import pack_pictures
from runtime.sampling import draw_labels


@pytest.fixture(scope="session")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The npz of a sampling that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    succeed("sample_ddp", *flags(checkpoint, folder))
    return (folder / "set.npz").read_bytes()


# What it makes -------------------------------------------------------------------------------------------------------


def test_pngs_and_npz_hold_the_same_pictures(words: list[str], tmp_path: Path) -> None:
    said = succeed("sample_ddp", *words).out
    with np.load(tmp_path / "set.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        packed = archive["arr_0"]
    assert packed.shape == (COUNT, 8, 8, 3)
    assert packed.dtype == np.uint8
    pngs = sorted((tmp_path / "set").glob("*.png"))
    assert [png.name for png in pngs] == [f"{index:06d}.png" for index in range(COUNT)]
    assert np.array_equal(packed, np.stack([np.asarray(Image.open(png)) for png in pngs]))
    assert packed.std() > 20
    assert len({picture.tobytes() for picture in packed}) == COUNT
    assert f"{COUNT} pictures of 8 x 8" in said
    assert "sparsedit DiT-T/2" in said


def test_the_record_beside_says_how(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--cfg-scale", "2.5", "--guidance-channels", "all", "--labels", "balanced", "--seed", "3")
    record = json.loads((tmp_path / "set.json").read_text())
    assert record["guidance"] == {"kind": "classifier-free", "scale": 2.5, "channels": "all", "interval": None}
    assert record["execution"] == {
        "compile": "none",
        "attention": "auto",
        "cuda_graphs": False,
        "packed_weights": True,
    }
    assert record["checkpoint"]["sha256"] == sha256(checkpoint)
    expected = {"method": "sparsedit", "model": "DiT-T/2", "sampler": "ddpm", "steps": "3", "labels": "balanced", "seed": 3,
                "count": COUNT, "weights": "ema", "image_size": 8, "num_classes": 4, "precision": "fp32"}  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["codec"]["name"] == "pixels"
    assert record["versions"]["torch"] == torch.__version__
    assert record == json.loads((tmp_path / "set" / "protocol.json").read_text())


def test_seed_and_global_seed_are_one_flag(words: list[str], whole: bytes, tmp_path: Path) -> None:
    made = []
    for flag in ("--seed", "--global-seed", "--global_seed"):
        succeed("sample_ddp", *words, flag, "5", "--sample-name", flag.strip("-"))
        made.append((tmp_path / f"{flag.strip('-')}.npz").read_bytes())
    assert made[0] == made[1] == made[2] != whole


def test_a_picture_depends_on_its_index_alone(words: list[str], whole: bytes, tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "5", "--sample-name", "few")
    (tmp_path / "whole.npz").write_bytes(whole)
    few, many = np.load(tmp_path / "few.npz")["arr_0"], np.load(tmp_path / "whole.npz")["arr_0"]
    assert np.array_equal(few, many[:5])


def test_a_larger_count_extends_a_set(words: list[str], whole: bytes, tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "5")
    before = {png.name: png.stat().st_mtime_ns for png in (tmp_path / "set").glob("*.png")}
    succeed("sample_ddp", *words)
    assert (tmp_path / "set.npz").read_bytes() == whole
    assert before == {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in before}
    assert json.loads((tmp_path / "set.json").read_text())["count"] == COUNT


def test_raw_and_averaged_weights_are_told_apart(literal_run: LiteralRun, tmp_path: Path) -> None:
    saved = checkpoints(literal_run.run_folder)[-1]
    words = ["--ckpt", saved, "--num-fid-samples", "4", "--num-sampling-steps", "3", "--sample-dir", tmp_path]
    for weights in ("ema", "raw"):
        succeed("sample_ddp", *words, "--weights", weights, "--sample-name", weights)
    assert (tmp_path / "ema.npz").read_bytes() != (tmp_path / "raw.npz").read_bytes()


def test_balanced_labels_are_equal_counts_and_random_ones_are_not() -> None:
    index = torch.arange(4000)
    balanced = draw_labels("balanced", 4, 0, index).bincount()
    assert balanced.tolist() == [1000] * 4
    drawn = draw_labels("random", 4, 0, index).bincount().double()
    assert drawn.tolist() != [1000.0] * 4
    assert float(((drawn - 1000) ** 2 / 1000).sum()) < 25  # chi-squared with 3 degrees of freedom: 2e-5 lie above
    assert torch.equal(draw_labels("random", 4, 0, index[7:9]), draw_labels("random", 4, 0, index)[7:9])


def test_labels_reach_the_network(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    sample = sample_ddp.sample_latents

    def noting(network, settings, labels, *rest):
        asked.append(labels)
        return sample(network, settings, labels, *rest)

    monkeypatch.setattr(sample_ddp, "sample_latents", noting)
    succeed("sample_ddp", *words, "--labels", "balanced")
    assert torch.cat(asked)[:COUNT].tolist() == [index % 4 for index in range(COUNT)]
    with np.load(tmp_path / "set.npz") as archive:
        assert archive["arr_1"].tolist() == [index % 4 for index in range(COUNT)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samplers_and_step_lists(sampler: str, words: list[str], tmp_path: Path) -> None:
    for steps in ("3", "ddim3", "2,1"):
        succeed("sample_ddp", *words, "--sampler", sampler, "--num-sampling-steps", steps, "--sample-name", steps)
    assert (tmp_path / "3.npz").read_bytes() != (tmp_path / "2,1.npz").read_bytes()


# Restarts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", ["--no-overlap-decoding", "--overlap-decoding"])
def test_killed_at_a_random_moment_and_restarted(decoding: str, checkpoint: Path, tmp_path: Path) -> None:
    # One step takes milliseconds: many steps and pictures keep the process busy until it is killed.
    more = ["--num-fid-samples", "40", "--num-sampling-steps", "30"]
    (tmp_path / "whole").mkdir()
    succeed("sample_ddp", *flags(checkpoint, tmp_path / "whole"), *more)
    words = [*flags(checkpoint, tmp_path), *more, decoding]
    after, patience = random.randint(1, 20), random.uniform(0, 0.1)
    process = start([ROOT / "sample_ddp.py", *words], tmp_path)
    try:
        end = time.monotonic() + 60
        while len(finished(tmp_path / "set")) < after:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(patience)
    finally:
        kill(process)
        process.wait()
    kept = {png.name: png.stat().st_mtime_ns for png in finished(tmp_path / "set")}
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert len(kept) < 40
    succeed("sample_ddp", *words)
    assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "whole" / "set.npz").read_bytes(), (after, patience)
    assert kept == {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in kept}


def finished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.png") if path.stem.isdigit()]


@pytest.mark.parametrize("bug", [False, True])
def test_a_missing_picture_is_made_again(
    bug: bool, words: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the missing ones, with the bytes they had. Planted bug: noise from torch's stream, which a restart begins anew."""
    if bug:
        monkeypatch.setattr(sampling, "normal", lambda keys, purpose, shape: torch.randn(len(keys.index), *shape))
        torch.manual_seed(0)
    succeed("sample_ddp", *words)
    made = (tmp_path / "set.npz").read_bytes()
    assert (made == whole) is not bug
    for name in ("000002.png", "000009.png"):
        (tmp_path / "set" / name).unlink()
    (tmp_path / "set.npz").unlink()
    succeed("sample_ddp", *words)
    assert ((tmp_path / "set.npz").read_bytes() == made) is not bug


def test_what_a_kill_left_half_written_is_removed(words: list[str], whole: bytes, tmp_path: Path) -> None:
    """A killed packing of 50,000 pictures leaves gigabytes."""
    succeed("sample_ddp", *words)
    (tmp_path / "set" / "000003.png").rename(tmp_path / "set" / ".000003.png.99999.partial")
    (tmp_path / "set.npz").rename(tmp_path / ".set.npz.99999.partial")
    succeed("sample_ddp", *words)
    assert (tmp_path / "set.npz").read_bytes() == whole
    assert list(tmp_path.rglob("*.partial")) == []


def test_finished_pictures_are_not_made_again(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("sample_ddp", *words)
    monkeypatch.setattr(sample_ddp, "sample_latents", lambda *arguments: pytest.fail("sampled again"))
    succeed("sample_ddp", *words)


OTHER = {
    "seed": ["--seed", "9"],
    "guidance": ["--cfg-scale", "3"],
    "steps": ["--num-sampling-steps", "4"],
    "sampler": ["--sampler", "ddim"],
    "labels": ["--labels", "balanced"],
    "batch_size": ["--per-proc-batch-size", "5"],
}


@pytest.mark.parametrize("name", list(OTHER))
def test_a_restart_with_other_settings_is_refused(name: str, words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    before = (tmp_path / "set.npz").read_bytes()
    assert_refused(call("sample_ddp", *words, *OTHER[name]), name, "--sample-name")
    assert (tmp_path / "set.npz").read_bytes() == before


def test_another_checkpoint_is_refused_and_the_same_elsewhere_is_not(
    words: list[str], checkpoint: Path, literal_run: LiteralRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("sample_ddp", *words, "--num-fid-samples", "4")
    refused = call("sample_ddp", *words, "--ckpt", checkpoints(literal_run.run_folder)[-1])
    assert_refused(refused, "checkpoint")
    monkeypatch.chdir(checkpoint.parent)
    succeed("sample_ddp", *words, "--num-fid-samples", "4", "--ckpt", checkpoint.name)


def test_pictures_of_unknown_origin_are_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "000000.png")
    assert_refused(call("sample_ddp", *words), str(tmp_path / "set"))


def test_damaged_and_wrong_pictures_are_named_when_packing(words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words)
    third = tmp_path / "set" / "000003.png"
    third.write_bytes(third.read_bytes()[:60])
    assert_refused(call("sample_ddp", *words), "000003.png", last_line_only=True)
    Image.new("RGB", (9, 8)).save(third)
    assert_refused(call("sample_ddp", *words), "000003.png", last_line_only=True)


def test_packing_holds_no_more_for_more_pictures(tmp_path: Path) -> None:
    import tracemalloc

    for index in range(400):
        Image.new("RGB", (32, 32), (index % 256, 0, 0)).save(tmp_path / f"{index:06d}.png")

    def peak(count: int) -> int:
        tracemalloc.start()
        pack_pictures(tmp_path, count, (32, 32), tmp_path / "packed.npz")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(50)  # imports
    few, many = peak(100), peak(400)
    assert many - few < 300 * 32 * 32 * 3 / 4  # the pictures between would be four times that


# Which checkpoint ----------------------------------------------------------------------------------------------------


def test_the_newest_run_that_matches_is_taken(literal_run: LiteralRun, pixel_features: Path, tmp_path: Path) -> None:
    small = ["--model", "DiT-T/2", "--max-steps", "1", "--global-batch-size", "4", "--results-dir", str(tmp_path)]
    settings = FeatureSettings(PIXELS, 16, (3, 16, 16), "samples", "original", None, 8)
    larger = write_features(tmp_path / "larger", settings, 2, np.zeros((4, *settings.row_shape), np.float16))
    for name, size, path in (("old", "8", pixel_features), ("new", "8", pixel_features), ("other-size", "16", larger)):
        succeed("train", *small, "--feature-path", path, "--image-size", size, "--run-name", name)
    for name, moment in (("old", 1000), ("new", 2000), ("other-size", 3000)):
        os.utime(checkpoints(tmp_path / name)[-1], (moment, moment))
    words = ["--results-dir", tmp_path, "--num-fid-samples", "1", "--num-sampling-steps", "1", "--sample-dir", tmp_path / "s"]
    assert "new/checkpoints/0000001.safetensors (EMA of step 1)" in said(*words, "--image-size", "8")
    assert "other-size/checkpoints" in said(*words, "--model", "DiT-T/2")
    assert_refused(call("sample_ddp", *words, "--image-size", "32"), "size 32", "train.py")
    assert_refused(call("sample_ddp", *words, "--model", "DiT-S/2"), "DiT-S/2")


def said(*words: object) -> str:
    return succeed("sample_ddp", *words).out


def test_released_weights_need_model_and_size_alone(pretrained: Path, tiny_vae: Path, tmp_path: Path) -> None:
    words = ["--ckpt", pretrained, "--vae", tiny_vae, "--num-fid-samples", "2", "--num-sampling-steps", "2",
             "--sample-dir", tmp_path, "--sample-name", "set"]  # fmt: skip
    succeed("sample_ddp", *words, "--model", "DiT-T/2", "--image-size", "64")
    assert json.loads((tmp_path / "set.json").read_text())["method"] == "dense"
    assert_refused(call("sample_ddp", *words, "--model", "DiT-S/2", "--image-size", "64"), str(pretrained))


# sample.py -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid_words(checkpoint: Path, tmp_path: Path) -> list[str]:
    return ["--ckpt", str(checkpoint), "--num-sampling-steps", "2", "--output", str(tmp_path / "grid.png")]


def test_grid_of_classes_by_name_and_number(grid_words: list[str], tmp_path: Path) -> None:
    result = succeed("sample", *grid_words, "--class-labels", "golf ball, 1", "--per-class", "2", "--columns", "2")
    assert f"{tmp_path / 'grid.png'}: 4 pictures of classes 2 golf ball, 1 church" in result.out
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (18, 18, 3)


def test_grid_of_some_classes_where_none_are_named(grid_words: list[str], tmp_path: Path) -> None:
    assert "4 pictures of classes 0 tench, 1 church, 2 golf ball, 3 chain saw" in succeed("sample", *grid_words).out


def test_grid_is_the_same_for_any_batch_size_to_one_grey_level(grid_words: list[str], tmp_path: Path) -> None:
    grids = []
    for batch in ("1", "3", "16"):
        succeed("sample", *grid_words, "--per-class", "2", "--batch-size", batch)
        grids.append(np.asarray(Image.open(tmp_path / "grid.png")).astype(int))
    assert grids[0].std() > 20
    assert np.abs(grids[0] - grids[1]).max() <= 1
    assert np.abs(grids[0] - grids[2]).max() <= 1


def test_class_names_from_a_file(grid_words: list[str], tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('["a", "b", "c", "d"]')
    result = succeed("sample", *grid_words, "--class-labels", "c", "--class-names", names)
    assert "classes 2 c" in result.out


BAD_GRIDS = {
    "unknown name": (["--class-labels", "golf bal"], "did you mean 'golf ball'"),
    "number too large": (["--class-labels", "4"], "0 to 3"),
    "negative number": (["--class-labels=-1"], "'-1'"),
    "no names file": (["--class-names", "nothing.txt"], "nothing.txt"),
    "too few names": (["--class-names", "FOLDER/few.txt"], "few.txt"),
    "too many names": (["--class-names", "FOLDER/many.txt", "--class-labels", "f"], "many.txt"),
    "no columns": (["--columns", "0"], "--columns"),
    "no checkpoint": (["--ckpt", "nothing.pt"], "nothing.pt"),
    "steps": (["--num-sampling-steps", "many"], "many"),
    "density": (["--density", "5"], "4x4"),
    "another size": (["--image-size", "16"], "--image-size 8"),
    "another model": (["--model", "DiT-S/2"], "--model DiT-T/2"),
    "codec that does not fit": (["--vae", "taesd"], "taesd"),
}


@pytest.mark.parametrize("case", list(BAD_GRIDS))
def test_sample_refuses_in_one_sentence(
    case: str, grid_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "many.txt").write_text("a\nb\nc\nd\ne\nf\n")
    monkeypatch.setattr("sample.sample_latents", lambda *arguments: pytest.fail("it sampled"))
    words, named = BAD_GRIDS[case]
    result = call("sample", *grid_words, *[word.replace("FOLDER", str(tmp_path)) for word in words])
    assert_refused(result, named)


def test_average_is_what_is_sampled_unless_raw_is_asked_for(literal_run: LiteralRun) -> None:
    saved = checkpoints(literal_run.run_folder)[-1]
    assert "(EMA of step 6)" in read_weights(str(saved)).origin


def test_every_sampler_can_be_asked_for_by_name() -> None:
    for name in samplers.SAMPLERS:
        assert from_mapping(sampling.SamplingSettings, {"sampler": name}, "test").sampler == name
    with pytest.raises(InputError, match="sampler"):
        from_mapping(sampling.SamplingSettings, {"sampler": "none of them"}, "test")
