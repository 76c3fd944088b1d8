"""Labelled pictures, from a folder with one folder per class or from a zip of one, and the crop that ADM prepares them with."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import threading
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.config import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# What the bytes may be, whatever the extension says: ImageNet itself holds a PNG named .JPEG. Naming the formats keeps
# Pillow away from those that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# Registers every format now: naming one that Pillow has not met yet is an error, and threads must not race to register it.
Image.init()

# System errors that belong to one picture (a dangling link, no permission). Others, such as EIO or EMFILE, are the machine's
# trouble: they must stop the run instead of marking every later picture as broken.
_ERRORS_OF_ONE_PICTURE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)


class BrokenPicture(Exception):
    """One picture cannot be read or decoded; the message says why, in words that are the same on every run."""


@dataclass(frozen=True)
class Listing:
    """The pictures of a source in their stable order: by class, then by path."""

    classes: tuple[str, ...]  # sorted; the position is the label
    names: tuple[str, ...]  # "class/.../picture.jpg", relative to the source

    def labels(self) -> np.ndarray:
        """-> (len(names),) int64"""
        label = {name: index for index, name in enumerate(self.classes)}
        return np.array([label[name.split("/", 1)[0]] for name in self.names], dtype=np.int64)


class PictureSource(ABC):
    """Where pictures come from. `read` may be called from several threads at once, and from several processes."""

    path: Path

    @abstractmethod
    def list_pictures(self) -> Listing:
        """Every picture under a class folder, at any depth; hidden files and other file types are left out.

        Raises InputError when there is none, or when a class folder holds none.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of the picture that the listing calls `name`. Raises OSError or zipfile.BadZipFile."""


def open_source(path: str | os.PathLike[str]) -> PictureSource:
    """The source at `path`, a folder or a zip file; InputError when it is neither."""
    if os.path.isdir(path):
        return FolderSource(Path(path))
    if not os.path.exists(path):
        raise InputError(f"{path}: no such folder or zip file; give the folder that holds one folder of pictures per class.")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is neither a folder nor a zip file; give a folder with one folder per class, or a zip of one."
        )
    return ZipSource(Path(path))


class FolderSource(PictureSource):
    """A folder with one folder per class, links followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def list_pictures(self) -> Listing:
        with os.scandir(self.path) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))
        names = {name: self._pictures_of(name) for name in classes}
        loose = sorted(name for name in os.listdir(self.path) if _is_picture(name))
        return _checked_listing(self.path, names, loose_picture=loose[0] if loose else None)

    def _pictures_of(self, class_name: str) -> list[str]:
        names = []
        seen = set()
        for folder, subfolders, files in os.walk(self.path / class_name, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
            # A link to a folder above would be walked again and again.
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            relative = PurePosixPath(Path(folder).relative_to(self.path).as_posix())
            names += [str(relative / name) for name in files if _is_picture(name)]
        return names

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class ZipSource(PictureSource):
    """A zip of a folder with one folder per class; folders around the class folders (`pictures/cat/1.jpg`) do not matter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # ZipFile counts its readers without a lock and closes a file that it opened itself when the count reaches zero;
        # it never closes one that it was given.
        try:
            self._archive = zipfile.ZipFile(open(path, "rb"))  # noqa: SIM115
        # The last two: an archive of a newer format than zipfile knows, and names in it that are no text.
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise InputError(f"{path} is a zip file that cannot be read ({error}); pack it again.") from None
        self._lock = threading.Lock()
        members = [info.filename for info in self._archive.infolist() if _is_picture(info.filename)]
        self._members = [name for name in members if not any(_hidden(part) for part in name.split("/"))]
        self._prefix = _shared_folders(path, self._members)

    def list_pictures(self) -> Listing:
        names: dict[str, list[str]] = {}
        loose_picture = None
        for member in sorted(set(self._members)):
            class_name, slash, _ = member[len(self._prefix) :].partition("/")
            if slash:
                names.setdefault(class_name, []).append(member[len(self._prefix) :])
            else:
                loose_picture = member
        return _checked_listing(self.path, names, loose_picture)

    def read(self, name: str) -> bytes:
        with self._lock:
            member = self._archive.open(self._prefix + name)
        try:
            return member.read()
        finally:
            with self._lock:
                member.close()


def load_picture(source: PictureSource, name: str, size: int) -> np.ndarray:
    """Reads, converts and crops one picture. -> (size, size, 3) uint8, RGB

    Raises BrokenPicture for whatever is wrong with this picture.
    """
    try:
        data = source.read(name)
        if not data:
            raise BrokenPicture("the file is empty")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return center_crop(to_rgb(image), size)
    except (BrokenPicture, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenPicture("not a JPEG, PNG, WebP, BMP or GIF picture") from None
    except OSError as error:
        if error.errno not in _ERRORS_OF_ONE_PICTURE:
            raise
        raise BrokenPicture(error.strerror or str(error)) from None
    except Exception as error:  # decoders answer damaged bytes with almost any exception
        raise BrokenPicture(f"{type(error).__name__}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB: greyscale, palette and CMYK are converted, transparency is dropped, 16 bits become 8."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of dividing.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop (Dhariwal & Nichol 2021): halve with a box filter while the shorter side is at least twice `size`, scale
    it to `size` with a bicubic filter, cut out the middle square. -> (size, size, 3) uint8
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _hidden(name.rsplit("/", 1)[-1])


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _shared_folders(path: Path, members: list[str]) -> str:
    """The folders around the class folders of a zip, such as "pictures/train/"; "" where there are none."""
    folders = {posixpath.dirname(member) for member in members}
    shared = posixpath.commonpath(folders) if folders else ""
    if folders == {shared}:  # one class: its folder is no wrapper
        shared = posixpath.dirname(shared)
    elif shared and shared in folders:
        raise InputError(
            f"{path}: {shared} holds both pictures and folders of pictures, so it may be a class or the folder of classes; "
            "make a zip of the class folders alone."
        )
    return f"{shared}/" if shared else ""


def _checked_listing(path: Path, names: dict[str, list[str]], loose_picture: str | None) -> Listing:
    if not any(names.values()):
        if loose_picture is not None:
            raise InputError(
                f"{path} holds pictures ({loose_picture}) but no class folders; "
                "put the pictures of each class into a folder of their own, or all of them into one."
            )
        raise InputError(f"{path} holds no pictures ({', '.join(EXTENSIONS)}) in class folders; give the folder above them.")
    for class_name, pictures in names.items():
        if not pictures:
            raise InputError(
                f"{path}: class folder {class_name!r} holds no picture; fill it, or remove it (labels would shift silently)."
            )
    listing = Listing(tuple(sorted(names)), tuple(name for class_name in sorted(names) for name in sorted(names[class_name])))
    for name in listing.names:
        if not _is_utf8(name):
            raise InputError(f"{path}: the file name {name!r} is not valid UTF-8, which the manifest needs; rename it.")
    return listing


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
