"""Alignment targets in a cache: those of the picture and the mirror that training reads, whole or refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_runs import COUNT, TARGET_WIDTH, aligned_features, aligned_settings, targets_of
from small_runs import write_features

from data import extraction
from data.extraction import Extraction, begin_extraction
from data.features import AlignmentTargets, open_features
from data.images import Listing
from data.manifest import FeatureSettings, Manifest, verify_checksums
from runtime.config import InputError
from runtime.seeding import Keys

LISTING = Listing(("a",), tuple(f"a/{index}.png" for index in range(12)))


def keys(count: int, step: int = 3, start: int = 0) -> Keys:
    return Keys(1, step, torch.arange(start, start + count))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aligned_features(tmp_path_factory.mktemp("aligned") / "f")


def agree(latents: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Which targets are those of their latents. -> (N,) bool"""
    return np.isclose(targets_of(latents.numpy()), targets.numpy(), atol=5e-3).all(axis=(1, 2))


def test_targets_are_those_of_the_mirror_that_is_drawn(cache: Path) -> None:
    features = open_features(cache, 8)
    targets = features.open_alignment()
    indices = np.arange(96) % COUNT
    latents, _ = features.batch(indices, keys(96))
    read = targets.batch(indices, keys(96))
    assert (read.shape, read.dtype) == ((96, 16, TARGET_WIDTH), torch.float16)
    assert agree(latents, read).all()
    wrong = targets.batch(indices, keys(96, step=4))  # the mirrors of another draw
    assert 0.3 < agree(latents, wrong).mean() < 0.7
    flipped = AlignmentTargets(targets.spec, "original", targets.array).batch(indices, keys(96))
    assert 0.3 < agree(latents, flipped).mean() < 0.7
    parts = [targets.batch(indices[start : start + 32], keys(32, start=start)) for start in (0, 32, 64)]
    assert torch.equal(torch.cat(parts), read)


def test_originals_alone(tmp_path: Path) -> None:
    settings = aligned_settings(mirrors="original")
    rows = np.random.default_rng(0).uniform(-1, 1, (7, 1, 3, 8, 8)).astype(np.float16)
    features = open_features(write_features(tmp_path / "f", settings, 1, rows, targets_of(rows).astype(np.float16)), 8)
    read = features.open_alignment().batch(np.arange(7), keys(7))
    assert agree(features.batch(np.arange(7), keys(7))[0], read).all()


def test_the_manifest_says_what_is_there(cache: Path) -> None:
    manifest = Manifest.read(cache)
    assert manifest.alignment == aligned_settings().alignment
    assert "alignment.npy" in manifest.sha256
    assert "dinov2-s features of 4 x 4 tokens" in manifest.describe()
    verify_checksums(cache)
    assert np.load(cache / "alignment.npy", mmap_mode="r").shape == (COUNT, 2, 16, TARGET_WIDTH)


def without_alignment(folder: Path) -> Path:
    settings = replace(aligned_settings(), alignment=None)
    return write_features(folder, settings, 1, np.zeros((5, *settings.row_shape), dtype=np.float16))


def test_older_caches_read_on_and_have_no_targets(tmp_path: Path) -> None:
    folder = without_alignment(tmp_path / "f")
    mapping = json.loads((folder / "manifest.json").read_text())
    del mapping["alignment"]
    (folder / "manifest.json").write_text(json.dumps(mapping))
    features = open_features(folder, 8)
    assert len(features) == 5
    with pytest.raises(InputError, match=r"holds no alignment features.*`extract_features.py --alignment dinov2-b`"):
        features.open_alignment()


def test_targets_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = aligned_features(tmp_path / "f")
    whole = (folder / "alignment.npy").read_bytes()
    (folder / "alignment.npy").write_bytes(whole[:-1])
    features = open_features(folder, 8)  # a training without them goes on
    with pytest.raises(InputError, match="incomplete"):
        features.open_alignment()
    (folder / "alignment.npy").unlink()
    with pytest.raises(InputError, match="is missing"):
        features.open_alignment()
    mapping = json.loads((folder / "manifest.json").read_text())
    mapping["alignment"] = {"name": "dinov2-s"}
    (folder / "manifest.json").write_text(json.dumps(mapping))
    with pytest.raises(InputError, match="is damaged"):
        open_features(folder, 8)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (None, "5", r"finished features with alignment none, not dinov2-s; give another --features-path"),
        ("5", None, "with alignment dinov2-s, not none"),
        ("5", "6", "with alignment sha256 5{64}, not 6{64}"),
    ],
)
def test_another_alignment_is_refused(tmp_path: Path, before: str | None, now: str | None, message: str) -> None:
    def settings(digit: str | None) -> FeatureSettings:
        whole = aligned_settings()
        assert whole.alignment is not None
        return replace(whole, alignment=replace(whole.alignment, sha256=digit * 64) if digit else None)

    fill(tmp_path / "f", settings(before))
    with pytest.raises(InputError, match=message):
        begin_extraction(tmp_path / "f", settings(now), LISTING)


def block_of(extraction: Extraction, block: int) -> tuple[np.ndarray, np.ndarray]:
    pictures = np.array(extraction.pictures_of(block), dtype=np.float16)
    return (
        np.broadcast_to(pictures[:, None, None, None, None], (len(pictures), 2, 3, 8, 8)),
        np.broadcast_to(pictures[:, None, None, None], (len(pictures), 2, 16, TARGET_WIDTH)),
    )


def fill(folder: Path, settings: FeatureSettings, broken: int | None = None) -> None:
    """A cache in which the numbers of a picture are its place."""
    extraction = begin_extraction(folder, settings, LISTING)
    assert isinstance(extraction, Extraction)
    with extraction:
        extraction.open_for_writing(0)
        for block in extraction.pending_blocks():
            rows, targets = block_of(extraction, block)
            reasons = {broken: "no picture"} if broken in extraction.pictures_of(block) else {}
            extraction.write_block(block, rows, reasons, targets if settings.alignment else None)
        extraction.finish(skip_broken=True)


def test_a_broken_picture_is_left_out_of_both_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_BYTES_COPIED_AT_ONCE", 700)  # some rows of one array, part of a row of none
    fill(tmp_path / "f", aligned_settings(), broken=6)
    expected = [index for index in range(12) if index != 6]
    for name in ("latents.npy", "alignment.npy"):
        rows = np.load(tmp_path / "f" / name)
        assert rows.reshape(11, -1).mean(axis=1).tolist() == expected
    verify_checksums(tmp_path / "f")


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_killed_while_the_arrays_are_put_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Before either, between the two, behind both: the same command ends it."""
    real, calls = os.replace, 0

    class Killed(BaseException):
        pass

    def interrupted(*arguments: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 2:  # listing and settings come first
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(Killed):
            fill(tmp_path / "f", aligned_settings())
    fill(tmp_path / "f", aligned_settings())
    verify_checksums(tmp_path / "f")
    for name in ("latents.npy", "alignment.npy"):
        assert np.load(tmp_path / "f" / name).reshape(12, -1).mean(axis=1).tolist() == list(range(12))


def test_the_disk_must_hold_both_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = extraction.shutil.disk_usage(tmp_path)
    latents = 12 * 2 * 3 * 8 * 8 * 2
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda path: usage._replace(free=latents + 100))
    fill(tmp_path / "small", replace(aligned_settings(), alignment=None))
    with pytest.raises(InputError, match="GB free"):
        fill(tmp_path / "large", aligned_settings())
