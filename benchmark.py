"""Measures what this project promises: candidate and baseline in one process, in turns, warmed up and synchronised.

  sample      guided sampling: dense as published scripts run it, against the method with our execution
  train       training steps: a plain loop as published scripts write it, against ours
  forward     one forward pass, the method against the dense network
  waits       what choosing tokens costs, for which the host waits once a block
  attention   attention kernels at the shapes of a network
  data        features read per second, one array against one file per picture
  eval        the evaluator's distance, neighbours and network, each beside what one would write without it
  pack        memory of packing samples into an npz
  density     fixed against dynamic token density over seeds
  compare     two results: what got slower, beyond the spread

Each has flags of its own: `python benchmark.py sample --help`. All but density and compare write runs/benchmarks/NAME.json and
a chart beside it; all but compare take --quick, which ends within five minutes on two CPU cores.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import attention, compare, data_loading, density, evaluation, forward, packing, sampling, training, waits
from benchmarks.devices import choose_device
from benchmarks.options import CommonSettings, settings_of
from benchmarks.result import headed, store
from runtime.config import ArgumentParser, InputError, nearest, run_script
from runtime.files import check_writable
from runtime.logs import say


class Measurement(NamedTuple):
    """One subcommand."""

    settings: type[CommonSettings]
    module: Any  # with `measure(settings)`, `show(result)` and a docstring
    quick_cpu: Mapping[str, Any]
    quick_gpu: Mapping[str, Any]


MEASUREMENTS: Mapping[str, Measurement] = {
    "sample": Measurement(sampling.SampleSettings, sampling, sampling.QUICK_CPU, sampling.QUICK_GPU),
    "train": Measurement(training.TrainSettings, training, training.QUICK_CPU, training.QUICK_GPU),
    "forward": Measurement(forward.ForwardSettings, forward, forward.QUICK_CPU, forward.QUICK_GPU),
    "waits": Measurement(waits.WaitSettings, waits, waits.QUICK_CPU, waits.QUICK_GPU),
    "attention": Measurement(attention.AttentionSettings, attention, attention.QUICK_CPU, attention.QUICK_GPU),
    "data": Measurement(data_loading.DataSettings, data_loading, data_loading.QUICK, data_loading.QUICK),
    "eval": Measurement(evaluation.EvaluationSettings, evaluation, evaluation.QUICK, evaluation.QUICK),
    "pack": Measurement(packing.PackSettings, packing, packing.QUICK, packing.QUICK),
}

QUICK_DENSITY = (
    "--seeds", "1", "--pretraining-steps", "150", "--steps", "80", "--samples", "100",
    "--output", "runs/density-quick",
)  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    what, rest = (words[0], words[1:]) if words else ("--help", [])
    if what in ("-h", "--help"):
        print(__doc__)
    elif what == "density":
        density.main(quick_density(rest))
    elif what == "compare":
        if code := compare.main(rest):
            sys.exit(code)
    elif what in MEASUREMENTS:
        measure(what, rest)
    else:
        raise InputError(f"benchmark.py {what!r} is no measurement{nearest(what, [*MEASUREMENTS, 'density', 'compare'])}")


def quick_density(arguments: Sequence[str]) -> list[str]:
    """The arguments of density, with those that `--quick` stands for before what was given, which wins."""
    if "--quick" not in arguments:
        return list(arguments)
    say(f"--quick: {' '.join(QUICK_DENSITY)}, where not given otherwise")
    return [*QUICK_DENSITY, *(word for word in arguments if word != "--quick")]


def measure(what: str, arguments: Sequence[str]) -> None:
    """`benchmark.py WHAT ...`: measures, prints, writes JSON and chart."""
    measurement = MEASUREMENTS[what]
    parser = ArgumentParser(measurement.module.__doc__, f"benchmark.py {what}")
    parser.add_config(measurement.settings)
    given = vars(parser.parse_args(arguments))
    gpu = choose_device(given.get("device", "auto")).type == "cuda"
    settings, reduced = settings_of(measurement.settings, given, measurement.quick_gpu if gpu else measurement.quick_cpu)
    folder = Path(settings.output)
    check_writable(folder, "--output")
    if reduced:
        say(f"--quick: {', '.join(reduced)}")
    result = headed(what, shlex.join(["python", "benchmark.py", what, *arguments]), measurement.module.measure(settings))
    print(measurement.module.show(result))
    print(*store(result, folder), sep=", ")


if __name__ == "__main__":
    run_script(main)
