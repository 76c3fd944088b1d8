"""pyproject.toml, environment.yml and constraints.txt name the same packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def declared() -> set[str]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {entry for entries in lists for entry in entries if not entry.startswith("sparsedit[")}


def test_conda_environment_mirrors_the_project() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = {entry for entry in content["dependencies"][-1]["pip"] if not entry.startswith("--")}
    assert listed == declared()


def test_every_dependency_has_a_tested_version_that_is_installed_here() -> None:
    from importlib.metadata import version

    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        if match:
            tested[match[1].lower().replace("_", "-")] = match[2]
    names = {re.split(r"[<>=]", entry)[0].lower().replace("_", "-") for entry in declared()}
    assert names <= set(tested)
    if sys.version_info[:2] == (3, 11):
        installed = {name: version(name).split("+")[0] for name in names}
        assert installed == {name: tested[name] for name in names}
