"""Fixtures of the tests of feature extraction."""

from __future__ import annotations

from pathlib import Path

import pytest
from feature_runs import random_pictures, write

from metrics import features as features_module
from metrics.pictures import PictureBatch


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 10)


@pytest.fixture
def batch(tmp_path: Path) -> PictureBatch:
    """45 pictures: four blocks of ten and one of five."""
    return write(tmp_path / "samples.npz", random_pictures(45))
