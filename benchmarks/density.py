"""Fixed against dynamic token density at equal compute.

One dense network is pretrained on a part of the pictures. From it train.py fine-tunes, for each seed, SparseDiTs that differ in
their token density alone: the same steps, data order, noise and number of micro-batches. "fixed" has one grid at all timesteps;
"dynamic" fewer tokens at high noise and more at low, with the same mean multiply-accumulates; "fixed-grouped" has the grid of
"fixed" and the timesteps that "dynamic" draws, each micro-batch within one interval: it tells what the grids do from what such
draws do. Measured: the loss on pictures kept from training, and the Frechet distance of samples.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.digits import EXTRACTION, ROOT, command, write_digits
from benchmarks.held_out import all_latents, digit_vectors, held_out_losses, pooled_vectors, sampled_latents, split
from benchmarks.paired_seeds import SHOWN, comparisons, show, spread
from data.features import open_features
from data.manifest import MANIFEST, Manifest
from diffusion.schedule import respaced_timesteps
from metrics.frechet import frechet_distance, statistics_of
from models import Backbone, DiT
from models.token_density import TIMESTEPS, TokenDensity
from runtime.checkpoint import checkpoints
from runtime.config import ArgumentParser, InputError, from_mapping, option, to_mapping
from runtime.files import check_writable, lock, write_json
from runtime.networks import blueprint, mean_gmacs
from runtime.sampling import SamplingSettings, load_checkpoint
from runtime.settings import parse_training

DENSE, FIXED, GROUPED, DYNAMIC = "dense", "fixed", "fixed-grouped", "dynamic"
DENSITIES = {4: ("2", "3,2,1@0,250,583"), 8: ("4", "5,4,3@0,350,550"), 16: ("8", "10,8,6@0,350,550")}
"""Side of the token map -> fixed and dynamic density with the same mean number of tokens."""
EQUAL = 0.01
"""How far mean multiply-accumulates may lie apart and still count as equal compute."""
NOTE = "settings.json"
MAY_CHANGE = ("seeds", "output", "jobs")
"""Settings that do not alter what is measured: a repeated command may change them."""


@dataclass(frozen=True)
class DensitySettings:
    seeds: int = option(5, "fine-tunings of each density, with the seeds 0, 1, ..; more may be asked for later")
    steps: int = option(1000, "optimizer steps of a fine-tuning")
    pretraining_steps: int = option(2000, "optimizer steps of the dense network")
    gradient_accumulation: int = option(4, "micro-batches of a step, for all densities alike; each has one token count")
    min_snr_gamma: float | None = option(5.0, "loss weight of all trainings and of the held-out loss; 5: SparseDiT's recipe")
    patch: int = option(2, "patch of the default backbone; on digits 2 makes 4 x 4 tokens, 1 makes 8 x 8")
    model: str | None = option(None, "backbone; none: DiT-128x8x4/PATCH")
    fixed: str | None = option(None, "token density of one grid, as train.py --density; none: by the token map")
    dynamic: str | None = option(None, "token density of several grids; none: by the token map")
    features: str | None = option(None, "folder made by extract_features.py; none: scikit-learn's digits, as pixels")
    held_out: int = option(360, "pictures kept from training, classes in proportion")
    samples: int = option(1000, "samples of each network, classes in turn")
    sampling_steps: str = option("50", "DDPM steps of a sample")
    cfg_scale: float = option(1.5, "guidance scale of samples")
    dense_config: str = option("configs/demo-dense.yaml", "train.py's settings for the dense network")
    sparse_config: str = option("configs/demo-sparsedit.yaml", "train.py's settings for the fine-tunings")
    output: str = option("runs/density", "folder for everything; what stands there already is not done again")
    jobs: int | None = option(None, "fine-tunings at the same time, one thread each; none: one for each core, 1 on a GPU")


@dataclass(frozen=True)
class Experiment:
    """What every process of the experiment must know."""

    settings: DensitySettings
    output: Path
    model: str
    image_size: int
    training: Path
    held_out: Path
    densities: Mapping[str, str]  # arm -> token density

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(cfg_scale=self.settings.cfg_scale, num_sampling_steps=self.settings.sampling_steps)

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """Arm and seed of every network, the dense one first."""
        return [(DENSE, 0), *((arm, seed) for seed in range(self.settings.seeds) for arm in self.densities)]

    def run(self, arm: str, seed: int) -> Path:
        return self.output / "runs" / f"{arm}-{seed}"

    def result(self, arm: str, seed: int) -> Path:
        return self.output / "results" / f"{arm}-{seed}.json"


def main(arguments: Sequence[str]) -> None:
    """`benchmark.py density ...`"""
    parser = ArgumentParser(__doc__ or "", "benchmark.py density")
    parser.add_config(DensitySettings)
    settings = from_mapping(DensitySettings, vars(parser.parse_args(arguments)), "command line")
    for name in ("seeds", "steps", "pretraining_steps", "gradient_accumulation", "patch", "samples", "jobs"):
        least, given = 2 if name == "samples" else 1, getattr(settings, name)
        if given is not None and given < least:
            raise InputError(f"--{name.replace('_', '-')} is {given}; it must be at least {least}.")
    if not math.isfinite(settings.cfg_scale):
        raise InputError(f"--cfg-scale is {settings.cfg_scale}; it must be finite.")
    # An exception ends the trainings too; a plain SIGTERM would leave them running.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        result = measure(settings)
    finally:
        signal.signal(signal.SIGTERM, before)
    write_json(Path(settings.output, "result.json"), result)
    text = show(result)
    Path(settings.output, "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n{Path(settings.output, 'result.json')}")


def measure(settings: DensitySettings) -> dict[str, Any]:
    """The whole experiment. Raises InputError for densities that cost differently, before anything is trained."""
    respaced_timesteps(settings.sampling_steps)
    output = Path(settings.output).resolve()
    check_writable(output, "--output")
    held = lock(output, f"{output} is being filled by another process; wait for it, or give another --output.")
    for folder in ("logs", "results"):
        (output / folder).mkdir(exist_ok=True)
    source = Path(settings.features).resolve() if settings.features else extract_digits(output)
    if not (source / MANIFEST).is_file():
        raise InputError(f"--features: {source} holds no {MANIFEST}; give a folder made by extract_features.py.")
    manifest = Manifest.read(source)
    experiment, networks = set_up(settings, output, manifest, source)
    now = conditions(experiment, manifest)
    check_unchanged(output, now)
    values = {task: read_values(experiment.result(*task)) for task in experiment.tasks if experiment.result(*task).exists()}
    split(source, output / "features", settings.held_out)
    write_json(output / NOTE, now)
    print(f"pretraining {experiment.model}, then {settings.seeds} x {len(experiment.densities)} fine-tunings; train.py's words "
          f"go to {output / 'logs'}", flush=True)  # fmt: skip
    train(experiment, DENSE, 0)
    values |= measure_rest(experiment, [task for task in experiment.tasks if task not in values])
    held.close()
    arms = {arm: [values[task] for task in experiment.tasks if task[0] == arm] for arm in networks}
    return summarise(experiment, manifest, networks, arms)


def extract_digits(output: Path) -> Path:
    """The feature cache of the digits."""
    features = output / "digits" / "features"
    if not (features / MANIFEST).is_file():
        write_digits(output / "digits" / "pictures")
        arguments = ["--data-path", output / "digits" / "pictures", "--features-path", features, *EXTRACTION]
        execute("extract_features.py", arguments, output / "logs" / "extract.txt")
    return features


def set_up(settings: DensitySettings, output: Path, manifest: Manifest, source: Path) -> tuple[Experiment, dict[str, DiT]]:
    """The experiment and the blueprint of every network in it. InputError where fixed and dynamic do not cost the same."""
    model = settings.model or f"DiT-128x8x4/{settings.patch}"
    training, options = parse_training(["--config", settings.sparse_config, "--model", model])
    channels, *side = manifest.latent_shape
    backbone = Backbone.named(model, (side[0], side[1]), channels, len(manifest.classes), training.learn_sigma)
    default = DENSITIES.get(backbone.grid[0]) if backbone.grid[0] == backbone.grid[1] else None
    if default is None and None in (settings.fixed, settings.dynamic):
        raise InputError(f"a map of {backbone.grid[0]} x {backbone.grid[1]} tokens has no default densities; give --fixed and "
                         "--dynamic.")  # fmt: skip
    fixed, dynamic = (
        TokenDensity.parse(given or default[place], backbone.grid)  # type: ignore[index]
        for place, given in enumerate((settings.fixed, settings.dynamic))
    )
    if len(fixed.grids) != 1 or len(dynamic.grids) == 1:
        raise InputError(f"--fixed is {fixed} and --dynamic is {dynamic}; the first takes one grid, the second several.")
    grouped = TokenDensity(dynamic.starts, fixed.grids * len(dynamic.grids))
    densities = {FIXED: str(fixed), GROUPED: str(grouped), DYNAMIC: str(dynamic)}
    networks = {arm: blueprint(training.method, backbone, {**options, "density": text}) for arm, text in densities.items()}
    for name, steps in (
        ("all timesteps", range(TIMESTEPS)),
        ("the sampler's steps", respaced_timesteps(settings.sampling_steps)),
    ):
        costs = [mean_gmacs(networks[arm], steps) for arm in (FIXED, DYNAMIC)]
        if abs(costs[1] / costs[0] - 1) > EQUAL:
            raise InputError(
                f"over {name} density {dynamic} costs a mean of {costs[1]:.4g} GMACs and {fixed} costs {costs[0]:.4g}, more "
                f"than {EQUAL:.0%} apart; choose another --dynamic or --fixed."
            )
    networks = {DENSE: blueprint(DENSE, backbone, {}), **networks}
    parts = output / "features"
    return Experiment(settings, output, model, manifest.image_size, parts / "training", parts / "held-out", densities), networks


def conditions(experiment: Experiment, manifest: Manifest) -> dict[str, Any]:
    """Everything that decides what is measured, fit for JSON. InputError for configs that the experiment cannot use."""
    settings = {name: value for name, value in to_mapping(experiment.settings).items() if name not in MAY_CHANGE}
    # The files' names would not tell that somebody edited them between two seeds.
    configs = {}
    for name in ("dense_config", "sparse_config"):
        training, options = parse_training(["--config", settings[name]])
        if (training.method == DENSE) != (name == "dense_config"):
            raise InputError(f"--{name.replace('_', '-')} {settings[name]} is of --method {training.method}; the first network "
                             "is dense, the others are not.")  # fmt: skip
        micro_batches = 1 if name == "dense_config" else experiment.settings.gradient_accumulation
        if training.global_batch_size % micro_batches:
            raise InputError(f"--gradient-accumulation {micro_batches} does not divide {settings[name]}'s global_batch_size "
                             f"{training.global_batch_size}; choose a divisor.")  # fmt: skip
        configs[f"content of {settings[name]}"] = {"settings": to_mapping(training), "options": options}
    now = {**settings, **configs, "densities": dict(experiment.densities), "pictures": manifest.sha256}
    return json.loads(json.dumps(now))  # as it will be read back


def check_unchanged(output: Path, now: Mapping[str, Any]) -> None:
    """InputError where the folder holds something measured otherwise."""
    note = output / NOTE
    if note.exists():
        before = read_json(note, f"nobody knows how {output} was measured; delete that, or give another --output")
        if differ := list(changes(before, now)):
            raise InputError(f"{output} was started with {', and with '.join(differ)}; give that again, or another --output.")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What an experiment was started with and is not now, in words."""
    for name, value in now.items():
        earlier = before.get(name)
        if earlier == value:
            continue
        if name.startswith("content of ") and earlier is None:
            continue  # of another file, which is named
        if name == "pictures":
            yield "other pictures"
        elif isinstance(value, Mapping) and isinstance(earlier, Mapping):
            where = {"densities": "token density of "}.get(name, f"{name.removeprefix('content of ')}: ")
            earlier, value = flat(earlier), flat(value)
            for key in dict.fromkeys((*earlier, *value)):
                if earlier.get(key) != value.get(key):
                    yield f"{where}{key} {shown(earlier.get(key))}, not {shown(value.get(key))}"
        else:
            yield f"--{name.replace('_', '-')} {shown(earlier)}, not {shown(value)}"


def flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and options of a training side by side."""
    return {key: value for name, part in mapping.items()
            for key, value in (part.items() if isinstance(part, Mapping) else [(name, part)])}  # fmt: skip


def shown(value: Any) -> str:
    return "none" if value is None else str(value)


def read_json(path: Path, therefore: str) -> Mapping[str, Any]:
    """InputError where the file is no JSON mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is damaged, so {therefore}.")
    return content


def read_values(path: Path) -> dict[str, float]:
    """The measures of a network that were written before."""
    remedy = "delete it, and the same command measures that network again"
    values = dict(read_json(path, remedy))
    if not all(isinstance(values.get(name), float) for name in (*SHOWN, *values)):
        raise InputError(f"{path} is damaged, so {remedy}.")
    return values


def execute(script: str, arguments: Sequence[object], log: Path, threads: int | None = None) -> None:
    """Runs one of the project's scripts, its words added to `log`. InputError where it fails."""
    environment = {**os.environ, "TQDM_DISABLE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with log.open("ab") as file:
        ended = subprocess.run(command(script, arguments), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode != 0:
        raise InputError(f"{script} ended with exit code {ended.returncode}; {log} says why, and the same command goes on from "
                         "what is done.")  # fmt: skip


def train(experiment: Experiment, arm: str, seed: int) -> None:
    """One run of train.py; it goes on from its newest checkpoint, and a finished run ends at once."""
    settings, run = experiment.settings, experiment.run(arm, seed)
    arguments: list[object] = ["--model", experiment.model, "--feature-path", experiment.training, "--image-size"]
    arguments += [experiment.image_size, "--results-dir", run.parent, "--run-name", run.name, "--seed", seed]
    arguments += ["--min-snr-gamma", settings.min_snr_gamma]
    if arm == DENSE:
        arguments += ["--config", settings.dense_config, "--max-steps", settings.pretraining_steps]
    else:
        dense = checkpoints(experiment.run(DENSE, 0))[-1]
        arguments += ["--config", settings.sparse_config, "--max-steps", settings.steps, "--pretrained", dense, "--density"]
        arguments += [experiment.densities[arm], "--gradient-accumulation", settings.gradient_accumulation]
    # Alone it may use every core; beside others, threads that wait for a core slow each other manyfold.
    execute("train.py", arguments, experiment.output / "logs" / f"{run.name}.txt", None if arm == DENSE else 1)


def measure_rest(experiment: Experiment, tasks: Sequence[tuple[str, int]]) -> dict[tuple[str, int], dict[str, float]]:
    """The values of the networks that have none yet, by arm and seed."""
    jobs = experiment.settings.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    total = len(experiment.tasks)
    bar = tqdm(total=total, initial=total - len(tasks), desc="networks")
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, bar:
        waiting = {pool.submit(measure_one, experiment, arm, seed): (arm, seed) for arm, seed in tasks}
        values = {}
        try:
            for done in as_completed(waiting):
                values[waiting[done]] = done.result()
                bar.update()
        except BaseException:
            for child in psutil.Process().children(recursive=True):  # what they did so far is in their checkpoints
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return values


def measure_one(experiment: Experiment, arm: str, seed: int) -> dict[str, float]:
    """Trains one network, unless that is done, and measures its averaged weights: losses and Frechet distance."""
    torch.set_num_threads(1)
    train(experiment, arm, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(str(checkpoints(experiment.run(arm, seed))[-1]), None, None)
    network, settings = checkpoint.network.to(device), experiment.settings
    held_out, training = (open_features(folder, experiment.image_size) for folder in (experiment.held_out, experiment.training))
    vectors = pooled_vectors if settings.features else digit_vectors
    real = torch.cat([all_latents(training), all_latents(held_out)])
    samples = sampled_latents(network, experiment.sampling, settings.samples, seed, device)
    values = {
        **held_out_losses(network, settings.min_snr_gamma, held_out, device),
        "frechet": frechet_distance(statistics_of(vectors(samples)), statistics_of(vectors(real))),
    }
    write_json(experiment.result(arm, seed), values)
    return values


def summarise(
    experiment: Experiment, manifest: Manifest, networks: Mapping[str, DiT], values: Mapping[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """All numbers of the experiment, fit for JSON."""
    settings = experiment.settings
    rows = {
        arm: {
            "density": experiment.densities.get(arm),
            "gmacs_all_timesteps": mean_gmacs(networks[arm]),
            "gmacs_sampled_timesteps": mean_gmacs(networks[arm], respaced_timesteps(settings.sampling_steps)),
            "measures": spread(of_arm),
        }
        for arm, of_arm in values.items()
    }
    pairs = ((DYNAMIC, FIXED), (DYNAMIC, GROUPED), (GROUPED, FIXED))
    return {
        "measured": "density",
        "settings": to_mapping(settings),
        "pictures": "scikit-learn's digits" if settings.features is None else settings.features,
        "count": manifest.count,
        "model": experiment.model,
        "tokens": list(networks[DENSE].backbone.grid),
        "compared": "the 64 raw pixels, 0 .. 16" if settings.features is None else "latents, pooled to 8 x 8 at most",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": rows,
        "comparisons": [comparisons(first, second, values[first], values[second]) for first, second in pairs],
    }
