"""Samples a few pictures of chosen classes into one grid.

python sample.py --ckpt results/DiT-XL-2-sparsedit-256/checkpoints/0400000.safetensors --class-labels 207,360
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from data.latents import load_codec
from runtime.config import ArgumentParser, InputError, from_mapping, nearest, option, run_script
from runtime.decoding import decode_pictures
from runtime.distributed import make_state
from runtime.execution import Executor, resolve_execution
from runtime.files import atomic_write, check_new_file
from runtime.sampling import CheckpointSettings, choose_checkpoint, open_checkpoint, picture_grid, sample_latents
from runtime.startup import FirstPictures
from runtime.work_report import work_lines

IMAGENET_EXAMPLES = (207, 360, 387, 974, 88, 979, 417, 279)
"""The classes of DiT's well-known grid: what a network of 1000 classes shows when none are named."""


@dataclass(frozen=True)
class GridSettings(CheckpointSettings):
    cfg_scale: float = option(4.0, "guidance scale; 1: none. 1.5 for scores, 4.0 for pictures")
    compile: Literal["auto", "none", "default", "max-autotune"] = option(
        "none", "compile the blocks; takes a minute the first time, which a few pictures seldom earn back; auto: on a GPU"
    )
    class_labels: str | None = option(None, "classes by number or name, separated by commas; none: some of them")
    class_names: str | None = option(None, "file of class names: a JSON list, or one name a line; none: the checkpoint's")
    per_class: int = option(1, "pictures of each class")
    columns: int | None = option(None, "pictures in a row; none: about square")
    output: str = option("sample.png", "file to write")
    batch_size: int = option(16, "pictures sampled at once")


def sample(settings: GridSettings) -> None:
    """Checks, samples, writes one PNG."""
    if min(settings.per_class, settings.batch_size, 1 if settings.columns is None else settings.columns) < 1:
        raise InputError("--per-class, --batch-size and --columns must be at least 1.")
    check_new_file(settings.output, "--output")
    device = make_state().device
    execution = resolve_execution(settings, device)
    checkpoint, spec = open_checkpoint(settings, choose_checkpoint(settings))
    settings = settings.under(checkpoint.objective)
    names = read_names(settings.class_names) if settings.class_names else checkpoint.classes
    num_classes = checkpoint.network.backbone.num_classes
    if names and len(names) != num_classes:
        raise InputError(f"{settings.class_names} names {len(names)} classes, and the network has {num_classes}.")
    chosen = choose_classes(settings.class_labels, names, num_classes)
    codec, checkpoint = load_codec(spec, device), checkpoint.build()
    network = checkpoint.network
    predict = Executor(network, execution)
    print("\n".join((*checkpoint.lines(settings), *predict.execution.lines())), flush=True)
    labels = torch.tensor([label for label in chosen for _ in range(settings.per_class)])
    pictures: list[torch.Tensor] = []
    first = FirstPictures(predict.execution)
    for start in range(0, len(labels), settings.batch_size):
        index = torch.arange(start, min(len(labels), start + settings.batch_size))
        latents = sample_latents(network, settings, labels[index], index, settings.seed, device, predict)
        pictures.append(decode_pictures(codec, latents))
        if start == 0:
            print(first.line(), flush=True)
    grid = picture_grid(torch.cat(pictures), settings.columns)
    if network.work is not None:
        print("\n".join(work_lines(network, network.work)), flush=True)
    with atomic_write(settings.output) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, format="png")
    shown = ", ".join(f"{label} {names[label]}" if names else str(label) for label in chosen)
    print(f"{settings.output}: {len(labels)} pictures of classes {shown}")


def choose_classes(asked: str | None, names: Sequence[str] | None, num_classes: int) -> list[int]:
    """Class numbers for "207,golden retriever". InputError names what is no class."""
    if asked is None:
        return list(IMAGENET_EXAMPLES) if num_classes == 1000 else list(range(min(8, num_classes)))
    chosen = []
    for word in (word.strip() for word in asked.split(",")):
        if names and word in names:
            chosen.append(list(names).index(word))
        elif word.isdigit() and int(word) < num_classes:
            chosen.append(int(word))
        elif word.isdigit() or not names:
            raise InputError(f"class {word!r} is none of the {num_classes} classes; give numbers 0 to {num_classes - 1}"
                             + ("." if names else ", or names with --class-names."))  # fmt: skip
        else:
            raise InputError(f"class {word!r} is not known{nearest(word, list(names))}")
    return chosen


def read_names(path: str) -> list[str]:
    """Class names in the order of their numbers, from a JSON list or the lines of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: class names cannot be read ({error}).") from None
    if path.endswith(".json"):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is no JSON ({error}).") from None
        if not isinstance(content, list):
            raise InputError(f"{path} must hold a JSON list of class names.")
        return [str(name) for name in content]
    return [line.strip() for line in text.splitlines() if line.strip()]


def main() -> None:
    parser = ArgumentParser("Samples pictures of chosen classes into one grid.")
    parser.add_config(GridSettings)
    sample(from_mapping(GridSettings, vars(parser.parse_args()), "command line"))


if __name__ == "__main__":
    run_script(main)
