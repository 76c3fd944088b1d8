"""pyproject.toml, environment.yml and constraints.txt name the same packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


APART = {"dinov2", "fp8"}
"""Extras that `dev` leaves out: timm needs a torchvision, which does not install beside every torch, torchao a newer GPU."""


def declared() -> dict[str, set[str]]:
    """The requirements of the core ("") and of each extra, as pyproject.toml writes them."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": set(project["dependencies"])} | {name: set(given) for name, given in project["optional-dependencies"].items()}


def developed() -> set[str]:
    """What `pip install -e .[dev]` brings."""
    extras = declared()
    (own,) = (entry for entry in extras["dev"] if entry.startswith("sparsedit["))
    named = re.split(r"[\[\],]", own)[1:-1]
    assert set(named) == set(extras) - {"", "dev"} - APART
    return extras[""].union(extras["dev"] - {own}, *(extras[name] for name in named))


def package(entry: str) -> str:
    return re.split(r"[<>=]", entry)[0].lower().replace("_", "-")


def test_conda_environment_mirrors_the_project() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = {entry for entry in content["dependencies"][-1]["pip"] if not entry.startswith("--")}
    assert listed == developed()


def test_every_dependency_has_a_tested_version_and_dev_is_installed_here() -> None:
    from importlib.metadata import version

    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        if match:
            tested[match[1].lower().replace("_", "-")] = match[2]
    everything = set().union(*declared().values())
    assert {package(entry) for entry in everything if not entry.startswith("sparsedit[")} <= set(tested)
    names = {package(entry) for entry in developed()}
    assert not names & {package(entry) for extra in APART for entry in declared()[extra]}
    if sys.version_info[:2] == (3, 11):
        installed = {name: version(name).split("+")[0] for name in names}
        assert installed == {name: tested[name] for name in names}
