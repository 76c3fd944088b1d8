"""Runs of the scripts on tiny data: as a user's subprocess, or inside this process where a subprocess adds nothing.

Both compute in one thread, so that their numbers can be compared bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

import models
from data.extraction import Extraction, begin_extraction
from data.images import Listing
from data.manifest import FeatureSettings
from runtime.checkpoint import checkpoints, read_header, read_tensors
from runtime.config import run_script

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 60
SHORT = ("--max-steps", "6", "--global-batch-size", "8", "--log-every", "2", "--checkpoint-every", "4")
"""What makes a training short."""
QUICK = ("--num-sampling-steps", "5", "--per-proc-batch-size", "4")
"""What makes sampling quick."""


@dataclass(frozen=True)
class Result:
    code: int | str | None
    out: str
    err: str


def environment() -> dict[str, str]:
    """This process's environment without what a launcher or a configured accelerate would add; one thread; no GPU, so that
    subprocess and test compare like with like.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and not name.startswith("ACCELERATE_")}
    port = {"PET_MASTER_PORT": str(free_port())}  # torchrun's default port may be taken by another test
    return kept | port | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(words: Iterable[str | Path], folder: Path, timeout: float = TIMEOUT) -> Result:
    """`python WORDS...` in `folder`, to its end; an error when it does not end in `timeout` seconds."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise TimeoutError(f"not finished after {timeout} seconds: {out[-1000:]} {err[-1000:]}") from None
    return Result(process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
    """`kill -9` of a process and of what it started: a launcher's workers would outlive it."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def start(words: Iterable[str | Path], folder: Path) -> subprocess.Popen[str]:
    """`python WORDS...` in `folder`; its output goes to FOLDER/output.txt."""
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


def torchrun(processes: int, script: str | Path, *words: str | Path) -> list[str | Path]:
    """The words of `torchrun --nnodes=1 --nproc_per_node=N SCRIPT ...`."""
    return ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}", script, *words]


def call(script: str, *words: object) -> Result:
    """`SCRIPT.py WORDS...` inside this process."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    module: Any = importlib.import_module(script)
    sys.argv = [f"{script}.py", *map(str, words)]
    code: int | str | None = None
    try:
        with alone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(module.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def succeed(script: str, *words: object) -> Result:
    """As `call`, for runs that must end well."""
    result = call(script, *words)
    assert result.code == 0, result.err
    return result


class WithScaler(Accelerator):
    """What fp16 on a GPU adds: a gradient scaler. Its factors are powers of two, so no weight's bits depend on them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        self.scaler.unscale_(optimizer.optimizer)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread, no GPU as in the subprocesses, and an accelerate that remembers nothing of earlier runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_accelerate()
    try:
        with mock.patch("torch.cuda.is_available", return_value=False):
            yield
    finally:
        forget_accelerate()
        torch.set_num_threads(threads)


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Data and weights ----------------------------------------------------------------------------------------------------


def write_features(
    folder: Path, settings: FeatureSettings, classes: int, rows: np.ndarray, targets: np.ndarray | None = None
) -> Path:
    """A feature cache of `rows` (count, *settings.row_shape), whose pictures are dealt to the classes in equal runs; with
    alignment `targets` (count, mirrors, tokens, width) where the settings have them.
    """
    names = [f"class{index * classes // len(rows)}/{index:04d}.png" for index in range(len(rows))]
    listing = Listing(tuple(f"class{label}" for label in range(classes)), tuple(names))
    extraction = begin_extraction(folder, settings, listing)
    assert isinstance(extraction, Extraction)
    extraction.open_for_writing(0)
    for block in extraction.pending_blocks():
        pictures = extraction.pictures_of(block)
        part = slice(pictures.start, pictures.stop)
        extraction.write_block(block, rows[part], {}, None if targets is None else targets[part])
    extraction.finish(skip_broken=False)
    return folder


def random_network(method: str, backbone: models.Backbone, options: Mapping[str, Any] | None = None) -> models.DiT:
    """A network whose every parameter matters: freshly initialised, it would be the zero function."""
    network = models.create_model(method, backbone, options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            scale = 0.04 if name.startswith("final_layer.linear") else 0.1  # outputs of about the size of noise
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return network


# What a run left -----------------------------------------------------------------------------------------------------


def state_at(run_folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a run's checkpoint of `step` (None: the newest): weights, average, optimizer moments."""
    saved = checkpoints(run_folder)
    chosen = saved[-1] if step is None else next(path for path in saved if int(path.stem) == step)
    return read_tensors(chosen, "")


def header_at(run_folder: Path) -> dict[str, Any]:
    """The JSON header of a run's newest checkpoint."""
    header = read_header(checkpoints(run_folder)[-1])
    assert header is not None
    return header


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, read as strictly as JSON is defined."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def recorded(function: Callable[..., Any], into: list[Any]) -> Callable[..., Any]:
    """`function`, noting the result of each call."""

    def wrapper(*arguments: Any) -> Any:
        into.append(function(*arguments))
        return into[-1]

    return wrapper
