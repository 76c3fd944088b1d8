"""The README promises nothing that is not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_waits_to_be_filled_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z_]+@", text) == []
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_file_and_flag_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:tests|configs|docs|models|runtime)/[\w./-]+\.\w+|\w+\.py)\b", text))
    assert len(named) > 8
    assert {name for name in named if not (ROOT / name).exists()} == set()
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    sources += "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").glob("*.py"))
    launchers = {"multi-gpu", "num-processes", "mixed-precision", "nproc-per-node", "nnodes"}
    flags = {flag.replace("_", "-") for flag in re.findall(r"--([a-z][\w-]+)", text)} - launchers
    unknown = {flag for flag in flags if flag.replace("-", "_") not in sources and f"--{flag}" not in sources}
    assert unknown == set()
