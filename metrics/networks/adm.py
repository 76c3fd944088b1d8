"""What every way of running ADM's Inception graph agrees on: its nodes, and the words that stand with its numbers.

The words are compared: statistics that were stored with them, and features that were cached, are taken for a network's own
where they are the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from metrics.networks.weight_files import GRAPH_NAME
from runtime.config import InputError

ADM_NAME = "ADM Inception (2015)"
LEGACY_PROTOCOL = "legacy bilinear resize to 299 x 299, (x - 128) / 128"

INPUT = "ExpandDims"
"""Fed in place of the graph's own input, which is one JPEG."""
POOL = "pool_3"
SPATIAL = "mixed_6/conv"
SPATIAL_CHANNELS = 7
"""Of `SPATIAL`, the first ones, 17 x 17 each (Nash et al. 2021, as ADM takes them)."""
LOGITS = "softmax/logits/MatMul"
"""Its second input holds the class weights."""


def check_nodes(path: Path, present: Collection[str]) -> None:
    """Raises InputError where the graph of a file lacks one of the nodes above. `present`: the names of its nodes."""
    missing = [name for name in (INPUT, POOL, SPATIAL, LOGITS) if name not in present]
    if missing:
        raise InputError(f"{path} has no node {', '.join(missing)}; ADM's {GRAPH_NAME} is needed.")
