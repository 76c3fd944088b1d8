"""Picture sources and ADM's crop."""

from __future__ import annotations

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import BrokenPicture, center_crop, load_picture, open_source, to_rgb
from runtime.config import InputError


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient: every filter leaves its own trace."""
    generator = np.random.default_rng(seed)
    gradient = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 60, width))[..., None]
    return Image.fromarray((gradient + generator.integers(0, 75, (height, width, 3))).astype(np.uint8))


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x: float) -> float:
    """Keys' cubic convolution with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resample(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """Antialiased resampling of axis 0 to `length`, one output line at a time, rounded to grey levels."""
    scale = len(pixels) / length
    stretch = max(scale, 1.0)
    lines = []
    for place in range(length):
        centre = (place + 0.5) * scale
        low, high = max(int(centre - support * stretch + 0.5), 0), min(int(centre + support * stretch + 0.5), len(pixels))
        weights = np.array([kernel((source - centre + 0.5) / stretch) for source in range(low, high)])
        lines.append(np.tensordot(weights / weights.sum(), pixels[low:high].astype(np.float64), axes=1))
    return np.clip(np.floor(np.array(lines) + 0.5), 0, 255)


def resize(pixels: np.ndarray, width: int, height: int, kernel, support: float) -> np.ndarray:
    across = resample(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resample(across, height, kernel, support)


def reference_crop(image: Image.Image, size: int, halve: bool = True, kernel=bicubic, shift: int = 0) -> np.ndarray:
    pixels = np.asarray(image)
    while halve and min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = resize(pixels, round(width * scale), round(height * scale), kernel, 2.0)
    top, left = (pixels.shape[0] - size) // 2 + shift, (pixels.shape[1] - size) // 2 + shift
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 61), (45, 100), (16, 16), (9, 20), (33, 32), (31, 63)])
def test_crop_equals_slow_reference(width: int, height: int) -> None:
    image = random_picture(width, height)
    difference = np.abs(center_crop(image, 16).astype(float) - reference_crop(image, 16))
    assert difference.max() <= 1


def triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


@pytest.mark.parametrize("bug", [{"halve": False}, {"kernel": triangle}, {"shift": -1}])
def test_crop_comparison_bites(bug: dict) -> None:
    image = random_picture(90, 61) if "shift" not in bug else random_picture(61, 90)
    wrong = reference_crop(image, 16, **bug)
    assert wrong.shape != (16, 16, 3) or np.abs(center_crop(image, 16).astype(float) - wrong).max() > 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "I;16", "RGB"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1)))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert("RGB").convert(mode)
    (tmp_path / "grey").mkdir()
    file = tmp_path / "grey" / ("1.jpg" if mode == "CMYK" else "1.png")
    image.save(file, quality=100) if mode == "CMYK" else image.save(file)
    pixels = load_picture(open_source(tmp_path), f"grey/{file.name}", 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    if mode not in ("1", "P"):
        assert np.abs(pixels.astype(int) - np.asarray(grey)[..., None]).max() <= 4
    assert np.ptp(pixels) > 200


def test_sixteen_bits_are_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert np.asarray(to_rgb(image)).max() == 0x80
    assert np.asarray(image.convert("RGB")).max() == 255  # what Pillow alone does


def write_tree(root: Path) -> None:
    for name in ("b/2.PNG", "b/10.png", "a/deep/er/1.JPeG", "a/z.bmp", "a/y.webp", "c/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_picture(8, 8).save(root / name)
    for name in (".hidden/1.png", "a/.1.png", "b/notes.txt", "__MACOSX/a/1.png", "readme.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


NAMES = ("a/deep/er/1.JPeG", "a/y.webp", "a/z.bmp", "b/10.png", "b/2.PNG", "c/1.jpg")


def zip_tree(root: Path, target: Path, prefix: str = "", backwards: bool = False) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*"), reverse=backwards):
            archive.write(path, prefix + path.relative_to(root).as_posix())
    return target


def test_folder_listing_is_sorted_and_ignores_the_rest(tmp_path: Path) -> None:
    write_tree(tmp_path)
    listing = open_source(tmp_path).list_pictures()
    assert listing.classes == ("a", "b", "c")
    assert listing.names == NAMES
    assert listing.labels().tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("prefix", ["", "pictures/", "one/two/"])
def test_zip_equals_folder(tmp_path: Path, prefix: str) -> None:
    write_tree(tmp_path / "tree")
    folder = open_source(tmp_path / "tree")
    archive = open_source(zip_tree(tmp_path / "tree", tmp_path / "tree.zip", prefix, backwards=True))
    assert archive.list_pictures() == folder.list_pictures()
    for name in NAMES:
        assert archive.read(name) == folder.read(name)


def test_zip_of_one_class_keeps_its_class(tmp_path: Path) -> None:
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    random_picture(8, 8).save(tmp_path / "tree" / "cat" / "1.png")
    for prefix in ("", "pictures/"):
        listing = open_source(zip_tree(tmp_path / "tree", tmp_path / "t.zip", prefix)).list_pictures()
        assert (listing.classes, listing.names) == (("cat",), ("cat/1.png",))


def test_zip_is_read_by_many_threads(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(40):
            archive.writestr(f"c/{index}.png", bytes([index]) * 20000)
    source = open_source(tmp_path / "many.zip")
    with ThreadPoolExecutor(8) as pool:
        for index, data in enumerate(pool.map(source.read, [f"c/{index % 40}.png" for index in range(800)])):
            assert data == bytes([index % 40]) * 20000


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    random_picture(8, 8).save(tmp_path / "store" / "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "b").mkdir()
    (tmp_path / "data" / "b" / "1.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data" / "b")
    assert open_source(tmp_path / "data").list_pictures().names == ("a/1.png", "b/1.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a JPEG"),
        ("truncated", "truncated"),
        ("damaged", ""),
        (None, "No such file"),
    ],
)
def test_broken_pictures_are_named_alike_every_time(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    (tmp_path / "a").mkdir()
    buffer = io.BytesIO()
    random_picture(40, 40).save(buffer, "PNG" if content == "damaged" else "JPEG")
    data = buffer.getvalue()
    if content == "truncated":
        content = data[: len(data) // 2]
    elif content == "damaged":
        content = data[:60] + bytes(200) + data[260:]
    if content is None:
        (tmp_path / "a" / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    else:
        (tmp_path / "a" / "1.jpg").write_bytes(content)
    messages = []
    for _ in range(2):
        with pytest.raises(BrokenPicture) as caught:
            load_picture(open_source(tmp_path), "a/1.jpg", 8)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert reason.lower() in messages[0].lower()


def test_failing_disk_is_not_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    source = open_source(tmp_path)

    def fail(name: str) -> bytes:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(OSError, match="Input/output"):
        load_picture(source, NAMES[0], 8)


def make_missing(path: Path) -> Path:
    return path / "missing"


def make_empty(path: Path) -> Path:
    return path


def make_flat(path: Path) -> Path:
    random_picture(8, 8).save(path / "1.png")
    return path


def make_empty_class(path: Path) -> Path:
    write_tree(path)
    (path / "empty").mkdir()
    return path


def make_false_zip(path: Path) -> Path:
    (path / "x.zip").write_text("no zip")
    return path / "x.zip"


def make_flat_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.zip", "w") as archive:
        archive.writestr("1.png", b"x")
    return path / "x.zip"


def make_ambiguous_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.zip", "w") as archive:
        archive.writestr("all/1.png", b"x")
        archive.writestr("all/cat/1.png", b"x")
    return path / "x.zip"


def make_odd_name(path: Path) -> Path:
    write_tree(path)
    with open(os.fsencode(path) + b"/a/\xff.png", "wb"):
        return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, "no such folder or zip"),
        (make_empty, "holds no pictures"),
        (make_flat, "no class folders"),
        (make_empty_class, "'empty' holds no picture"),
        (make_false_zip, "neither a folder nor a zip"),
        (make_flat_zip, "no class folders"),
        (make_ambiguous_zip, "both pictures and folders"),
        (make_odd_name, "not valid UTF-8"),
    ],
)
def test_unusable_sources_get_one_sentence(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_source(make(tmp_path)).list_pictures()
    assert "\n" not in str(caught.value)
