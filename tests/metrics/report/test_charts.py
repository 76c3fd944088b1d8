from __future__ import annotations

import numpy as np
import pytest
from page_reader import Tree

from metrics.report.charts import Axis, Mark, scatter


def test_chart_places_points() -> None:
    this = Mark(0.5, 0.25, "this one", "this", (0.45, 0.55), (0.2, 0.3))
    root = Tree(
        scatter(this, [Mark(1.0, 0.0, "corner", "1")], [Mark(0.0, 1.0, "class")], "Title", "Words", "Across", "Up")
    ).root
    horizontal, vertical = Axis(0, 1, 84, 540), Axis(0, 1, 364, 16)
    circles = {
        circle.text: (float(str(circle.attributes["cx"])), float(str(circle.attributes["cy"]))) for circle in root.all("circle")
    }
    assert circles == {"corner": (540.0, 364.0), "class": (84.0, 16.0)}
    points = [tuple(map(float, pair.split(","))) for pair in str(root.all("polygon")[0].attributes["points"]).split()]
    assert np.mean(points, axis=0) == pytest.approx((horizontal.place(0.5), vertical.place(0.25)))
    assert len(root.all("path", "interval")) == 2
    texts = [text.text for text in root.all("text")]
    assert texts == ["0", "0.2", "0.4", "0.6", "0.8", "1"] * 2 + ["Across", "Up", "this", "1"]
    assert root.all("title")[0].text == "Title"
    assert root.all("desc")[0].text == "Words"


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 1.0), (0.7, 0.71), (0.31, 0.64), (0.0, 1.0)])
def test_chart_keeps_everything_inside(low: float, high: float) -> None:
    marks = [Mark(low, high, "a", "this"), Mark(high, low, "b", "12345"), Mark(high, high, "c", "3"), Mark(low, low, "d", "4")]
    root = Tree(scatter(marks[0], marks[1:], [], "t", "d", "x", "y")).root
    for circle in root.all("circle"):
        assert 84 <= float(str(circle.attributes["cx"])) <= 540
        assert 16 <= float(str(circle.attributes["cy"])) <= 364
    for text in root.all("text"):
        width = 11 * len(text.text)
        x = float(str(text.attributes["x"]))
        start = {"start": x, "middle": x - width / 2, "end": x - width}[str(text.attributes["text-anchor"])]
        assert text.attributes.get("class") == "name" or (start >= 0 and start + width <= 560)
    ticks = [text.text for text in root.all("text") if "class" not in text.attributes]
    assert len(ticks) >= 8
    assert all(0 <= float(tick) <= 1 for tick in ticks)


def test_labels_do_not_meet() -> None:
    marks = [Mark(0.5, 0.5 + 0.001 * index, "", label) for index, label in enumerate(("this", "1", "2"))]
    labels = Tree(scatter(marks[0], marks[1:], [], "t", "d", "x", "y")).root.all("text", "label")
    assert len({(label.attributes["x"], label.attributes["y"], label.attributes["text-anchor"]) for label in labels}) == 3
    assert len({label.attributes["text-anchor"] for label in labels}) == 3
