"""What is printed and drawn of a token density, held against grids and counts by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.schedule import NoiseSchedule
from models import Backbone, DiT, Plan
from runtime import density_report
from runtime.config import InputError
from runtime.density_report import PUBLISHED, density_lines, draw_density, published_row, record_density
from runtime.networks import blueprint, summary

ROOT = Path(__file__).resolve().parents[2]


def xl(density: str, size: int = 256, model: str = "DiT-XL/2", **options: Any) -> DiT:
    return blueprint("sparsedit", Backbone.named(model, (size // 8,) * 2), {"density": density, **options})


def steps(text: str) -> list[int]:
    """The timesteps of a sampling under ddpm."""
    return list(NoiseSchedule.linear().respaced(text).timesteps)


# Printed -------------------------------------------------------------------------------------------------------------


def test_the_table_says_every_interval_and_the_paper() -> None:
    lines = density_lines(xl("0.61:0.86/4"), "DiT-XL/2", steps("250"))
    assert lines[0] == "token density 10,9,8,6@0,250,500,750"
    assert [line.split() for line in lines[2:6]] == [
        ["0-249", "10x10", "100", "0.61", "75.48"],
        ["250-499", "9x9", "81", "0.68", "70.35"],
        ["500-749", "8x8", "64", "0.75", "65.78"],
        ["750-999", "6x6", "36", "0.86", "58.29"],
    ]
    assert "67.47 over all 1,000 timesteps" in lines[6]
    assert "over the 250 sampled timesteps (56.9% of the dense backbone's 118.62)" in lines[6]
    assert "the paper prints 68.05 for r 0.61:0.86 (arXiv 2412.06028, table 1), 118.64 for dense" in lines[7]
    assert len(lines) == 8


@pytest.mark.parametrize("bug", [False, True])
def test_the_mean_is_over_the_timesteps_of_the_steps(bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the mean over the indices of the steps, 0 .. 44, all of them in the clean interval."""
    network, schedule = xl("0.61:0.86/4"), NoiseSchedule.linear().respaced("10,15,20")
    by_hand = sum(network.macs(network.plan(t)) for t in schedule.timesteps) / len(schedule) / 1e9
    assert by_hand < 67  # the noisy section has the most steps
    if bug:
        monkeypatch.setattr(density_report, "mean_gmacs", lambda network, steps=range(1000): network.mean_macs(
            range(len(steps))) / 1e9)  # fmt: skip
    said = "\n".join(density_lines(network, "DiT-XL/2", steps("10,15,20")))
    assert (f"{by_hand:.2f} over the 45 sampled timesteps" in said) is not bug


def test_one_grid_is_one_line_and_none_is_none() -> None:
    (line,) = density_lines(xl("8x6"), "DiT-XL/2", steps("250"))
    assert line == "token density 8x6: 8x6 = 48 of 256 tokens, r 0.81, at every timestep"
    assert density_lines(blueprint("dense", Backbone.named("DiT-XL/2", (32, 32)), {}), "DiT-XL/2", steps("250")) == []


class Alternating(DiT):
    """A method without a density whose steps differ: every other step runs half the blocks."""

    def plan(self, t: int) -> Plan:
        return Plan(("blocks", self.backbone.depth // (1 + t % 2)))

    def block_macs(self, plan: Plan) -> int:
        return super().block_macs(Plan()) * plan.signature[1] // self.backbone.depth


def test_any_method_whose_steps_differ_is_told(tmp_path: Path) -> None:
    network = Alternating(Backbone.named("DiT-T/2", (8, 8)))
    (line,) = density_lines(network, "DiT-T/2", steps("ddim500"))  # every other timestep, from 0
    means = [float(line.split(": ")[1].split()[0]), float(line.split("timesteps, ")[1].split()[0])]
    assert means[0] < 0.8 * means[1]
    assert "(100.0% of the dense backbone's" in line
    draw_density(network, tmp_path / "plot.png", steps("250"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{8 * row.latent_side}-{row.rates}")
@pytest.mark.parametrize("form", ["{}", "{}/4"])
def test_the_papers_rows_are_recognised(row: density_report.Published, form: str) -> None:
    network = xl(form.format(row.rates), 8 * row.latent_side)
    assert published_row(network, "DiT-XL/2") == row
    assert published_row(xl(str(network.density), 8 * row.latent_side), "DiT-XL/2") == row  # as a checkpoint has it


def test_other_networks_are_not_taken_for_the_papers() -> None:
    released: dict[str, Any] = {"poolingformer_blocks": 1, "modules": 4, "module_blocks": [1, 3, 1, 1], "top_blocks": 3}
    others = [
        (xl("0.61:0.86", **released), "DiT-XL/2"),
        (xl("0.61:0.86", readd_position=True), "DiT-XL/2"),
        (xl("0.61:0.85"), "DiT-XL/2"),
        (xl("0.90:0.96"), "DiT-XL/2"),  # of the larger pictures
        (xl("8"), "DiT-XL/2"),
        (xl("0.61:0.86", model="DiT-L/2"), "DiT-L/2"),
        (blueprint("dense", Backbone.named("DiT-XL/2", (32, 32)), {}), "DiT-XL/2"),
    ]
    assert [published_row(network, model) for network, model in others] == [None] * len(others)


def test_the_summary_gives_the_mean_where_plans_differ() -> None:
    line = summary(xl("0.61:0.86"), "DiT-XL/2")
    assert "69.04 GMACs per image and pass, the mean over timesteps (58.2% of the dense backbone's 118.6)" in line
    assert "density 10,9,8,7,6@0,363,574,761,925" in line
    assert "the mean" not in summary(xl("8"), "DiT-XL/2")


# Drawn ---------------------------------------------------------------------------------------------------------------


def test_the_plot_is_a_picture_of_the_same_bytes_every_time(tmp_path: Path) -> None:
    network = xl("0.61:0.86/4")
    for name in ("first.png", "second.png"):
        draw_density(network, tmp_path / name, steps("250"))
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    draw_density(network, tmp_path / "other.png", steps("50"))
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "first.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "other.png", "second.png"]
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (960, 540)
        assert set(picture.info) <= {"dpi"}  # no date, no version
        assert np.asarray(picture.convert("L")).std() > 10
    draw_density(blueprint("dense", Backbone.named("DiT-XL/2", (32, 32)), {}), tmp_path / "dense.png", steps("250"))
    assert not (tmp_path / "dense.png").exists()


@pytest.mark.parametrize("hindrance", ["a folder in its place", "no matplotlib"])
def test_a_picture_that_cannot_be_drawn_beside_other_work_is_a_warning(
    hindrance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if hindrance == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(InputError, match=r"plot\.png needs matplotlib, which cannot be imported"):
            draw_density(xl("8", 256), tmp_path / "plot.png", steps("10"))
    else:
        (tmp_path / "plot.png").mkdir()
    record_density(xl("8", 256), tmp_path / "plot.png", steps("10"))
    assert capsys.readouterr().out.startswith("WARNING: the token density is not drawn: ")


def test_the_plot_shows_tokens_costs_mean_and_dense(tmp_path: Path, figures: list[Any]) -> None:
    network = xl("0.61:0.86/4")
    draw_density(network, tmp_path / "plot.png", steps("10,15,20"))
    left, right = figures[0].axes
    stairs: Any
    (filled, tokens), (costs,) = left.patches, right.patches
    for stairs, values in ((filled, [100, 81, 64, 36]), (tokens, [100, 81, 64, 36]), (costs, [75.48, 70.35, 65.78, 58.29])):
        assert stairs.get_data().values == pytest.approx(values, abs=0.005)
        assert stairs.get_data().edges.tolist() == [0, 250, 500, 750, 1000]
    timesteps = NoiseSchedule.linear().respaced("10,15,20").timesteps
    heights = {line.get_linestyle(): np.asarray(line.get_ydata())[0] for line in right.get_lines()}
    assert heights == pytest.approx({"--": network.mean_macs(timesteps) / 1e9, "-": 118.62}, abs=0.005)
    assert left.get_xlim() == (0, 1000)  # noise grows to the right
    assert left.get_xlabel() == "timestep t (0 clean, 999 noise)"
    assert [text.get_text().strip() for text in left.texts] == ["10x10", "9x9", "8x8", "6x6"]
    assert left.get_title() == "token density 10,9,8,6@0,250,500,750"


ALONE = """
import sys, pathlib
from models import Backbone
from runtime.density_report import density_lines, draw_density
from runtime.networks import blueprint
network = blueprint("sparsedit", Backbone.named("DiT-T/2", (8, 8)), {"density": "3,1@0,500"})
density_lines(network, "DiT-T/2", range(0, 1000, 4))
assert "matplotlib" not in sys.modules
draw_density(network, pathlib.Path(sys.argv[1]), range(0, 1000, 4))
assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_is_imported_by_who_draws_and_its_global_state_by_nobody(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ALONE, str(tmp_path / "plot.png")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "plot.png").exists()
