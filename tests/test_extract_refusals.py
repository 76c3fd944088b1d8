"""What extract_features.py refuses, and when: before a codec is loaded, in one sentence, with nothing lost."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from extraction_runs import digests, extract, flags, run
from extraction_runs import pictures as pictures
from extraction_runs import undisturbed as undisturbed

import extract_features
from data.latents import pixels_from_bytes
from runtime.config import InputError


def test_a_complete_cache_is_left_alone(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    extract(monkeypatch, *flags(pictures, tmp_path / "f"))
    before = digests(tmp_path / "f"), (tmp_path / "f" / "latents.npy").stat().st_mtime_ns
    capsys.readouterr()
    extract(monkeypatch, *flags(pictures, tmp_path / "f"))
    assert "is complete: 23 pictures" in capsys.readouterr().out
    assert (digests(tmp_path / "f"), (tmp_path / "f" / "latents.npy").stat().st_mtime_ns) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("change", "message"), [
    (("--image-size", "4"), "image_size 8, not 4"),
    (("--mirrors", "original"), "mirrors both, not original"),
    (("--batch-size", "5"), "batch_size 4, not 5"),
    (("picture",), "zz.png is new"),
])  # fmt: skip
def test_other_settings_are_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, change: tuple[str, ...], message: str
) -> None:
    mine = tmp_path / "pictures"
    shutil.copytree(pictures, mine)
    if not finished:
        (mine / "a" / "00.png").write_text("broken")
    try:
        extract(monkeypatch, *flags(mine, tmp_path / "f"))
    except InputError:
        assert not finished
    if change == ("picture",):
        shutil.copy(pictures / "b" / "01.png", mine / "b" / "zz.png")
        change = ()
    with pytest.raises(InputError, match=message):
        extract(monkeypatch, *flags(mine, tmp_path / "f", "--vae", "pixels", *change))


def test_a_first_try_that_failed_may_be_corrected(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    def unreachable(*arguments: object) -> None:
        raise InputError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract_features, "load_codec", unreachable)
        with pytest.raises(InputError, match="no network"):
            extract(patch, *flags(pictures, tmp_path / "f", "--vae", "mse"))
    extract(monkeypatch, *flags(pictures, tmp_path / "f"))
    assert digests(tmp_path / "f") == undisturbed


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("x")
    return tmp_path / "occupied"


def test_every_bad_input_is_found_before_a_codec_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("a codec was loaded")

    monkeypatch.setattr(extract_features, "load_codec", loaded)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    new = tmp_path / "new"
    for arguments, message in [
        (["--features-path", "x"], "--data-path IMAGES is missing"),
        (["--data-path", "x"], "--features-path FOLDER is missing"),
        (flags(tmp_path / "missing", new), "no such folder"),
        (flags(tmp_path / "empty", new), "holds no pictures"),
        (flags(pictures / "a", new), "no class folders"),
        (flags(tmp_path / "file", new), "neither a folder nor a zip"),
        (flags(pictures, occupied(tmp_path)), r"something else \(thesis\.tex\)"),
        (flags(pictures, tmp_path / "file"), "is a file"),
        (flags(pictures, tmp_path / "file" / "below"), "cannot be written"),
        (flags(pictures, new, "--vae", "taesdd"), "did you mean 'taesd'"),
        (flags(pictures, new, "--vae", "ema", "--image-size", "100"), "multiple of 8"),
        (flags(pictures, new, "--vae", "pixels", "--image-size", "0"), "multiple of 1"),
        (flags(pictures, new, "--vae", "pixels", "--kind", "moments"), "needs a codec with a posterior"),
        (flags(pictures, new, "--vae", "pixels", "--mirrors", "bot"), "did you mean 'both'"),
        (flags(pictures, new, "--vae", "pixels", "--batch-size", "0"), "--batch-size is 0"),
        (flags(pictures, new, "--vae", "pixels", "--num-workers", "-1"), "--num-workers is -1"),
        (flags(pictures, new, "--vae", "pixels", "--image-sise", "8"), "did you mean '--image-size'"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            extract(monkeypatch, *arguments)
        assert "\n" not in str(caught.value)
    assert not new.exists()


def test_a_full_disk_is_foreseen(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB free"):
        extract(monkeypatch, *flags(pictures, tmp_path / "f"))


def test_values_beyond_float16_are_not_stored(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_features, "pixels_from_bytes", lambda pictures: pixels_from_bytes(pictures) * 1e9)
    with pytest.raises(InputError, match=r"beyond float16 for a/00\.png"):
        extract(monkeypatch, *flags(pictures, tmp_path / "f"))


def test_the_command_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    done = run(sys.executable, "extract_features.py", *flags(tmp_path / "missing", tmp_path / "f"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("extract_features.py: error: ")
    help_text = run(sys.executable, "extract_features.py", "--help").stdout
    assert "torchrun --nproc_per_node=8 extract_features.py" in help_text
