"""The cache as training reads it: gathers, keyed draws, legacy folders, order, and every way in which it may not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.extraction import Extraction, begin_extraction
from data.features import BatchOrder, CachedFeatures, LegacyFeatures, open_features
from data.images import Listing
from data.latents import PIXELS, SD_VAE
from data.manifest import FeatureSettings, Manifest, verify_checksums
from runtime.config import InputError
from runtime.seeding import Keys

COUNT = 10
LISTING = Listing(("cat", "dog"), tuple(f"cat/{i}.png" for i in range(4)) + tuple(f"dog/{i}.png" for i in range(6)))
MOMENTS = FeatureSettings(SD_VAE, 32, (4, 4, 4), "moments", "both", None, 4)
SAMPLES = FeatureSettings(PIXELS, 4, (3, 4, 4), "samples", "both", None, 4)


def rows_of(settings: FeatureSettings) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(COUNT, *settings.row_shape)).astype(np.float16)
    return np.abs(rows) if settings.kind == "moments" else rows


def write_cache(folder: Path, settings: FeatureSettings) -> np.ndarray:
    """A cache of random numbers. -> its rows"""
    rows = rows_of(settings)
    extraction = begin_extraction(folder, settings, LISTING)
    assert isinstance(extraction, Extraction)
    with extraction:
        extraction.open_for_writing(0)
        for block in extraction.pending_blocks():
            pictures = extraction.pictures_of(block)
            extraction.write_block(block, rows[pictures.start : pictures.stop], {})
        extraction.finish(skip_broken=False)
    return rows


def keys(count: int, seed: int = 1, step: int = 3, start: int = 0) -> Keys:
    return Keys(seed, step, torch.arange(start, start + count))


def test_samples_are_the_stored_numbers_of_one_of_the_mirrors(tmp_path: Path) -> None:
    rows = write_cache(tmp_path / "f", SAMPLES)
    dataset = open_features(tmp_path / "f", 4, num_classes=2, channels=3)
    assert (len(dataset), dataset.latent_shape, dataset.num_classes) == (COUNT, (3, 4, 4), 2)
    assert (dataset.kind, dataset.mirrors, dataset.codec.name) == ("samples", "both", "pixels")
    indices = np.array([7, 0, 9, 7, 3] * 20)
    latents, labels = dataset.batch(indices, keys(100))
    assert (latents.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [int(index >= 4) for index in indices]
    mirrored = [np.array_equal(latent, rows[index, 1]) for latent, index in zip(latents.numpy(), indices, strict=True)]
    original = [np.array_equal(latent, rows[index, 0]) for latent, index in zip(latents.numpy(), indices, strict=True)]
    assert all(a != b for a, b in zip(mirrored, original, strict=True))
    assert 30 < sum(mirrored) < 70


def test_originals_alone_are_not_drawn(tmp_path: Path) -> None:
    rows = write_cache(tmp_path / "f", replace(SAMPLES, mirrors="original"))
    latents, _ = open_features(tmp_path / "f", 4).batch(np.arange(COUNT), keys(COUNT))
    assert np.array_equal(latents.numpy(), rows[:, 0].astype(np.float32))


def test_moments_are_drawn_afresh_from_the_stored_posterior(tmp_path: Path) -> None:
    rows = write_cache(tmp_path / "f", replace(MOMENTS, mirrors="original"))[:, 0].astype(np.float32)  # (N, 2, C, h, w)
    dataset = open_features(tmp_path / "f", 32, num_classes=2)
    draws = torch.stack([dataset.batch(np.arange(COUNT), keys(COUNT, step=step))[0] for step in range(400)])
    noise = (draws - torch.from_numpy(rows[:, 0])) / torch.from_numpy(rows[:, 1]).clamp(min=1e-3)
    assert noise[0].ne(noise[1]).any()
    assert abs(noise[..., 1:, :].mean()) < 0.02
    assert abs(noise[..., 1:, :].std() - 1) < 0.05


@pytest.mark.parametrize("settings", [SAMPLES, MOMENTS])
def test_a_sample_does_not_depend_on_its_batch(tmp_path: Path, settings: FeatureSettings) -> None:
    write_cache(tmp_path / "f", settings)
    dataset = open_features(tmp_path / "f", settings.image_size)
    indices = np.array([5, 5, 2, 9, 0, 2, 8, 1])
    together, labels = dataset.batch(indices, keys(8))
    parts = [
        dataset.batch(indices[start : start + 3], keys(len(indices[start : start + 3]), start=start)) for start in (0, 3, 6)
    ]
    assert torch.equal(together, torch.cat([latents for latents, _ in parts]))
    assert torch.equal(labels, torch.cat([part for _, part in parts]))
    # A draw that ignored the place in the global batch would make every part start alike.
    local = [dataset.batch(indices[start : start + 3], keys(len(indices[start : start + 3]))) for start in (0, 3, 6)]
    assert not torch.equal(together, torch.cat([latents for latents, _ in local]))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (7, 3), (5, 12), (1, 3)])
def test_order_covers_every_picture_once_per_epoch(count: int, batch_size: int) -> None:
    order = BatchOrder(seed=3, count=count, batch_size=batch_size)
    everything = np.concatenate([order.indices(step, np.arange(batch_size)) for step in range(4 * count)])
    epochs = everything[: len(everything) // count * count].reshape(-1, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs.tolist())
    if count > 3:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
        assert epochs.tolist() != [list(range(count))] * len(epochs)


def test_order_is_a_pure_function() -> None:
    order = BatchOrder(seed=3, count=10, batch_size=4)
    whole = [order.indices(step, np.arange(4)) for step in range(12)]
    for step in (11, 0, 7, 2):
        halves = [BatchOrder(3, 10, 4).indices(step, np.array(places)) for places in ([2, 3], [0, 1])]
        assert np.array_equal(np.concatenate(halves[::-1]), whole[step])
        assert np.array_equal(order.indices(step, np.arange(4)), whole[step])
    assert any(not np.array_equal(BatchOrder(4, 10, 4).indices(step, np.arange(4)), whole[step]) for step in range(3))


def write_legacy(root: Path, numbers: range, size: int = 32, label=lambda number: number % 5) -> Path:
    for half in ("features", "labels"):
        (root / f"imagenet{size}_{half}").mkdir(parents=True)
    for number in numbers:
        feature = np.full((1, 4, size // 8, size // 8), number, dtype=np.float32)
        np.save(root / f"imagenet{size}_features" / f"{number}.npy", feature)
        np.save(root / f"imagenet{size}_labels" / f"{number}.npy", np.array([label(number)]))
    return root


def test_legacy_folders_are_read_in_numeric_order(tmp_path: Path) -> None:
    (write_legacy(tmp_path, range(3, 15)) / "imagenet32_features" / ".DS_Store").write_bytes(b"")
    dataset = open_features(tmp_path, 32)
    assert isinstance(dataset, LegacyFeatures)
    assert (len(dataset), dataset.latent_shape, dataset.num_classes) == (12, (4, 4, 4), 1000)
    latents, labels = dataset.batch(np.array([11, 0, 7]), keys(3))
    assert (latents.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert latents[:, 0, 0, 0].tolist() == [14, 3, 10]
    assert latents.shape == (3, 4, 4, 4)
    assert labels.tolist() == [4, 3, 0]
    assert open_features(tmp_path, 32, num_classes=5).num_classes == 5


def spoil_nothing(root: Path) -> None:
    pass


def spoil_label_missing(root: Path) -> None:
    (root / "imagenet32_labels" / "7.npy").unlink()


def spoil_labels_missing(root: Path) -> None:
    (root / "imagenet32_labels").rename(root / "elsewhere")


def spoil_no_files(root: Path) -> None:
    for path in (root / "imagenet32_features").iterdir():
        path.unlink()


def spoil_shape(root: Path) -> None:
    np.save(root / "imagenet32_features" / "3.npy", np.zeros((1, 4, 8, 8)))


def spoil_truncated(root: Path) -> None:
    path = root / "imagenet32_features" / "3.npy"
    path.write_bytes(path.read_bytes()[:200])


def spoil_label_shape(root: Path) -> None:
    np.save(root / "imagenet32_labels" / "4.npy", np.zeros(2))


@pytest.mark.parametrize(
    ("spoil", "path", "size", "num_classes", "message"),
    [
        (spoil_nothing, ".", 64, None, "holds imagenet32_features, but --image-size is 64"),
        (spoil_nothing, "imagenet32_features", 32, None, "give the folder above"),
        (spoil_nothing, "missing", 32, None, "no such feature folder"),
        (spoil_nothing, ".", 32, 4, "holds label 4, but there are 4 classes"),
        (spoil_label_missing, ".", 32, None, "7.npy is missing"),
        (spoil_labels_missing, ".", 32, None, "imagenet32_labels is missing"),
        (spoil_no_files, ".", 32, None, "no numbered"),
        (spoil_shape, ".", 32, None, r"shape \(1, 4, 8, 8\)"),
        (spoil_truncated, ".", 32, None, "no whole .npy array"),
        (spoil_label_shape, ".", 32, None, "instead of one whole number"),
    ],
)
def test_unusable_legacy_folders(tmp_path: Path, spoil, path: str, size: int, num_classes: int | None, message: str) -> None:
    spoil(write_legacy(tmp_path, range(3, 15)))
    with pytest.raises(InputError, match=message) as caught:
        open_features(tmp_path / path, size, num_classes)
    assert "\n" not in str(caught.value)


def test_a_later_legacy_file_of_another_shape_is_named(tmp_path: Path) -> None:
    np.save(write_legacy(tmp_path, range(5)) / "imagenet32_features" / "4.npy", np.zeros((1, 4, 8, 8)))
    dataset = open_features(tmp_path, 32)
    dataset.batch(np.arange(4), keys(4))
    with pytest.raises(InputError, match=r"4\.npy holds an array of shape"):
        dataset.batch(np.array([4]), keys(1))


def damage_truncate(folder: Path) -> None:
    path = folder / "latents.npy"
    path.write_bytes(path.read_bytes()[:-2])


def damage_missing(folder: Path) -> None:
    (folder / "labels.npy").unlink()


def damage_dtype(folder: Path) -> None:
    np.save(folder / "latents.npy", np.load(folder / "latents.npy").astype(np.float32))


def damage_text(folder: Path) -> None:
    (folder / "latents.npy").write_text("some text")


def damage_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.arange(COUNT))


def damage_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1,')


def damage_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def edit_manifest(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in (manifest | values).items() if v is not None}))


def damage_version(folder: Path) -> None:
    edit_manifest(folder, format_version=9)


def damage_key(folder: Path) -> None:
    edit_manifest(folder, count=None)


def damage_kind(folder: Path) -> None:
    edit_manifest(folder, kind="sample")


def damage_unfinished(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "gone")
    (folder / ".progress").mkdir()


def damage_empty(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "incomplete"),
        (damage_missing, "labels.npy is missing"),
        (damage_dtype, "holds float32"),
        (damage_text, "no .npy array"),
        (damage_labels, "labels 0 to 9, but there are 2 classes"),
        (damage_json, "cannot be read"),
        (damage_list, "not a feature manifest"),
        (damage_version, "format version 9"),
        (damage_key, "count"),
        (damage_kind, "did you mean 'samples'"),
        (damage_unfinished, "not finished"),
        (damage_empty, "neither manifest.json nor imagenet4_features"),
    ],
)
def test_damaged_caches_get_one_sentence(tmp_path: Path, damage, message: str) -> None:
    write_cache(tmp_path / "f", SAMPLES)
    damage(tmp_path / "f")
    with pytest.raises(InputError, match=message) as caught:
        open_features(tmp_path / "f", 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image_size", "num_classes", "channels", "message"),
    [
        (8, None, None, "size 4 .* --image-size is 8"),
        (4, 3, None, "holds 2 classes, but --num-classes is 3"),
        (4, 2, 4, "3 channels .* takes 4"),
    ],
)
def test_a_cache_that_does_not_fit_the_model(
    tmp_path: Path, image_size: int, num_classes: int | None, channels: int | None, message: str
) -> None:
    write_cache(tmp_path / "f", SAMPLES)
    with pytest.raises(InputError, match=message):
        open_features(tmp_path / "f", image_size, num_classes, channels)


def test_checksums_notice_one_changed_byte(tmp_path: Path) -> None:
    write_cache(tmp_path / "f", SAMPLES)
    verify_checksums(tmp_path / "f")
    data = bytearray((tmp_path / "f" / "latents.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f" / "latents.npy").write_bytes(data)
    assert isinstance(open_features(tmp_path / "f", 4), CachedFeatures)
    with pytest.raises(InputError, match=r"latents\.npy differs"):
        verify_checksums(tmp_path / "f")


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_cache(tmp_path / "f", MOMENTS)
    manifest = Manifest.read(tmp_path / "f")
    assert manifest.settings == MOMENTS
    assert (manifest.count, manifest.classes, manifest.skipped) == (COUNT, ("cat", "dog"), {})
    assert json.loads((tmp_path / "f" / "sources.json").read_text()) == list(LISTING.names)
