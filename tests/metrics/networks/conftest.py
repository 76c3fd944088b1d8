"""One small Inception network in every form its weights come in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inception_runs import WIDTH
from torch import Tensor

from metrics.networks.graph import write_graph
from metrics.networks.inception_layout import layout_graph, random_state
from metrics.networks.weight_files import GRAPH_NAME


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    return random_state(WIDTH)


@pytest.fixture(scope="session")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def graph_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / GRAPH_NAME
    write_graph(layout_graph(state), path)
    return path
