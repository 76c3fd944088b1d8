"""Which content a batch has: a hash of everything, and a cheap state that tells when it must be computed again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from metrics.pictures import PictureBatch
from runtime.config import InputError
from runtime.files import sha256, write_json

_SETTLED_SECONDS = 2.0


def content_hash(batch: PictureBatch, memory: Path | None = None) -> str:
    """SHA-256 of an npz file, or of the names and contents of a folder's PNGs.

    Reading 39 GB takes a minute, so the result is kept in a small file in the folder `memory` and believed, as make and
    rsync would, while size, modification time and change time of the file (of each PNG) are the same. Bytes that change
    while all three stay, as on a failing disk, are not noticed then. What was written within the last two seconds is hashed
    each time, because a further change might leave its times as they are.
    Raises InputError for a damaged file, and for one that changes while it is read.
    """
    place, state = os.fsencode(batch.path.resolve()), content_state(batch)
    note = memory / f"content-{hashlib.sha256(place).hexdigest()[:16]}.json" if memory else None
    described = {"path": place.decode(errors="backslashreplace"), "state": state.text}
    known = _remembered(note, described) if note else None
    if known:
        return known
    try:
        content = batch.pictures.digest() if batch.pictures else sha256(batch.path)
        unchanged = content_state(batch) == state
    except FileNotFoundError:
        unchanged = False
    if not unchanged:
        raise InputError(f"{batch.path} changed while it was read; start again when it is complete.")
    if note and time.time() - state.latest > _SETTLED_SECONDS:
        # A note of another user, in a folder for all, or a folder in its place: hashed again the next time.
        with suppress(PermissionError, IsADirectoryError):
            write_json(note, _note(described, content))
    return content


class ContentState(NamedTuple):
    """What tells that a file or folder was written to, and when that last happened (seconds since 1970)."""

    text: str
    latest: float


def content_state(batch: PictureBatch) -> ContentState:
    """Names, sizes and times of a batch's files: two states differ when something was written between them."""
    pictures = batch.pictures
    # The pictures of one folder may be cropped to one size or another, and by a rule that is mended later.
    digest, latest = hashlib.sha256(f"{pictures.preparation}\0{pictures.count}\0".encode() if pictures else b""), 0
    for name in pictures.names if pictures else [""]:
        try:
            found = os.stat(batch.path / name)
        except (FileNotFoundError, NotADirectoryError):
            digest.update(os.fsencode(f"{name} is gone\0"))
            continue
        digest.update(os.fsencode(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0"))
        latest = max(latest, found.st_mtime_ns, found.st_ctime_ns)
    return ContentState(digest.hexdigest(), latest / 1e9)


def _note(described: Mapping[str, str], content: str) -> dict[str, str]:
    """What a note of `content_hash` holds: whose SHA-256, that, and a checksum by which damage to either is noticed."""
    fields = {**described, "sha256": content}
    return {**fields, "checksum": hashlib.sha256(json.dumps(fields).encode()).hexdigest()}


def _remembered(note: Path, described: Mapping[str, str]) -> str | None:
    """The SHA-256 in a note that is of what is described; None where the content is to be hashed anew."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    content = known.get("sha256") if isinstance(known, dict) else None
    if not isinstance(content, str) or not re.fullmatch("[0-9a-f]{64}", content) or known != _note(described, content):
        return None
    return content
