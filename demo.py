"""The whole job on a CPU in minutes: handwritten digits through the project's own scripts, dense against sparse.

    make demo
    make demo METHOD=dydit

Pictures -> features -> a small dense DiT -> the networks of a method fine-tuned from it, one for each configs/demo-METHOD*.yaml
-> 600 paired samples of each -> one table and one picture in runs/demo/. Of sparsedit, the default, these are two: one with the
same tokens at all timesteps, one with fewer at high noise and more at low for the same mean cost. The pictures are
scikit-learn's 1,797 scans of handwritten digits. Started again, stages that are done are not done again, and another method
starts from the same dense network; `--fresh` starts over. Exits with 1 when a stage fails or a figure misses its mark.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC

from benchmarks.digits import EXTRACTION, ROOT, command, grey_vectors, load_digits, write_digits
from benchmarks.timing import interleaved
from metrics.frechet import frechet_distance, statistics_of
from models import DiT
from runtime.checkpoint import checkpoints
from runtime.config import ArgumentParser, InputError, run_script
from runtime.files import atomic_write, check_writable, write_json
from runtime.networks import mean_gmacs, method_name
from runtime.sampling import (
    Checkpoint,
    SamplingSettings,
    density_text,
    load_checkpoint,
    picture_grid,
    sample_latents,
    sampled_timesteps,
)
from runtime.work_report import measured_ratio

COUNT, BATCH = 600, 200
GUIDANCE, STEPS = 1.5, "50"
SAMPLING = SamplingSettings(cfg_scale=GUIDANCE, num_sampling_steps=STEPS)
TIMED, ROUNDS = 100, 3
ENLARGED, GAP = 5, 24
LEAST_AGREEMENT, MOST_LOST, LEAST_SPEEDUP = 0.85, 0.05, 1.3
EQUAL_COMPUTE, OFF_TARGET = 0.01, 0.02
DENSE, DEFAULT = "dense", "sparsedit"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    gmacs: float  # of one pass, the mean over the sampler's steps: counted where they depend on what a network sees
    images_per_second: float
    frechet: float
    agreement: float
    density: str | None
    flops_ratio: float | None = None  # counted, of the dense network's attention and MLP; None where plans say what is computed
    flops_target: float | None = None  # the ratio that was trained for

    @property
    def off_target(self) -> float:
        """How far the ratio is from the one that was trained for."""
        return 0.0 if self.flops_ratio is None or self.flops_target is None else abs(self.flops_ratio - self.flops_target)


def stages(method: str) -> list[str]:
    """The runs of a demo, the dense one first; the settings of RUN are configs/demo-RUN.yaml. InputError for other methods."""
    names = sorted(path.stem.removeprefix("demo-") for path in (ROOT / "configs").glob("demo-*.yaml"))
    own = [name for name in names if name.partition("-")[0] == method]
    if method == DENSE or not own:
        methods = dict.fromkeys(name.partition("-")[0] for name in names if name != DENSE)
        raise InputError(f"--method {method!r} has no demo; choose from {', '.join(methods)}.")
    return [DENSE, *own]


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


def row_name(network: DiT) -> str:
    """The method, and for a sparse network whether its density is fixed or dynamic."""
    kind = "" if network.density is None else " fixed" if len(network.density.intervals) == 1 else " dynamic"
    return method_name(network) + kind


def measure_speed(networks: Sequence[Checkpoint]) -> list[float]:
    """Images per second of each network in one run: interleaved, after a warm-up, the median of the rounds.

    All steps are timed: those of a dynamic density cost differently, and a few of them would not have its mean cost.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.arange(TIMED)
    runs = {}
    for place, checkpoint in enumerate(networks):
        network = checkpoint.network.to(device)
        runs[str(place)] = partial(sample_latents, network, SAMPLING, index % 10, index, 0, device)
    return [TIMED / timing.median for timing in interleaved(runs, ROUNDS, device).values()]


def compare(runs: Sequence[Path], samples: Sequence[Path]) -> list[Row]:
    """Measures every run's samples against the real digits."""
    digits = load_digits()
    classifier = SVC(gamma=0.001, C=10.0).fit(digits.data, digits.target)
    networks = [load_checkpoint(str(checkpoints(run)[-1]), None, None) for run in runs]
    rows = []
    for checkpoint, batch, speed in zip(networks, samples, measure_speed(networks), strict=True):
        vectors = grey_vectors(np.load(batch)["arr_0"])
        asked = np.arange(len(vectors)) % 10
        network, agreement = checkpoint.network, float(np.mean(classifier.predict(vectors) == asked))
        distance = frechet_distance(statistics_of(vectors), statistics_of(digits.data))
        cost, ratio, target = mean_gmacs(network, sampled_timesteps(network, SAMPLING)), None, None
        if network.work is not None:  # what passed while the speed was measured
            cost, ratio = network.work.macs / network.work.passes / 1e9, measured_ratio(network, network.work)
            target = network.flops_target
        rows.append(Row(row_name(network), cost, speed, distance, agreement, density_text(network), ratio, target))
    return rows


def show(rows: Sequence[Row]) -> str:
    """The table."""
    dense = rows[0]
    lines = [
        f"{'method':<18} {'GMACs/pass':>11} {'images/s':>9} {'speed-up':>9} {'FD (raw pixels)':>16} {'agreement':>10}",
        *(
            f"{row.name:<18} {row.gmacs:>11.5f} {row.images_per_second:>9.1f} "
            f"{row.images_per_second / dense.images_per_second:>8.2f}x {row.frechet:>16.2f} {row.agreement:>10.1%}"
            for row in rows
        ),
        *density_notes([row for row in rows if row.density is not None]),
        *(
            f"{row.name}: {row.flops_ratio:.1%} of the dense network's attention and MLP were computed, {row.flops_target:.0%} "
            f"were trained for,\ncounted over the {STEPS} steps as is GMACs/pass, of everything: {row.gmacs / dense.gmacs:.1%} "
            "of the dense network's."
            for row in rows
            if row.flops_ratio is not None
        ),
        f"{COUNT} samples each, same seeds, {STEPS} DDPM steps, guidance {GUIDANCE}. images/s: {TIMED} at a time through all "
        f"{STEPS} steps,",
        f"the median of {ROUNDS} interleaved rounds. FD: Frechet distance on the 64 raw pixels (0 .. 16) to the 1,797 real",
        "digits, not an FID. Agreement: a support vector machine fitted on the real digits gives the asked class.",
    ]
    return "\n".join(lines)


def density_notes(rows: Sequence[Row]) -> list[str]:
    """What a fixed and a dynamic token density have in common; nothing where they are not compared."""
    if len(rows) != 2:
        return []
    fixed, dynamic = rows
    return [
        f"Token density (sides of the sparse grids @ where they start; t = 0 is clean): fixed {fixed.density},",
        f"dynamic {dynamic.density}. GMACs/pass: the mean over the {STEPS} steps, the dynamic network's "
        f"{dynamic.gmacs / fixed.gmacs - 1:+.2%} from the fixed one's.",
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
    for row in others:
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
    parser.add_argument("--method", default=DEFAULT, help=f"compared with the dense network (default: {DEFAULT})")
    parser.add_argument("--output", default="runs/demo", help="folder for everything (default: runs/demo)")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo left there and start over")
    chosen = parser.parse_args()
    output, names = Path(chosen.output).resolve(), stages(chosen.method)
    check_writable(output, "--output")
    if chosen.fresh:
        for name in ("pictures", "features", "results", "samples"):  # nothing else: the folder is the user's
            shutil.rmtree(output / name, ignore_errors=True)
    started = time.perf_counter()
    write_digits(output / "pictures")
    features = output / "features"
    run_stage("extract", "extract_features.py", ["--data-path", output / "pictures", "--features-path", features, *EXTRACTION])
    runs = [output / "results" / name for name in names]
    for run in runs:
        start = ["--pretrained", checkpoints(runs[0])[-1]] if run != runs[0] else []
        title = f"{'fine-tune' if start else 'pretrain'} {run.name}"
        run_stage(title, "train.py", ["--config", f"configs/demo-{run.name}.yaml", "--run-name", run.name, *start,
                  "--feature-path", features, "--results-dir", output / "results"])  # fmt: skip
    for run in runs:
        run_stage(f"sample {run.name}", "sample_ddp.py", ["--ckpt", checkpoints(run)[-1], "--sample-name", run.name,
                  "--sample-dir", output / "samples", "--num-fid-samples", COUNT, "--per-proc-batch-size", BATCH,
                  "--labels", "balanced", "--cfg-scale", GUIDANCE, "--num-sampling-steps", STEPS])  # fmt: skip
    samples = [output / "samples" / f"{run.name}.npz" for run in runs]
    print("\n== compare", flush=True)
    rows = compare(runs, samples)
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
