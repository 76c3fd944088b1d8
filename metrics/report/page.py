"""An evaluation as one HTML page that loads nothing: numbers, protocol, pictures, nearest neighbours, classes, a chart.

    from metrics.report import Neighbours, Report, write_report

    indices, distances = nearest_neighbours(sample_features[:8], reference_features, k=5)
    nearest = reference.take(indices.ravel()).reshape(8, 5, 256, 256, 3)
    neighbours = Neighbours(samples.take(range(8)), nearest, distances, typical)
    report = Report(record, grid=samples.take(range(36)), neighbours=neighbours, classes=scores, others=earlier_records)
    print(write_report(Path("report"), report))     # report/index.html, with grid.png and neighbours.png beside it

The pictures stand in the page itself, scaled down where they would make it larger than about 15 MB; the two PNG files hold
them at full size. Everything that comes from a file (paths, protocol values) is escaped by `metrics.report.markup`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metrics.class_scores import ClassScore
from metrics.measures import MEASURES
from metrics.report.charts import Mark, scatter
from metrics.report.markup import Markup, joined, tag
from metrics.report.mosaic import data_address, enlargement, in_rows, mosaic, png, within_pixels
from metrics.report.numbers import finite, lookup, name_of, numbers, protocol, shown
from runtime.files import atomic_write

STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PIXELS = 1_850_000
"""Of the grid, and of the neighbours, in the page: at worst (noise) 4 bytes each as base64, 15 MB together."""
NEAR = 1 / 3
"""A sample nearer to a real picture than this share of the typical distance is marked; the page says "a third"."""
EXTREMES = 10
"""So many best and so many worst classes are shown outside the folded table."""


@dataclass(frozen=True)
class Neighbours:
    """Samples (n, H, W, 3), the k real pictures nearest to each (n, k, H, W, 3), and their distances (n, k), ascending.

    `typical` is the median distance of a real picture to its nearest other real picture, in the same feature space.
    """

    samples: NDArray[np.uint8]
    nearest: NDArray[np.uint8]
    distances: NDArray[np.floating]
    typical: float


@dataclass(frozen=True)
class Report:
    """What a page is made of: the evaluator's JSON record, pictures (n, H, W, 3), neighbours, classes, earlier records.

    `labels` are the classes of the reference's pictures (N,) and of the samples (M,): classes too small for scores of their
    own are counted from them.
    """

    record: Mapping[str, Any]
    grid: NDArray[np.uint8]
    neighbours: Neighbours | None
    classes: Sequence[ClassScore]
    others: Sequence[Mapping[str, Any]]
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None


def write_report(folder: Path, report: Report) -> Path:
    """Writes index.html, grid.png and neighbours.png into `folder`, which is made where missing; returns index.html's path.

    Files of an earlier report are replaced, and a PNG for which there are no pictures now is removed.
    """
    neighbours = report.neighbours
    pictures = {
        "grid.png": in_rows(report.grid) if len(report.grid) else None,
        "neighbours.png": (
            np.concatenate([neighbours.samples[:, None], neighbours.nearest], axis=1)  # (n, 1 + k, H, W, 3)
            if neighbours and len(neighbours.samples)
            else None
        ),
    }
    for name, arranged in pictures.items():
        if arranged is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(png(mosaic(arranged)))
    text = page(report, datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"))
    with atomic_write(folder / "index.html") as temporary:
        # A path on disk may hold bytes that are no UTF-8; Python hands them on as lone surrogates.
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return folder / "index.html"


def page(report: Report, written: str) -> str:
    """The whole page. `written` is the time to show where the record has no `date`."""
    record = report.record
    name = name_of(record, "samples")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: evaluation"),
        # Without an icon of its own the browser asks the server for one.
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    body = [
        _heading(record, name, str(record.get("date") or written)),
        _warnings(record),
        _section("Numbers", numbers(record)),
        _section("Network and protocol", protocol(record)),
        _section("Samples", _grid(report.grid, int(finite(lookup(record, "samples", "count")) or len(report.grid)))),
        _section("Nearest real pictures", _neighbours(report.neighbours)),
        _section("Classes", _classes(report)),
        _section("Precision and recall", _scatter(report)),
        _section("Record", tag("details", tag("summary", "All of it, as JSON"), tag("pre", _json(record)))),
    ]
    return "<!doctype html>\n" + tag("html", head, "\n", tag("body", tag("main", *body)), lang="en") + "\n"


def _section(title: str, content: Markup) -> Markup:
    identity = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=identity), content, "\n", aria_labelledby=identity)


def _heading(record: Mapping[str, Any], name: str, date: str) -> Markup:
    count, others = lookup(record, "samples", "count"), lookup(record, "reference", "count")
    sizes = [f"{number:,} pictures" if isinstance(number, int) else "statistics alone" for number in (count, others)]
    against = f"{sizes[0]}, compared with {name_of(record, 'reference')} ({sizes[1]})"
    seconds = finite(record.get("seconds"))
    took = f", in {seconds:,.1f} s" if seconds is not None else ""
    return tag("header", tag("h1", name), tag("p", against), tag("p", f"Evaluated {date}{took}", class_="quiet"), "\n")


def _warnings(record: Mapping[str, Any]) -> Markup:
    sentences = record.get("warnings") or []
    if not sentences:
        return Markup()
    points = [tag("li", sentence) for sentence in sentences]
    return tag(
        "section", tag("h2", "Warnings", id="warnings"), tag("ul", *points), class_="warning", aria_labelledby="warnings"
    )


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record), indent=2, ensure_ascii=False, default=str)


def _grid(pictures: NDArray[np.uint8], count: int) -> Markup:
    if not len(pictures):
        return tag("p", "The sample batch holds statistics alone: there are no pictures to show.")
    shown_here = within_pixels(pictures, PIXELS)
    images = [_image(picture, "") for picture in shown_here]
    return joined([
        tag("p", f"{len(pictures):,} of {_number(count, 'picture')} of {_size(pictures)}, evenly spaced; ",
            _scaling(pictures, shown_here), " ",
            tag("code", "grid.png"), " beside this page holds them side by side, at full size."),
        _enlarged(tag("div", *images, class_="pictures", role="img", aria_label=_number(len(pictures), "sample")), pictures),
    ])  # fmt: skip


def _size(pictures: NDArray[np.uint8]) -> str:
    return f"{pictures.shape[-2]} × {pictures.shape[-3]} pixels"


def _scaling(pictures: NDArray[np.uint8], smaller: NDArray[np.uint8]) -> str:
    if smaller.shape != pictures.shape:
        return f"here scaled down to {_size(smaller)}, to keep the page small."
    factor = enlargement(*pictures.shape[1:3])
    return f"shown {factor} times larger." if factor > 1 else "shown at full size."


def _enlarged(shown_in: Markup, pictures: NDArray[np.uint8]) -> Markup:
    """`shown_in`, which shows `pictures` (..., H, W, 3), made to show small ones larger by a whole factor."""
    height, width = pictures.shape[-3:-1]
    factor = enlargement(height, width)
    return tag("div", shown_in, class_="small", style=f"--cell: {factor * width}px") if factor > 1 else shown_in


def _image(picture: NDArray[np.uint8], alt: str) -> Markup:
    return tag("img", src=data_address(picture), alt=alt, width=picture.shape[1], height=picture.shape[0])


def _number(count: int, thing: str, things: str | None = None) -> str:
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def _neighbours(neighbours: Neighbours | None) -> Markup:
    if neighbours is None or not len(neighbours.samples):
        return tag("p", "Not looked for: it needs pictures in both batches.")
    count, k = neighbours.distances.shape
    everything = np.concatenate([neighbours.samples[:, None], neighbours.nearest], axis=1)  # (n, 1 + k, H, W, 3)
    smaller = within_pixels(everything.reshape(-1, *everything.shape[2:]), PIXELS)
    rows = smaller.reshape(count, 1 + k, *smaller.shape[1:])
    typical = neighbours.typical if math.isfinite(neighbours.typical) and neighbours.typical > 0 else None
    near = [typical is not None and bool(row[0] < NEAR * typical) for row in neighbours.distances]
    listed = [_neighbour_row(i, rows[i], neighbours.distances[i], typical, near[i]) for i in range(count)]
    explanation = (
        "Has the model memorised? Each row shows a sample and the real pictures nearest to it in the network's feature space, "
        f"with their Euclidean distances. {_reading(typical)} Only the reference batch is searched: a copy of a training "
        "picture outside it is not found. "
    )
    return joined([
        tag("p", explanation, tag("code", "neighbours.png"), " beside this page holds the rows at full size."),
        tag("p", tag("strong", _marked(near)) if typical else "Without a typical distance no row can be marked."),
        _enlarged(tag("ol", *listed, class_="neighbours"), neighbours.samples),
    ])  # fmt: skip


def _reading(typical: float | None) -> str:
    if typical is None:
        return "The typical distance between real pictures is not known here."
    return (
        f"A real picture lies typically (median) {shown(typical, 2)} from the nearest other real picture. Samples of a model "
        "that has learnt lie about as far; one that lies nearer than a third of that may be a copy, and is marked: look at it."
    )


def _marked(near: Sequence[bool]) -> str:
    samples = ", ".join(str(index + 1) for index, marked in enumerate(near) if marked)
    if not samples:
        return f"None of the {_number(len(near), 'sample')} shown is marked."
    return f"Marked, of the {_number(len(near), 'sample')} shown: {samples}."


def _neighbour_row(
    index: int, pictures: NDArray[np.uint8], distances: NDArray[np.floating], typical: float | None, near: bool
) -> Markup:
    name = f"Sample {index + 1}"
    figures = [tag("figure", _image(pictures[0], name), tag("figcaption", tag("strong", name)))]
    for place, (picture, distance) in enumerate(zip(pictures[1:], distances, strict=True), start=1):
        alt = f"Real picture {place}, distance {shown(distance, 2)} from sample {index + 1}"
        share = tag("span", f"{distance / typical:.2f} × typical") if typical else ""
        figures.append(tag("figure", _image(picture, alt), tag("figcaption", shown(distance, 2), " ", share)))
    row = tag("div", *figures, class_="row", style=f"--figures: {len(figures)}")
    if not near:
        return tag("li", row)
    sentence = "Nearer to a real picture than a third of the typical distance: it may be a copy."
    return tag("li", tag("p", tag("strong", sentence)), row, class_="near")


def _classes(report: Report) -> Markup:
    if not report.classes and report.labels is None:
        return tag("p", "No classes: both batches need the label of each picture, as ", tag("code", "arr_1"), " in their npz.")
    ordered = sorted(report.classes, key=lambda score: (finite(score.distance) is None, score.rank, score.label))
    bias = (
        "With few pictures a class's Fréchet distance is biased upwards: read the rank rather than the distance, and compare "
        "classes of equal counts only."
    )
    parts = [_class_counts(report), tag("p", bias if ordered else "No class has pictures enough, in both batches, for scores.")]
    if len(ordered) > 2 * EXTREMES:
        parts.append(_class_table(f"The best {EXTREMES} of {len(ordered):,} classes", ordered[:EXTREMES]))
        parts.append(_class_table(f"The worst {EXTREMES}", ordered[-EXTREMES:]))
        everything = tag("summary", f"All {len(ordered):,} classes"), _class_table("All classes, best first", ordered)
        parts.append(tag("details", *everything))
    elif ordered:
        parts.append(_class_table("All classes, best first", ordered))
    return joined(parts)


def _class_counts(report: Report) -> Markup:
    if report.labels:
        occurring = np.union1d(*report.labels)
        counts = [np.bincount(np.searchsorted(occurring, each), minlength=len(occurring)) for each in report.labels]
    else:
        counts = [
            np.array([score.references for score in report.classes]),
            np.array([score.samples for score in report.classes]),
        ]
    rows = [_header("Batch", "Least", "Median", "Most", "Classes without any")]
    for name, each in (("Samples", counts[1]), ("Reference", counts[0])):
        without = f"{np.count_nonzero(each == 0):,} of {len(each):,}"
        cells = (f"{each.min():,}", f"{np.median(each):,.12g}", f"{each.max():,}", without)
        rows.append(tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells)))
    unscored = len(counts[0]) - len(report.classes)
    left_out = f"{_number(unscored, 'class', 'classes')} with too few pictures for scores counted here, not ranked below."
    return joined([_table("Pictures per class", rows), tag("p", left_out) if unscored else ""])


def _class_table(caption: str, classes: Iterable[ClassScore]) -> Markup:
    rows = [_header("Rank", "Class", "Fréchet distance", "Precision", "Recall", "Samples", "Reference")]
    for score in classes:
        rank = score.rank if finite(score.distance) is not None else "–"
        values = (shown(score.distance, 2), shown(score.precision, 3), shown(score.recall, 3))
        counts = (f"{score.samples:,}", f"{score.references:,}")
        cells = [tag("td", cell) for cell in (*values, *counts)]
        rows.append(tag("tr", tag("td", rank), tag("th", score.label, scope="row"), *cells))
    return _table(caption, rows)


def _header(*names: str) -> Markup:
    return tag("tr", *(tag("th", name, scope="col") for name in names))


def _table(caption: str, rows: Sequence[Markup]) -> Markup:
    content = tag("table", tag("caption", caption), tag("thead", rows[0]), tag("tbody", *rows[1:]))
    # A keyboard must be able to scroll what is wider than the screen.
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _scatter(report: Report) -> Markup:
    record = report.record
    if finite(record.get("precision")) is None or finite(record.get("recall")) is None:
        return tag("p", "Precision and recall were not computed, so there is nothing to draw; the reason stands under Numbers.")
    compared = [(other, _difference(record, other)) for other in report.others]
    drawn = [other for other, difference in compared if difference is None]
    this = _mark(record, "this")
    others = [_mark(other, str(index)) for index, other in enumerate(drawn, start=1)]
    background = [
        Mark(precision, recall, f"class {score.label}: {precision:.3f}, {recall:.3f}")
        for score in report.classes
        if (precision := finite(score.precision)) is not None and (recall := finite(score.recall)) is not None
    ]
    parts = ["◆ this evaluation", "the bar its 95 % interval" if this.x_interval or this.y_interval else ""]
    parts += [f"● {_number(len(others), 'earlier evaluation')}" if others else "", "○ single classes" if background else ""]
    legend = "; ".join(part for part in parts if part) + "."
    chart = scatter(this, others, background, "Precision and recall", legend, "Precision", "Recall")
    left_out = [tag("li", f"{name_of(other, 'samples')}: {why}") for other, why in compared if why]
    summary = tag("summary", f"Left out of the chart: {_number(len(left_out), 'earlier evaluation')}")
    return joined([
        tag("figure", chart, tag("figcaption", legend, " Up and to the right is better."), class_="chart"),
        _scatter_table(record, drawn),
        tag("details", summary, tag("ul", *left_out, class_="left-out")) if left_out else "",
    ])  # fmt: skip


def _mark(record: Mapping[str, Any], label: str) -> Mark:
    precision, recall = float(record["precision"]), float(record["recall"])
    title = f"{name_of(record, 'samples')}: precision {precision:.3f}, recall {recall:.3f}"
    intervals = [_interval(record, key) if label == "this" else None for key in ("precision", "recall")]
    return Mark(precision, recall, title, label, intervals[0], intervals[1])


def _interval(record: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    ends = [finite(end) for end in lookup(record, "intervals", key) or ()]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def _difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why precision and recall of another evaluation do not belong in the chart; None where they do."""
    for reason, *path in (
        ("another feature network", "network"),
        ("another reference", "reference", "sha256"),
        ("another number of neighbours", "settings", "neighbours"),
        ("another number of samples", "samples", "count"),
    ):
        if lookup(record, *path) != lookup(other, *path):
            return reason
    if finite(other.get("precision")) is None or finite(other.get("recall")) is None:
        return "no precision and recall"
    content = lookup(record, "samples", "sha256")
    return "the same samples" if content is not None and content == lookup(other, "samples", "sha256") else None


def _scatter_table(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Markup:
    distance = next((measure for measure in MEASURES if measure.key in ("fid", "fdd") and measure.key in record), MEASURES[0])
    columns = (("precision", 3), ("recall", 3), (distance.key, distance.decimals))
    rows = [_header("Samples", "Point", "Precision", "Recall", distance.name)]
    for label, each in (("this", record), *((str(i), other) for i, other in enumerate(others, start=1))):
        values = [shown(each.get(key), decimals) for key, decimals in columns]
        cells = [tag("th", name_of(each, "samples"), scope="row", class_="long"), tag("td", label)]
        rows.append(tag("tr", *cells, *(tag("td", value) for value in values)))
    return _table("The points", rows)
