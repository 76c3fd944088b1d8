"""A scatter chart of shares as inline SVG: no script, no library, colours and letter sizes from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metrics.report.markup import Markup, joined, tag

WIDTH, HEIGHT = 560, 440
LEFT, TOP, RIGHT, BOTTOM = 84, 16, WIDTH - 20, HEIGHT - 76
"""The plotted area; around it is room for letters of twice the usual size, as a telephone needs them."""
LETTER = 11
"""Width of such a letter, at most."""
DIAMOND = 7


class Mark(NamedTuple):
    """A point: shares `x` and `y` in [0, 1], what a pointer resting on it shows, a short label, and its intervals."""

    x: float
    y: float
    title: str
    label: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """Shares from `low` to `high` laid out from position `start` to position `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """The position of a share; what lies outside the axis lands on its edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Four to seven round values within the axis."""
        span = self.high - self.low
        step = 0.05 if span < 0.31 else 0.1 if span < 0.61 else 0.2
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [round(index * step, 2) for index in range(first, last + 1)]


def scatter(
    this: Mark, others: Sequence[Mark], background: Sequence[Mark], title: str, description: str, x_name: str, y_name: str
) -> Markup:
    """One marked point (a diamond, with a cross where it has intervals), labelled points, and faint ones behind them."""
    marks = [this, *others, *background]
    horizontal = Axis(*_limits([value for mark in marks for value in (mark.x, *(mark.x_interval or ()))]), LEFT, RIGHT)
    vertical = Axis(*_limits([value for mark in marks for value in (mark.y, *(mark.y_interval or ()))]), BOTTOM, TOP)
    places = [(horizontal.place(mark.x), vertical.place(mark.y)) for mark in (this, *others)]
    return tag(
        "svg",
        tag("title", title, id="scatter-title"),
        tag("desc", description, id="scatter-description"),
        _axes(horizontal, vertical, x_name, y_name),
        joined(_dot(mark, horizontal, vertical, "faint", 3) for mark in background),
        joined(_dot(mark, horizontal, vertical, "other", 5) for mark in others),
        _marked(this, horizontal, vertical),
        _labels([this.label, *(mark.label for mark in others)], places),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby="scatter-title scatter-description",
        class_="scatter",
    )


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Tenths around the values, at least 0.2 apart, within [0, 1]."""
    kept = list(values)
    low = max(0.0, math.floor((min(kept) - 0.02) * 10) / 10)
    high = min(1.0, math.ceil((max(kept) + 0.02) * 10) / 10)
    low = min(low, max(0.0, high - 0.2))
    return low, max(high, low + 0.2)


def _axes(horizontal: Axis, vertical: Axis, x_name: str, y_name: str) -> Markup:
    parts = []
    for value in horizontal.ticks():
        x = horizontal.place(value)
        parts.append(tag("line", x1=x, y1=TOP, x2=x, y2=BOTTOM, class_="rule"))
        parts.append(tag("text", f"{value:g}", x=x, y=BOTTOM + 30, text_anchor="middle"))
    for value in vertical.ticks():
        y = vertical.place(value)
        parts.append(tag("line", x1=LEFT, y1=y, x2=RIGHT, y2=y, class_="rule"))
        parts.append(tag("text", f"{value:g}", x=LEFT - 8, y=y, dy="0.35em", text_anchor="end"))
    parts.append(tag("path", d=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", class_="axis"))
    parts.append(tag("text", x_name, x=(LEFT + RIGHT) / 2, y=HEIGHT - 14, text_anchor="middle", class_="name"))
    middle = (TOP + BOTTOM) / 2
    turned = f"rotate(-90 22 {middle})"
    parts.append(tag("text", y_name, x=22, y=middle, dy="0.35em", text_anchor="middle", transform=turned, class_="name"))
    return joined(parts)


def _dot(mark: Mark, horizontal: Axis, vertical: Axis, kind: str, radius: int) -> Markup:
    x, y = horizontal.place(mark.x), vertical.place(mark.y)
    return tag("circle", tag("title", mark.title), cx=x, cy=y, r=radius, class_=kind)


def _marked(mark: Mark, horizontal: Axis, vertical: Axis) -> Markup:
    x, y = horizontal.place(mark.x), vertical.place(mark.y)
    parts = []
    if mark.x_interval:
        low, high = map(horizontal.place, mark.x_interval)
        parts.append(tag("path", d=f"M{low} {y - 5}v10M{high} {y - 5}v10M{low} {y}H{high}", class_="interval"))
    if mark.y_interval:
        low, high = map(vertical.place, mark.y_interval)
        parts.append(tag("path", d=f"M{x - 5} {low}h10M{x - 5} {high}h10M{x} {low}V{high}", class_="interval"))
    corners = f"{x},{y - DIAMOND} {x + DIAMOND},{y} {x},{y + DIAMOND} {x - DIAMOND},{y}"
    return tag("g", *parts, tag("polygon", tag("title", mark.title), points=corners, class_="this"))


class Box(NamedTuple):
    """A rectangle of the chart."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def _labels(labels: Sequence[str], places: Sequence[tuple[float, float]]) -> Markup:
    """Each label beside its point: right, left, above or below, where it first meets neither a point nor another label."""
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    parts = []
    for label, (x, y) in zip(labels, places, strict=True):
        width = LETTER * len(label)
        choices = (
            (Box(x + 12, y - 10, x + 12 + width, y + 10), x + 12, "start"),
            (Box(x - 12 - width, y - 10, x - 12, y + 10), x - 12, "end"),
            (Box(x - width / 2, y - 34, x + width / 2, y - 14), x, "middle"),
            (Box(x - width / 2, y + 14, x + width / 2, y + 34), x, "middle"),
        )
        inside = [choice for choice in choices if _fits(choice[0])]
        free = [choice for choice in inside if not any(choice[0].meets(box) for box in taken)]
        box, anchored, anchor = [*free, *inside, choices[0]][0]
        taken.append(box)
        middle = (box.top + box.bottom) / 2
        parts.append(tag("text", label, x=anchored, y=middle, dy="0.35em", text_anchor=anchor, class_="label"))
    return joined(parts)


def _fits(box: Box) -> bool:
    return box.left >= LEFT and box.right <= WIDTH and box.top >= 0 and box.bottom <= BOTTOM + 12
