"""Imports go one way (DESIGN.md): scripts import everything, runtime everything but scripts, the libraries next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("models", "diffusion", "data", "metrics")
FOUNDATION = ("runtime.seeding", "runtime.config", "runtime.files")
"""All that a library may import of ours, beside itself."""
BARE = ("models", "diffusion")
"""Packages that run where torch and numpy alone are installed."""

SCRIPTS = [path.stem for path in ROOT.glob("*.py")]
PACKAGES = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"tests"}
OURS = {*PACKAGES, *SCRIPTS, "tests"}
FILES = sorted(
    path.relative_to(ROOT) for pattern in ("*.py", *(f"{name}/**/*.py" for name in PACKAGES)) for path in ROOT.glob(pattern)
)


def package_of(path: Path) -> str:
    """The top-level package of a file, or the script's own name."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever it stands: "runtime.config.InputError", "torch.nn", ..."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(path.parent.parts[: len(path.parent.parts) - node.level + 1]) if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")):
                yield node.lineno, str(node.args[0].value)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def forbidden(path: Path, name: str) -> str | None:
    """Why a file may not import `name`, None where it may."""
    package, target = package_of(path), name.partition(".")[0]
    if target == "tests" or (target in SCRIPTS and target != package):
        return "nothing imports a script or a test"
    if package in LIBRARIES and target in OURS and not within(name, (package, *FOUNDATION)):
        return f"{package} imports nothing of ours but {', '.join(FOUNDATION)}"
    if package in BARE and target not in {*OURS, *sys.stdlib_module_names, "torch", "numpy"}:
        return f"{package} needs torch and numpy alone"
    if within(".".join(path.with_suffix("").parts), FOUNDATION) and target in OURS and not within(name, FOUNDATION):
        return "the foundation imports nothing of ours but itself"
    return None


def violations(path: Path, source: str) -> list[str]:
    found = ((line, name, forbidden(path, name)) for line, name in imported(path, source))
    return [f"{path}:{line} imports {name}: {reason}" for line, name, reason in found if reason]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_package_and_script_is_looked_at() -> None:
    assert {package_of(path) for path in FILES} == OURS - {"tests"}
    assert {*LIBRARIES, "runtime"} <= PACKAGES
    assert {"train", "sample", "sample_ddp", "extract_features", "evaluator"} <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/dit.py", "from diffusion.schedule import NoiseSchedule"),
        ("models/dit.py", "import runtime.training"),
        ("models/dit.py", "from runtime import checkpoint"),
        ("models/dit.py", "from runtime.configuration import x"),
        ("models/dit.py", "import timm"),
        ("models/dit.py", "def lazily():\n    from diffusers import AutoencoderKL"),
        ("models/dit.py", "if TYPE_CHECKING:\n    from data.features import FeatureDataset"),
        ("models/dit.py", "from ..data import features"),
        ("models/dit.py", "import importlib\nimportlib.import_module('accelerate')"),
        ("diffusion/gaussian.py", "import scipy.stats"),
        ("diffusion/gaussian.py", "import os, models"),
        ("data/features.py", "import metrics.frechet as f"),
        ("data/deep/er.py", "from models import DiT"),
        ("metrics/frechet.py", "from train import main"),
        ("runtime/training.py", "import sample"),
        ("runtime/training.py", "from tests.golden_files import GOLDEN"),
        ("runtime/config.py", "from models import DiT"),
        ("runtime/seeding.py", "from runtime.logs import say"),
        ("sample_ddp.py", "from sample import main"),
        ("train.py", "try:\n    import demo\nexcept ImportError:\n    pass"),
    ],
)
def test_planted_imports_are_found(file: str, source: str) -> None:
    assert len(violations(Path(file), source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/sparsedit.py", "import math\nimport torch.nn.functional as F\nimport numpy as np\nfrom models.dit import DiT"),
        ("models/sparsedit.py", "from runtime.config import InputError\nfrom runtime import seeding\nfrom . import layers"),
        ("data/latents.py", "import diffusers\nfrom data.images import crop\nfrom runtime.files import sha256"),
        ("runtime/training.py", "from models import METHODS\nfrom data import features\nimport accelerate"),
        ("train.py", "from runtime.config import run_script\nimport models, diffusion, data, metrics"),
    ],
)
def test_allowed_imports_pass(file: str, source: str) -> None:
    assert violations(Path(file), source) == []


ALONE = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
{code}
"""
ABSENT = (
    "accelerate", "diffusers", "huggingface_hub", "matplotlib", "PIL", "psutil", "safetensors", "scipy", "sklearn",
    "tensorboard", "tensorflow", "tqdm", "transformers", "yaml",
)  # fmt: skip


def runs_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Python with torch and numpy, and none of the other packages the project uses."""
    program = ALONE.format(absent=ABSENT, code=code)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


FORWARD = """
import torch, diffusion.gaussian, diffusion.samplers, diffusion.guidance
from models import METHODS, Backbone, create_model
for method in METHODS:
    create_model(method, Backbone.named("DiT-T/2", (8, 8)))(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.tensor([1]))
"""


def test_models_and_diffusion_run_with_torch_and_numpy_alone() -> None:
    """What their imports import in turn counts too, so it is tried."""
    ended = runs_alone(FORWARD)
    assert ended.returncode == 0, ended.stderr
    planted = runs_alone("import safetensors")
    assert planted.returncode != 0
    assert "No module named 'safetensors'" in planted.stderr
