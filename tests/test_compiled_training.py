"""Compiled and checkpointed blocks: the numbers of plain training, one graph for a kind of block, and less memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from counted_graphs import Graphs, counted_graphs
from small_runs import call, differing, metrics, random_network, state_at, succeed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import Backbone, DiT, checkpoint_blocks
from runtime.compilation import training_execution
from runtime.settings import TrainingSettings, parse_training
from runtime.training import Trainer

RUN = "DiT-16x5x2-2-sparsedit-64"
KINDS = 4
"""Kinds of block in that network: pooling, merging, recovering, plain."""


@pytest.fixture
def words(features: Path, tmp_path: Path) -> list[str]:
    """Six steps in a small network that has every kind of block, the plain one twice."""
    return ["--model", "DiT-16x5x2/2", "--poolingformer-blocks", "1", "--modules", "1", "--module-blocks", "1,0,1,1",
            "--top-blocks", "1", "--pretrained", "none", "--feature-path", str(features), "--image-size", "64", "--max-steps",
            "6", "--global-batch-size", "4", "--log-every", "1", "--lr", "1e-3", "--results-dir", str(tmp_path)]  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Blocks run in torch's graphs without being compiled further."""
    with counted_graphs(monkeypatch) as made:
        yield made
    assert made.symbolic == 0


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_the_compilers_loss_curve_is_that_of_eager(features: Path, tmp_path: Path) -> None:
    """The compiler itself, in the smallest network: one kind of block, as it takes seconds for each."""
    torch._dynamo.reset()
    words = ["--model", "DiT-16x1x2/2", "--method", "dense", "--feature-path", features, "--image-size", "64", "--max-steps",
             "6", "--global-batch-size", "4", "--log-every", "1", "--lr", "1e-3", "--results-dir", tmp_path]  # fmt: skip
    said = succeed("train", *words, "--run-name", "compiled", "--compile", "default").out
    assert "blocks compiled (default): the first steps wait for it" in said
    assert "blocks compiled" not in succeed("train", *words, "--run-name", "eager").out
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    assert len(losses(tmp_path / "compiled")) == 6
    succeed("train", *words, "--run-name", "another", "--seed", "1")
    assert losses(tmp_path / "another") != pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_one_graph_for_a_kind_of_block_and_the_numbers_of_eager(
    checkpointing: str, words: list[str], graphs: Graphs, tmp_path: Path
) -> None:
    succeed("train", *words, "--compile", "default", "--gradient-checkpointing", checkpointing)
    assert graphs.made == KINDS
    assert graphs.ran >= 6 * 5  # every block of every step ran in one, and again where it is recomputed
    succeed("train", *words, "--run-name", "eager")
    assert differing(state_at(tmp_path / RUN), state_at(tmp_path / "eager")) == []  # all names of the checkpoint too


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_graphs_of_two_stages(
    checkpointing: str, features: Path, graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under masks and with everything on: a graph each, whatever the stage. (Probes sample: theirs are counted elsewhere.)"""
    monkeypatch.setattr("train.work_meter", lambda *arguments: None)
    words = ["--model", "DiT-16x3x2/2", "--method", "dydit", "--complete-steps", "3", "--target-warmup", "0", "--feature-path",
             features, "--image-size", "64", "--max-steps", "6", "--global-batch-size", "4", "--log-every", "1", "--lr", "1e-3",
             "--results-dir", tmp_path]  # fmt: skip
    succeed("train", *words, "--run-name", "compiled", "--compile", "default", "--gradient-checkpointing", checkpointing)
    assert graphs.made == 2
    assert graphs.ran >= (6 + 3) * 3
    succeed("train", *words, "--run-name", "eager")
    assert differing(state_at(tmp_path / "compiled"), state_at(tmp_path / "eager")) == []


def test_graphs_of_a_varying_density(words: list[str], graphs: Graphs) -> None:
    """One more for each grid of what sees the grid; the limit follows."""
    density = "4,3,2,2x1,4x2,1@0,150,300,450,600,750"
    succeed("train", *words, "--compile", "default", "--density", density, "--max-steps", "24")
    assert torch._dynamo.config.recompile_limit == 28
    assert graphs.made <= 2 + 6 * 3
    assert graphs.ran >= 24 * 5


def test_a_limit_that_stays_would_be_noticed(words: list[str], graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few(*arguments: Any) -> None:
        models.compile_blocks(*arguments)
        torch._dynamo.config.recompile_limit = 2

    monkeypatch.setattr("runtime.compilation.compile_blocks", too_few)
    density = "4,3,2,2x1,4x2,1@0,150,300,450,600,750"
    succeed("train", *words, "--compile", "default", "--density", density, "--max-steps", "24")
    assert graphs.ran < 24 * 5


def test_the_average_runs_as_it_is(words: list[str], graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    as_it_is = Trainer.__init__

    def noting(self: Trainer, *arguments: Any) -> None:
        as_it_is(self, *arguments)
        ran.extend("forward" in block.__dict__ for network in (self.network, self.ema.network) for block in network.blocks)

    monkeypatch.setattr(Trainer, "__init__", noting)
    succeed("train", *words, "--compile", "default", "--max-steps", "1")
    assert ran == [True] * 5 + [False] * 5


def test_two_ways_to_compile_are_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    result = call("train", *words, "--compile", "default")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "--compile default compiles the blocks, and the launcher's --dynamo_backend the whole step" in result.err
    cpu = torch.device("cpu")
    assert training_execution(TrainingSettings(), cpu).compile == "none"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert training_execution(TrainingSettings(compile="default"), cpu).compile == "default"
    assert training_execution(TrainingSettings(), cpu).compile == "none"


def test_older_ways_to_ask_for_checkpointing(tmp_path: Path) -> None:
    def chosen(*words: str) -> str:
        return parse_training(words)[0].gradient_checkpointing

    assert chosen() == chosen("--gradient-checkpointing", "none") == "none"
    assert chosen("--gradient-checkpointing") == chosen("--gradient_checkpointing", "--seed", "1") == "full"
    assert chosen("--gradient-checkpointing", "selective") == "selective"
    for content, meaning in (("true", "full"), ("false", "none"), ("selective", "selective")):
        (tmp_path / "run.yaml").write_text(f"gradient-checkpointing: {content}\n")
        assert chosen("--config", str(tmp_path / "run.yaml")) == meaning
    assert chosen("--config", str(tmp_path / "run.yaml"), "--gradient-checkpointing") == "full"
    (tmp_path / "run.yaml").write_text("gradient_checkpointing: true\n")
    assert chosen("--config", str(tmp_path / "run.yaml"), "--no-gradient-checkpointing") == "none"
    assert [parse_training(words)[0].profile for words in ([], ["--profile"], ["--profile", "9"])] == [0, 5, 9]
    (tmp_path / "run.yaml").write_text("profile: true\n")
    assert parse_training(["--config", str(tmp_path / "run.yaml")])[0].profile == 5


# Memory --------------------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Storages that operators made, and how large they are."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def held_and_gradients(network: DiT) -> tuple[int, list[Tensor]]:
    """Bytes that live between forward and backward, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    with Allocated() as allocated:
        loss = network(x, torch.tensor([3, 500]), torch.tensor([0, 1]), network.training_plans()[0][1]).square().mean()
    held = allocated.alive()
    loss.backward()
    return held, [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("method", models.METHODS)
def test_checkpointing_holds_less_and_changes_no_bit(method: str) -> None:
    held: dict[str, int] = {}
    gradients: dict[str, list[Tensor]] = {}
    for mode in ("none", "selective", "full"):
        torch.manual_seed(0)
        network = random_network(method, Backbone.named("DiT-T/2", (16, 16), num_classes=3))
        if mode != "none":
            checkpoint_blocks(network, selective=mode == "selective")
        held[mode], gradients[mode] = held_and_gradients(network)
        assert len(gradients[mode]) == len(gradients["none"])
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"], strict=True))
    assert held["selective"] < 0.75 * held["none"]
    assert held["full"] < 0.65 * held["selective"]


def test_selective_checkpointing_computes_no_product_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def products(selective: bool | None) -> int:
        count = 0

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal count
                count += function in models.PRODUCTS
                return function(*args, **(kwargs or {}))

        network = random_network("sparsedit", Backbone.named("DiT-T/2", (8, 8), num_classes=3))
        if selective is not None:
            checkpoint_blocks(network, selective)
        with Counting():
            network(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]), network.plan(0)).sum().backward()
        return count

    assert products(None) == products(selective=True) < products(selective=False)
