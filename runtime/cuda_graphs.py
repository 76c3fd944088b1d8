"""CUDA graphs: what one denoising step launches, recorded once for each plan and batch shape, and replayed by one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import Plan

Run = Callable[[Tensor, Tensor, Tensor, Plan, Tensor | None], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records a function of no arguments: the tensor into which it writes, and a call that computes that tensor anew."""

WARM_UP = 3


@dataclass(frozen=True)
class Recorded:
    """One graph, the memory it reads and the memory it writes."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    replay: Callable[[], None]


class PlanGraphs:
    """`run` through a graph of its own for every plan's signature and batch shape: a plan's tensors are data.

    The least recently used graph goes where there would be more than `most`.
    """

    def __init__(self, run: Run, capture: Capture, most: int = 64) -> None:
        self.run, self.capture, self.most = run, capture, most
        self._graphs: dict[Any, Recorded] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, plan: Plan, index: Tensor | None) -> Tensor:
        given = {"x": x, "t": t, "y": y, **({} if index is None else {"index": index})}
        given |= {f"plan {name}": value for name, value in plan.tensors.items()}
        key = plan.signature, tuple((name, value.shape, value.dtype) for name, value in given.items())
        recorded = self._graphs.pop(key, None) or self._record(given, plan)
        self._graphs[key] = recorded  # last: the most recently used
        if len(self._graphs) > self.most:
            del self._graphs[next(iter(self._graphs))]
        for name, value in given.items():
            recorded.inputs[name].copy_(value)
        recorded.replay()
        return recorded.output.clone()  # the next replay, of this graph or of one that shares its memory, writes there again

    def _record(self, given: Mapping[str, Tensor], plan: Plan) -> Recorded:
        inputs = {name: value.clone() for name, value in given.items()}
        tensors = {name: inputs[f"plan {name}"] for name in plan.tensors}
        still = Plan(plan.signature, tensors)
        output, replay = self.capture(lambda: self.run(inputs["x"], inputs["t"], inputs["y"], still, inputs.get("index")))
        return Recorded(inputs, output, replay)


class CudaCapture:
    """Records on a GPU. All graphs share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):  # compilation, autotuning and the libraries' workspaces must not fall into the recording
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Pictures may be decoded in another thread meanwhile, whose allocations are none of this recording's business.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = run()
        return output, graph.replay
