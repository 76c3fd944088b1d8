"""extract_features.py as it is typed: the same bytes for any number of processes and after any kill, and every bad input."""

from __future__ import annotations

import hashlib
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
from PIL import Image

import extract_features
from data import extraction
from data.features import open_features
from data.images import load_picture, open_source
from data.latents import load_codec, pixels_from_bytes, resolve_codec
from data.manifest import verify_checksums
from runtime.config import InputError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of three classes, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(23):
        folder = root / "abc"[index % 3]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (generator.integers(8, 30), generator.integers(8, 30), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


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


def flags(pictures: Path, features: Path, *more: str) -> list[str]:
    return ["--data-path", str(pictures), "--features-path", str(features), "--image-size", "8", "--batch-size", "4",
            "--num-workers", "2", *(more or ("--vae", "pixels"))]  # fmt: skip


def extract(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script's main, in this process."""
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *arguments])
    extract_features.main()


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def digests(features: Path) -> dict[str, str]:
    """Hash of each file of a finished cache."""
    assert not (features / ".progress").exists()
    assert not list(features.glob(".*.partial"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in features.iterdir() if path.name != ".lock"}


@pytest.fixture
def undisturbed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    extract(monkeypatch, *flags(pictures, tmp_path / "undisturbed"))
    result = digests(tmp_path / "undisturbed")
    assert set(result) == {"latents.npy", "labels.npy", "sources.json", "manifest.json"}
    return result


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


def extract_in_turn(config: extract_features.ExtractConfig, world_size: int, before_rank=lambda rank: None) -> dict[str, str]:
    """What `world_size` processes do, one after the other in this one. -> `digests` of the result"""
    main = extract_features.prepare(config, world_size)
    assert main is not None
    pending = main.pending_blocks()
    with main:
        for rank in range(1, world_size):
            before_rank(rank)
            with extract_features.join_extraction(main.folder, main.settings) as own:
                extract_features.extract(own, config, pending[rank::world_size], rank)
        before_rank(0)
        extract_features.extract(main, config, pending[::world_size], 0)
        main.finish(config.skip_broken)
    return digests(main.folder)


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
    def write_to_the_block_before(self, block, rows, broken):
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
