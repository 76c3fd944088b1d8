"""The page is read back with html.parser and the PNGs with Pillow; how it looks was judged in a browser, by people."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_reader import Element, Tree, every, outside
from PIL import Image

from metrics.class_scores import ClassScore
from metrics.measures import MEASURES
from metrics.report import Neighbours, Report, write_report
from metrics.report.markup import Markup, tag
from metrics.report.mosaic import GAP
from metrics.report.numbers import shown
from metrics.report.page import page

WRITTEN = "2026-11-20 12:00:00 UTC"
EVIL = "</dd><script>alert(1)</script><img src=//x.example/a.png onerror='x()'>&\"'"
SECTIONS = [
    "Warnings", "Numbers", "Network and protocol", "Samples", "Nearest real pictures", "Classes", "Precision and recall",
    "Record",
]  # fmt: skip


def parsed(report: Report) -> Element:
    return Tree(page(report, WRITTEN)).root


def record(**changes: Any) -> dict[str, Any]:
    batch = {"count": 500, "height": 8, "width": 8, "fid_statistics": "computed from the pictures", "sfid_statistics": None}
    return {
        "fid": 3.14159, "sfid": 5.2, "inception_score": 200.125, "precision": 0.8125, "recall": 0.625, "kid": 0.00123,
        "kid_deviation": 0.000217, "density": 1.0317, "coverage": 0.9121,
        "intervals": {"fid": [3.04, 3.27], "precision": [0.801, 0.823], "recall": [0.611, 0.643]},
        "not_computed": {},
        "reference": {"path": "/data/reference.npz", "sha256": "ab" * 32, **batch},
        "samples": {"path": "/data/sample-set-1.5.npz", "sha256": "cd" * 32, **batch},
        "network": {"name": "ADM", "protocol": "legacy resize", "sha256": "ef" * 32, "backend": "PyTorch float32"},
        "settings": {"neighbours": 3, "inception_score_split": 5_000},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "seconds": 12.3,
        "warnings": ["FID: too few pictures."],
        "protocol": {"guidance": {"scale": 1.75, "interval": None}, "sampler": "ddim", "steps": 250, "rates": [[0.4], [0.6]]},
        **changes,
    }  # fmt: skip


def random_pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def random_neighbours(count: int = 4, k: int = 3, side: int = 8, typical: float = 3.0) -> Neighbours:
    distances = np.sort(np.random.default_rng(1).uniform(2, 4, (count, k)), axis=1).astype(np.float32)
    return Neighbours(random_pictures(count, side, side), random_pictures(count, k, side, side), distances, typical)


def some_classes(count: int) -> list[ClassScore]:
    """Class `label` has the rank `count - label`, so that sorting shows."""
    return [ClassScore(i, 10 + i % 3, 20, 900.0 - i / 2, count - i, 0.5 + 0.0003 * i, 0.7) for i in range(count)]


def full_report(**changes: Any) -> Report:
    return Report(**{  # type: ignore[arg-type]
        "record": record(), "grid": random_pictures(6, 8, 8), "neighbours": random_neighbours(), "classes": some_classes(5),
        "others": [record(precision=0.71, samples=record()["samples"] | {"path": "/x/older.npz", "sha256": "00" * 32})],
    } | changes)  # fmt: skip


def empty_report() -> Report:
    scores = {measure.key: None for measure in MEASURES if measure.key not in ("fdd", "kdd")}
    reasons = {key: f"no pictures for {key}" for key in scores}
    changed = record(
        **scores, not_computed=reasons, network=None, protocol=None, intervals=None, warnings=[], kid_deviation=None
    )
    return Report(changed, np.empty((0, 8, 8, 3), np.uint8), None, [], [])


@pytest.mark.parametrize("report", [full_report(), full_report(classes=some_classes(1_000)), empty_report()])
def test_structure(report: Report) -> None:
    source = page(report, WRITTEN)
    assert source.startswith("<!doctype html>")
    root = Tree(source).root
    assert root.all("html")[0].attributes["lang"] == "en"
    assert [title.text for title in root.all("h2")] == SECTIONS[0 if report.record["warnings"] else 1 :]
    metas = {meta.attributes.get("http-equiv") or meta.attributes.get("name"): meta.attributes for meta in root.all("meta")}
    assert metas["Content-Security-Policy"]["content"].startswith("default-src 'none'; img-src data:;")
    assert "width=device-width" in str(metas["viewport"]["content"])
    assert outside(root) == []
    assert all("alt" in image.attributes for image in root.all("img"))
    identities = [element.attributes["id"] for element in every(root) if "id" in element.attributes]
    assert len(identities) == len(set(identities))
    named = [word for element in every(root) for word in (element.attributes.get("aria-labelledby") or "").split()]
    assert set(named) <= set(identities)
    assert all(table.parent and table.parent.attributes["class"] == "scroll" for table in root.all("table"))


@pytest.mark.parametrize(
    "planted",
    [
        tag("img", src="https://x.example/a.png"),
        tag("img", src="grid.png"),
        tag("p", onclick="x()"),
        tag("script"),
        tag("style", Markup("@import 'x.css'")),
        tag("p", style="background: url(//x.example)"),
    ],
)
def test_planted_requests_are_found(planted: Markup) -> None:
    assert len(outside(Tree(planted).root)) == 1


def test_every_number_of_the_record_is_shown() -> None:
    root = parsed(full_report())
    cards = {card.children[0].text: card for card in root.all("dl", "numbers")[0].all("div")}  # type: ignore[union-attr]
    assert list(cards) == ["FID", "sFID", "Inception Score", "Precision", "Recall", "KID", "Density", "Coverage"]
    for measure in MEASURES:
        if measure.key in record():
            assert cards[measure.name].all("data")[0].attributes["value"] == repr(record()[measure.key])
            assert f"{measure.better} is better · {measure.source}" in cards[measure.name].text
    assert [card.all("data")[0].text for card in cards.values()] == [
        "3.14", "5.20", "200.12", "0.812", "0.625", "0.00123", "1.032", "0.912",
    ]  # fmt: skip
    assert "95 % interval 3.04 to 3.27" in cards["FID"].text
    assert "95 % interval" not in cards["sFID"].text
    assert "standard deviation over subsets 0.00022" in cards["KID"].text
    protocol = root.all("div", "protocol")[0].text
    for value in ("ab" * 32, "cd" * 32, "ef" * 32, "/data/reference.npz", "legacy resize", "PyTorch float32", "500", "8 × 8",
                  "5000", "2.13.0", "1.75", "ddim", "250", "0.4", "0.6"):  # fmt: skip
        assert value in protocol
    assert json.loads(root.all("pre")[0].text) == record()
    assert WRITTEN in root.all("header")[0].text
    assert root.all("h1")[0].text == "sample-set-1.5"


def test_record_may_carry_its_own_date() -> None:
    root = parsed(full_report(record=record(date="2025-01-02 03:04")))
    assert "2025-01-02 03:04" in root.all("header")[0].text
    assert WRITTEN not in root.all("header")[0].text


def test_numbers_of_dinov2() -> None:
    root = parsed(full_report(record={"fdd": 812.5, "kdd": -0.25, "precision": 0.5, "recall": 0.25, "not_computed": {}}))
    assert [name.text for name in root.all("dl", "numbers")[0].all("dt")] == ["FDD", "Precision", "Recall", "KDD"]


def test_what_is_missing_is_said_in_words() -> None:
    root = parsed(empty_report())
    cards = root.all("dl", "numbers")[0].all("div")
    assert len(cards) == 8
    assert all("not computed: no pictures for " in card.text for card in cards)
    text = root.text
    for sentence in ("No network was run", "No protocol record was found", "there are no pictures to show", "Not looked for",
                     "arr_1", "Precision and recall were not computed"):  # fmt: skip
        assert sentence in text
    assert root.all("svg") == root.all("table") == root.all("img") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_values_that_are_no_numbers(value: float | None) -> None:
    """In every place that holds a number: the page stands, and shows no "nan"."""
    classes = [ClassScore(7, 0, 20, math.nan, 2, math.nan, math.nan), ClassScore(8, 5, 20, 3.5, 1, 0.5, 0.5)]
    neighbours = replace(random_neighbours(typical=math.nan), distances=np.full((4, 3), np.nan))
    intervals = {"fid": [value, 1.0], "precision": [value, value], "recall": None}
    changed = record(fid=value, precision=0.5, kid_deviation=value, intervals=intervals)
    root = parsed(Report(changed, random_pictures(1, 8, 8), neighbours, classes, [record(recall=value), {}]))
    shown_text = root.text.replace(root.all("pre")[0].text, "").replace(root.all("style")[0].text, "")
    assert re.findall(r"\b(nan|inf|NaN|Infinity|None)\b", shown_text) == []
    assert "not computed: the value is not a finite number" in shown_text
    assert [row.all("th")[0].text for row in root.all("table")[1].all("tr")[1:]] == ["8", "7"]
    assert page(full_report(record=record(precision=value)), WRITTEN).count("<svg") == 0


def test_what_comes_from_files_is_escaped() -> None:
    changed = record(
        reference={"path": f"/a/{EVIL}", "sha256": EVIL, "fid_statistics": EVIL},
        samples={"path": EVIL.replace("/", "∕"), "sha256": "12"},
        network={EVIL: EVIL, "name": EVIL},
        settings={EVIL: EVIL},
        versions={"torch": EVIL},
        warnings=[EVIL],
        not_computed={"sfid": EVIL},
        sfid=None,
        protocol={EVIL: {EVIL: [EVIL, [EVIL, {EVIL: None}]]}},
    )
    other = changed | {"samples": {"path": EVIL.replace("/", "∕")}}
    left_out = record(samples={"path": EVIL.replace("/", "∕")})
    source = page(full_report(record=changed, others=[other, left_out]), WRITTEN)
    root = Tree(source).root
    assert outside(root) == []
    assert root.text.count(EVIL) >= 10
    assert "<script" not in source
    # The known-bad variant: the same value taken for markup.
    assert outside(Tree(tag("p", Markup(EVIL.replace("</dd>", "")))).root) != []


def test_paths_that_are_no_unicode_can_be_written(tmp_path: Path) -> None:
    changed = record(samples={"path": b"/data/\xff\xfe.npz".decode("utf-8", "surrogateescape")})
    assert b"/data/??.npz" in write_report(tmp_path, full_report(record=changed)).read_bytes()


def test_classes_sorted_by_rank() -> None:
    tables = parsed(full_report(classes=some_classes(20))).all("table")
    counts = [[cell.text for cell in row.all("td")] for row in tables[0].all("tr")[1:]]
    assert counts == [["10", "11", "12", "0 of 20"], ["20", "20", "20", "0 of 20"]]
    rows = tables[1].all("tr")[1:]
    assert [row.all("td")[0].text for row in rows] == [str(rank) for rank in range(1, 21)]
    assert [row.all("th")[0].text for row in rows] == [str(label) for label in range(19, -1, -1)]
    assert [cell.text for cell in rows[0].all("td")] == ["1", "890.50", "0.506", "0.700", "11", "20"]


def test_thousand_classes_stay_folded() -> None:
    root = parsed(full_report(classes=some_classes(1_000)))
    folded = next(details for details in root.all("details") if details.all("table"))
    assert "open" not in folded.attributes
    assert len(folded.all("tr")) == 1_001
    lengths = [len(table.all("tr")) - 1 for table in root.all("table") if table not in folded.all("table")]
    assert lengths == [2, 10, 10, 2]  # counts, best, worst, the points of the chart
    worst = root.all("table")[2].all("tr")[1:]
    assert [row.all("td")[0].text for row in worst] == [str(rank) for rank in range(991, 1_001)]
    assert len(root.all("svg")[0].all("circle", "faint")) == 1_000


def test_classes_without_pictures_are_counted() -> None:
    classes = [*some_classes(3), ClassScore(3, 0, 20, math.nan, 4, math.nan, math.nan)]
    row = parsed(full_report(classes=classes)).all("table")[0].all("tr")[1]
    assert [cell.text for cell in row.all("td")] == ["0", "10.5", "12", "1 of 4"]


def test_classes_too_small_for_scores_are_counted_from_the_labels() -> None:
    """Class 9 is in the samples alone, class 4 in the reference alone."""
    labels = np.array([4] * 3 + [7] * 20 + [8] * 20), np.array([7] * 5 + [8] * 11 + [9])
    classes = [ClassScore(7, 5, 20, 2.0, 1, 0.5, 0.5), ClassScore(8, 11, 20, 3.0, 2, 0.5, 0.5)]
    root = parsed(full_report(classes=classes, labels=labels))
    counts = [[cell.text for cell in row.all("td")] for row in root.all("table")[0].all("tr")[1:]]
    assert counts == [["0", "3", "11", "1 of 4"], ["0", "11.5", "20", "1 of 4"]]
    assert "2 classes with too few pictures" in root.text
    root = parsed(full_report(classes=[], labels=labels, others=[]))
    assert "1 of 4" in root.all("table")[0].text
    assert "No class has pictures enough" in root.text
    assert len(root.all("table")) == 2  # the counts, and the points of the chart


def test_near_samples_are_marked_in_words() -> None:
    neighbours = random_neighbours()
    neighbours.distances[2] = [0.99, 2, 3]  # typical is 3.0
    neighbours.distances[3] = [1.01, 2, 3]
    root = parsed(full_report(neighbours=neighbours))
    rows = root.all("ol", "neighbours")[0].children
    assert ["may be a copy" in row.text for row in rows] == [False, False, True, False]  # type: ignore[union-attr]
    assert "Marked, of the 4 samples shown: 3." in root.text
    assert "(median) 3.00" in root.text
    captions = [caption.text for caption in rows[2].all("figcaption")]  # type: ignore[union-attr]
    assert captions == ["Sample 3", "0.99 0.33 × typical", "2.00 0.67 × typical", "3.00 1.00 × typical"]
    assert "None of the 4 samples shown is marked." in parsed(full_report()).text


def test_pictures_in_the_page_are_those_given() -> None:
    """Small ones pixel for pixel, in their order."""
    report = full_report()
    root = parsed(report)
    grid = [decoded(image) for image in root.all("div", "pictures")[0].all("img")]
    np.testing.assert_array_equal(grid, report.grid)
    assert report.neighbours is not None
    for index, row in enumerate(root.all("div", "row")):
        pictures = [decoded(image) for image in row.all("img")]
        np.testing.assert_array_equal(pictures[0], report.neighbours.samples[index])
        np.testing.assert_array_equal(pictures[1:], report.neighbours.nearest[index])
    assert {style.attributes.get("style") for style in root.all("div", "small")} == {"--cell: 96px"}


def decoded(image: Element) -> np.ndarray:
    address = str(image.attributes["src"])
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


def test_large_pictures_are_scaled_down_in_the_page_alone(tmp_path: Path) -> None:
    """Noise is the worst case for PNG: even then the grid takes half of 15 MB, and the neighbours may take the other half."""
    neighbours = Neighbours(*(np.full((4, *shape, 512, 512, 3), 90, np.uint8) for shape in ((), (1,))), np.ones((4, 1)), 2.0)
    place = write_report(tmp_path, Report(record(), random_pictures(8, 512, 512), neighbours, [], []))
    assert 5e6 < place.stat().st_size < 7.6e6
    text = place.read_text(encoding="utf-8")
    assert "here scaled down to 480 × 480 pixels" in text
    assert {image.attributes["width"] for image in Tree(text).root.all("img")} == {"480"}
    assert Image.open(tmp_path / "grid.png").size == (3 * 512 + 2 * GAP, 3 * 512 + 2 * GAP)
    assert Image.open(tmp_path / "neighbours.png").size == (2 * 512 + GAP, 4 * 512 + 3 * GAP)


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    place = write_report(folder, full_report())
    assert place == folder / "index.html"
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "index.html", "neighbours.png"]
    cell = 8 * 12
    grid, neighbours = Image.open(folder / "grid.png"), Image.open(folder / "neighbours.png")
    assert grid.size == (3 * cell + 2 * GAP, 2 * cell + GAP)  # six pictures, three in a row
    assert neighbours.size == (4 * cell + 3 * GAP, 4 * cell + 3 * GAP)
    np.testing.assert_array_equal(np.asarray(grid)[cell + GAP :: 12, ::12][:8, :8], full_report().grid[3])
    write_report(folder, empty_report())
    assert sorted(path.name for path in folder.iterdir()) == ["index.html"]
    assert "No network was run" in place.read_text(encoding="utf-8")


def test_only_comparable_evaluations_are_drawn() -> None:
    def other(name: str, **changes: Any) -> dict[str, Any]:
        return record(**{"samples": record()["samples"] | {"path": f"/x/{name}.npz", "sha256": name}} | changes)

    others = [
        other("good"),
        other("network", network=record()["network"] | {"backend": "PyTorch TF32"}),
        other("reference", reference={"sha256": "00"}),
        other("k", settings={"neighbours": 5}),
        other("fewer", samples={"path": "/x/fewer", "sha256": "1", "count": 100}),
        other("without", recall=None),
        record(),
        {},
    ]
    root = parsed(full_report(others=others))
    svg = root.all("svg")[0]
    assert [circle.text for circle in svg.all("circle", "other")] == ["good: precision 0.812, recall 0.625"]
    assert [label.text for label in svg.all("text", "label")] == ["this", "1"]
    left_out = [item.text for item in root.all("ul", "left-out")[0].all("li")]
    assert left_out == [
        "network: another feature network", "reference: another reference", "k: another number of neighbours",
        "fewer: another number of samples", "without: no precision and recall", "sample-set-1.5: the same samples",
        "samples: another feature network",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [(3.14159, 2, "3.14"), (1234.5, 2, "1,234.50"), (0.0123, 2, "0.0123"), (0, 2, "0.00"), (-0.25, 5, "-0.25000"),
     (1e-9, 5, "1e-09"), (np.float32(0.5), 3, "0.500"), (math.nan, 2, "–"),
     (None, 2, "–"), (math.inf, 2, "–"), ("text", 2, "–"), (True, 2, "–")],
)  # fmt: skip
def test_shown(value: Any, decimals: int, expected: str) -> None:
    assert shown(value, decimals) == expected
