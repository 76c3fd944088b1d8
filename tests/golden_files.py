"""Where the reference vectors are: tests/golden, and the folder that GOLDEN_EXTRA names.

The kind of an npz is decided by the keys it holds, never by its name: ask `keys(path)`.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden_folders() -> list[Path]:
    """tests/golden, then the folder named by GOLDEN_EXTRA when it is set. A wrong name must not pass for an empty folder."""
    folders = [GOLDEN]
    if extra := os.environ.get("GOLDEN_EXTRA"):
        if not Path(extra).is_dir():
            raise NotADirectoryError(f"GOLDEN_EXTRA={extra} is not a folder")
        folders.append(Path(extra).resolve())
    return folders


def adm_folders() -> list[Path]:
    """Every folder `adm*` at any depth that holds expected.json, and a golden folder that itself does."""
    found = []
    for folder in golden_folders():
        candidates = [place.parent for place in sorted(folder.rglob("expected.json"))]
        found += [place for place in candidates if place.name.startswith("adm") or place == folder]
    return found


def npz_files() -> list[Path]:
    """Every npz at any depth, those inside `adm_folders()` apart."""
    inside = set(adm_folders())
    return [file for folder in golden_folders() for file in sorted(folder.rglob("*.npz")) if not inside & set(file.parents)]


def keys(path: Path) -> set[str]:
    """The names of the arrays in an npz, without reading them."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def label(path: Path) -> str:
    """A short name for a test's id: the path within its golden folder, the extra ones marked."""
    root = next(folder for folder in golden_folders() if folder == path or folder in path.parents)
    within = path.relative_to(root).as_posix()
    return within if root == GOLDEN else f"extra/{within}"
