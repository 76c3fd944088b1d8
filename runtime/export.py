"""`train.py export`: the weights of a training checkpoint, for others to load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models import DiT
from models.backbone import SIT
from models.weights import export as export_state
from models.weights import from_sit, with_blank_variance
from runtime.checkpoint import read_header, read_tensors, save_checkpoint, save_state
from runtime.config import ArgumentParser, InputError, to_mapping
from runtime.files import check_new_file
from runtime.networks import build, described, method_name, published_objective, published_time_scale


def export(arguments: list[str]) -> None:
    """`train.py export CHECKPOINT OUTPUT`: the averaged weights alone, under our names or a released layout's."""
    parser = ArgumentParser("Writes the weights of a training checkpoint, without optimizer state.", "train.py export")
    parser.add_argument("checkpoint", help="a checkpoint of train.py")
    parser.add_argument("output", help="file to write: .safetensors, or .pt for a released layout")
    parser.add_argument("--layout", default="ours", choices=("ours", "released"), help="key names (default: ours)")
    parser.add_argument("--raw", action="store_true", help="the raw weights in place of the averaged ones")
    chosen = parser.parse_args(arguments)
    header = read_header(chosen.checkpoint) if chosen.checkpoint.endswith(".safetensors") else None
    if header is None or "settings" not in header:
        raise InputError(f"{chosen.checkpoint} is no training checkpoint; give one that train.py wrote under checkpoints/.")
    if chosen.layout == "ours" and not chosen.output.endswith(".safetensors"):
        raise InputError(f"{chosen.output}: our layout is written as .safetensors; give such a name, or --layout released.")
    if Path(chosen.output).exists() and Path(chosen.output).samefile(chosen.checkpoint):
        raise InputError(f"{chosen.output} is the checkpoint itself; give another output.")
    check_new_file(chosen.output, "output")
    kept = {key: header[key] for key in ("network", "data", "versions", "objective", "step")}
    kept["weights"] = "raw" if chosen.raw else "ema"
    network = build(described(header["network"]))
    network.load_state_dict(read_tensors(chosen.checkpoint, "model/" if chosen.raw else "ema/"))
    if chosen.layout == "ours":
        save_checkpoint(chosen.output, network.state_dict(), kept)
    else:
        save_state(chosen.output, as_released(network, header["network"]["model"]))
        untold = not_in_layout(network, header["network"]["model"])
        if untold:
            print(f"This layout holds no options; whoever loads it must know {untold}")
    print(f"{chosen.output}: {'raw' if chosen.raw else 'averaged'} weights of step {header['step']}, {chosen.layout} layout")


def as_released(network: DiT, model: str) -> Mapping[str, Tensor]:
    """The weights under the names and conventions of the authors of `model` and the network's method."""
    state = export_state(network, network.released_layout)
    return with_blank_variance(from_sit(state)) if is_sit(network, model) else state


def is_sit(network: DiT, model: str) -> bool:
    """Whether a network is a SiT, whose conventions are its own."""
    return model.startswith(SIT) and method_name(network) == "dense" and network.backbone.time_scale == 1


def not_in_layout(network: DiT, model: str) -> str:
    """What a released layout does not say of the network, where it is not as published; empty where it is."""
    options, default = to_mapping(network.options), type(network).resolve(network.options_type(), network.backbone)
    published = published_objective(model, method_name(network)), published_time_scale(model, method_name(network))
    there = network.backbone.objective, network.backbone.time_scale
    told = [] if there == published else [f"objective {there[0]}", f"time_scale {there[1]:g}"]
    if any(value != to_mapping(default)[name] for name, value in options.items() if name not in network.training_options):
        told += [f"{name} {value}" for name, value in options.items()]
    return ", ".join(told)
