"""Measures what this project promises, candidate and baseline in one process.

python benchmark.py forward --model DiT-XL/2 --image-size 512
python benchmark.py data
python benchmark.py pack --count 20000 --image-size 256
python benchmark.py density --seeds 5        (a command of its own: benchmark.py density --help)
python benchmark.py eval
python benchmark.py eval --only network --weights classify_image_graph_def.pb --batch-size 64
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import data_loading, density, evaluation, forward, packing
from models import METHODS
from runtime.config import ArgumentParser, InputError, run_script
from runtime.files import write_json


def main() -> None:
    if sys.argv[1:2] == ["density"]:
        density.main(sys.argv[2:])
        return
    chosen = parse()
    measure, show = {
        "forward": (measure_forward, forward.show),
        "data": (measure_data, data_loading.show),
        "pack": (measure_packing, packing.show),
        "eval": (measure_evaluation, evaluation.show),
    }[chosen.what]
    result = measure(chosen)
    print(show(result))
    if chosen.json:
        write_json(chosen.json, result)


def parse() -> argparse.Namespace:
    """The command line. Raises InputError for numbers below 1."""
    parser = ArgumentParser(__doc__ or "")
    meanings = (
        "forward: a method's forward pass against the dense one; data: features read per second against one file each; "
        "pack: memory of packing samples; eval: the evaluator's Fréchet distance against scipy.linalg.sqrtm, its precision "
        "and recall against torch.cdist, its network under torch against TensorFlow; "
        "density: fixed against dynamic token density over seeds, with flags of its own"
    )
    parser.add_argument("what", choices=("forward", "data", "pack", "eval", "density"), help=meanings)
    parser.add_argument("--model", default="DiT-XL/2", help="backbone (forward; default: DiT-XL/2)")
    parser.add_argument("--method", default="sparsedit", choices=list(METHODS), help="candidate (forward; default: sparsedit)")
    tokens = "sparse tokens, as train.py --density (forward; default: the method's)"
    parser.add_argument("--density", "--sparse-grid", metavar="TEXT", help=tokens)
    timestep = "whose tokens are kept, 0 clean to 999 noise (forward; default: 0)"
    parser.add_argument("--timestep", type=int, default=0, metavar="N", help=timestep)
    parser.add_argument("--image-size", type=int, help="picture side (forward; default: 512; data, pack, eval: 256)")
    parser.add_argument("--batch-size", type=int, help="pictures per pass (forward; default: 1; eval: 64)")
    counted = "pictures (pack; default: 20000), features (data; default: 4096) or vectors a side (eval; default: 10000)"
    parser.add_argument("--count", type=int, help=counted)
    parser.add_argument("--dimensions", type=int, default=2048, help="numbers in a vector (eval; default: 2048)")
    parser.add_argument("--only", choices=("frechet", "distances", "network"), help="one part alone (eval; default: all)")
    weights = "ADM's Inception graph (eval; default: the cached one, else random weights in its layout)"
    parser.add_argument("--weights", "--inception", metavar="FILE", help=weights)
    parser.add_argument("--rounds", type=int, help="measured rounds after one of warm-up (default: 5; eval: 3)")
    parser.add_argument("--json", help="also write the result to this file")
    chosen = parser.parse_args()
    if chosen.what == "density":
        raise InputError("density has flags of its own and stands first: benchmark.py density --help.")
    for flag in ("batch_size", "count", "dimensions", "image_size", "rounds"):
        given = getattr(chosen, flag)
        if given is not None and given < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {given}.")
    return chosen


def measure_forward(chosen: argparse.Namespace) -> dict[str, Any]:
    options = {} if chosen.density is None else {"density": chosen.density}
    side, batch, rounds = (chosen.image_size or 512) // 8, chosen.batch_size or 1, chosen.rounds or 5
    return forward.measure(chosen.model, chosen.method, options, side, batch, rounds, chosen.timestep)


def measure_data(chosen: argparse.Namespace) -> dict[str, Any]:
    return data_loading.measure(chosen.count or 4096, chosen.image_size or 256, chosen.rounds or 5)


def measure_packing(chosen: argparse.Namespace) -> dict[str, Any]:
    return packing.measure(chosen.count or 20_000, chosen.image_size or 256)


def measure_evaluation(chosen: argparse.Namespace) -> dict[str, Any]:
    return evaluation.measure(
        chosen.only,
        chosen.weights,
        chosen.count or 10_000,
        chosen.dimensions,
        chosen.batch_size or 64,
        chosen.image_size or 256,
        chosen.rounds or 3,
    )


if __name__ == "__main__":
    run_script(main)
