"""Training steps: a plain loop as published scripts write it, against `Trainer.optimize` with everything that makes it fast.

All draw the same weights, latents, labels, timesteps and noise, so their losses can be compared.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceiling import ceilings
from benchmarks.contestants import OURS, PLAIN, random_network, with_numerics
from benchmarks.memory import weights_gib
from benchmarks.options import DENSE, NetworkSettings, options_in, recorded
from benchmarks.result import Work, heading, rows_of, table
from benchmarks.timing import interleaved
from diffusion.schedule import Timesteps
from models import DiT
from models.token_density import TIMESTEPS
from runtime.compilation import training_execution
from runtime.config import option
from runtime.density_groups import group_timestep, interval_of
from runtime.distributed import make_accelerator
from runtime.logs import say
from runtime.networks import blueprint, build, summary
from runtime.objectives import Objective, make_objective
from runtime.seeding import Keys, integers, normal
from runtime.settings import TrainingSettings, with_objective
from runtime.training import Batch, Trainer, TrainingStep

PICTURES = 256
FORWARD_AND_BACKWARD = 3
"""A backward pass multiplies twice as much as a forward pass: once for the gradients of inputs, once for those of weights."""
GPU_BATCH, CPU_BATCH = 32, 2
DRAWN = (
    "a step draws one part of a density that varies: GMACs are their mean, and the spread of rounds is mostly that of the draws"
)


@dataclass(frozen=True)
class TrainSettings(NetworkSettings):
    batch_size: int | None = option(None, "pictures of a step; none: 32 on a GPU, 2 on a CPU")
    steps_per_round: int | None = option(None, "optimizer steps of a round; none: 10 on a GPU, 1 on a CPU")
    against: str | None = option(
        None, "options with which the method itself takes the dense network's place, as --options: 'drop_ratio=0'"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option("auto", "of our loop, as train.py --precision")
    compile: Literal["auto", "none", "default", "max-autotune"] = option("auto", "of our loop, as train.py --compile")
    gradient_checkpointing: Literal["none", "selective", "full"] = option("none", "of our loop, as train.py's", bare="full")

    def rival(self) -> tuple[str, DiT]:
        """Name and blueprint of what the method is compared with: the dense network, or itself as `--against` says."""
        if not self.against:
            return DENSE, self.blueprints()[0]
        options = self.method_options() | options_in(self.method, self.against, "--against")
        return f"{self.method} {self.against}", blueprint(self.method, self.backbone(), options)


QUICK_CPU: Mapping[str, Any] = {"model": "DiT-S/2", "image_size": 256, "rounds": 3}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3}


class RandomData:
    """Latents and labels that are drawn once and held on the CPU, in the order of their places."""

    def __init__(self, blueprint: DiT) -> None:
        backbone, keys = blueprint.backbone, Keys(0, 0, torch.arange(PICTURES))
        self.latents = normal(keys, "latents", (backbone.in_channels, *backbone.latent_size))  # (PICTURES, C, H, W)
        self.labels = integers(keys, "labels", backbone.num_classes)  # (PICTURES,)

    def __len__(self) -> int:
        return PICTURES

    def batch_at(self, step: int, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """positions (n,) int64 -> latents (n, C, H, W), labels (n,), on `device`"""
        places = (step * len(positions) + positions) % PICTURES
        return self.latents[places].to(device), self.labels[places].to(device)


class PlainLoop:
    """What published scripts do: eager, fp16 autocast with a gradient scaler on a GPU, AdamW as torch has it by default, the
    average updated parameter by parameter, the loss read back at every step.
    """

    def __init__(self, network: DiT, objective: Objective, data: RandomData, batch: int, device: torch.device) -> None:
        self.network, self.data, self.device = network, data, device
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.step_module, self.plans = TrainingStep(network, objective, 0), network.training_plans()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=TrainingSettings.learning_rate, weight_decay=0.0)
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.positions, self.step, self.losses = torch.arange(batch), 0, list[float]()

    def optimize(self) -> None:
        """One optimizer step."""
        latents, labels = self.data.batch_at(self.step, self.positions, self.device)
        interval = interval_of(
            [timesteps for timesteps, _ in self.plans],
            group_timestep(0, self.step, 0, 1, self.step_module.objective.timestep_at),
        )
        timesteps, plan = self.plans[interval]
        bounds = Timesteps(*(torch.tensor(bound, device=self.device) for bound in (timesteps.start, timesteps.stop)))
        batch = Batch(latents, labels, self.positions.to(self.device), bounds, plan)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            loss, _ = self.step_module(batch, torch.tensor(self.step, device=self.device))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # here, as in our loop: what stands between rounds is not in the memory that a round adds
        decay = TrainingSettings.ema_decay
        for average, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.mul_(decay).add_(parameter.data, alpha=1 - decay)
        self.losses.append(loss.item())
        self.step += 1

    def take(self) -> float:
        """The mean loss since the last call."""
        taken, self.losses = self.losses, []
        return statistics.fmean(taken)


def measure(settings: TrainSettings) -> dict[str, Any]:
    """Seconds of `steps_per_round` optimizer steps: the method's rival and the method plain, and the method by our loop.

    A rival that is the method itself goes by our loop too.
    """
    rival, other = settings.rival()
    blueprints = other, settings.blueprints()[1]
    gpu = torch.cuda.is_available()
    device, batch = torch.device("cuda" if gpu else "cpu"), settings.batch_size or (GPU_BATCH if gpu else CPU_BATCH)
    steps = settings.steps_per_round or (10 if gpu else 1)
    execution = training_execution(our_settings(settings, batch), device)
    if execution.note:
        say(f"WARNING: {execution.note}")
    data, objective = RandomData(blueprints[1]), make_objective(our_settings(settings, batch))
    plain, ours = f"{settings.method}, {PLAIN}", f"{settings.method}, {OURS}"
    loops = {
        name: PlainLoop(trainable(one, device), objective, data, batch, device)
        for name, one in {f"{rival}, {PLAIN}": other, plain: blueprints[1]}.items()
    }
    trained = {f"{rival}, {OURS}": other, ours: blueprints[1]} if settings.against else {ours: blueprints[1]}
    curves: dict[str, list[float]] = {name: [] for name in (*loops, *trained)}
    with ExitStack() as stack:
        trainers = {
            name: stack.enter_context(our_loop(settings, trainable(one, device), execution.precision, batch, data, objective))
            for name, one in trained.items()
        }
        networks = {name: (loop.network, plain_precision(device)) for name, loop in loops.items()}
        networks |= {name: (trainer.network, execution.precision) for name, trainer in trainers.items()}
        takes: dict[str, tuple[Callable[[], object], Callable[[], float]]]
        takes = {name: (loop.optimize, loop.take) for name, loop in loops.items()}
        takes |= {name: (trainer.optimize, partial(take_losses, trainer)) for name, trainer in trainers.items()}
        runs = {
            name: with_numerics(precision, rounds_of(*takes[name], steps, curves[name]))
            for name, (_, precision) in networks.items()
        }
        works = {name: work_of(network, batch * steps, steps, precision) for name, (network, precision) in networks.items()}
        precisions = [precision for _, precision in networks.values()]
        if gpu:  # AdamW's moments come with the first step, and on a GPU the memory that the warm-up adds counts
            for name, (_, precision) in networks.items():
                with_numerics(precision, takes[name][0])()
        ceiling = ceilings(device, precisions)
        timings = interleaved(runs, settings.rounds, device)
        ceiling = ceilings(device, precisions, ceiling)
    resolved = {"precision": execution.precision, "compile": execution.compile}
    return {
        "settings": recorded(settings, device=device.type, batch_size=batch, steps_per_round=steps, **resolved),
        "networks": [summary(network, settings.model) for network in blueprints],
        "rows": rows_of(timings, works, plain, ceiling),
        "against": rival,
        "ceiling": ceiling,
        "notes": [DRAWN] if blueprints[1].plan_varies else [],
        "losses": curves,
        "largest_difference": largest_difference(curves[ours], curves[plain]),
    }


def plain_precision(device: torch.device) -> str:
    """What published training scripts compute in."""
    return "fp16" if device.type == "cuda" else "fp32"


def our_settings(settings: TrainSettings, batch: int) -> TrainingSettings:
    """train.py's, with one density group: each step draws one interval of the timesteps, as the plain loop does."""
    asked = TrainingSettings(
        model=settings.model,
        method=settings.method,
        objective=settings.objective,
        image_size=settings.image_size,
        max_steps=10**9,
        global_batch_size=batch,
        density_groups=1,
        precision=settings.precision,
        compile=settings.compile,
        gradient_checkpointing=settings.gradient_checkpointing,
        ema_warmup=False,
    )
    return with_objective(asked)


@contextmanager
def our_loop(
    settings: TrainSettings, network: DiT, precision: str, batch: int, data: RandomData, objective: Objective
) -> Iterator[Trainer]:
    """train.py's trainer, which writes nothing."""
    accelerator = make_accelerator(precision, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(our_settings(settings, batch), accelerator, network, objective, data, Path(folder), {})
        try:
            yield trainer
        finally:
            trainer.close()
            accelerator.free_memory()


def take_losses(trainer: Trainer) -> float:
    """The mean loss since the last call, as a log line reads it."""
    trainer.settle()
    return trainer.losses.take()["loss"]


def trainable(blueprint: DiT, device: torch.device) -> DiT:
    """The same drawn weights for every loop, with gradients wherever the method trains."""
    network = random_network(blueprint, device).train()
    for parameter, original in zip(network.parameters(), blueprint.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return network


def rounds_of(optimize: Callable[[], object], take: Callable[[], float], steps: int, curve: list[float]) -> Callable[[], None]:
    """`steps` optimizer steps, then their mean loss onto `curve`."""

    def run() -> None:
        for _ in range(steps):
            optimize()
        curve.append(take())

    return run


def work_of(network: nn.Module, images: int, steps: int, precision: str) -> Work:
    """A round's work. Beside the weights stand their average and AdamW's two moments; the gradients come and go in a step."""
    assert isinstance(network, DiT)
    gmacs = FORWARD_AND_BACKWARD * training_gmacs(network)
    return Work(images, steps, gmacs, images * gmacs, precision, 4 * weights_gib(network))


@torch.no_grad()
def training_gmacs(network: DiT) -> float:
    """Billions of multiply-accumulates of one picture on its way forward in the first step, the mean over timesteps."""
    with torch.device("meta"):
        meta, backbone = build(network), network.backbone
        x, t, y = torch.zeros(1, backbone.in_channels, *backbone.latent_size), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    draws = {name: values.to("meta") for name, values in network.draw(Keys(0, 0, torch.arange(1))).items()}
    macs = 0.0
    for timesteps, plan in meta.training_plans():
        with FlopCounterMode(display=False) as counter:
            meta.training_forward(x, t, y, plan, draws)
        macs += len(timesteps) / TIMESTEPS * counter.get_total_flops() / 2
    return macs / 1e9


def largest_difference(ours: list[float], plain: list[float]) -> float:
    """Of two loss curves, as a share of the plain one's value."""
    return max(abs(one / other - 1) for one, other in zip(ours, plain, strict=True))


def time_ratios(result: Mapping[str, Any]) -> list[str]:
    """A step of the method against one of its rival, by the same loop, beside the ratio of multiply-accumulates."""
    lines, rows = [], result["rows"]
    for kind in (PLAIN, OURS):
        rival, method = f"{result['against']}, {kind}", f"{result['settings']['method']}, {kind}"
        if rival in rows and method in rows:
            seconds = rows[method]["seconds"]["median"] / rows[rival]["seconds"]["median"]
            macs = rows[method]["gmacs"] / rows[rival]["gmacs"]
            lines.append(
                f"{kind}: {method.partition(',')[0]} / {result['against']}: time ratio {seconds:.3f}, MACs ratio {macs:.3f}"
            )
    return lines


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings = result["settings"]
    size = "x".join(map(str, settings["latent"])) if settings["latent"] else settings["image_size"]
    difference = result["largest_difference"]
    lines = [
        f"{settings['model']} at {size}, batch {settings['batch_size']}, {settings['steps_per_round']} steps a round; ours: "
        f"{settings['precision']}, compile {settings['compile']}, gradient checkpointing {settings['gradient_checkpointing']}",
        *heading(result),
        *result["networks"],
        *table(result["rows"]),
        *time_ratios(result),
        f"loss curves of {settings['method']}, ours and plain: at most {difference:.2g} of the loss apart in "
        f"{len(next(iter(result['losses'].values())))} rounds" + ("" if math.isfinite(difference) else " (not finite)"),
        "plain: eager, AdamW as torch has it, average by parameter, loss read every step; fp16 with a scaler on a GPU, fp32 on "
        "a CPU. Speed is against the method's plain loop; GMACs are those of forward and backward, 3 x forward",
        *result["notes"],
    ]
    return "\n".join(lines)
