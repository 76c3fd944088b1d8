"""Weights of every known layout load into every network that can take them, and nothing is lost or made up on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from models import METHODS, DiT
from models.layers import position_embedding
from models.weights import export, identify, load, plan_loading
from runtime.checkpoint import Weights, read_weights, save_checkpoint
from runtime.config import InputError
from runtime.networks import blueprint, build, build_with, canonical, describe, fit_weights, recognized
from tests.models.random_networks import distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread
from tests.models.weight_files import WRITERS, State, Writer, as_fast_dit

SPLITS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "two of each": {"poolingformer_blocks": 1, "modules": 1, "module_blocks": (2, 1, 2, 1), "top_blocks": 1},
    "no pooling": {"poolingformer_blocks": 0, "modules": 2, "module_blocks": (1, 1, 1, 1), "top_blocks": 0},
}

every_method = pytest.mark.parametrize("method", METHODS)


def same(ours: DiT, other: DiT) -> bool:
    """Whether two networks give the same output, bit for bit."""
    reference = other(*inputs(other.backbone))
    assert reference.abs().max() > 0.1
    return torch.equal(ours(*inputs(ours.backbone)), reference)


def loaded(weights: Weights, like: DiT) -> DiT:
    """A new network of the same description with these weights; nothing may be new or left out."""
    copy, plan = build_with(blueprint_of(like), weights)
    assert plan.new == plan.dropped == plan.warnings == plan.notes == ()
    return copy


def blueprint_of(like: DiT) -> DiT:
    with torch.device("meta"):
        return type(like)(like.backbone, like.options)


def refusal(state: Mapping[str, Tensor], plan: DiT) -> str:
    """The sentence with which these weights are refused."""
    with pytest.raises(InputError) as caught:
        fit_weights(Weights(state, "the.file"), plan)
    message = str(caught.value)
    assert message.startswith("the.file: ")
    assert "\n" not in message
    assert message.endswith(".")
    return message


# Layouts of files ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("layout", ["ours", "released"])
def test_files_of_every_layout_load(method: str, write: Writer, layout: str, tmp_path: Path) -> None:
    original = network(method, tiny())
    state = export(original, original.released_layout if layout == "released" else "ours")
    weights = read_weights(str(write(state, tmp_path)))
    assert same(loaded(weights, original), original)


def test_the_raw_weights_of_a_fast_dit_checkpoint_on_request(tmp_path: Path) -> None:
    original = network("dense", tiny())
    path = as_fast_dit(dict(original.state_dict()), tmp_path)
    raw = canonical(read_weights(str(path), averaged=False))
    assert torch.equal(raw["x_embedder.proj.bias"], original.state_dict()["x_embedder.proj.bias"] + 1)
    assert "EMA" in read_weights(str(path)).origin
    assert "EMA" not in read_weights(str(path), averaged=False).origin


def diffusers_network(shared: bool = True) -> Any:
    """diffusers' DiT of the debug size, every weight drawn. Its conversion of DiT keeps a copy of the embedders per block."""
    torch.manual_seed(0)
    model: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, num_layers=8, sample_size=16, num_embeds_ada_norm=10, out_channels=8,
        norm_eps=1e-6,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        if shared:
            block.norm1.emb.load_state_dict(first.state_dict())
    for block in model.transformer_blocks:
        # DiT's frequencies run to 1/10000 exclusively; diffusers' default of 1 includes it and is another function.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


@pytest.mark.parametrize("folder", ["transformer", ""])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_diffusers_folder_computes_the_same(folder: str, safe: bool, tmp_path: Path) -> None:
    theirs = diffusers_network()
    theirs.save_pretrained(tmp_path / folder, safe_serialization=safe)
    ours, plan = build_with(blueprint("dense", tiny(), {}), read_weights(str(tmp_path)))
    assert plan.new == ("pos_embed",)
    assert plan.warnings == ()
    x, t, y = inputs(tiny())
    with torch.no_grad():
        reference = theirs(x, timestep=t, class_labels=y).sample
    assert distance(ours(x, t, y), reference) < 1e-5
    # The known-bad variant: diffusers' own default frequencies are another function.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert distance(theirs(x, timestep=t, class_labels=y).sample, reference) > 1e-4


def test_a_diffusers_folder_converts_to_sparsedit(tmp_path: Path) -> None:
    theirs = diffusers_network()
    theirs.save_pretrained(tmp_path)
    converted, plan = build_with(blueprint("sparsedit", tiny(), {}), read_weights(str(tmp_path)))
    attention = theirs.transformer_blocks[0].attn1
    assert torch.equal(converted.state_dict()["blocks.0.attn.v.weight"], attention.to_v.weight)
    assert {key.split(".")[-2] for key in plan.new if key != "pos_embed"} == {"merged_layer1", "merged_layer2"}


def test_diffusers_weights_with_an_embedder_per_block_are_no_dit() -> None:
    assert "block 1" in refuse_canonical(diffusers_network(shared=False).state_dict())


def refuse_canonical(state: Mapping[str, Tensor]) -> str:
    with pytest.raises(InputError) as caught:
        canonical(Weights(state, "the.file"))
    return str(caught.value)


def test_incomplete_diffusers_weights_are_refused() -> None:
    state = diffusers_network().state_dict()
    del state["transformer_blocks.3.attn1.to_k.bias"]
    assert "blocks.3.attn.qkv.bias" in refusal(state, blueprint("dense", tiny(), {}))


@every_method
def test_our_checkpoint_loads_its_average_or_its_raw_weights(method: str, tmp_path: Path) -> None:
    raw, averaged = network(method, tiny()), network(method, tiny(), seed=1)
    states = {"model/": raw.state_dict(), "ema/": averaged.state_dict(), "optimizer/": {"x/exp_avg": torch.zeros(1)}}
    tensors = {prefix + key: value for prefix, state in states.items() for key, value in state.items()}
    header = {"step": 7, "network": describe(raw, "DiT-T/2")}
    save_checkpoint(tmp_path / "checkpoints" / "0000007.safetensors", tensors, header)
    for source in (tmp_path, tmp_path / "checkpoints" / "0000007.safetensors"):
        weights = read_weights(str(source))
        assert weights.header == header
        assert "EMA of step 7" in weights.origin
        assert same(loaded(weights, raw), averaged)
    path = tmp_path / "checkpoints" / "0000007.safetensors"
    assert same(loaded(read_weights(str(path), averaged=False), raw), raw)


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("layout", ["SparseDiT", "released SparseDiT"])
def test_sparsedit_exports_and_loads_back(split: dict[str, Any], layout: str) -> None:
    original = network("sparsedit", tiny(), split)
    state = export(original, layout)
    assert len(state) == len(original.state_dict())
    assert same(loaded(Weights(state, "file"), original), original)


@pytest.mark.parametrize("layout", ["SparseDiT", "released SparseDiT"])
def test_what_can_be_built_can_be_loaded_back(layout: str) -> None:
    """A network without modules: whoever builds it must recognize its checkpoint, or refuse to build it."""
    try:
        original = network("sparsedit", tiny(), {"poolingformer_blocks": 2, "modules": 0, "top_blocks": 6})
    except InputError:
        return
    assert same(loaded(Weights(export(original, layout), "file"), original), original)


def test_released_names_are_the_authors() -> None:
    original = network(
        "sparsedit", tiny(), {"poolingformer_blocks": 1, "modules": 1, "module_blocks": (1, 3, 1, 1), "top_blocks": 1}
    )
    names = set(export(original, original.released_layout))
    module = "dumbbell_blocks.0"
    assert {
        "pos_embed",
        "poolingformer_blocks.0.attn.v.weight",
        f"{module}.token_merge_blocks.0.attn.q.weight",
        f"{module}.token_merge_blocks.0.attn.kv.bias",
        f"{module}.semantic_blocks.2.attn.qkv.weight",
        f"{module}.token_recover_blocks.0.merged_layer1.weight",
        f"{module}.token_recover_blocks.0.merged_layer2.bias",
        f"{module}.normal_blocks.0.mlp.fc2.weight",
        "normal_blocks.0.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    } <= names
    assert not any(name.startswith("blocks.") for name in names)
    assert set(export(network("dense", tiny()), "DiT")) == set(network("dense", tiny()).state_dict())


@pytest.mark.parametrize("split", [SPLITS["default"], SPLITS["two of each"], SPLITS["no pooling"]])
def test_the_released_layout_tells_the_split_and_sizes(split: dict[str, Any]) -> None:
    original = network("sparsedit", tiny(in_channels=3, num_classes=4, learn_sigma=False), split)
    plan = recognized(Weights(export(original, original.released_layout), "file"), "DiT-T/2", (16, 16))
    assert (plan.backbone, plan.options) == (original.backbone, original.options)


def test_a_dense_checkpoint_is_recognized() -> None:
    original = network("dense", tiny(latent_size=(8, 8), num_classes=4))
    plan = recognized(Weights(original.state_dict(), "file"), "DiT-T/2", (8, 8))
    assert type(plan) is DiT
    assert plan.backbone == original.backbone
    state = {key: value for key, value in original.state_dict().items() if "x_embedder" not in key}
    with pytest.raises(InputError, match=r"^file: .*x_embedder.*is missing"):
        recognized(Weights(state, "file"), "DiT-T/2", (8, 8))


# Every key accounted for ---------------------------------------------------------------------------------------------

ROUTES = {
    "dense": ("dense", "dense"),
    "sparsedit": ("sparsedit", "sparsedit"),
    "conversion": ("dense", "sparsedit"),
    "dydit": ("dydit", "dydit"),
    "dydit from dense": ("dense", "dydit"),
}
every_route = pytest.mark.parametrize(("source", "target"), ROUTES.values(), ids=ROUTES)


def source_and_plan(source: str, target: str) -> tuple[State, DiT]:
    return dict(network(source, tiny()).state_dict()), blueprint(target, tiny(), {})


@every_route
@pytest.mark.parametrize("released", [False, True], ids=["ours", "released"])
def test_an_added_key_is_refused(source: str, target: str, released: bool) -> None:
    original = network(source, tiny())
    state = export(original, original.released_layout if released else "ours")
    state["blocks.0.attn.extra.weight"] = torch.zeros(1)
    assert "not expected: blocks.0.attn.extra.weight" in refusal(state, blueprint(target, tiny(), {}))


@every_route
def test_a_missing_key_is_refused(source: str, target: str) -> None:
    """Whichever it is; the position table alone is a formula and need not stand in a file."""
    state, plan = source_and_plan(source, target)
    # These say what the checkpoint is.
    told = {"blocks.0.attn.qkv.weight", "blocks.5.merged_layer1.weight", "blocks.0.attn_rate.router.weight"}
    for key in sorted(state.keys() - {"pos_embed"} - told):
        without = {name: value for name, value in state.items() if name != key}
        assert key in refusal(without, plan), key


@every_route
def test_another_shape_is_refused(source: str, target: str) -> None:
    state, plan = source_and_plan(source, target)
    for key in sorted(state.keys() - {"pos_embed", "y_embedder.embedding_table.weight"}):
        longer = torch.cat((state[key], state[key][:1]))
        assert key in refusal({**state, key: longer}, plan), key


@every_route
def test_another_width_or_depth_is_refused(source: str, target: str) -> None:
    _, plan = source_and_plan(source, target)
    for name in ("DiT-32x8x4/2", "DiT-48x12x4/2", "DiT-48x8x4/4"):
        assert "does not fit" in refusal(network(source, tiny(name)).state_dict(), plan)


def test_another_number_of_heads_is_refused_where_our_header_tells_it() -> None:
    """Heads leave no trace in shapes, and the same weights with other heads are another function."""
    original = network("dense", tiny("DiT-48x8x4/2"))
    weights = Weights(original.state_dict(), "file", {"network": describe(original, "DiT-48x8x4/2")})
    with pytest.raises(InputError):
        fit_weights(weights, blueprint("dense", tiny("DiT-48x8x2/2"), {}))


def test_many_differences_are_listed_in_one_line() -> None:
    message = refusal(network("dense", tiny("DiT-48x12x4/2")).state_dict(), blueprint("dense", tiny(), {}))
    assert re.search(r"not expected: .*blocks\.8\..* and \d+ more", message)


def test_two_names_of_one_key_are_refused() -> None:
    """With and without a wrapper's prefix: which of the two is meant cannot be told."""
    state = network("dense", tiny()).state_dict()
    state = {**state, "module.x_embedder.proj.bias": state["x_embedder.proj.bias"] + 1}
    with pytest.raises(InputError):
        fit_weights(Weights(state, "file"), blueprint("dense", tiny(), {}))


def test_foreign_weights_are_refused() -> None:
    assert "no known DiT layout" in refusal({"conv1.weight": torch.zeros(3, 3)}, blueprint("dense", tiny(), {}))


@pytest.mark.parametrize("layout", ["SparseDiT", "released SparseDiT"])
@pytest.mark.parametrize("target", ["dense", "dydit"])
def test_a_checkpoint_of_another_method_is_refused(layout: str, target: str) -> None:
    state = export(network("sparsedit", tiny()), layout)
    message = refusal(state, blueprint(target, tiny(), {}))
    assert "holds a sparsedit network" in message
    assert "--method sparsedit" in message


def test_a_sparsedit_of_another_split_is_refused() -> None:
    state = export(network("sparsedit", tiny(), SPLITS["two of each"]), "SparseDiT")
    assert "does not fit" in refusal(state, blueprint("sparsedit", tiny(), {}))


def test_every_row_of_a_converted_checkpoint_is_used_or_declared_dropped() -> None:
    state, plan = source_and_plan("dense", "sparsedit")
    _, loading = fit_weights(Weights(state, "file"), plan)
    rows = [*loading.sources.values(), *loading.dropped]
    for key in state:
        assert sorted(third for row in rows if row.key == key for third in range(row.start, row.stop)) == [0, 1, 2]
    assert set(loading.sources) | set(loading.new) == set(plan.state_dict())
    assert {row.key for row in loading.dropped} == {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}
    assert "blocks.0.attn.qkv.weight" in loading.summary()
    assert f"{len(loading.sources)} tensors loaded from DiT weights; new: blocks.5.merged_layer1.weight" in loading.summary()


@pytest.mark.parametrize("broken", ["a source", "a dropped row", "a new key"])
def test_incomplete_rules_of_a_method_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known-bad variants of a method's rules: one entry forgotten."""
    state, plan = source_and_plan("dense", "sparsedit")
    rules = plan.dense_rules()
    if broken == "a source":
        sources = {key: rows for key, rows in rules.sources.items() if key != "blocks.3.mlp.fc1.bias"}
        forgotten, rules = "blocks.3.mlp.fc1.bias", type(rules)(sources, rules.new, rules.dropped)
    elif broken == "a dropped row":
        forgotten, rules = "blocks.0.attn.qkv.weight", type(rules)(rules.sources, rules.new, frozenset())
    else:
        forgotten, rules = "blocks.5.merged_layer1.weight", type(rules)(rules.sources, frozenset(), rules.dropped)
    monkeypatch.setattr(plan, "dense_rules", lambda: rules)
    assert forgotten in refusal(state, plan)


# What may differ -----------------------------------------------------------------------------------------------------


@every_route
def test_another_class_count_starts_the_label_table_anew_and_warns(source: str, target: str) -> None:
    state = dict(network(source, tiny()).state_dict())
    plan = blueprint(target, tiny(num_classes=7), {})
    torch.manual_seed(0)
    rebuilt, loading = build_with(plan, Weights(state, "file"))
    assert "y_embedder.embedding_table.weight" in loading.new
    (warning,) = loading.warnings
    assert "10 classes" in warning
    assert "this network 7" in warning
    torch.manual_seed(0)
    assert torch.equal(rebuilt.y_embedder.embedding_table.weight, build(plan).y_embedder.embedding_table.weight)
    assert torch.equal(rebuilt.x_embedder.proj.weight, state["x_embedder.proj.weight"])


@every_route
@pytest.mark.parametrize("latent_size", [(8, 8), (8, 24)])
def test_another_latent_size_computes_the_position_table(source: str, target: str, latent_size: tuple[int, int]) -> None:
    state = dict(network(source, tiny()).state_dict())
    rebuilt, loading = build_with(blueprint(target, tiny(latent_size=latent_size), {}), Weights(state, "file"))
    assert "pos_embed" in loading.new
    assert loading.warnings == ()
    assert len(loading.notes) == 1
    assert torch.equal(rebuilt.pos_embed, position_embedding(48, (latent_size[0] // 2, latent_size[1] // 2)))


def test_a_map_of_the_same_size_and_another_shape_computes_the_position_table() -> None:
    """16 x 16 and 8 x 32 have tables of one shape, with other positions in them."""
    state = network("dense", tiny(latent_size=(16, 16))).state_dict()
    rebuilt, _ = build_with(blueprint("dense", tiny(latent_size=(8, 32)), {}), Weights(state, "file"))
    assert torch.equal(rebuilt.pos_embed, position_embedding(48, (4, 16)))


def test_half_precision_weights_load_into_a_float32_network() -> None:
    state = {key: value.half() for key, value in network("dense", tiny()).state_dict().items()}
    rebuilt, _ = build_with(blueprint("dense", tiny(), {}), Weights(state, "file"))
    assert all(parameter.dtype == torch.float32 for parameter in rebuilt.parameters())
    assert torch.equal(rebuilt.x_embedder.proj.weight, state["x_embedder.proj.weight"].float())


def test_the_blueprint_decides_without_reading_tensors() -> None:
    state, plan = source_and_plan("dense", "sparsedit")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert identify(shapes, METHODS) == ("dense", "DiT", {})
    real = network("sparsedit", tiny())
    load(real, state, plan_loading(plan, shapes, METHODS))
    assert torch.equal(real.state_dict()["blocks.7.mlp.fc1.weight"], state["blocks.7.mlp.fc1.weight"])
