"""Flow matching against the definitions: the path, the law of the times, and Gaussian data, whose velocity, transport and
reverse process are known in closed form."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from diffusion import flow
from diffusion.flow import FlowObjective, Times, interpolate, share_below, time_at
from diffusion.samplers import PUBLISHED, SAMPLERS
from diffusion.schedule import Timesteps, plan_timestep
from runtime.config import InputError
from runtime.seeding import Keys
from tests.diffusion.gaussian_data import SHAPE, FlowData, flow_data, largest_z_score
from tests.models.random_networks import one_thread as one_thread

LAWS: dict[Times, Any] = {
    "uniform": scipy.stats.uniform().cdf,
    "logit-normal": lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t))),
}
every_law = pytest.mark.parametrize("times", list(LAWS))
COUNT = 20_000


def mutant(function: Callable[..., Any], right: str, wrong: str) -> Any:
    """The function with one place of its source written otherwise: a planted bug."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1
    names: dict[str, Any] = {}
    future = "from __future__ import annotations\n"
    exec(compile(future + source.replace(right, wrong), "mutant", "exec"), vars(flow) | {}, names)
    return names[function.__name__]


# The path and the loss -----------------------------------------------------------------------------------------------


def batch(objective: FlowObjective, timesteps: range | Timesteps | None = None, count: int = 6) -> tuple[Tensor, flow.Noised]:
    x0 = torch.randn(count, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, objective.noised(x0, Keys(3, 5, torch.arange(count)), timesteps)


@every_law
def test_the_path_goes_from_data_to_noise_and_the_velocity_is_its_slope(times: Times) -> None:
    x0, noised = batch(FlowObjective(times))
    time = (noised.t.double() / 1000).reshape(-1, 1, 1, 1)
    assert all(value.dtype == torch.float32 for value in noised)
    torch.testing.assert_close(noised.x_t - time * noised.velocity, x0, rtol=1e-6, atol=1e-6)  # its beginning
    noise = noised.x_t + (1 - time) * noised.velocity  # its end
    torch.testing.assert_close(noised.x_t.double(), (1 - time) * x0 + time * noise, rtol=1e-6, atol=1e-6)
    assert noise.std() == pytest.approx(1, abs=0.15)
    assert not torch.equal(x0.float(), noised.x_t)


def test_the_ends_of_the_path() -> None:
    x0, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.equal(interpolate(x0, torch.zeros(2), noise), x0)
    assert torch.equal(interpolate(x0, torch.ones(2), noise), noise)
    assert torch.equal(interpolate(x0, torch.tensor([0.0, 1.0]), noise), torch.stack((x0[0], noise[1])))


def test_the_loss_is_the_mean_squared_error_of_each_sample() -> None:
    objective = FlowObjective("uniform")
    _, noised = batch(objective)
    losses = objective.losses((noised.velocity + torch.arange(6.0).reshape(-1, 1, 1, 1)).bfloat16().float(), noised)
    assert set(losses) == {"loss"}
    torch.testing.assert_close(losses["loss"], torch.arange(6.0) ** 2, rtol=0.02, atol=1e-3)
    assert objective.losses(noised.velocity, noised)["loss"].tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="a velocity of shape"):
        objective.losses(torch.cat((noised.velocity, noised.velocity), dim=1), noised)


# The law of the times ------------------------------------------------------------------------------------------------


def drawn(objective: FlowObjective, timesteps: range | None = None, count: int = COUNT) -> np.ndarray:
    """Flow times of training. -> (count,) float64"""
    noised = objective.noised(torch.zeros(count, 1, 1, 1), Keys(7, 11, torch.arange(count)), timesteps)
    return noised.t.double().numpy() / 1000


def probability(times: np.ndarray, law: Times, start: float = 0, stop: float = 1) -> float:
    """How likely numbers are that lie so far, or farther, from the law within [start, stop) (Kolmogorov and Smirnov)."""
    cdf = LAWS[law]
    with np.errstate(divide="ignore"):
        low, high = cdf(np.float64(start)), cdf(np.float64(stop))
    return float(scipy.stats.kstest(times, lambda t: (cdf(t) - low) / (high - low)).pvalue)


@every_law
def test_times_follow_their_law(times: Times) -> None:
    found = drawn(FlowObjective(times))
    assert probability(found, times) > 1e-3
    other: Times = "logit-normal" if times == "uniform" else "uniform"
    assert probability(found, other) < 1e-12


@every_law
@pytest.mark.parametrize("timesteps", [range(0, 7), range(250, 500), range(900, 1000)], ids=str)
def test_times_within_an_interval_follow_the_law_given_it(times: Times, timesteps: range) -> None:
    found = drawn(FlowObjective(times), timesteps)
    assert timesteps.start / 1000 <= found.min() < found.max() <= timesteps.stop / 1000
    assert probability(found, times, timesteps.start / 1000, timesteps.stop / 1000) > 1e-3


def test_an_interval_that_is_ignored_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(FlowObjective.noised, "first + (last - first) * within", "within")
    monkeypatch.setattr(FlowObjective, "noised", wrong)
    assert probability(drawn(FlowObjective("logit-normal"), range(250, 500)), "logit-normal", 0.25, 0.5) < 1e-12


def test_uniform_times_in_an_interval_of_other_times_would_be_noticed() -> None:
    """Planted bug: times spread evenly over the interval, as if it had no law of its own."""
    found = np.interp(drawn(FlowObjective("uniform")), (0, 1), (0.75, 1.0))
    assert probability(found, "logit-normal", 0.75, 1.0) < 1e-12


@every_law
@pytest.mark.parametrize("strata", [1, 4, 8])
def test_strata_draw_in_turn_from_parts_of_equal_probability(times: Times, strata: int) -> None:
    found = drawn(FlowObjective(times, strata))
    assert probability(found, times) > 1e-3
    shares = LAWS[times](found) * strata
    place = np.arange(COUNT) % strata
    assert np.all((shares > place - 1e-5) & (shares < place + 1 + 1e-5))
    for part in range(strata):
        assert scipy.stats.kstest(shares[place == part] - part, "uniform").pvalue > 1e-3


@every_law
def test_what_a_sample_draws_follows_from_its_key(times: Times) -> None:
    objective, x0, index = FlowObjective(times, 4), torch.randn(6, 3, 2, 4), torch.tensor([5, 0, 3, 2, 4, 1])
    whole = objective.noised(x0, Keys(3, 5, index))
    for part in torch.arange(6).split([1, 3, 2]):
        apart = objective.noised(x0[part], Keys(3, 5, index[part]))
        assert all(torch.equal(one, other[part]) for one, other in zip(apart, whole, strict=True))
    assert not torch.equal(objective.noised(x0, Keys(3, 6, index)).t, whole.t)
    assert not torch.equal(objective.noised(x0, Keys(4, 5, index)).t, whole.t)


def test_bounds_in_tensors_are_those_of_a_range() -> None:
    objective = FlowObjective("logit-normal")
    _, by_range = batch(objective, range(250, 750))
    _, by_tensors = batch(objective, Timesteps(torch.tensor(250), torch.tensor(750)))
    _, whole = batch(objective, range(1000))
    assert all(torch.equal(one, other) for one, other in zip(by_range, by_tensors, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(batch(objective)[1], whole, strict=True))


@every_law
def test_shares_and_times_are_inverse_rise_and_end_at_0_and_1(times: Times) -> None:
    share = torch.linspace(0, 1, 2001, dtype=torch.float64)
    time = time_at(times, share)
    assert time[[0, 1000, 2000]].tolist() == [0, 0.5, 1]
    assert (time.diff() > 0).all()
    torch.testing.assert_close(share_below(times, time), share, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(share[1:-1], LAWS[times](time[1:-1].numpy()), rtol=1e-12, atol=1e-12)
    found = [FlowObjective(times).timestep_at(float(one)) for one in share]
    assert found == [plan_timestep(1000 * float(one)) for one in time]
    assert (found[0], found[1000], found[-1]) == (0, 500, 999)


# Samplers ------------------------------------------------------------------------------------------------------------

STEPS = (40, 80, 160, 320)


def start(count: int = 16) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def slope(errors: list[float]) -> float:
    """Order of convergence: of halved steps."""
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def ode_errors(sampler: Callable[..., Tensor], data: FlowData) -> list[float]:
    """Largest distance from the exact transport, for each of STEPS."""
    noise = start()
    return [
        float(np.abs(sampler(data.velocity, noise, steps).flatten(1).numpy() - data.transported(noise)).max())
        for steps in STEPS
    ]


@pytest.mark.parametrize(("name", "order", "best"), [("euler", 1, 0.02), ("heun", 2, 2e-4)])
def test_ode_samplers_converge_to_the_exact_transport_with_their_order(name: str, order: int, best: float) -> None:
    errors = ode_errors(getattr(flow, name), flow_data())
    assert slope(errors) == pytest.approx(order, abs=0.1)
    assert errors[-1] < best


ODE_BUGS = {
    "times reversed": ("euler", "velocity(x, start)", "velocity(x, TIMESTEPS - start)"),
    "step in the other direction": ("euler", "x + (end / TIMESTEPS - time) * v", "x - (end / TIMESTEPS - time) * v"),
    "another length of the first time": ("euler", "start / TIMESTEPS", "start / 999"),
    "second call at the beginning": ("heun", "velocity(x + length * v, end)", "velocity(x + length * v, start)"),
    "second call at the same place": ("heun", "velocity(x + length * v, end)", "velocity(x, end)"),
}


@pytest.mark.parametrize("bug", list(ODE_BUGS))
def test_planted_bugs_in_the_ode_are_caught(bug: str) -> None:
    name, right, wrong = ODE_BUGS[bug]
    errors = ode_errors(mutant(getattr(flow, name), right, wrong), flow_data())
    assert not (slope(errors) == pytest.approx({"euler": 1, "heun": 2}[name], abs=0.1) and errors[-1] < 0.02)


def test_a_velocity_of_the_other_sign_is_caught() -> None:
    data = flow_data()
    noise = start()
    made = flow.euler(lambda x, t: -data.velocity(x, t), noise, 320).flatten(1).numpy()
    assert np.abs(made - data.transported(noise)).max() > 1


def moments(sampler: Callable[..., Tensor], data: FlowData, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of what the sampler makes of all noises, without sampling error.

    On Gaussian data its outcome is affine in start noise and step noises. A batch that holds 0 and every unit vector of these
    tells the map, and so the moments.
    """
    columns = 4 * (steps + 1)
    units = torch.cat((torch.zeros(1, columns), torch.eye(columns))).unflatten(1, (steps + 1, *SHAPE))
    made = sampler(data.velocity, units[:, 0], steps, lambda step: units[:, step + 1]).flatten(1).numpy()
    linear = made[1:] - made[0]
    return made[0], linear.T @ linear


def off(found: tuple[np.ndarray, np.ndarray], data: FlowData) -> float:
    """How far mean and covariance are from the data's at worst, in standard deviations of the data."""
    whiten = np.linalg.inv(np.linalg.cholesky(data.covariance))
    mean, covariance = found
    return float(max(np.abs(whiten @ (mean - data.mean)).max(), np.abs(whiten @ covariance @ whiten.T - np.eye(4)).max()))


SDE_STEPS = (20, 40, 80, 160)


def sde_errors(sampler: Callable[..., Tensor], data: FlowData, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For each of SDE_STEPS, with a last step as long as the others: the published one, 0.04, would stay."""
    errors = []
    for steps in SDE_STEPS:
        monkeypatch.setattr(flow, "LAST_NOISY_TIMESTEP", 1000 / steps)
        errors.append(off(moments(sampler, data, steps), data))
    return errors


def test_the_sde_converges_to_the_data_with_order_1(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = sde_errors(flow.euler_maruyama, flow_data(), monkeypatch)
    assert slope(errors) == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.05


def from_recursion(sampler: Callable[..., Tensor], steps: int) -> float:
    """The largest difference of its moments from those of the published steps, computed from the definitions."""
    times, data = np.append(np.linspace(1, 0.04, steps), 0), flow_data()
    pairs = zip(moments(sampler, data, steps), data.reversed(times), strict=True)
    return float(max(np.abs(found - expected).max() for found, expected in pairs))


@pytest.mark.parametrize("steps", [2, 5, 250])
def test_the_sde_has_the_moments_of_the_linear_recursion(steps: int) -> None:
    assert from_recursion(flow.euler_maruyama, steps) < 1e-5


def test_the_published_sde_comes_close_to_the_data() -> None:
    """250 steps, and a last one of 0.04 that adds no noise: 5 % of the variance are missing where it is smallest, 0.09."""
    assert off(moments(flow.euler_maruyama, flow_data(), 250), flow_data()) < 0.06


SDE_BUGS = {
    "wrong sign of the score": ("v - time * score", "v + time * score"),
    "diffusion t": ("math.sqrt(2 * time * -length)", "math.sqrt(time * -length)"),
    "noise at the last step": ("if end > 0:", "if True:"),
    "no score": ("v - time * score", "v"),
    "score of the other parametrisation": ("(-(1 - time) * v - x) / time", "(-(1 - time) * v - x) / time**2"),
    "no last step": ("pairwise(noisy_ends(steps))", "pairwise(noisy_ends(steps)[:-1])"),
    "times reversed": ("velocity(x, start)", "velocity(x, TIMESTEPS - start)"),
}


@pytest.mark.parametrize("bug", list(SDE_BUGS))
def test_planted_bugs_in_the_sde_are_caught(bug: str) -> None:
    assert not from_recursion(mutant(flow.euler_maruyama, *SDE_BUGS[bug]), 50) < 1e-3


def test_drawn_noise_has_the_moments_of_the_affine_map() -> None:
    generator, data = torch.Generator().manual_seed(1), flow_data()

    def draw(step: int = 0) -> Tensor:
        return torch.randn(COUNT, *SHAPE, generator=generator)

    samples = flow.euler_maruyama(data.velocity, draw(), 30, draw)
    assert largest_z_score(samples, *moments(flow.euler_maruyama, data, 30)) < 5
    assert largest_z_score(samples, data.mean, 1.3 * data.covariance) > 10


# Their steps ---------------------------------------------------------------------------------------------------------


def test_timesteps_are_where_the_steps_begin() -> None:
    assert SAMPLERS["euler"].timesteps("5") == [1000, 800, 600, 400, 200]
    assert SAMPLERS["heun"].timesteps(" 2 ") == [1000, 500, 500, 0]
    assert SAMPLERS["euler-maruyama"].timesteps("5") == [1000, 760, 520, 280, 40]
    assert SAMPLERS["euler-maruyama"].timesteps("250")[1] == pytest.approx(1000 * np.linspace(1, 0.04, 250)[1])
    assert flow.noisy_ends(5)[-2:] == [40, 0]
    assert PUBLISHED == {"ddpm": "ddpm", "flow": "euler-maruyama"}
    assert all(SAMPLERS[name].objective == objective for objective, name in PUBLISHED.items())


@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
def test_timesteps_are_those_at_which_the_sampler_asks(name: str) -> None:
    for steps in ("1", "2", "7"):
        asked: list[float] = []

        def denoise(x: Tensor, timestep: float, asked: list[float] = asked) -> Tensor:
            asked.append(timestep)
            return x

        SAMPLERS[name].run(denoise, start(2), steps, lambda step: start(2))
        assert asked == SAMPLERS[name].timesteps(steps)
        assert len(asked) == SAMPLERS[name].calls * int(steps)


@pytest.mark.parametrize("name", ["euler", "euler-maruyama"])
def test_one_step_returns_what_the_first_call_predicts(name: str) -> None:
    """At t = 1 the score is -x: the SDE's step of length 1 is x - v - x, the mean of the data less x + v."""
    noise, data = start(), flow_data()
    made = SAMPLERS[name].run(data.velocity, noise, "1", lambda step: pytest.fail("no noise is added"))
    v = data.velocity(noise, 1000)
    expected = noise - v if name == "euler" else -v
    torch.testing.assert_close(made, expected.double())


def test_noise_is_asked_for_in_order_and_not_at_the_last_step() -> None:
    asked: list[int] = []
    flow.euler_maruyama(flow_data().velocity, start(2), 5, lambda step: asked.append(step) or start(2))  # type: ignore[func-returns-value]
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
def test_the_callback_sees_the_latents_and_the_prediction_of_x0(name: str) -> None:
    """The exact velocity's prediction is E[x_0 | x_t], at the latents before the step."""
    data, before, seen = flow_data(), [start(3)], list[int]()
    ends = flow.noisy_ends(4) if name == "euler-maruyama" else flow.even_ends(4)

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        t, points = ends[step] / 1000, before[-1].flatten(1).double().numpy()
        marginal = (1 - t) ** 2 * data.covariance + t**2 * np.eye(4)
        gain = (1 - t) * data.covariance @ np.linalg.inv(marginal)
        expected = data.mean + (points - (1 - t) * data.mean) @ gain.T
        np.testing.assert_allclose(x0.flatten(1).numpy(), expected, rtol=1e-5, atol=1e-5)
        before.append(x)
        seen.append(step)

    made = SAMPLERS[name].run(data.velocity, before[0], "4", lambda step: start(3), callback)
    assert torch.equal(made, before[-1])
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
def test_the_state_is_float64_and_the_network_sees_float32(name: str) -> None:
    """A state in float32 would lose what thousands of small steps add."""

    def constant(x: Tensor, timestep: float) -> Tensor:
        assert x.dtype == torch.float32
        return torch.full_like(x, 0.1, dtype=torch.bfloat16)

    made = SAMPLERS[name].run(constant, torch.ones(1, *SHAPE), "3000", lambda step: torch.zeros(1, *SHAPE))
    assert made.dtype == torch.float64
    if name != "euler-maruyama":
        assert (made - (1 - float(torch.tensor(0.1).bfloat16()))).abs().max() < 1e-12


@pytest.mark.parametrize("steps", ["0", "-1", "10,15,20", "ddim25", "many", "", "2.5", "100001"])
@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
def test_what_are_no_steps_is_refused(name: str, steps: str) -> None:
    with pytest.raises(InputError, match=r"Sampling steps .* are not understood: under flow give a number from 1 to 100,000\."):
        SAMPLERS[name].timesteps(steps)
