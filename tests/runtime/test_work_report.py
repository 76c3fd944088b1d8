"""What is printed, recorded and drawn of counted work, held against counts by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dydit_networks import dydit
from PIL import Image

from models import Backbone, DiT, DyDiT
from models.work import CountedWork
from runtime import work_report
from runtime.config import InputError
from runtime.networks import blueprint
from runtime.work_report import (
    dense_block_macs,
    draw_work,
    gather_work,
    measured_ratio,
    probe,
    read_work,
    record_work,
    save_work,
    work_lines,
    work_record,
)
from tests.models.random_networks import one_thread as one_thread

CPU = torch.device("cpu")
KINDS = ("heads", "channels", "tokens")


def named(model: str, method: str = "dydit", side: int = 32) -> DiT:
    return blueprint(method, Backbone.named(model, (side, side)), {})


def counted(scale: int = 1) -> CountedWork:
    """Two layers: three images at timestep 100, one at 700."""
    work = CountedWork(2)
    for timestep, images, shares in ((100, 3, (0.25, 0.5)), (700, 1, (0.75, 1.0))):
        for layer, share in enumerate(shares):
            work.add_layer(layer, timestep, images, dict(zip(KINDS, (share, share / 2, 1.0), strict=True)), 1000 * scale)
        work.add_pass(timestep, images, 50 * scale)
    return work


def two_layers() -> DiT:
    return named("DiT-48x2x4/2", side=8)


# Figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "attention", "mlp"),
    [("DiT-S/2", 0.2013, 0.3020), ("DiT-B/2", 0.7046, 1.2080), ("DiT-XL/2", 1.5099, 2.7179)],
)
def test_the_dense_part_is_as_the_paper_counts(model: str, attention: float, mlp: float) -> None:
    network = named(model)
    assert dense_block_macs(network) / network.backbone.depth / 1e9 == pytest.approx(attention + mlp, abs=1e-4)


def test_means_are_over_passes() -> None:
    network, made = two_layers(), work_record(two_layers(), counted())
    assert made == {
        "passes": 4,
        "gmacs_per_pass": 4100 / 4 / 1e9,
        "attention_and_mlp_gmacs_per_pass": 1e-6,
        "flops_ratio": 1000 / dense_block_macs(network),
    }
    assert json.loads(json.dumps(made)) == made


def test_the_lines_give_both_conventions() -> None:
    """At 57.88 GMACs the paper's XL/2 computes 48.9 % of attention and MLP (118.69 in all, dense: 118.38 of them)."""
    network, work = named("DiT-XL/2"), CountedWork(28)
    work.add_layer(0, 10, 2000, dict.fromkeys(KINDS, 1.0), 2000 * 57_880_000_000)
    work.add_pass(10, 2000, 2000 * 1_120_000_000)
    assert work_lines(network, work) == [
        "measured over 2,000 passes: 59 GMACs per image and pass in full (49.7% of the dense backbone's 118.6)",
        "  attention and MLP alone, which FLOPs ratios are of: 57.88 GMACs (48.9% of the dense backbone's 118.4)",
    ]
    assert work_lines(network, CountedWork(28)) == []


# Counted -------------------------------------------------------------------------------------------------------------


def test_a_probe_counts_for_itself() -> None:
    network = dydit()
    network.work = own = counted()
    work = probe(network, CPU)
    assert network.work is own
    assert own.passes == 4
    assert work.passes == 8 * 25 * 2
    assert np.flatnonzero(work.images).tolist() == [round(999 / 24 * step) for step in range(25)]
    assert 0.2 < measured_ratio(network, work) < 0.8
    assert probe(network, CPU).macs == work.macs
    assert probe(network, CPU, seed=1).macs != work.macs


def test_a_probe_that_fails_gives_the_counts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    network = dydit()
    own = network.work
    monkeypatch.setattr(network, "plan", lambda t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe(network, CPU)
    assert network.work is own


def test_there_is_nothing_to_probe_where_plans_say_it_all() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        probe(named("DiT-T/2", "dense", side=8), CPU)


@pytest.mark.parametrize("bug", [False, True])
def test_counts_of_all_processes_are_added(bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: each process takes its own for all."""
    network = two_layers()
    network.work = counted()
    others = [] if bug else [counted(scale=10)]
    monkeypatch.setattr(work_report, "gather_object", lambda mine: [*mine, *others])
    work = gather_work(network)
    assert work is not None
    assert ((work.passes, work.macs, work.block_macs) == (8, 45_100, 44_000)) is not bug
    assert work.rates("heads")[:, 100].tolist() == [0.25, 0.5]
    assert network.work.passes == 4
    assert gather_work(named("DiT-T/2", "dense", side=8)) is None


def test_counts_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "work.npz"
    assert read_work(path, 2).passes == 0
    save_work(counted(), path)
    work, content = read_work(path, 2), path.read_bytes()
    assert (work.macs, work.block_macs, work.passes) == (4100, 4000, 4)
    assert all((work.kept[kind] == counted().kept[kind]).all() for kind in KINDS)
    save_work(work, path)
    assert path.read_bytes() == content
    method = content.index(b"PK\x01\x02") + 10  # of compression, in the archive's list of files
    negative = counted()
    negative.images[0] -= 9
    save_work(negative, path)
    for damaged in (
        b"",
        b"PK",
        content[: len(content) // 2],
        content[:method] + b"\x63" + content[method + 1 :],
        path.read_bytes(),
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"work\.npz is damaged, .*; delete it, and what is sampled from now on is counted"
        ):
            read_work(path, 2)


# Drawn ---------------------------------------------------------------------------------------------------------------


def test_timesteps_that_were_met_are_bands(figures: list[Any], tmp_path: Path) -> None:
    """Half-way to their neighbours, and to both ends: nothing is drawn of timesteps that were not met."""
    work = counted()
    work.add_layer(0, 200, 2, dict.fromkeys(KINDS, 0.5), 1)
    work.add_layer(1, 200, 2, dict.fromkeys(KINDS, 0.0), 1)
    work.add_pass(200, 2, 1)
    draw_work(two_layers(), work, tmp_path / "kept.png")
    *panels, bar = figures[0].axes
    expected = {
        "heads": [[0.25, 0.5, 0.75], [0.5, 0.0, 1.0]],
        "channels": [[0.125, 0.5, 0.375], [0.25, 0.0, 0.5]],
        "tokens": [[1.0, 0.5, 1.0], [1.0, 0.0, 1.0]],
    }
    for panel, (kind, rates) in zip(panels, expected.items(), strict=True):
        (mesh,) = panel.collections
        assert (panel.get_title(loc="left"), panel.get_ylabel()) == (f"{kind} that were on", "layer, 0 first")
        assert mesh.get_array().tolist() == rates
        assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 150.5, 450.5, 1000]
        assert mesh.get_coordinates()[:, 0, 1].tolist() == [-0.5, 0.5, 1.5]  # the first layer below
        assert mesh.get_clim() == (0, 1)
        assert panel.get_xlim() == (0, 1000)  # noise to the right
    assert panels[-1].get_xlabel() == "timestep t (0 clean, 999 noise)"
    assert bar.get_ylabel() == "share on"
    ratio = measured_ratio(two_layers(), work)
    assert figures[0].get_suptitle() == (f"{ratio:.1%} of attention and MLP computed, mean of 6 passes of a picture")


def test_every_timestep_has_its_place_where_all_are_met(figures: list[Any], tmp_path: Path) -> None:
    work = CountedWork(2)
    for timestep in range(1000):
        work.add_pass(timestep, 1, 1)
    draw_work(two_layers(), work, tmp_path / "kept.png")
    (mesh,) = figures[0].axes[0].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == list(range(1001))


def test_the_picture_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name, work in (("first.png", counted()), ("second.png", counted()), ("none.png", CountedWork(2))):
        draw_work(two_layers(), work, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert not (tmp_path / "none.png").exists()
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (960, 840)
        assert set(picture.info) <= {"dpi"}  # no date, no version


@pytest.mark.parametrize("hindrance", ["a folder in its place", "no matplotlib"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(
    hindrance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if hindrance == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        (tmp_path / "kept.png").mkdir()
    record_work(two_layers(), counted(), tmp_path / "kept.png")
    assert capsys.readouterr().out.startswith("WARNING: what was computed is not drawn: ")


def test_a_network_that_leaves_nothing_out_has_ratio_one() -> None:
    whole = DyDiT(Backbone.named("DiT-T/2", (8, 8), in_channels=3, num_classes=4))
    work = probe(whole, CPU)
    assert measured_ratio(whole, work) == 1.0
    assert all(np.nanmin(work.rates(kind)) == 1.0 for kind in KINDS)
