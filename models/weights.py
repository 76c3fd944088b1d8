"""Weights of any known layout into any network, with every key of both sides accounted for.

A checkpoint here is a flat dictionary of tensors (or, for planning, of shapes); reading files is `runtime/checkpoint.py`'s.
Loading has two steps: `plan_loading` decides from names and shapes alone where every key of the network comes from and
raises when a key of either side is left over; `load` carries the plan out. The plan can be made on the meta device, so a
checkpoint that does not fit is refused before a network is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.layers import FREQUENCIES, timestep_frequencies
from runtime.config import InputError

if TYPE_CHECKING:
    from models.dit import DiT

LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITION_TABLE = "pos_embed"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """Thirds `start` to `stop` of the first dimension of a checkpoint's tensor (a qkv projection has three parts)."""

    key: str
    start: int = 0
    stop: int = 3

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        # Rows that do not divide by three are no qkv projection: their whole shape fits nothing.
        whole_taken = self.stop - self.start == 3 or whole[0] % 3
        return whole if whole_taken else (whole[0] // 3 * (self.stop - self.start), *whole[1:])

    def of(self, tensor: Tensor) -> Tensor:
        third = tensor.shape[0] // 3
        return tensor if self.stop - self.start == 3 else tensor[self.start * third : self.stop * third]


@dataclass(frozen=True)
class DenseRules:
    """How a dense DiT becomes a method's network: a source per key, keys that start anew, rows that nobody takes."""

    sources: Mapping[str, Rows]
    new: frozenset[str] = frozenset()
    dropped: frozenset[Rows] = frozenset()


@dataclass(frozen=True)
class LoadingPlan:
    """Where every key of a network comes from. `notes` are facts to print, `warnings` what a user may not have meant."""

    layout: str
    sources: Mapping[str, Rows]
    new: tuple[str, ...]
    dropped: tuple[Rows, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """One line: what was loaded, what is new, what was left out."""
        new = f"; new: {_listed(self.new)}" if self.new else "; nothing new"
        dropped = f"; left out: {_listed([rows.key for rows in self.dropped])}" if self.dropped else ""
        return f"{len(self.sources)} tensors loaded from {self.layout} weights{new}{dropped}"


def plan_loading(network: DiT, shapes: Shapes, methods: Mapping[str, type[DiT]]) -> LoadingPlan:
    """Where each key of `network` (the meta device is enough) comes from in a checkpoint of these shapes.

    Raises InputError when the checkpoint is of another method, or when a key of either side stays unaccounted for.
    """
    method, layout, _ = identify(shapes, methods)
    if type(network) is methods[method]:
        names = network.layout_names(layout)
        rules = DenseRules({key: Rows(name) for key, name in names.items()})
    elif method == next(iter(methods)):  # the dense DiT stands first in the registry
        rules = network.dense_rules()
    else:
        own = next(name for name, kind in methods.items() if type(network) is kind)
        raise InputError(f"the checkpoint holds a {method} network, and --method {own} starts from dense DiT or {own} "
                         f"weights; give one of those or --method {method}.")  # fmt: skip
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    rows, columns = network.backbone.grid
    return _accounted(rules, layout, ours, shapes, square=rows == columns)


def _accounted(rules: DenseRules, layout: str, ours: Shapes, theirs: Shapes, square: bool) -> LoadingPlan:
    sources, new, dropped = dict(rules.sources), set(rules.new), set(rules.dropped)
    notes, warnings = [], []
    label, position = sources.get(LABEL_TABLE), sources.get(POSITION_TABLE)
    if label and label.key in theirs and theirs[label.key][0] != ours[LABEL_TABLE][0]:
        there, here = theirs[label.key][0] - 1, ours[LABEL_TABLE][0] - 1
        warnings.append(f"the label table is re-initialised: the checkpoint has {there} classes, this network {here}")
        new.add(LABEL_TABLE)
        dropped.add(sources.pop(LABEL_TABLE))
    if position and (theirs.get(position.key) != ours[POSITION_TABLE] or not square):
        # The table is a formula of the grid, not a learned weight; diffusers does not even store it. A table of the right
        # length may be that of another rectangle.
        notes.append("the position table is computed for this latent size")
        new.add(POSITION_TABLE)
        if sources.pop(POSITION_TABLE).key in theirs:
            dropped.add(position)
    unsourced = [key for key in ours if key not in sources and key not in new]
    absent = [f"{rows.key} (for {key})" for key, rows in sources.items() if rows.key not in theirs]
    used: dict[str, set[int]] = {key: set() for key in theirs}
    for rows in (*sources.values(), *dropped):
        used.setdefault(rows.key, set()).update(range(rows.start, rows.stop))
    unused = [key for key in theirs if used[key] != {0, 1, 2}]
    misshapen = [
        f"{rows.key} is {list(rows.shape(theirs[rows.key]))}, not {list(ours[key])}"
        for key, rows in sources.items()
        if rows.key in theirs and rows.shape(theirs[rows.key]) != ours[key]
    ]
    if unsourced or absent or unused or misshapen:
        parts = [("missing", [*absent, *unsourced]), ("not expected", unused), ("of another shape", misshapen)]
        difference = "; ".join(f"{name}: {_listed(keys)}" for name, keys in parts if keys)
        raise InputError(
            f"the checkpoint ({layout} layout) does not fit the network: {difference}; give the --model it was made with, or "
            "copy the file again."
        )
    ordered = tuple(key for key in ours if key in new)
    return LoadingPlan(layout, sources, ordered, tuple(sorted(dropped, key=str)), tuple(notes), tuple(warnings))


def load(network: DiT, state: Mapping[str, Tensor], plan: LoadingPlan) -> None:
    """Copies the checkpoint's tensors into `network` as planned; new keys keep the values the network was built with."""
    own = network.state_dict()
    with torch.no_grad():
        for key, rows in plan.sources.items():
            own[key].copy_(rows.of(state[rows.key]))


def identify(shapes: Shapes, methods: Mapping[str, type[DiT]]) -> tuple[str, str, Mapping]:
    """(method, layout, options told by the keys) of a checkpoint. InputError when no method knows its keys."""
    # Dense stands first in the registry and its keys are part of every other method's: ask it last.
    for name, kind in reversed(list(methods.items())):
        recognized = kind.recognize(shapes)
        if recognized:
            return name, *recognized
    raise InputError(f"the checkpoint's keys ({_listed(list(shapes))}) are those of no known DiT layout; give the weights of a "
                     "DiT, SiT, SparseDiT, DyDiT, SPRINT or diffusers DiT, or one of our checkpoints.")  # fmt: skip


def export(network: DiT, layout: str) -> dict[str, Tensor]:
    """The network's weights under the names of `layout` ("DiT", "released SparseDiT", ...)."""
    state = network.state_dict()
    return {name: state[key].detach().cpu().contiguous() for key, name in network.layout_names(layout).items()}


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes `module.` (data parallel) and `_orig_mod.` (torch.compile) from the front of every key, however often."""
    names = {key: re.sub(r"^(module\.|_orig_mod\.)+", "", key).replace("._orig_mod.", ".") for key in state}
    if len(set(names.values())) < len(names):
        raise InputError("the checkpoint holds weights with and without a `module.` or `_orig_mod.` prefix under one name; "
                         "save one of the two alone.")  # fmt: skip
    return {names[key]: value for key, value in state.items()}


FIRST_TIME_LAYER = "t_embedder.mlp.0.weight"
FINAL_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")


def from_sit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SiT (arXiv 2401.08740) in our conventions, and back: its time runs from noise to data, and so does its velocity.

    With s = 1 - t, the sinusoids of s are those of t turned by the frequencies, which goes into the first layer behind them;
    the velocity's sign goes into the last layer. Both are exact, up to rounding to float32. Variance outputs, which SiT
    throws away, are left out.
    """
    converted = without_variance(state)
    cos, sin = converted[FIRST_TIME_LAYER].double().chunk(2, dim=1)  # (D, 128) each: of cosines, of sines
    frequencies = timestep_frequencies().to(cos)
    c, s = frequencies.cos(), frequencies.sin()
    turned = torch.cat((cos * c + sin * s, cos * s - sin * c), dim=1)  # (D, 256)
    converted[FIRST_TIME_LAYER] = turned.to(torch.promote_types(state[FIRST_TIME_LAYER].dtype, torch.float32))
    for name in FINAL_LAYER:
        converted[name] = -converted[name]
    return converted


def is_whole_sit(shapes: Shapes) -> bool:
    """Whether the tensors are there that `from_sit` converts."""
    outputs = [shapes.get(name, (0,))[0] for name in FINAL_LAYER]
    return shapes.get(FIRST_TIME_LAYER, ())[1:] == (FREQUENCIES,) and outputs[0] == outputs[1] > 0


def has_variance(shapes: Shapes) -> bool:
    """Whether a network also puts out a variance for each channel."""
    patches = shapes.get("x_embedder.proj.weight", ())  # (D, C, p, p), or (D, C p p) of flattened ones
    outputs = {shapes.get(name, (0,))[0] for name in FINAL_LAYER}
    return len(patches) > 1 and outputs == {2 * math.prod(patches[1:])}


def without_variance(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without variance outputs, which are the second half of the channels.

    Channels stand last, at each place of a patch, or first where patches are embedded flattened.
    """
    result = dict(state)
    if not has_variance({key: tuple(value.shape) for key, value in state.items()}):
        return result
    patches = state["x_embedder.proj.weight"]
    places, channels = math.prod(patches.shape[2:]), patches.shape[1]  # flattened: one place, all numbers its channels
    for name in FINAL_LAYER:
        rows = result[name].unflatten(0, (places, -1))  # (p p, 2 C, ...)
        result[name] = rows[:, :channels].flatten(0, 1)
    return result


def with_blank_variance(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DiT's layout with variance outputs of zero, for code that expects some and throws them away."""
    result, patches = dict(state), state["x_embedder.proj.weight"]  # (D, C, p, p)
    for name in FINAL_LAYER:
        rows = result[name].unflatten(0, (math.prod(patches.shape[2:]), -1))  # (p p, C, ...)
        result[name] = torch.cat((rows, torch.zeros_like(rows)), dim=1).flatten(0, 1)
    return result


DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
"""diffusers' DiTTransformer2DModel block -> DiT block; queries, keys and values are joined besides."""

DIFFUSERS_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}

DIFFUSERS_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": LABEL_TABLE,
}


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers-layout DiT under DiT's names; other layouts come back unchanged.

    diffusers stores a copy of the timestep and label embedders in every block. They must be equal; one is kept.
    """
    if "transformer_blocks.0.attn1.to_q.weight" not in state:
        return dict(state)
    rest = dict(state)
    result: dict[str, Tensor] = {}
    for theirs, ours in DIFFUSERS_OUTSIDE.items():
        _move(rest, result, theirs, ours)
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"transformer_blocks\.(\d+)\.", key)))
    for i in range(depth):
        for theirs, ours in DIFFUSERS_BLOCK.items():
            _move(rest, result, f"transformer_blocks.{i}.{theirs}", f"blocks.{i}.{ours}")
        for part in ("weight", "bias"):
            names = [f"transformer_blocks.{i}.attn1.to_{name}.{part}" for name in "qkv"]
            if all(name in rest for name in names):
                parts = [rest.pop(name) for name in names]
                result[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(parts)
        for theirs, ours in DIFFUSERS_EMBEDDERS.items():
            tensor = rest.pop(f"transformer_blocks.{i}.norm1.emb.{theirs}", None)
            if tensor is not None and not torch.equal(result.setdefault(ours, tensor), tensor):
                raise InputError(f"block {i} of the diffusers checkpoint has its own {theirs}, which DiT shares between "
                                 "blocks; this is not a DiT.")  # fmt: skip
    return {**result, **rest}


def _move(source: dict[str, Tensor], target: dict[str, Tensor], old: str, new: str) -> None:
    for part in ("weight", "bias"):
        if f"{old}.{part}" in source:
            target[f"{new}.{part}"] = source.pop(f"{old}.{part}")


def _listed(keys: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
