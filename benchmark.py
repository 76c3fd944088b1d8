"""Measures what this project promises, candidate and baseline in one process.

python benchmark.py forward --model DiT-XL/2 --image-size 512
python benchmark.py data
python benchmark.py pack --count 20000 --image-size 256
"""

from __future__ import annotations

from benchmarks import data_loading, forward, packing
from models import METHODS
from runtime.config import ArgumentParser, InputError, coerce, run_script
from runtime.files import write_json


def main() -> None:
    parser = ArgumentParser("Measures what this project promises, candidate and baseline in one process.")
    meanings = (
        "forward: a method's forward pass against the dense one; data: features read per second against one file each; "
        "pack: memory of packing samples"
    )
    parser.add_argument("what", choices=("forward", "data", "pack"), help=meanings)
    parser.add_argument("--model", default="DiT-XL/2", help="backbone (forward; default: DiT-XL/2)")
    parser.add_argument("--method", default="sparsedit", choices=list(METHODS), help="candidate (forward; default: sparsedit)")
    parser.add_argument("--sparse-grid", help="sparse tokens, as 8 or 8x8 (forward; default: the method's)")
    parser.add_argument("--image-size", type=int, help="picture side (forward; default: 512; data, pack: 256)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures per pass (forward; default: 1)")
    parser.add_argument("--count", type=int, help="pictures (pack; default: 20000) or features (data; default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one of warm-up (default: 5)")
    parser.add_argument("--json", help="also write the result to this file")
    chosen = parser.parse_args()
    if min(chosen.batch_size, chosen.rounds, 1 if chosen.count is None else chosen.count) < 1:
        raise InputError("--batch-size, --count and --rounds must be at least 1.")
    if chosen.what == "forward":
        grid = coerce(chosen.sparse_grid, tuple[int, ...], "--sparse-grid") if chosen.sparse_grid else None
        options = {"sparse_grid": grid} if grid else {}
        side = (chosen.image_size or 512) // 8
        result = forward.measure(chosen.model, chosen.method, options, side, chosen.batch_size, chosen.rounds)
        print(forward.show(result))
    elif chosen.what == "data":
        result = data_loading.measure(chosen.count or 4096, chosen.image_size or 256, chosen.rounds)
        print(data_loading.show(result))
    else:
        result = packing.measure(chosen.count or 20_000, chosen.image_size or 256)
        print(packing.show(result))
    if chosen.json:
        write_json(chosen.json, result)


if __name__ == "__main__":
    run_script(main)
