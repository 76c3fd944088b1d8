"""torch.compile without its compiler: networks run in the graphs that it traces, and each graph counts its runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo


class Graphs:
    """Graphs that torch made, and how often each ran."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.symbolic = 0  # graphs of a variable size, which are slow

    @property
    def made(self) -> int:
        return len(self.runs)

    @property
    def ran(self) -> int:
        return sum(self.runs)

    def backend(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        place = len(self.runs)
        self.runs.append(0)
        self.symbolic += any(isinstance(value, torch.SymInt) for value in example)

        def counted(*inputs: Any) -> Any:
            self.runs[place] += 1
            return graph.forward(*inputs)

        return counted


@contextmanager
def counted_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Within it, whoever calls torch.compile gets counted graphs, under torch's own limit of eight for a function."""
    torch._dynamo.reset()
    graphs, compile_ = Graphs(), torch.compile

    def compiled(function: Any, mode: str | None = None, **chosen: Any) -> Any:
        return compile_(function, **{**chosen, "backend": graphs.backend})  # a mode is the compiler's business

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep each of its lines
    with torch._dynamo.config.patch(recompile_limit=8):  # put back afterwards
        yield graphs
    torch._dynamo.reset()
