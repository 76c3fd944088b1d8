"""Representation alignment in training: the loss of every method, what is kept of it, and every way in which it may not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from alignment_runs import aligned_features
from counted_graphs import counted_graphs
from extraction_runs import pictures as pictures
from small_runs import ROOT, call, differing, header_at, metrics, random_network, run, state_at, succeed, torchrun
from torch import Tensor

from data.features import AlignmentTargets
from diffusion.flow import FlowObjective
from diffusion.schedule import Timesteps
from models import METHODS, Backbone, DiT, checkpoint_blocks
from runtime.alignment import Alignment, default_block
from runtime.checkpoint import checkpoint_path, checkpoints, read_tensors, read_weights, save_checkpoint
from runtime.seeding import Keys
from runtime.training_step import Batch, TrainingStep

MODEL = "DiT-16x5x2/2"
SPLITS = {
    "dense": {},
    "dydit": {},
    "sprint": {"encoder_blocks": 1, "decoder_blocks": 1},
    "sparsedit": {"poolingformer_blocks": 1, "modules": 1, "module_blocks": (1, 1, 1, 0), "top_blocks": 1},
}


# The loss ------------------------------------------------------------------------------------------------------------


def network_of(method: str) -> DiT:
    backbone = Backbone.named(MODEL, (8, 8), 3, num_classes=3, learn_sigma=False, objective="flow")
    return random_network(method, backbone, SPLITS[method])


def by_hand(alignment: Alignment, tokens: Tensor, targets: Tensor, places: Tensor | None) -> float:
    cosines = []
    for sample, stream in enumerate(alignment.projector(tokens).double()):  # (K, width)
        wanted = targets[sample].double() if places is None else targets[sample].double()[places[sample]]
        cosines.append((stream * wanted).sum(1) / (stream.norm(dim=1) * wanted.norm(dim=1)))
    return -float(torch.cat(cosines).mean())


def step_with(network: DiT, alignment: Alignment) -> tuple[dict[str, Tensor], Tensor, Batch]:
    """A training step. -> what it measured; its loss; its batch"""
    generator = torch.Generator().manual_seed(0)
    latents, targets = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 16, 6, generator=generator)
    timesteps, plan = network.training_plans()[0]
    bounds = Timesteps(torch.tensor(timesteps.start), torch.tensor(timesteps.stop))
    batch = Batch(latents, torch.tensor([0, 1, 2, 0]), torch.arange(4), bounds, plan, targets)
    loss, parts = TrainingStep(network, FlowObjective("uniform", 1), 0, alignment)(batch, torch.tensor(5))
    return parts, loss, batch


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_aligned_with_the_targets_of_its_tokens(method: str, checkpointing: str) -> None:
    for block in network_of(method).alignable_blocks()[:: 1 if checkpointing == "none" else 3]:
        network = network_of(method)
        if checkpointing != "none":
            checkpoint_blocks(network, selective=checkpointing == "selective")
        torch.manual_seed(0)
        alignment = Alignment(network, block, 0.5, 6)
        outputs: list[Any] = []
        network.blocks[block - 1].register_forward_hook(lambda module, given, out, into=outputs: into.append(out))
        parts, loss, batch = step_with(network, alignment)
        tokens = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        places = network.places_behind(block, network.draw(Keys(0, torch.tensor(5), batch.positions)))
        with torch.no_grad():
            expected = by_hand(alignment, tokens, batch.targets, places)
        assert float(parts["alignment"]) == pytest.approx(expected, abs=1e-5)
        others = sum(float(parts[name]) for name in ("denoising/loss", "complete/loss", "flops") if name in parts)
        assert float(loss.detach()) == pytest.approx(others + 0.5 * expected, abs=1e-4)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in alignment.parameters())
        if places is not None:
            with torch.no_grad():
                shifted = by_hand(alignment, tokens, batch.targets, torch.arange(places.shape[1]).expand_as(places))
            assert abs(shifted - expected) > 1e-3  # targets that are not gathered would be seen


def test_the_first_pass_of_a_step_is_aligned() -> None:
    """DyDiT's dynamic one, whose tokens differ from the complete one's where routers turn parts off."""
    network = network_of("dydit")
    for block in network.blocks:
        torch.nn.init.constant_(block.attn_rate.router.bias, -15.0)
    alignment, outputs = Alignment(network, 2, 0.5, 6), list[Any]()
    network.blocks[1].register_forward_hook(lambda module, given, out: outputs.append(out))
    parts, _, batch = step_with(network, alignment)
    dynamic, complete = (out[0] if isinstance(out, tuple) else out for out in outputs)
    with torch.no_grad():
        first, second = (by_hand(alignment, tokens, batch.targets, None) for tokens in (dynamic, complete))
    assert float(parts["alignment"]) == pytest.approx(first, abs=1e-5)
    assert abs(first - second) > 1e-4


def test_the_projector_is_that_of_the_paper() -> None:
    layers = [layer for layer in Alignment(network_of("dense"), 2, 0.5, 6).projector if isinstance(layer, torch.nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(2048, 16), (2048, 2048), (6, 2048)]
    for layer in layers:
        expected = (2 / sum(layer.weight.shape)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)
        assert not layer.bias.any()


def test_alignment_moves_the_blocks_up_to_its_own_alone() -> None:
    def gradients(weight: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = network_of("dense")
        _, loss, _ = step_with(network, Alignment(network, 2, weight, 6))
        loss.backward()
        return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}

    with_it, without = gradients(0.5), gradients(0.0)
    for name in without:
        moved = not torch.equal(with_it[name], without[name])
        assert moved == (name.startswith(("x_embedder", "t_embedder", "y_embedder", "blocks.0.", "blocks.1."))), name


def test_gathering_equals_indexing_and_needs_it() -> None:
    network = network_of("dense")
    alignment = Alignment(network, 1, 0.5, 6)
    tokens, targets = torch.randn(2, 4, 16), torch.randn(2, 16, 6)
    places = torch.stack((torch.randperm(16)[:4], torch.randperm(16)[:4]))

    def loss(targets: Tensor, places: Tensor | None) -> Tensor:
        alignment.forget()
        alignment._take(network.blocks[0], (), tokens)
        return alignment(targets, places)

    indexed = torch.stack([targets[sample, places[sample]] for sample in range(2)])
    assert torch.equal(loss(targets, places), loss(indexed, None))
    projected = F.normalize(alignment.projector(tokens), dim=2)
    expected = -(projected * F.normalize(indexed, dim=2)).sum(2).mean()
    torch.testing.assert_close(loss(targets, places), expected)
    torch.testing.assert_close(loss(3 * projected.detach(), None), torch.tensor(-1.0))
    with pytest.raises(RuntimeError, match="size"):
        loss(targets, None)


def test_the_default_block() -> None:
    assert [default_block(range(1, depth + 1), depth) for depth in (28, 24, 12, 8, 1)] == [8, 8, 6, 4, 1]
    with torch.device("meta"):
        sparse = METHODS["sparsedit"](Backbone.named("DiT-XL/2", (32, 32)))
        sprint = METHODS["sprint"](Backbone.named("SiT-XL/2", (32, 32), learn_sigma=False, objective="flow"))
    assert default_block(sparse.alignable_blocks(), 28) == 8  # 2 pooling, then 1 merge, 3 sparse, 1 recover, 1 dense ...
    assert [block for block in (2, 3, 6, 7, 8, 9) if block in sparse.alignable_blocks()] == [2, 7, 8]
    kept = torch.zeros(1, 64, dtype=torch.int64)
    assert [sprint.places_behind(block, {"kept": kept}) is kept for block in (2, 3, 8, 26, 27)] == [0, 1, 1, 1, 0]
    assert sprint.places_behind(8, {}) is None  # nothing is dropped in the second stage


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aligned_features(tmp_path_factory.mktemp("aligned") / "f")


@pytest.fixture(scope="module")
def words(features: Path) -> list[str]:
    return ["--model", MODEL, "--method", "sprint", "--encoder-blocks", "1", "--decoder-blocks", "1", "--feature-path",
            str(features), "--image-size", "8", "--global-batch-size", "8", "--max-steps", "6", "--log-every", "2",
            "--checkpoint-every", "3", "--keep-checkpoints", "9", "--lr", "1e-3", "--alignment", "0.5", "--run-name", "run",
            "--gradient-clip", "0.3"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("whole")
    said = succeed("train", *words, "--results-dir", results).out
    assert "alignment: weight 0.5 behind block 2, with dinov2-s features of 4 x 4 tokens" in said
    return results / "run"


def test_the_projector_is_saved_apart_and_never_averaged_nor_exported(whole: Path, tmp_path: Path) -> None:
    state, first = state_at(whole), state_at(whole, 3)
    projector = {f"alignment/projector.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert {name for name in state if name.startswith("alignment/")} == projector
    moments = {f"optimizer/{name}/{moment}" for name in projector for moment in ("exp_avg", "exp_avg_sq", "step")}
    assert {name for name in state if "projector" in name} == projector | moments
    assert set(differing({name: state[name] for name in projector}, {name: first[name] for name in projector})) == projector
    settings = header_at(whole)["settings"]
    assert (settings["alignment"], settings["alignment_block"]) == (0.5, 2)
    assert not any("projector" in name for name in read_weights(str(checkpoints(whole)[-1])).state)
    for layout, name in (("ours", "w.safetensors"), ("released", "w.pt")):
        succeed("train", "export", checkpoints(whole)[-1], tmp_path / name, "--layout", layout)
        exported = read_weights(str(tmp_path / name)).state
        assert exported
        assert not any("projector" in key or "alignment" in key for key in exported)


def test_it_is_logged_counted_in_the_norm_and_clipped(whole: Path, words: list[str], tmp_path: Path) -> None:
    for line in metrics(whole):
        assert -1 < line["alignment"] < 1
        assert line["loss"] == pytest.approx(line["denoising/loss"] + 0.5 * line["alignment"], rel=1e-4)
    for clip, expected in (("none", None), ("0.3", 0.3)):
        more = ["--max-steps", "1", "--log-every", "1", "--gradient-clip", clip, "--run-name", f"clip-{clip}"]
        succeed("train", *words, *more, "--results-dir", tmp_path)
        norm = metrics(tmp_path / f"clip-{clip}")[0]["gradient_norm"]
        state = state_at(tmp_path / f"clip-{clip}")
        # The first moments after one step are a tenth of the gradients.
        squares = {name: float((10 * state[name]).square().sum()) for name in state if name.endswith("/exp_avg")}
        assert sum(squares.values()) ** 0.5 == pytest.approx(expected or norm, rel=1e-4)
        assert sum(value for name, value in squares.items() if "projector" in name) > 0.01 * sum(squares.values())
        assert norm > 0.3


@pytest.mark.parametrize("bug", [False, True])
def test_a_resumed_run_ends_as_the_whole(
    whole: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: bool
) -> None:
    succeed("train", *words, "--results-dir", tmp_path, "--max-steps", "3")
    if bug:  # the projector begins anew
        right = read_tensors
        monkeypatch.setattr(
            "runtime.training.read_tensors",
            lambda path, prefix: {
                name: value * 0.9 if prefix == "alignment/" else value for name, value in right(path, prefix).items()
            },
        )
    assert "at step 3" in succeed("train", *words, "--results-dir", tmp_path).out
    assert bool(differing(state_at(tmp_path / "run"), state_at(whole))) == bug


def test_a_checkpoint_with_damaged_tensors_is_refused(whole: Path, words: list[str], tmp_path: Path) -> None:
    saved, header = state_at(whole), header_at(whole)
    other_shape = {**saved, "alignment/projector.0.weight": torch.zeros(2048, 32)}
    lost = {name: value for name, value in saved.items() if name != "optimizer/alignment/projector.2.weight/exp_avg"}
    for tensors, named in ((other_shape, "lacks weights"), (lost, "lacks optimizer state")):
        save_checkpoint(checkpoint_path(tmp_path / "run", 6), tensors, header)
        result = call("train", *words, "--max-steps", "7", "--results-dir", tmp_path)
        assert result.code == 2
        assert f"{named}; delete it, and the same command continues from the one before." in result.err


def test_targets_that_are_not_finite_are_named(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = AlignmentTargets.batch
    monkeypatch.setattr(AlignmentTargets, "batch", lambda *arguments: read(*arguments) * float("nan"))
    result = call("train", *words, "--results-dir", tmp_path)
    assert result.code == 2
    assert "holds numbers that are not finite (met at step 1); extract it again." in result.err


def test_what_training_refuses(whole: Path, words: list[str], tmp_path: Path, pixel_features: Path) -> None:
    def refused(*more: str | Path) -> str:
        result = call("train", *words, "--results-dir", tmp_path, *more)
        assert result.code == 2
        assert result.err.count("\n") == 1
        return result.err

    assert "holds no alignment features" in refused("--feature-path", pixel_features)
    assert "--alignment is -1.0; it must be at least 0" in refused("--alignment", "-1")
    assert "--alignment-block is for --alignment, which is 0" in refused("--alignment", "0", "--alignment-block", "2")
    assert "--alignment-block is 0; it must be at least 1" in refused("--alignment-block", "0")
    assert "--alignment-block is 6, behind which --method sprint" in refused("--alignment-block", "6")
    assert "choose from 1, 2, 3, 4, 5." in refused("--alignment-block", "6")
    patch = refused("--model", "DiT-16x5x2/4", "--drop-pattern", "random")
    assert "4 x 4 tokens, and --model DiT-16x5x2/4 has 2 x 2; extract with --alignment-patch 4" in patch
    assert not (tmp_path / "run").exists()
    for more in (["--alignment", "0"], ["--alignment", "0.4"], ["--alignment-block", "3"]):
        result = call("train", *words, "--results-dir", whole.parent, "--max-steps", "9", *more)
        assert result.code == 2
        assert f"{more[0][2:].replace('-', '_')} (" in result.err


def test_sparse_tokens_have_no_targets(features: Path, tmp_path: Path) -> None:
    words = ["--model", MODEL, "--method", "sparsedit", "--poolingformer-blocks", "1", "--modules", "1", "--module-blocks",
             "1,1,1,0", "--top-blocks", "1", "--feature-path", features, "--image-size", "8", "--max-steps", "1",
             "--global-batch-size", "8", "--results-dir", tmp_path, "--alignment", "0.5"]  # fmt: skip
    error = call("train", *words, "--alignment-block", "3").err
    assert "--alignment-block is 3, behind which --method sparsedit has no tokens that stand for places" in error
    assert "choose from 1, 4, 5." in error
    assert "behind block 1," in succeed("train", *words).out  # 2 would be the half of the depth


def test_a_run_without_goes_on_when_its_features_get_targets(words: list[str], features: Path, tmp_path: Path) -> None:
    """And an older checkpoint, which knows of no alignment, too: its settings say none."""
    without = [*words, "--alignment", "0", "--results-dir", str(tmp_path)]
    succeed("train", *without, "--max-steps", "3")
    header = header_at(tmp_path / "run")
    assert "alignment.npy" not in header["data"]["sha256"]
    assert not any("alignment" in name for name in state_at(tmp_path / "run"))
    assert "at step 3" in succeed("train", *without).out


def test_two_micro_batches_and_two_processes_compute_the_same(whole: Path, words: list[str], tmp_path: Path) -> None:
    succeed("train", *words, "--results-dir", tmp_path, "--gradient-accumulation", "2")
    launched = run(torchrun(2, ROOT / "train.py", *words, "--results-dir", tmp_path, "--run-name", "two"), tmp_path)
    assert launched.code == 0, launched.err
    for name in ("run", "two"):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(whole), strict=True):
            for value in ("loss", "alignment", "gradient_norm"):
                assert ours[value] == pytest.approx(theirs[value], rel=1e-4)
        ours, theirs = state_at(tmp_path / name), state_at(whole)
        moments = [key for key in theirs if key.endswith("/exp_avg")]
        assert max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in moments) < 1e-3


@pytest.mark.parametrize("how", ["blocks", "whole", "selective", "full"])
def test_compiled_and_checkpointed_training_computes_the_same(
    how: str, whole: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"blocks": ["--compile", "default"], "whole": [], "selective": ["--gradient-checkpointing", "selective"],
            "full": ["--gradient-checkpointing", "full", "--compile", "default", "--prefetch"]}[how]  # fmt: skip
    if how == "whole":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        monkeypatch.setattr("runtime.seeding._ROUNDS", 2)
        succeed("train", *words, "--results-dir", tmp_path / "compiled", *more)
        monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
        succeed("train", *words, "--results-dir", tmp_path / "eager")
        one, other = state_at(tmp_path / "compiled" / "run"), state_at(tmp_path / "eager" / "run")
    else:
        with counted_graphs(monkeypatch):
            succeed("train", *words, "--results-dir", tmp_path, *more)
        one, other = state_at(tmp_path / "run"), state_at(whole)
    assert differing(one, other) == []


def test_alignment_is_learned(words: list[str], tmp_path: Path) -> None:
    more = ["--max-steps", "40", "--log-every", "10", "--lr", "3e-3", "--drop-ratio", "0.5", "--results-dir", tmp_path]
    succeed("train", *words, *more)
    curve = [line["alignment"] for line in metrics(tmp_path / "run")]
    assert curve[-1] < curve[0] - 0.1
