"""The whole job on a CPU in minutes: handwritten digits through the project's own scripts, dense against sparse.

    make demo
    make demo METHOD=dydit

Pictures -> features -> a small dense DiT -> the networks of a method, each trained as configs/demo-RUN.yaml says -> 600
paired samples of each -> one table and one picture in runs/demo/. Of sparsedit, the default, these are two: one with the same
tokens at all timesteps, one with fewer at high noise and more at low for the same mean cost. `--method flow` shows no method
but the other objective: networks that sample in 5 steps. The pictures are scikit-learn's 1,797 scans of handwritten digits.
Started again, stages that are done are not done again, and another method starts from the same dense network; `--fresh` starts
over. Exits with 1 when a stage fails or a figure misses its mark.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC

from benchmarks.digits import EXTRACTION, ROOT, command, grey_vectors, load_digits, write_digits
from benchmarks.timing import interleaved
from metrics.frechet import frechet_distance, statistics_of
from runtime.checkpoint import checkpoints
from runtime.config import ArgumentParser, InputError, run_script
from runtime.files import atomic_write, check_writable, write_json
from runtime.sampling import (
    Checkpoint,
    SamplingSettings,
    density_text,
    load_checkpoint,
    picture_grid,
    sample_latents,
    sampling_cost,
)
from runtime.work_report import measured_ratio

COUNT, BATCH = 600, 200
TIMED, ROUNDS = 100, 5
ENLARGED, GAP = 5, 24
LEAST_AGREEMENT, MOST_LOST, LEAST_SPEEDUP = 0.85, 0.05, 1.3
EQUAL_COMPUTE, OFF_TARGET = 0.01, 0.02
SAMPLING = SamplingSettings(cfg_scale=1.5, num_sampling_steps="50")
PATH_DROP = replace(SAMPLING, guidance="path-drop", sampler="euler")
FEW_DDIM, FEW_EULER = (replace(SAMPLING, sampler=name, num_sampling_steps="5") for name in ("ddim", "euler"))


class Entry(NamedTuple):
    """One line of the table: a trained network, and how it is sampled."""

    name: str
    run: str  # of train.py, under configs/demo-RUN.yaml
    sampling: SamplingSettings = SAMPLING
    judged: bool = True  # False: stands there to be compared with, whatever comes out

    @property
    def sample_name(self) -> str:
        """Of its folder and file under samples/."""
        return self.name.replace(" ", "-")


DEFAULT = "sparsedit"
DENSE = Entry("dense", "dense")
DEMOS: Mapping[str, Sequence[Entry]] = {
    "sparsedit": (Entry("sparsedit fixed", "sparsedit"), Entry("sparsedit dynamic", "sparsedit-dynamic")),
    "dydit": (Entry("dydit", "dydit"),),
    "sprint": (
        Entry("sprint stage 1", "sprint", PATH_DROP),
        Entry("sprint stage 2", "sprint-full", PATH_DROP),
    ),
    "flow": (
        Entry("dense in 5 steps", "dense", FEW_DDIM, judged=False),
        Entry("dense under flow", "dense-flow", FEW_EULER),
        Entry("sparsedit under flow", "sparsedit-flow", FEW_EULER),
    ),
}
"""What `--method` compares with `DENSE`."""

STARTS = {
    "sparsedit": "dense",
    "sparsedit-dynamic": "dense",
    "dydit": "dense",
    "sprint-full": "sprint",
    "dense-flow": "dense",
    "sparsedit-flow": "dense",
}
"""Run -> the run whose network it starts from; others start from newly initialised weights."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    gmacs: float  # of one pass, the mean over a picture's: counted where they depend on what a network sees
    images_per_second: float
    frechet: float
    agreement: float
    density: str | None
    flops_ratio: float | None = None  # counted, of the dense network's attention and MLP; None where plans say what is computed
    flops_target: float | None = None  # the ratio that was trained for
    sampled: str = ""  # sampler, steps, guidance
    judged: bool = True

    @property
    def off_target(self) -> float:
        """How far the ratio is from the one that was trained for."""
        return 0.0 if self.flops_ratio is None or self.flops_target is None else abs(self.flops_ratio - self.flops_target)


def entries(method: str) -> list[Entry]:
    """The lines of a demo, the dense one first. InputError for what has none."""
    if method not in DEMOS:
        raise InputError(f"--method {method!r} has no demo; choose from {', '.join(sorted(DEMOS))}.")
    return [DENSE, *DEMOS[method]]


def stages(method: str) -> list[str]:
    """The runs of a demo, each after the one that it starts from."""
    found = dict[str, None]()
    for entry in entries(method):
        chain = [entry.run]
        while chain[0] in STARTS:
            chain.insert(0, STARTS[chain[0]])
        found |= dict.fromkeys(chain)
    return [*found]


def sampled_as(sampling: SamplingSettings) -> str:
    """Sampler, steps and guidance in words, of settings that name their sampler."""
    kind = "" if sampling.guidance == "classifier-free" else f" {sampling.guidance}"
    return f"{sampling.sampler} {sampling.num_sampling_steps}, guidance {sampling.cfg_scale:g}{kind}"


def run_stage(title: str, script: str, arguments: Sequence[object]) -> None:
    """Runs one of the project's scripts as a user would, showing the command."""
    words = command(script, arguments)
    print(f"\n== {title}\n$ python {' '.join(words[1:])}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(words, cwd=ROOT).returncode
    if code != 0:
        print(f"demo.py: the stage {title!r} failed with exit code {code}; `python demo.py`, with the same --method and "
              "without --fresh, goes on from what is done.",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)
    print(f"   ({time.perf_counter() - started:.0f} s)", flush=True)


def measure_speed(networks: Sequence[Checkpoint], samplings: Sequence[SamplingSettings]) -> list[float]:
    """Images per second of each network in one run: interleaved, after a warm-up, the median of the rounds.

    All steps are timed: those of a dynamic density cost differently, and a few of them would not have its mean cost.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.arange(TIMED)
    runs = {}
    for place, (checkpoint, sampling) in enumerate(zip(networks, samplings, strict=True)):
        network = checkpoint.network.to(device)
        runs[str(place)] = partial(sample_latents, network, sampling, index % 10, index, 0, device)
    return [TIMED / timing.median for timing in interleaved(runs, ROUNDS, device).values()]


def compare(chosen: Sequence[Entry], results: Path, samples: Path) -> list[Row]:
    """Measures every entry's samples against the real digits."""
    digits = load_digits()
    classifier = SVC(gamma=0.001, C=10.0).fit(digits.data, digits.target)
    networks = [load_checkpoint(str(checkpoints(results / entry.run)[-1]), None, None) for entry in chosen]
    samplings = [entry.sampling.under(one.objective) for entry, one in zip(chosen, networks, strict=True)]
    rows = []
    for entry, checkpoint, sampling, speed in zip(chosen, networks, samplings, measure_speed(networks, samplings), strict=True):
        vectors = grey_vectors(np.load(samples / f"{entry.sample_name}.npz")["arr_0"])
        asked = np.arange(len(vectors)) % 10
        network, agreement = checkpoint.network, float(np.mean(classifier.predict(vectors) == asked))
        distance = frechet_distance(statistics_of(vectors), statistics_of(digits.data))
        planned, ratio, target = sampling_cost(network, sampling), None, None
        cost = planned.macs / planned.passes / 1e9
        if network.work is not None:  # what passed while the speed was measured
            cost, ratio = network.work.macs / network.work.passes / 1e9, measured_ratio(network, network.work)
            target = network.flops_target
        facts = density_text(network), ratio, target, sampled_as(sampling), entry.judged
        rows.append(Row(entry.name, cost, speed, distance, agreement, *facts))
    return rows


def show(rows: Sequence[Row]) -> str:
    """The table."""
    dense, wide = rows[0], max(len(row.name) for row in rows)
    lines = [
        f"{'method':<{wide}} {'GMACs/pass':>11} {'images/s':>9} {'speed-up':>9} {'FD (raw pixels)':>16} {'agreement':>10}"
        "  sampled",
        *(
            f"{row.name:<{wide}} {row.gmacs:>11.5f} {row.images_per_second:>9.1f} "
            f"{row.images_per_second / dense.images_per_second:>8.2f}x {row.frechet:>16.2f} {row.agreement:>10.1%}"
            f"  {row.sampled}"
            for row in rows
        ),
        *density_notes([row for row in rows if row.density is not None]),
        *(
            f"{row.name}: {row.flops_ratio:.1%} of the dense network's attention and MLP were computed, {row.flops_target:.0%} "
            f"were trained for,\ncounted over all steps as is GMACs/pass, of everything: {row.gmacs / dense.gmacs:.1%} "
            "of the dense network's."
            for row in rows
            if row.flops_ratio is not None
        ),
        f"{COUNT} samples each, same seeds. GMACs/pass: the mean over a picture's passes. images/s: {TIMED} at a time through",
        f"all steps, the median of {ROUNDS} interleaved rounds. FD: Frechet distance on the 64 raw pixels (0 .. 16) to the",
        "1,797 real digits, not an FID. Agreement: a support vector machine fitted on the real digits gives the asked class.",
    ]
    return "\n".join(lines)


def density_notes(rows: Sequence[Row]) -> list[str]:
    """What a fixed and a dynamic token density have in common; nothing where they are not compared."""
    if len(rows) != 2:
        return []
    fixed, dynamic = rows
    return [
        f"Token density (sides of the sparse grids @ where they start; t = 0 is clean): fixed {fixed.density},",
        f"dynamic {dynamic.density}, whose GMACs/pass are {dynamic.gmacs / fixed.gmacs - 1:+.2%} from the fixed one's.",
        "One training of each: which of the two is better here says little; docs/token-density.md compares several seeds.",
    ]


def draw(samples: Sequence[Path], target: Path) -> None:
    """The grids side by side: a column per class, the same seeds in the same places."""
    grids = []
    for batch in samples:
        pictures = torch.from_numpy(np.load(batch)["arr_0"][:80])
        enlarged = pictures.repeat_interleave(ENLARGED, dim=1).repeat_interleave(ENLARGED, dim=2)
        grids.append(picture_grid(enlarged, columns=10))
    gap = grids[0].new_full((grids[0].shape[0], GAP, 3), 255)
    picture = torch.cat([part for grid in grids for part in (grid, gap)][:-1], dim=1)
    with atomic_write(target) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="png")


def failures(rows: Sequence[Row]) -> list[str]:
    """Which marks were missed, in words."""
    dense, *others = rows
    missed = []
    if dense.agreement < LEAST_AGREEMENT:
        missed.append(f"dense agreement {dense.agreement:.1%} is below {LEAST_AGREEMENT:.0%}")
    for row in (row for row in others if row.judged):
        speedup = row.images_per_second / dense.images_per_second
        if row.agreement < dense.agreement - MOST_LOST:
            missed.append(
                f"{row.name} agreement {row.agreement:.1%} is more than {MOST_LOST * 100:.0f} points below the dense one"
            )
        if speedup < LEAST_SPEEDUP:
            missed.append(f"{row.name} speed-up {speedup:.2f} is below {LEAST_SPEEDUP}")
        if row.off_target > OFF_TARGET:
            missed.append(
                f"{row.name} computes {row.flops_ratio:.1%} of attention and MLP, more than {OFF_TARGET * 100:.0f} points from "
                f"the {row.flops_target:.0%} it was trained for"
            )
    costs = [row.gmacs for row in others if row.density is not None]
    if costs and max(costs) / min(costs) - 1 > EQUAL_COMPUTE:
        missed.append(f"mean GMACs of fixed and dynamic differ by more than {EQUAL_COMPUTE:.0%}")
    return missed


def main() -> None:
    parser = ArgumentParser("The whole job on handwritten digits, dense against sparse, in minutes on a CPU.")
    choices = ", ".join(sorted(DEMOS))
    parser.add_argument("--method", default=DEFAULT, help=f"compared with the dense network: {choices} (default: {DEFAULT})")
    parser.add_argument("--output", default="runs/demo", help="folder for everything (default: runs/demo)")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo left there and start over")
    chosen = parser.parse_args()
    output, shown, names = Path(chosen.output).resolve(), entries(chosen.method), stages(chosen.method)
    check_writable(output, "--output")
    if chosen.fresh:
        for name in ("pictures", "features", "results", "samples"):  # nothing else: the folder is the user's
            shutil.rmtree(output / name, ignore_errors=True)
    started = time.perf_counter()
    write_digits(output / "pictures")
    features = output / "features"
    run_stage("extract", "extract_features.py", ["--data-path", output / "pictures", "--features-path", features, *EXTRACTION])
    results = output / "results"
    for name in names:
        start = ["--pretrained", checkpoints(results / STARTS[name])[-1]] if name in STARTS else []
        run_stage(f"{'fine-tune' if start else 'pretrain'} {name}", "train.py", [
                  "--config", f"configs/demo-{name}.yaml", "--run-name", name, *start,
                  "--feature-path", features, "--results-dir", results])  # fmt: skip
    for entry in shown:
        asked = entry.sampling
        sampler = [] if asked.sampler is None else ["--sampler", asked.sampler]
        run_stage(f"sample {entry.name}", "sample_ddp.py", ["--ckpt", checkpoints(results / entry.run)[-1],
                  "--sample-name", entry.sample_name, "--sample-dir", output / "samples", "--num-fid-samples", COUNT,
                  "--per-proc-batch-size", BATCH, "--labels", "balanced", "--cfg-scale", asked.cfg_scale,
                  "--guidance", asked.guidance, *sampler, "--num-sampling-steps", asked.num_sampling_steps])  # fmt: skip
    samples = [output / "samples" / f"{entry.sample_name}.npz" for entry in shown]
    print("\n== compare", flush=True)
    rows = compare(shown, results, output / "samples")
    table = show(rows)
    draw(samples, output / "demo.png")
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    write_json(output / "table.json", [vars(row) for row in rows])
    print(f"{table}\n\n{output / 'demo.png'} (left to right: {', '.join(row.name for row in rows)}), {output / 'table.txt'}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    missed = failures(rows)
    if missed:
        print(f"demo.py: {'; '.join(missed)}.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
