"""How benchmark.py takes times and makes results of them: on fake clocks and devices, whose figures are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import ceiling, compare, devices, result, timing
from benchmarks.devices import choose_device, synchronise
from benchmarks.result import Work, rows_of, table
from benchmarks.timing import Timing, interleaved
from runtime.config import InputError

CPU = torch.device("cpu")


def clock_of(durations: list[float]) -> Callable[[], float]:
    """A clock that is read at the start and end of runs which take so long, a second apart."""
    steps = chain.from_iterable(zip(repeat(1.0), durations, strict=False))
    times: Iterator[float] = accumulate(steps)
    return lambda: next(times)


def test_everyone_runs_once_a_round_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    durations = [90.0, 80.0, 2.0, 1.0, 4.0, 2.0, 3.0, 3.0]
    monkeypatch.setattr(timing, "perf_counter", clock_of(durations))
    found = interleaved({"slow": lambda: ran.append("slow"), "quick": lambda: ran.append("quick")}, 3, CPU)
    assert ran == ["slow", "quick"] * 4
    assert found["slow"].rounds == (2.0, 4.0, 3.0)
    assert found["quick"].rounds == (1.0, 2.0, 3.0)
    assert (found["slow"].median, found["slow"].fastest, found["slow"].slowest) == (3.0, 2.0, 4.0)


def test_the_clock_is_read_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that only asks a device for work returns at once."""
    events: list[str] = []

    def read() -> float:
        events.append("clock")
        return 0.0

    def waited(device: torch.device) -> None:
        assert device == CPU
        events.append("wait")

    monkeypatch.setattr(timing, "perf_counter", read)
    monkeypatch.setattr(timing, "synchronise", waited)
    interleaved({"one": lambda: events.append("run")}, 1, CPU, warm_up=0)
    assert events == ["wait", "clock", "run", "wait", "clock"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_synchronise_waits_for_that_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    for name in ("cuda", "mps", "cpu"):
        monkeypatch.setattr(getattr(torch, name), "synchronize", lambda *device, name=name: waited.append(name))
    synchronise(torch.device(kind))
    assert waited == [kind]


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(InputError, match="--device cuda: torch finds no such device here; choose cpu, or auto"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    assert devices.device_name(torch.device("mps")).endswith(", mps")
    assert devices.device_name(CPU).endswith(" threads")


def test_the_ratio_is_that_of_the_rounds_and_not_of_the_medians() -> None:
    """A machine that slows down in the middle slows both, and the ratio stays."""
    timings = {"base": Timing((2.0, 20.0, 4.0)), "ours": Timing((1.0, 10.0, 2.0)), "lucky": Timing((2.0, 2.0, 20.0))}
    rows = rows_of(timings, dict.fromkeys(timings, Work()), "base")
    assert rows["ours"]["ratio"] == {"median": 2.0, "fastest": 2.0, "slowest": 2.0}
    assert rows["lucky"]["ratio"] == {"median": 1.0, "fastest": 10.0, "slowest": 0.2}
    assert timings["base"].median / timings["lucky"].median == 2.0  # the known-bad choice
    assert "ratio" not in rows_of(timings, dict.fromkeys(timings, Work()), "another")["ours"]


def test_the_ratio_is_that_of_pictures() -> None:
    """Known bad: that of the seconds, where the baseline finished more in them."""
    timings, works = {"base": Timing((4.0,)), "ours": Timing((1.0,))}, {"base": Work(images=4), "ours": Work(images=2)}
    rows = rows_of(timings, works, "base")
    assert rows["ours"]["ratio"]["median"] == 2.0
    assert rows["ours"]["images_per_second"] / rows["base"]["images_per_second"] == 2.0
    assert rows["base"]["ratio"]["median"] == 1.0


def test_what_follows_from_the_work() -> None:
    work = Work(images=8, steps=4, gmacs=0.5, total_gmacs=3000.0, precision="bf16", memory_gib=1.0)
    row = rows_of({"one": Timing((2.0,), added_gib=0.5)}, {"one": work}, "one", {"bf16": 6.0, "fp32": 1.0})["one"]
    assert row["images_per_second"] == 4.0
    assert row["ms_per_step"] == 500.0
    assert row["tflops"] == 3.0  # a MAC is two operations
    assert row["share_of_ceiling"] == 0.5
    assert row["peak_memory_gib"] == 1.5
    assert rows_of({"one": Timing((2.0,))}, {"one": Work()}, "one")["one"].keys() == {"seconds", "ratio"}
    assert "50.0%" in "\n".join(table({"one": row}))
    assert "of ceiling" not in "\n".join(table({"one": {"seconds": row["seconds"]}}))


def test_a_busy_moment_does_not_lower_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = iter([2.0, 5.0, 1.0, 9.0])
    monkeypatch.setattr(ceiling, "matmul_ceiling", lambda device, name: next(reached))
    before = ceiling.ceilings(CPU, ["fp32", "bf16", "bf16", "fp8"])
    assert before == {"bf16": 2.0, "fp32": 5.0}
    assert ceiling.ceilings(CPU, ["fp32", "bf16"], before) == {"bf16": 2.0, "fp32": 9.0}


def test_the_ceiling_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 100)
    monkeypatch.setattr(ceiling, "perf_counter", clock_of([4.0, 2.0, 3.0, 8.0, 5.0]))
    assert ceiling.matmul_ceiling(CPU, "bf16") == pytest.approx(2 * 100**3 / 2.0 / 1e12)


def made(rounds: dict[str, list[float]], **other: Any) -> dict[str, Any]:
    """A result with these rounds."""
    timings = {name: Timing(tuple(values)) for name, values in rounds.items()}
    rows = rows_of(timings, dict.fromkeys(timings, Work(images=4)), next(iter(timings)))
    return result.headed(
        "sample", "python benchmark.py sample", {"settings": {"model": "DiT-T/2", "rounds": 3}, "rows": rows} | other
    )


def stored(folder: Path, rounds: dict[str, list[float]]) -> str:
    return str(result.store(made(rounds), folder)[0])


def test_the_result_is_json_and_the_chart_a_png(tmp_path: Path) -> None:
    path, chart = result.store(made({"base": [2.0, 4.0, 3.0], "ours": [1.0, 1.0, 2.0]}), tmp_path)
    content = json.loads(path.read_text())
    assert {"measured", "command", "date", "device", "torch", "settings", "rows"} == content.keys()
    assert content["rows"]["base"]["seconds"] == {"median": 3.0, "fastest": 2.0, "slowest": 4.0, "rounds": [2.0, 4.0, 3.0]}
    with Image.open(chart) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
    title, bars = result.bars_of(content["rows"])
    assert title == "images per second"
    assert bars == [(1.0, 4 / 3, 2.0), (2.0, 4.0, 4.0)]
    without_images = {name: {"seconds": row["seconds"]} for name, row in content["rows"].items()}
    assert result.bars_of(without_images) == ("seconds", [(2.0, 3.0, 4.0), (1.0, 1.0, 2.0)])


# compare -------------------------------------------------------------------------------------------------------------

BEFORE = {"base": [2.0, 2.2, 2.1], "ours": [1.0, 1.2, 1.1]}


@pytest.mark.parametrize(
    ("ours", "verdict", "code"),
    [
        ([1.0, 1.2, 1.1], "same", 0),
        ([1.19, 1.5, 1.6], "same", 0),  # its fastest round is within the spread of before, though the median is not
        ([1.21, 1.5, 1.6], "SLOWER", 1),  # planted
        ([0.5, 0.6, 0.99], "faster", 0),
        ([0.5, 0.6, 1.0], "same", 0),
    ],
)
def test_slower_is_what_lies_beyond_the_spread(
    ours: list[float], verdict: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stored(tmp_path / "before", rounds=BEFORE)
    after = stored(tmp_path / "after", rounds={**BEFORE, "ours": ours, "new": [1.0, 1.0, 1.0]})
    assert compare.main([before, after]) == code
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["ours"].endswith(f"  {verdict}")
    assert lines["base"].endswith("+0.0%  same")
    assert lines["new"].endswith("only in one of them")


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.0, 1.1, 1.1, 9.0], [3.0, 3.0, 3.1, 3.2, 3.3], "SLOWER"),  # one busy moment hides nothing
        ([1.0, 1.1, 9.0], [3.0, 3.1, 3.3], "same"),  # of few rounds each counts
        ([3.0, 3.0, 3.1, 3.2, 3.3], [1.0, 1.0, 1.1, 1.1, 9.0], "faster"),
        ([1.0, 1.001, 1.002], [1.004, 1.005, 1.006], "same"),  # beyond the spread, yet too little to speak of
    ],
)
def test_neither_one_busy_moment_nor_next_to_nothing_decides(before: list[float], after: list[float], verdict: str) -> None:
    assert compare.verdict(before, after) == verdict


def test_auto_and_what_it_comes_to_are_compared(tmp_path: Path) -> None:
    resolved = {"execution": "cpu, fp32, blocks not compiled"}
    paths = []
    for asked in ({"precision": "auto"}, {"precision": "fp32"}, {"precision": "fp32", "execution": "cpu, bf16"}):
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(made(BEFORE) | {"settings": {"model": "DiT-T/2"} | resolved | asked}))
    assert compare.main([str(path) for path in paths[:2]]) == 0
    with pytest.raises(InputError, match="execution cpu, fp32, blocks not compiled, not cpu, bf16"):
        compare.main([str(path) for path in paths[1:]])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rows": {"x": {"seconds": {"median": 1.0, "rounds": [True]}}}}, "holds no timings of rounds"),
        ({"date": None}, "holds no timings of rounds"),
        ({"device": "another machine"}, "device is .* in one and 'another machine' in the other"),
        ({"measured": "train"}, "measured is 'sample' in one and 'train'"),
        ({"settings": {"model": "DiT-S/2", "rounds": 3}}, "model DiT-T/2, not DiT-S/2; measure both with the same settings"),
        ({"settings": {"model": "DiT-T/2", "steps": 5}}, "steps None, not 5"),
        ({"rows": {"x": {"seconds": {"median": 1.0, "rounds": [1.0]}}}}, "no row in common"),
        ({"rows": {"x": 3}}, "holds no timings of rounds"),
        ({"rows": {"x": {"seconds": {"median": 1.0, "rounds": []}}}}, "holds no timings of rounds"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    before = stored(tmp_path, rounds=BEFORE)
    after = tmp_path / "after.json"
    after.write_text(json.dumps(made(BEFORE) | other))
    with pytest.raises(InputError, match=said):
        compare.main([before, str(after)])


def test_more_rounds_may_be_compared_with_fewer(tmp_path: Path) -> None:
    before = stored(tmp_path, rounds=BEFORE)
    after = tmp_path / "after.json"
    after.write_text(json.dumps(made(BEFORE) | {"settings": {"model": "DiT-T/2", "rounds": 9}}))
    assert compare.main([before, str(after)]) == 0
    with pytest.raises(InputError, match="no such file"):
        compare.main([before, str(tmp_path / "none.json")])
    after.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        compare.main([before, str(after)])


def test_memory_of_a_gpu_is_its_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak is forgotten before every run, and what stood before is not counted. The warm-up counts, unlike on a CPU."""
    allocator = SimpleNamespace(now=2**30, peak=9 * 2**30)

    def run() -> None:
        allocator.peak = max(allocator.peak, allocator.now + added.pop(0) * 2**30)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(allocator, "peak", allocator.now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocator.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(timing, "synchronise", lambda device: None)
    added = [3, 1, 2]
    assert interleaved({"one": run}, 2, torch.device("cuda"))["one"].added_gib == 3
