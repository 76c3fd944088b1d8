"""Guided sampling: the dense network as published scripts run it, and the method with everything that makes it fast.

A round samples one batch through a few steps that are spread evenly over the schedule, so that the grids of a varying token
density and both sides of a guidance interval are met. Images per second are those of the whole schedule, of whose
multiply-accumulates the timed steps are a known share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.ceiling import ceilings
from benchmarks.contestants import OURS, PLAIN, Contestant, Seen, contestants, execution_notes, with_numerics
from benchmarks.counted import CountedRun, counted
from benchmarks.devices import choose_device
from benchmarks.memory import weights_gib
from benchmarks.options import DENSE, DeviceSettings, NetworkSettings, recorded
from benchmarks.result import Row, Work, heading, rows_of, table
from benchmarks.timing import interleaved
from data.latents import Codec, CodecSpec, load_codec, resolve_codec
from diffusion.guidance import GUIDANCE, Interval, Predict, check_guidance
from diffusion.samplers import SamplerName
from models import DiT
from runtime.config import InputError, option
from runtime.decoding import make_decoder
from runtime.execution import Execution, ExecutionSettings, resolve_execution
from runtime.logs import say
from runtime.networks import summary
from runtime.sampling import SamplingSettings, plain_forward, sample_latents, sampled_timesteps, sampling_cost

BATCHES, TIMED_STEPS = {"cpu": 1}, {"cpu": 4}
GPU_BATCH, GPU_TIMED_STEPS = 32, 25
"""32 is the batch of a process in the published scripts; 128 is the paper's."""


@dataclass(frozen=True)
class SampleSettings(ExecutionSettings, NetworkSettings, DeviceSettings):
    batch_size: int | None = option(None, "pictures at once; none: 32 on a GPU, as published (the paper's is 128), 1 on a CPU")
    steps: int = option(250, "sampling steps of a picture")
    timed_steps: int | None = option(None, "how many of them a round runs, evenly spread; none: 25 on a GPU, 4 on a CPU")
    cfg_scale: float = option(1.5, "guidance scale")
    sampler: SamplerName | None = option(None, "as sample.py --sampler")
    guidance: Literal["path-drop"] | None = option(
        None, "also measure the method with this guidance, as sample.py, beside classifier-free"
    )
    guidance_interval: tuple[float, float] | None = option(
        None, "also measure the method with guidance in this interval alone, as sample.py", words=("LOW", "HIGH")
    )
    vae: str | None = option(None, "also measure the method with decoding, by this codec, as sample.py; needs all steps timed")


PATH_DROP, INTERVAL = ", path-drop", ", interval"
"""What the names of rows with another guidance end with."""
BLOCKS = 3
"""Batches of a round in which pictures are decoded: the first's sampling and the last's decoding have nothing beside them."""
DECODED = f"decoded, decoded beside: the time of a batch, of {BLOCKS} in a row, the latter decoded while the next is sampled"
QUICK_CPU: Mapping[str, Any] = {"model": "DiT-S/2", "image_size": 256, "rounds": 3, "timed_steps": 3}
QUICK_GPU: Mapping[str, Any] = {"rounds": 3, "timed_steps": 5}


def measure(settings: SampleSettings) -> dict[str, Any]:
    """Seconds of `timed_steps` guided steps for each contestant, and what follows from them for all `steps`."""
    device = choose_device(settings.device)
    execution = resolve_execution(settings, device)
    timed = settings.timed_steps or TIMED_STEPS.get(device.type, GPU_TIMED_STEPS)
    check(settings, timed)
    spec, blueprints = codec_of(settings, timed), settings.blueprints()
    for line in execution.lines():
        say(line)
    sampling = SamplingSettings(settings.cfg_scale, sampler=settings.sampler, num_sampling_steps=str(timed))
    sampling = sampling.under(blueprints[1].backbone.objective)
    competing = contestants(blueprints, execution, lambda network: inputs(network, sampling, device))
    batch = settings.batch_size or BATCHES.get(device.type, GPU_BATCH)
    if device.type == "cuda":
        first, one_step = next(iter(competing.values())), replace(sampling, num_sampling_steps="1")
        batch = fitting_batch(lambda size: run_of(first, one_step, size, device)(), batch)
    runs, works = dict[str, CountedRun](), {}
    for name, contestant, chosen in entries(competing, settings, sampling):
        runs[name] = CountedRun.of(contestant.network, run_of(contestant, chosen, batch, device))
        works[name] = work_of(contestant, chosen, batch, settings.steps)
    decoded: list[str] = []
    if spec is not None:
        name, contestant = best(competing, settings.method)
        for how, run in decoding_runs(contestant, sampling, batch, load_codec(spec, device), execution).items():
            decoded.append(f"{name}, {how}")
            runs[decoded[-1]] = CountedRun.of(contestant.network, run)
            works[decoded[-1]] = work_of(contestant, sampling, batch, settings.steps)
    precisions = [contestant.precision for contestant in competing.values()]
    ceiling = ceilings(device, precisions)
    timings = interleaved(runs, settings.rounds, device)
    ceiling = ceilings(device, precisions, ceiling)
    works = {name: runs[name].measured(work) for name, work in works.items()}
    timings |= {name: timings[name].part(BLOCKS) for name in decoded}
    notes = execution_notes(blueprints, execution)
    notes += [DECODED] if decoded else []
    return {
        "settings": recorded(
            settings,
            device=device.type,
            batch_size=batch,
            timed_steps=timed,
            execution=str(execution),
        ),
        "sampler": sampling.sampler,
        "networks": [summary(network, settings.model) for network in blueprints],
        "rows": rows_of(timings, works, f"{DENSE}, {PLAIN}", ceiling),
        "ceiling": ceiling,
        "notes": notes + interval_notes(settings, sampling, blueprints[1]),
        **counted(runs),
    }


def check(settings: SampleSettings, timed: int) -> None:
    """InputError for what no sampling can be."""
    check_guidance(settings.cfg_scale, None)
    Interval.of(settings.guidance_interval)
    network = settings.blueprints()[1]
    sampled_timesteps(network, SamplingSettings(sampler=settings.sampler, num_sampling_steps=str(settings.steps)))
    if settings.guidance is not None:
        GUIDANCE[settings.guidance](network)
    if timed > settings.steps:
        raise InputError(f"--timed-steps is {timed}, more than the {settings.steps} --steps; give fewer.")


def codec_of(settings: SampleSettings, timed: int) -> CodecSpec | None:
    """The decoder of --vae. InputError where it is not of these latents, or would meet too few steps."""
    if settings.vae is None:
        return None
    if timed != settings.steps:
        raise InputError(f"--vae: decoding has its share of whole pictures alone, and {timed} of {settings.steps} steps are "
                         "timed; give --timed-steps and --steps the same number.")  # fmt: skip
    spec, made = resolve_codec(settings.vae), settings.latent_shape
    if spec.latent_shape(settings.image_size) != made:
        raise InputError(f"--vae {settings.vae} decodes latents of {spec.latent_shape(settings.image_size)} to pictures of "
                         f"{settings.image_size}, and these are {made}; give --latent or --image-size to fit.")  # fmt: skip
    return spec


@torch.no_grad()
def inputs(network: DiT, sampling: SamplingSettings, device: torch.device) -> Seen:
    """What a network sees where a picture is sampled: with drawn weights that is no noise for long."""
    seen: list[Seen] = []

    def watched(x: Tensor, t: Tensor, y: Tensor, plan: Any, index: Tensor | None) -> Tensor:
        seen.append((x, t.expand(len(x)), y if index is None else y[index]))
        return plain_forward(network, x, t, y, plan, index)

    one = torch.arange(1)
    sample_latents(network, sampling, one, one, 0, device, watched)
    latents, timesteps, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return latents, timesteps, labels


def work_of(contestant: Contestant, sampling: SamplingSettings, batch: int, steps: int) -> Work:
    """What one batch through the steps of `sampling` gets done: a share of as many pictures, which need `steps` of them.

    The share is that of the multiply-accumulates. Few steps are not guided, or of a grid, as often as all of them are.
    """
    cost, whole = (
        sampling_cost(contestant.network, one) for one in (sampling, replace(sampling, num_sampling_steps=str(steps)))
    )
    return Work(
        images=batch * cost.macs / whole.macs,
        steps=steps * cost.macs / whole.macs,
        gmacs=cost.macs / 1e9 / cost.passes,
        total_gmacs=batch * cost.macs / 1e9,
        precision=contestant.precision,
        memory_gib=weights_gib(contestant.network),
    )


def decoding_runs(
    contestant: Contestant, sampling: SamplingSettings, batch: int, codec: Codec, execution: Execution
) -> dict[str, Callable[[], None]]:
    """Several batches, each decoded at once, or while the next is sampled where the execution lets both run together."""
    device, index = execution.device, torch.arange(batch)
    labels = index % contestant.network.backbone.num_classes

    def run(overlap: bool) -> None:
        with make_decoder(codec, device, overlap) as decoder:
            for _ in range(BLOCKS):
                latents = sample_latents(contestant.network, sampling, labels, index, 0, device, contestant.predict)
                decoder.submit(latents, lambda place, pictures: None)

    ways = {"decoded": False, "decoded beside": True} if execution.attention == "auto" else {"decoded": False}
    return {name: with_numerics(contestant.precision, partial(run, overlap)) for name, overlap in ways.items()}


def interval_notes(settings: SampleSettings, sampling: SamplingSettings, network: DiT) -> list[str]:
    """How well the timed steps, those of `sampling`, stand for all of them under the guidance interval."""
    if settings.guidance_interval is None:
        return []
    limited = replace(sampling, guidance_interval=settings.guidance_interval)
    whole = replace(limited, num_sampling_steps=str(settings.steps))
    all_steps, part = (sampling_cost(network, one) for one in (whole, limited))
    return [
        f"guidance interval: {all_steps.guided_steps} of all {all_steps.steps} steps are guided, {part.guided_steps} of the "
        f"{part.steps} timed ones"
    ]


def entries(
    competing: Mapping[str, Contestant], settings: SampleSettings, sampling: SamplingSettings
) -> list[tuple[str, Contestant, SamplingSettings]]:
    """Name, network and sampling of every row: all contestants, and the method's fastest once more for each other guidance."""
    found = [(name, one, sampling) for name, one in competing.items()]
    name, one = best(competing, settings.method)
    kinds = dict.fromkeys((sampling.guidance, settings.guidance or sampling.guidance))
    wheres = dict.fromkeys((None, settings.guidance_interval))
    for kind, where in list(product(kinds, wheres))[1:]:
        chosen = replace(sampling, guidance=kind, guidance_interval=where)
        found.append((name + (f", {kind}" if kind != sampling.guidance else "") + (INTERVAL if where else ""), one, chosen))
    return found


def best(competing: Mapping[str, Contestant], method: str) -> tuple[str, Contestant]:
    """The method with our execution, or plain where that is the same."""
    name = next(name for name in (f"{method}, {OURS}", f"{method}, {PLAIN}") if name in competing)
    return name, competing[name]


def run_of(contestant: Contestant, sampling: SamplingSettings, batch: int, device: torch.device) -> Callable[[], None]:
    """Samples one batch of latents through the steps of `sampling`."""
    index = torch.arange(batch)
    labels = index % contestant.network.backbone.num_classes
    predict: Predict = contestant.predict
    run = partial(sample_latents, contestant.network, sampling, labels, index, 0, device, predict)
    return with_numerics(contestant.precision, run)


def fitting_batch(attempt: Callable[[int], object], batch: int) -> int:
    """The largest of `batch`, a half, a quarter .. that `attempt` has memory for; says so where it is not all of it."""
    asked = batch
    while True:
        try:
            attempt(batch)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise InputError("not even a batch of 1 fits into this GPU's memory; choose a smaller --model.") from None
        # Outside the handler: until it ends, its traceback keeps the tensors of the failed attempt.
        torch.cuda.empty_cache()
        batch //= 2
    if batch != asked:
        say(f"batch {asked} does not fit into this GPU's memory: reduced to {batch}.")
    return batch


def path_drop_ratios(rows: Mapping[str, Row]) -> list[str]:
    """A step with path-drop guidance against one with classifier-free, beside the ratio of multiply-accumulates."""
    lines = []
    for name, row in rows.items():
        if PATH_DROP in name:
            other = rows[name.replace(PATH_DROP, "")]
            seconds, macs = row["seconds"]["median"] / other["seconds"]["median"], row["gmacs"] / other["gmacs"]
            lines.append(f"{name} / classifier-free: time ratio {seconds:.3f}, MACs ratio {macs:.3f}")
    return lines


def show(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    settings = result["settings"]
    size = "x".join(map(str, settings["latent"])) if settings["latent"] else settings["image_size"]
    lines = [
        f"{settings['model']} at {size}, batch {settings['batch_size']}, {result['sampler']}, guidance "
        f"{settings['cfg_scale']}, {settings['timed_steps']} of {settings['steps']} steps timed; ours: {settings['execution']}",
        *heading(result),
        *result["networks"],
        *table(result["rows"]),
        *path_drop_ratios(result["rows"]),
        *result["counted_lines"],
        *result["notes"],
        "plain: float32 weights (TF32 products on a GPU), eager, as published scripts run; speed is against dense, plain",
    ]
    return "\n".join(lines)
