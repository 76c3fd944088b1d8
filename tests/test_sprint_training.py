"""SPRINT in training: its mask token stays, its blocks are few graphs, and its draws are read by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_graphs import Graphs, counted_graphs
from small_runs import state_at, succeed
from torch import Tensor, nn

from diffusion.flow import FlowObjective
from diffusion.schedule import Timesteps
from models import SPRINT, create_model, sprint
from runtime.checkpoint import checkpoints
from runtime.compilation import prepare_blocks
from runtime.seeding import Keys
from runtime.training_step import Batch, TrainingStep
from tests.models.random_networks import inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread

META = torch.device("meta")
FLOW: dict[str, Any] = {"learn_sigma": False, "objective": "flow", "time_scale": 1.0}
SPLIT = {"encoder_blocks": 1, "decoder_blocks": 1}


# The mask token ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mask_tokens(features: Path, tmp_path: Path) -> Callable[[], list[Tensor]]:
    """Trains three steps that change every trained weight much -> the mask token, raw and averaged, after each."""

    def train() -> list[Tensor]:
        succeed("train", "--model", "DiT-16x4x2/2", "--method", "sprint", "--encoder-blocks", "1", "--decoder-blocks", "1",
                "--feature-path", features, "--image-size", "64", "--max-steps", "3", "--global-batch-size", "4",
                "--checkpoint-every", "1", "--keep-checkpoints", "3", "--lr", "0.1", "--weight-decay", "0.1", "--ema-decay",
                "0.3", "--results-dir", tmp_path, "--run-name", "run")  # fmt: skip
        states = [state_at(tmp_path / "run", step) for step in (1, 2, 3)]
        assert len(checkpoints(tmp_path / "run")) == 3
        assert not torch.equal(states[0]["ema/renoise_linear.weight"], states[1]["ema/renoise_linear.weight"])
        return [state[f"{kind}/mask_token"] for state in states for kind in ("model", "ema")]

    return train


def test_the_mask_token_stays_in_training_average_and_checkpoints(mask_tokens: Callable[[], list[Tensor]]) -> None:
    first, *others = mask_tokens()
    assert float(first.std()) > 0.01
    assert all(torch.equal(first, other) for other in others)


def test_a_trained_mask_token_would_be_noticed(
    mask_tokens: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = SPRINT.build_outside_blocks

    def planted(self: SPRINT) -> None:
        build(self)
        self.mask_token = nn.Parameter(self.mask_token.detach())

    monkeypatch.setattr(SPRINT, "build_outside_blocks", planted)
    first, *others = mask_tokens()
    assert not any(torch.equal(first, other) for other in others)


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Nothing but the tracing of torch.compile."""
    with counted_graphs(monkeypatch) as made:
        yield made


def trained_with_drop(steps: int) -> None:
    """Passes of training, each of which keeps other tokens; the third and the last on all, as a second stage."""
    model = network("sprint", tiny("DiT-16x4x2/2"), SPLIT)
    prepare_blocks(model, "none", "default")
    x, t, y = inputs(model.backbone, 4)
    for number in range(steps):
        draws, whole = model.draw(Keys(0, number, torch.arange(4))), number in (2, steps - 1)
        plan = model.plan(0) if whole else model.training_plans()[0][1]
        model.training_forward(x, t, y, plan, draws)[0]["denoising"][0].square().mean().backward()


def test_training_with_drop_is_one_graph_for_few_tokens_and_one_for_all(graphs: Graphs) -> None:
    trained_with_drop(5)
    assert (graphs.made, graphs.ran) == (2, 5 * 4)


def test_a_number_of_kept_tokens_that_is_drawn_would_be_noticed(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: another number every step."""
    draw = SPRINT.draw

    def planted(self: SPRINT, keys: Keys) -> dict[str, Tensor]:
        drawn = draw(self, keys)
        return {**drawn, "kept": drawn["kept"][:, int(keys.step) :]}

    monkeypatch.setattr(SPRINT, "draw", planted)
    trained_with_drop(5)
    assert graphs.made > 2


# Nothing is read back ------------------------------------------------------------------------------------------------


def train_sprint_without_values() -> None:
    """A training pass under flow, draws and gradients included, on the meta device."""
    with META:
        step = TrainingStep(create_model("sprint", tiny(**FLOW)), FlowObjective("logit-normal", strata=2), 0)
        x, places, number = torch.empty(4, 4, 16, 16), torch.empty(4, dtype=torch.long), torch.empty((), dtype=torch.long)
    whole = Timesteps(torch.empty_like(number), torch.empty_like(number))
    loss, _ = step(Batch(x, places, places, whole, step.network.training_plans()[0][1]), number)
    loss.backward()
    assert all(p.grad is not None for p in step.network.blocks.parameters())  # type: ignore[attr-defined]


def test_training_with_drop_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    train_sprint_without_values()
    # Planted bug: the kept tokens as a list of numbers.
    draw_kept = sprint.draw_kept
    monkeypatch.setattr(sprint, "draw_kept", lambda *given: torch.tensor(draw_kept(*given).tolist()))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train_sprint_without_values()


# The second stage ----------------------------------------------------------------------------------------------------


def test_path_drop_goes_on_where_no_token_is_dropped() -> None:
    """The cheap pass is learned in the second stage too."""
    model = network("sprint", tiny(**FLOW), {"drop_ratio": 0.0, "path_drop": 0.5})
    x, t, y = inputs(model.backbone)
    drawn = model.draw(Keys(0, 0, torch.arange(64)))
    assert 16 < int(drawn["path_drop"].sum()) < 48
    draws = {"label_drop": torch.zeros(3, dtype=torch.bool), "path_drop": torch.tensor([False, True, False])}
    output, whole, cheap = model(x, t, y, draws=draws), model(x, t, y, model.plan(0)), model(x, t, y, model.cheap_plan(0))
    torch.testing.assert_close(output, torch.stack((whole[0], cheap[1], whole[2])), rtol=0, atol=1e-5)
    assert (whole[1] - cheap[1]).abs().max() > 1e-2
