"""The whole job on a CPU in minutes: handwritten digits through the project's own scripts, dense against sparse.

    make demo

Pictures -> features -> a small dense DiT -> SparseDiT fine-tuned from it -> 1,000 paired samples of each -> one table and one
picture in runs/demo/. The pictures are scikit-learn's 1,797 scans of handwritten digits. Started again, stages that are done
are not done again; `--fresh` starts over. Exits with 1 when a stage fails or a figure misses its mark.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from metrics.frechet import MeanAndCovariance, Statistics, frechet_distance
from runtime.checkpoint import checkpoints
from runtime.config import ArgumentParser, run_script
from runtime.files import atomic_write, write_json
from runtime.networks import method_name
from runtime.sampling import Checkpoint, SamplingSettings, load_checkpoint, picture_grid, sample_latents

ROOT = Path(__file__).parent
SIDE = 8
COUNT = 1000
BATCH = 250
GUIDANCE = 1.5
STEPS, TIMED_STEPS = "50", "5"
ENLARGED = 5
LEAST_AGREEMENT, MOST_LOST, LEAST_SPEEDUP = 0.85, 0.05, 1.3


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    gmacs: float
    images_per_second: float
    frechet: float
    agreement: float


def run_stage(title: str, script: str, arguments: Sequence[object]) -> None:
    """Runs one of the project's scripts as a user would, showing the command."""
    command = [sys.executable, script, *map(str, arguments)]
    print(f"\n== {title}\n$ python {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    if code != 0:
        print(f"demo.py: the stage {title!r} failed with exit code {code}; `python demo.py` goes on from what is done.",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)
    print(f"   ({time.perf_counter() - started:.0f} s)", flush=True)


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as PNGs, a folder per class; 17 grey levels spread over 0 .. 255."""
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        with atomic_write(folder / str(label) / f"{index:04d}.png") as temporary:
            Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(temporary, format="png")


def grey_vectors(pictures: np.ndarray) -> np.ndarray:
    """(N, 8, 8, 3) uint8 -> (N, 64) float64 in the digits' own range 0 .. 16"""
    return pictures.astype(np.float64).mean(axis=3).reshape(len(pictures), -1) * 16 / 255


def statistics_of(vectors: np.ndarray) -> Statistics:
    """Mean and covariance of (N, D) vectors."""
    gathered = MeanAndCovariance()
    gathered.update(vectors)
    return gathered.statistics()


def measure_speed(networks: Sequence[Checkpoint]) -> list[float]:
    """Images per second of each network in one run: interleaved, after a warm-up, the median of five, scaled to all steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.arange(BATCH)
    short = SamplingSettings(cfg_scale=GUIDANCE, num_sampling_steps=TIMED_STEPS)
    seconds: list[list[float]] = [[] for _ in networks]
    for round_number in range(6):
        for place, checkpoint in enumerate(networks):
            network = checkpoint.network.to(device)
            started = time.perf_counter()
            sample_latents(network, short, index % 10, index, 0, device).cpu()
            if round_number > 0:
                seconds[place].append(time.perf_counter() - started)
    scale = int(STEPS) / int(TIMED_STEPS)
    return [BATCH / (statistics.median(times) * scale) for times in seconds]


def compare(runs: Sequence[Path], samples: Sequence[Path]) -> list[Row]:
    """Measures every run's samples against the real digits."""
    digits = load_digits()
    classifier = SVC(gamma=0.001, C=10.0).fit(digits.data, digits.target)
    networks = [load_checkpoint(str(checkpoints(run)[-1]), None, None) for run in runs]
    rows = []
    for checkpoint, batch, speed in zip(networks, samples, measure_speed(networks), strict=True):
        vectors = grey_vectors(np.load(batch)["arr_0"])
        asked = np.arange(len(vectors)) % 10
        distance = frechet_distance(statistics_of(vectors), statistics_of(digits.data))
        agreement = float(np.mean(classifier.predict(vectors) == asked))
        rows.append(Row(method_name(checkpoint.network), checkpoint.network.macs() / 1e9, speed, distance, agreement))
    return rows


def show(rows: Sequence[Row]) -> str:
    """The table."""
    dense = rows[0]
    lines = [
        f"{'method':<10} {'GMACs/pass':>11} {'images/s':>9} {'speed-up':>9} {'FD (raw pixels)':>16} {'agreement':>10}",
        *(
            f"{row.name:<10} {row.gmacs:>11.4f} {row.images_per_second:>9.1f} "
            f"{row.images_per_second / dense.images_per_second:>8.2f}x {row.frechet:>16.2f} {row.agreement:>10.1%}"
            for row in rows
        ),
        f"{COUNT} samples each, same seeds, {STEPS} DDPM steps, guidance {GUIDANCE}. images/s: {BATCH} at a time, the",
        f"median of five interleaved runs of {TIMED_STEPS} steps, scaled to {STEPS}. FD: Frechet distance on the 64 raw pixels",
        "(0 .. 16) to the 1,797 real digits, not an FID. Agreement: a support vector machine fitted on the real digits gives",
        "the asked class.",
    ]
    return "\n".join(lines)


def draw(rows: Sequence[Row], samples: Sequence[Path], target: Path) -> None:
    """Both grids side by side: a column per class, the same seeds in the same places."""
    grids = []
    for batch in samples:
        pictures = torch.from_numpy(np.load(batch)["arr_0"][:80])
        enlarged = pictures.repeat_interleave(ENLARGED, dim=1).repeat_interleave(ENLARGED, dim=2)
        grids.append(picture_grid(enlarged, columns=10))
    gap = grids[0].new_full((grids[0].shape[0], 24, 3), 255)
    picture = torch.cat([part for grid in grids for part in (grid, gap)][:-1], dim=1)
    with atomic_write(target) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="png")


def failures(rows: Sequence[Row]) -> list[str]:
    """Which marks were missed, in words."""
    dense, sparse = rows
    missed = []
    if dense.agreement < LEAST_AGREEMENT:
        missed.append(f"dense agreement {dense.agreement:.1%} is below {LEAST_AGREEMENT:.0%}")
    if sparse.agreement < dense.agreement - MOST_LOST:
        missed.append(f"sparse agreement {sparse.agreement:.1%} is more than {MOST_LOST * 100:.0f} points below the dense one")
    if sparse.images_per_second < LEAST_SPEEDUP * dense.images_per_second:
        missed.append(f"speed-up {sparse.images_per_second / dense.images_per_second:.2f} is below {LEAST_SPEEDUP}")
    return missed


def main() -> None:
    parser = ArgumentParser("The whole job on handwritten digits, dense against sparse, in minutes on a CPU.")
    parser.add_argument("--output", default="runs/demo", help="folder for everything (default: runs/demo)")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo left there and start over")
    chosen = parser.parse_args()
    output = Path(chosen.output).resolve()
    if chosen.fresh:
        for name in ("pictures", "features", "results", "samples"):  # nothing else: the folder is the user's
            shutil.rmtree(output / name, ignore_errors=True)
    started = time.perf_counter()
    write_digits(output / "pictures")
    features = output / "features"
    run_stage("extract", "extract_features.py", ["--data-path", output / "pictures", "--features-path", features,
              "--image-size", str(SIDE), "--vae", "pixels", "--mirrors", "original"])  # fmt: skip
    runs = [output / "results" / name for name in ("dense", "sparsedit")]
    common = ["--feature-path", features, "--results-dir", output / "results"]
    run_stage("pretrain dense", "train.py", ["--config", "configs/demo-dense.yaml", "--run-name", "dense", *common])
    run_stage("fine-tune SparseDiT", "train.py", ["--config", "configs/demo-sparsedit.yaml", "--run-name", "sparsedit",
              "--pretrained", checkpoints(runs[0])[-1], *common])  # fmt: skip
    for run in runs:
        run_stage(f"sample {run.name}", "sample_ddp.py", ["--ckpt", checkpoints(run)[-1], "--sample-name", run.name,
                  "--sample-dir", output / "samples", "--num-fid-samples", str(COUNT), "--per-proc-batch-size", str(BATCH),
                  "--labels", "balanced", "--cfg-scale", str(GUIDANCE), "--num-sampling-steps", STEPS])  # fmt: skip
    samples = [output / "samples" / f"{run.name}.npz" for run in runs]
    print("\n== compare", flush=True)
    rows = compare(runs, samples)
    table = show(rows)
    draw(rows, samples, output / "demo.png")
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    write_json(output / "table.json", [vars(row) for row in rows])
    print(f"{table}\n\n{output / 'demo.png'} (left: dense, right: sparse), {output / 'table.txt'}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    missed = failures(rows)
    if missed:
        print(f"demo.py: {'; '.join(missed)}.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
