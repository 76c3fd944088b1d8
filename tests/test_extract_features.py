"""extract_features.py as it is typed: the same bytes for any number of processes and after any kill, and every bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_runs import ENVIRONMENT, digests, extract, extract_in_turn, flags, run
from extraction_runs import pictures as pictures
from extraction_runs import undisturbed as undisturbed

import extract_features
from data import extraction
from data.features import open_features
from data.images import load_picture, open_source
from data.latents import load_codec, pixels_from_bytes, resolve_codec
from data.manifest import verify_checksums
from runtime.config import InputError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL that shrinks by 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "kl"
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).save_pretrained(folder)
    return folder


def with_broken(pictures: Path, target: Path) -> tuple[Path, list[str]]:
    """A copy of `pictures` in which two cannot be read. -> the copy, their names"""
    shutil.copytree(pictures, target)
    broken = ["a/09.png", "c/20.png"]
    (target / broken[0]).write_bytes((pictures / broken[0]).read_bytes()[:50])
    (target / broken[1]).write_text("not a picture")
    return target, broken


def test_stored_latents_are_the_cropped_pixels_and_their_mirror_image(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, *flags(pictures, tmp_path / "f"))
    verify_checksums(tmp_path / "f")
    latents = np.load(tmp_path / "f" / "latents.npy", mmap_mode="r")
    names = json.loads((tmp_path / "f" / "sources.json").read_text())
    assert latents.shape == (23, 2, 3, 8, 8)
    assert latents.dtype == np.float16
    for row, name in zip(latents, names, strict=True):
        pixels = load_picture(open_source(pictures), name, 8)
        assert np.array_equal(load_codec(resolve_codec("pixels")).decode(torch.tensor(row))[0].numpy(), pixels)
        assert np.array_equal(row[1], row[0, :, :, ::-1])
        assert not np.array_equal(row[1], row[0])
    assert np.load(tmp_path / "f" / "labels.npy").tolist() == ["abc".index(name[0]) for name in names]
    assert len(open_features(tmp_path / "f", 8, num_classes=3)) == 23


def test_moments_and_samples_of_an_autoencoder(
    pictures: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = load_codec(resolve_codec(str(autoencoder)))
    source = open_source(pictures)
    names = source.list_pictures().names
    pixels = pixels_from_bytes(torch.from_numpy(np.stack([load_picture(source, name, 8) for name in names])))
    extract(monkeypatch, *flags(pictures, tmp_path / "m", "--codec", str(autoencoder)))
    moments = np.load(tmp_path / "m" / "moments.npy").astype(np.float32)
    assert moments.shape == (23, 2, 2, 4, 4, 4)
    for mirror, view in enumerate((pixels, pixels.flip(3))):
        mean, deviation = codec.encode_moments(view)
        np.testing.assert_allclose(moments[:, mirror, 0], mean, atol=2e-3)
        np.testing.assert_allclose(moments[:, mirror, 1], deviation, rtol=2e-3)
    alone = [tmp_path / name for name in ("s0", "s1")]
    for seed, folder in enumerate(alone):
        extract(monkeypatch, *flags(pictures, folder, "--vae", str(autoencoder), "--kind", "samples", "--seed", str(seed)))
    noise = [(np.load(folder / "latents.npy") - moments[:, :, 0]) / moments[:, :, 1] for folder in alone]
    assert abs(noise[0].std() - 1) < 0.05
    for other in (noise[1], noise[0][:, ::-1], np.roll(noise[0], 1, axis=0)):  # seeds, mirrors, pictures
        assert abs(np.corrcoef(noise[0].ravel(), other.ravel())[0, 1]) < 0.05


def test_any_number_of_processes_draws_the_same_samples(
    pictures: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> extract_features.ExtractConfig:
        return extract_features.ExtractConfig(
            str(pictures), str(tmp_path / name), image_size=8, vae=str(autoencoder), kind="samples", batch_size=4
        )

    expected = extract_in_turn(config("1"), 1)
    for world_size in (2, 3, 7):
        assert extract_in_turn(config(str(world_size)), world_size) == expected
    right = extract_features.Keys

    def seed_by_rank(rank: int) -> None:
        monkeypatch.setattr(extract_features, "Keys", lambda seed, step, index: right(seed + rank, step, index))

    assert extract_in_turn(config("bug"), 2, seed_by_rank)["latents.npy"] != expected["latents.npy"]


# A driver that runs the script with a mistake: the second process writes its blocks over the first one's.
COLLIDING = """
import os, sys
import extract_features
from data.extraction import Extraction
from runtime.config import run_script
write = Extraction.write_block
if os.environ["RANK"] == "1":
    right = Extraction.pictures_of
    def write_to_the_block_before(self, block, rows, broken, targets):
        self.pictures_of = lambda block: right(self, block - 1)
        write(self, block, rows, broken)
        del self.pictures_of
    Extraction.write_block = write_to_the_block_before
sys.argv[0] = "extract_features.py"
run_script(extract_features.main)
"""


def test_two_processes_give_the_same_bytes(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a zip, with broken pictures to skip; against one process on the folder."""
    damaged, _ = with_broken(pictures, tmp_path / "pictures")
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", damaged))
    (tmp_path / "colliding.py").write_text(COLLIDING)
    extract(monkeypatch, *flags(damaged, tmp_path / "one", "--vae", "pixels", "--skip-broken"))
    for script in ("extract_features.py", str(tmp_path / "colliding.py")):
        features = tmp_path / Path(script).stem
        done = run(*TORCHRUN, script, *flags(archive, features, "--vae", "pixels", "--skip-broken"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote 21 pictures") == 1
        assert "23/23" in done.stderr
    assert digests(tmp_path / "extract_features") == digests(tmp_path / "one")
    assert digests(tmp_path / "colliding")["latents.npy"] != digests(tmp_path / "one")["latents.npy"]


SLOW = """
import sys, time
import extract_features
from data.extraction import Extraction
write = Extraction.write_block
def slowly(*arguments):
    time.sleep(0.2)
    write(*arguments)
Extraction.write_block = slowly
extract_features.main()
"""


def test_kill_and_restart(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]) -> None:
    features = tmp_path / "f"
    killed = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags(pictures, features)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    journal = features / ".progress" / "blocks.rank0.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(InputError, match="another run is writing"):
        extract(monkeypatch, *flags(pictures, features))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finished = journal.read_bytes().count(b"\n")
    assert 2 <= finished < 6
    encoded = []
    encode_block = extract_features.encode_block
    monkeypatch.setattr(
        extract_features, "encode_block", lambda e, c, block, p: encoded.append(block) or encode_block(e, c, block, p)
    )
    extract(monkeypatch, *flags(pictures, features))
    assert encoded == list(range(finished, 6))
    assert digests(features) == undisturbed


class Killed(BaseException):
    """What a kill is to code that catches exceptions."""


@pytest.mark.parametrize(
    ("owner", "function", "call", "half"),
    [
        (extraction, "write_json", 1, False),  # the listing
        (extraction, "write_json", 2, False),  # the settings
        (extraction, "_write_all", 1, True),  # the first block's bytes
        (extraction, "_write_all", 2, True),  # its line in the journal
        (extraction, "_write_all", 7, True),  # a later block's bytes
        (extraction, "_write_all", 8, True),
        (extraction, "write_json", 3, False),  # the sources
        (os, "replace", 5, False),  # the array
        (extraction, "sha256", 1, False),  # between array and manifest
        (extraction.Manifest, "write", 1, False),
        (shutil, "rmtree", 2, False),  # after the manifest
    ],
)
def test_interruption_at_any_point(
    pictures: Path, tmp_path: Path, undisturbed: dict[str, str], owner, function: str, call: int, half: bool
) -> None:
    features = tmp_path / "f"
    calls = 0
    real = getattr(owner, function)

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            if half:
                file, data = arguments
                real(file, data[: len(data) // 2])
            raise Killed
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, interrupted)
        died = False
        try:
            extract(patch, *flags(pictures, features))
        except Killed:
            died = True
    assert died
    with pytest.MonkeyPatch.context() as patch:
        extract(patch, *flags(pictures, features))
    assert digests(features) == undisturbed


def test_broken_pictures_are_named_at_the_end_and_skipped_on_request(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damaged, broken = with_broken(pictures, tmp_path / "pictures")
    with pytest.raises(InputError, match="2 of 23 pictures cannot be read") as caught:
        extract(monkeypatch, *flags(damaged, tmp_path / "f"))
    assert all(name in str(caught.value) for name in [*broken, "--skip-broken", "not a JPEG"])
    assert not (tmp_path / "f" / "manifest.json").exists()
    capsys.readouterr()
    extract(monkeypatch, *flags(damaged, tmp_path / "f", "--vae", "pixels", "--skip-broken"))
    assert "16 pictures were done before" in capsys.readouterr().out  # all blocks but the two with broken pictures
    # As if they had never been there.
    clean = tmp_path / "clean"
    shutil.copytree(pictures, clean)
    for name in broken:
        (clean / name).unlink()
    extract(monkeypatch, *flags(clean, tmp_path / "g"))
    result, expected = digests(tmp_path / "f"), digests(tmp_path / "g")
    assert result.pop("manifest.json") != expected.pop("manifest.json")
    assert result == expected
    assert list(json.loads((tmp_path / "f" / "manifest.json").read_text())["skipped"]) == broken


def test_repaired_pictures_are_read_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    damaged, broken = with_broken(pictures, tmp_path / "pictures")
    with pytest.raises(InputError):
        extract(monkeypatch, *flags(damaged, tmp_path / "f"))
    for name in broken:
        shutil.copy(pictures / name, damaged / name)
    extract(monkeypatch, *flags(damaged, tmp_path / "f"))
    assert digests(tmp_path / "f") == undisturbed


def test_nothing_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for index in range(12):
        (tmp_path / "pictures" / "a" / f"{index}.png").write_text("no picture")
    with pytest.raises(InputError, match=r"none of the 12 .* others in .*broken\.json"):
        extract(monkeypatch, *flags(tmp_path / "pictures", tmp_path / "f", "--vae", "pixels", "--skip-broken"))
    assert len(json.loads((tmp_path / "f" / ".progress" / "broken.json").read_text())) == 12
