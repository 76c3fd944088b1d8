"""Every fast way to run a network against the plain one, in numbers, and what is refused where it cannot run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from counted_graphs import Graphs, counted_graphs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import METHODS, DiT, Plan, create_model
from models.layers import Attention, Float32Linear, PatchEmbedder
from runtime import execution, seeding
from runtime.config import InputError
from runtime.execution import Execution, ExecutionSettings, Executor, resolve_execution
from runtime.sampling import SamplingSettings, plain_forward, sample_latents
from runtime.seeding import Keys, integers, normal, uniform
from tests.models.random_networks import distance, inputs, network, tiny
from tests.models.random_networks import one_thread as one_thread

CPU, META = torch.device("cpu"), torch.device("meta")
EXACT = 1e-5
GRIDS = "7,6,5,4x5,4,3,2,2x1,1@0,110,220,330,440,550,660,770,880"
"""Nine grids of nine different numbers of tokens, on a map of 8 x 8."""
every_method = pytest.mark.parametrize("method", METHODS)


def step(model: DiT, timestep: int = 500, count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Plan, Tensor]:
    """What guidance gives: x (N, C, H, W), t (1,), y (R,) the different labels, the plan, index (N,) each sample's label."""
    x, _, _ = inputs(model.backbone, count, seed)
    return x, torch.tensor([timestep]), torch.tensor([3, 1, 10]), model.plan(timestep), torch.arange(count) * 2 % 3


def by_sample(model: DiT, arguments: tuple[Tensor, Tensor, Tensor, Plan, Tensor]) -> Tensor:
    """The plain way: every sample with its own timestep and label."""
    x, t, y, plan, index = arguments
    with torch.no_grad():
        return model(x, t.expand(len(x)), y[index], plan)


def executed(model: DiT, arguments: tuple[Any, ...], **how: Any) -> Tensor:
    with torch.no_grad():
        return Executor(copy.deepcopy(model), Execution(CPU, **how))(*arguments)


# Conditions, once for all that share them ----------------------------------------------------------------------------


@every_method
def test_conditions_that_are_shared_are_those_of_each_sample(method: str) -> None:
    model = network(method, tiny())
    x, t, y, plan, index = step(model)
    assert distance(executed(model, (x, t, y, plan, index)), by_sample(model, (x, t, y, plan, index))) < EXACT
    wrong = executed(model, (x, t, y, plan, index.flip(0)))
    assert distance(wrong, by_sample(model, (x, t, y, plan, index))) > 100 * EXACT


@every_method
def test_the_modulation_of_a_condition_is_computed_once(method: str) -> None:
    model, rows = network(method, tiny()), []
    for block in model.blocks:
        block.adaLN_modulation.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    executed(model, step(model, count=8))
    assert rows == [3] * len(model.blocks)


# Compiled blocks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Nothing but the tracing of torch.compile."""
    with counted_graphs(monkeypatch) as made:
        yield made


SHALLOW = {"poolingformer_blocks": 1, "modules": 2, "module_blocks": (1, 1, 1, 1), "top_blocks": 1, "density": "3"}
"""Ten blocks of five kinds: pooling, merge, block on few tokens, recover, block on all."""


def compiled(options: dict[str, Any], steps: list[tuple[int, int]]) -> None:
    """Runs `steps` (timestep, samples) compiled, and compares each with the plain network."""
    depth = options["poolingformer_blocks"] + 4 * options["modules"] + options["top_blocks"]
    model = network("sparsedit", tiny(f"DiT-16x{depth}x2/2"), options)
    executor = Executor(copy.deepcopy(model), Execution(CPU, compile="default"))
    with torch.no_grad():
        for timestep, count in steps:
            arguments = step(model, timestep, count)
            assert distance(executor(*arguments), by_sample(model, arguments)) < EXACT


def test_one_graph_for_each_kind_of_block_and_shape(graphs: Graphs) -> None:
    compiled(SHALLOW, [(timestep, 4) for timestep in (0, 1, 500, 999)])
    assert (graphs.made, graphs.ran) == (5, 40)


def test_tokens_laid_out_by_channel_are_caught(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a convolution leaves them: the blocks up to the first module would be compiled for a layout of their own."""
    monkeypatch.setattr(PatchEmbedder, "forward", lambda self, x: self.proj(x).flatten(2).transpose(1, 2))
    compiled(SHALLOW, [(500, 4)])
    assert graphs.made > 5


def test_a_timestep_as_a_number_is_caught(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Attention.forward

    def planted(self: Attention, tokens: Tensor) -> Tensor:
        return forward(self, tokens) + 0.0 * len(seen)

    seen: list[int] = []
    monkeypatch.setattr(Attention, "forward", planted)
    plan = DiT.plan
    monkeypatch.setattr(DiT, "plan", lambda self, t: seen.append(t) or plan(self, t))
    model = network("dense", tiny("DiT-16x2x2/2"))
    executor = Executor(model, Execution(CPU, compile="default"))
    for timestep in (0, 1, 2):
        executor(*step(model, timestep))
    assert graphs.made > 1


def test_a_density_of_nine_grids_stays_compiled(graphs: Graphs) -> None:
    """Pooling and full blocks once, merge, sparse and recover blocks once a grid; every block of every step runs in a graph."""
    compiled({**SHALLOW, "density": GRIDS}, [(timestep, 4) for timestep in range(0, 881, 110)])
    assert (graphs.made, graphs.ran) == (2 + 3 * 9, 9 * 10)


FOUR = {**SHALLOW, "density": "3,2@0,500", "poolingformer_blocks": 0, "modules": 1, "top_blocks": 0}
"""Four blocks of two grids: merge, block on few tokens, recover, block on all."""


def test_guided_and_unguided_steps_and_those_of_a_last_batch_stay_compiled(graphs: Graphs) -> None:
    """More shapes than torch's own limit, of eight to a function, lets stay compiled."""
    compiled(FOUR, [(timestep, count) for count in (4, 2, 6, 3) for timestep in (0, 500)])
    assert (graphs.made, graphs.ran) == (4 * (1 + 3 * 2), 8 * 4)


def test_the_compiler_keeps_the_numbers() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network("sparsedit", tiny("DiT-16x2x2/2"), {**FOUR, "module_blocks": (1, 0, 1, 0), "density": "3"})
    arguments = step(model)
    assert distance(executed(model, arguments, compile="default"), by_sample(model, arguments)) < EXACT
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_both_halves_of_path_drop_guidance_run_one_graph(graphs: Graphs) -> None:
    """Four blocks alike, two of which the cheap plan leaves out: every block that runs sees the full map."""
    model = network("sprint", tiny("DiT-16x4x2/2"), {"encoder_blocks": 1, "decoder_blocks": 1})
    executor = Executor(copy.deepcopy(model), Execution(CPU, compile="default"))
    with torch.no_grad():
        for plan in (model.plan(0), model.cheap_plan(0), model.plan(999)):
            x, t, y, _, index = step(model)
            assert plan is not None
            assert distance(executor(x, t, y, plan, index), by_sample(model, (x, t, y, plan, index))) < EXACT
    assert (graphs.made, graphs.ran) == (1, 4 + 2 + 4)


# Precision -----------------------------------------------------------------------------------------------------------


def norm_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def plain_bf16(model: DiT, arguments: tuple[Any, ...]) -> Tensor:
    """As autocast does it: float32 weights, converted at every product."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return plain_forward(model, *arguments)


@every_method
def test_bf16_is_no_further_from_float32_than_autocast_s(method: str) -> None:
    model = network(method, tiny())
    arguments = step(model)
    exact, ours, plain = by_sample(model, arguments), executed(model, arguments, precision="bf16"), plain_bf16(model, arguments)
    assert 1e-4 < norm_error(plain, exact) < 0.03
    assert norm_error(ours, exact) < 1.05 * norm_error(plain, exact)
    assert norm_error(ours, plain) < 0.2 * norm_error(plain, exact)


@every_method
def test_weights_are_stored_as_they_are_multiplied(method: str) -> None:
    model = Executor(network(method, tiny()), Execution(CPU, "bf16")).network
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.dtype == (torch.float32 if isinstance(module, Float32Linear) else torch.bfloat16)
    frozen = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    assert {parameter.dtype for parameter in (model.x_embedder.proj.weight, *frozen)} == {torch.float32}


@every_method
def test_rounding_what_must_stay_float32_is_caught(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_linears(model: nn.Module, half: torch.dtype) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(half)

    model = network(method, tiny())
    arguments = step(model)
    exact, plain = by_sample(model, arguments), plain_bf16(model, arguments)
    monkeypatch.setattr(execution, "convert_linears", all_linears)
    assert norm_error(executed(model, arguments, precision="bf16"), exact) > 1.05 * norm_error(plain, exact)


# Attention -----------------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Names the attention that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function):
            self.seen.add(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["flash", "math"])
@every_method
def test_the_kernel_that_was_asked_for_computes_the_same(method: str, kernel: str) -> None:
    model = network(method, tiny())
    arguments = step(model)
    with Kernels() as kernels:
        ours = executed(model, arguments, attention=kernel)
    assert distance(ours, by_sample(model, arguments)) < EXACT
    assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels.seen) == (kernel == "flash"), kernels.seen


# Nothing is read back ------------------------------------------------------------------------------------------------


FLOW: dict[str, Any] = {"learn_sigma": False, "objective": "flow", "time_scale": 1.0}
LOOPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm": ("sparsedit", {}, {"density": "3,2@0,500"}),
    "ddim": ("sparsedit", {}, {"density": "3,2@0,500"}),
    "euler": ("sprint", FLOW, {}),
    "euler-maruyama": ("sprint", FLOW, {}),
}
"""Sampler -> method, sizes and options of a network for it; SPRINT is guided by path-drop."""
every_loop = pytest.mark.parametrize("sampler", LOOPS)


def sample_without_values(sampler: Any, **how: Any) -> None:
    """The whole loop of sampling on the meta device, whose tensors have no values: any read raises."""
    method, sizes, options = LOOPS[sampler]
    with META:
        model = create_model(method, tiny(**sizes), options).eval()
    settings = SamplingSettings(4.0, guidance_interval=(0.2, 0.7), num_sampling_steps="8", sampler=sampler)
    if method == "sprint":
        settings = replace(settings, guidance="path-drop")
    index = torch.empty(3, dtype=torch.long, device="meta")
    result = sample_latents(model, settings, index, index, 0, META, Executor(model, Execution(META, **how)))
    assert result.shape == (3, 4, 16, 16)


@every_loop
def test_sampling_reads_nothing_back_from_the_device(sampler: str) -> None:
    sample_without_values(sampler)


@every_loop
def test_a_read_is_caught(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DiT.forward

    def reading(self: DiT, x: Tensor, t: Tensor, *rest: Any, **named: Any) -> Tensor:
        assert t.item() < 1000
        return forward(self, x, t, *rest, **named)

    monkeypatch.setattr(DiT, "forward", reading)
    with pytest.raises(RuntimeError, match="meta"):
        sample_without_values(sampler)


# Asking for it -------------------------------------------------------------------------------------------------------


def test_on_a_cpu_weights_are_packed_and_all_else_is_off_until_asked_for() -> None:
    usual = resolve_execution(ExecutionSettings(), CPU)
    assert usual == Execution(CPU, "fp32", "none", "auto", False, True, None)
    assert usual.lines() == ["execution: cpu, fp32, blocks not compiled, weights packed"]
    plain = resolve_execution(ExecutionSettings(pack_weights=False), CPU)
    assert plain == Execution(CPU)
    assert plain.lines() == ["execution: cpu, fp32, blocks not compiled"]
    asked = resolve_execution(ExecutionSettings("bf16", None, "default", "flash"), CPU)
    assert asked.lines() == ["execution: cpu, bf16, blocks compiled (default), flash attention"]
    rounded = resolve_execution(ExecutionSettings("fp16"), CPU)
    assert rounded.precision == "fp32"
    assert rounded.lines()[1].startswith("WARNING: fp16 needs a CUDA device")


GPU = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to ask about, on a machine that has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(execution.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("hopper")
def test_on_a_gpu_what_pays_is_on() -> None:
    assert resolve_execution(ExecutionSettings(), GPU) == Execution(GPU, "bf16", "default", "auto", True, False, None)
    off = ExecutionSettings(tf32=True, compile="none", cuda_graphs=False)
    assert resolve_execution(off, GPU) == Execution(GPU, "tf32", "none", "auto", False, False, None)
    assert resolve_execution(ExecutionSettings("fp8"), GPU).precision == "fp8"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_triton_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution.importlib.util, "find_spec", lambda name: None)
    assert resolve_execution(ExecutionSettings(), GPU).compile == "none"
    with pytest.raises(InputError, match=r"^--compile needs triton, which is not installed; install it, or .*none\.$"):
        resolve_execution(ExecutionSettings(compile="default"), GPU)
    with pytest.raises(InputError, match=r"^--precision fp8 needs torchao; pip install"):
        resolve_execution(ExecutionSettings("fp8"), GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"^--precision fp8 needs a GPU that multiplies in it"):
        resolve_execution(ExecutionSettings("fp8"), GPU)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_kernels_of_half_precision_are_refused_in_float32(kernel: Any) -> None:
    assert resolve_execution(ExecutionSettings("fp16", attention=kernel), GPU).attention == kernel
    for precision in ("fp32", "tf32"):
        with pytest.raises(InputError, match=f"--attention {kernel} takes no float32 on a GPU, and --precision is {precision}"):
            resolve_execution(ExecutionSettings(precision, attention=kernel), GPU)


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        (ExecutionSettings("fp8"), CPU, "--precision fp8 needs a GPU that multiplies in it"),
        (ExecutionSettings("fp32", True), CPU, "--precision fp32 and --tf32 contradict each other"),
        (ExecutionSettings(attention="cudnn"), CPU, "--attention cudnn does not exist on cpu; choose auto or flash or math"),
        (ExecutionSettings(attention="efficient"), CPU, "--attention efficient does not exist on cpu"),
        (ExecutionSettings(attention="flash"), torch.device("mps"), "--attention flash does not exist on mps; choose auto"),
    ],
)
def test_what_cannot_run_is_refused(settings: ExecutionSettings, device: torch.device, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_execution(settings, device)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_found() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(InputError, match=r"^--compile needs a C\+\+ compiler, and none is found; install g\+\+"):
        resolve_execution(ExecutionSettings(compile="default"), CPU)
    assert resolve_execution(ExecutionSettings(compile="auto"), CPU).compile == "none"


def test_where_there_is_no_float64_draws_are_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, moved = Keys(0, torch.tensor(3), torch.arange(4)), []
    draws = [uniform, normal, partial(integers, high=torch.tensor(7))]
    expected = [draw(keys, "test", shape=(3,)) for draw in draws]
    on = Keys.on
    monkeypatch.setattr(Keys, "on", lambda self, device: moved.append(device) or on(self, device))
    monkeypatch.setattr(seeding, "_WITHOUT_FLOAT64", {"cpu"})
    assert all(torch.equal(draw(keys, "test", shape=(3,)), value) for draw, value in zip(draws, expected, strict=True))
    assert moved == [CPU] * 3
