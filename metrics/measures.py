"""The scores: what each is called, which way is better, who defined it."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """A number of the record: its key, name, which way is better, source, and decimals shown."""

    key: str
    name: str
    better: str
    source: str
    decimals: int


MEASURES = (
    Measure("fid", "FID", "lower", "Heusel et al. 2017", 2),
    Measure("fdd", "FDD", "lower", "Stein et al. 2023", 2),
    Measure("sfid", "sFID", "lower", "Nash et al. 2021", 2),
    Measure("inception_score", "Inception Score", "higher", "Salimans et al. 2016", 2),
    Measure("precision", "Precision", "higher", "Kynkäänniemi et al. 2019", 3),
    Measure("recall", "Recall", "higher", "Kynkäänniemi et al. 2019", 3),
    Measure("kid", "KID", "lower", "Bińkowski et al. 2018", 5),
    Measure("kdd", "KDD", "lower", "Bińkowski et al. 2018, on DINOv2 features", 5),
    Measure("density", "Density", "higher", "Naeem et al. 2020", 3),
    Measure("coverage", "Coverage", "higher", "Naeem et al. 2020", 3),
)

TITLES = {measure.key: measure.name for measure in MEASURES}
"""Key in the JSON record -> name, in the order of the screen and the page."""
