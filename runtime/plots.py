"""Plots as PNG files: equal content makes equal bytes, and no display or global state of matplotlib is touched.

matplotlib is imported by who draws: it takes a second, and one process of a run should draw.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.config import InputError
from runtime.files import atomic_write


def new_canvas(path: Path, width: float, height: float) -> Any:
    """A matplotlib canvas, whose `figure` is empty, of so many inches. InputError, naming `path`, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{path} needs matplotlib, which cannot be imported; run `pip install -e .` again.") from None
    # Without pyplot there is no state that other code in the process could see, and no display is asked for.
    return FigureCanvasAgg(Figure(figsize=(width, height), dpi=120, layout="constrained"))


def save_canvas(canvas: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        # The default metadata names the version of matplotlib.
        canvas.print_png(temporary, metadata={"Software": None})


def try_to_draw(what: str, draw: Callable[[], None]) -> None:
    """`draw` beside work that is more than the picture: what keeps `what` from being drawn is a warning."""
    try:
        draw()
    except (InputError, IsADirectoryError, PermissionError) as error:
        print(f"WARNING: {what} is not drawn: {error}", flush=True)
