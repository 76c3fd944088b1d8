from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.schedule import NoiseSchedule, at, linear_betas, respaced_timesteps
from models.token_density import TIMESTEPS
from runtime.config import InputError


@given(st.integers(2, 1000))
def test_a_number_spreads_steps_from_end_to_end(count):
    kept = respaced_timesteps(str(count))
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, 999)
    assert max(abs(place - 999 * k / (count - 1)) for k, place in enumerate(kept)) < 0.5 + 1e-6


@given(st.lists(st.integers(1, 100), min_size=1, max_size=10))
def test_a_list_keeps_that_many_of_each_section(counts):
    kept = respaced_timesteps(counts)
    assert kept == sorted(set(kept)) == respaced_timesteps(",".join(map(str, counts)))
    edges = [0, *np.cumsum([1000 // len(counts) + (k < 1000 % len(counts)) for k in range(len(counts))])]
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        section = [place for place in kept if start <= place < end]
        assert len(section) == count
        assert section[0] == start
        assert count == 1 or section[-1] == end - 1


@given(st.integers(1, 1000))
def test_ddim_steps_are_a_whole_number_apart_or_refused(count):
    try:
        kept = respaced_timesteps(f"ddim{count}")
    except InputError:
        assert all(len(range(0, 1000, stride)) != count for stride in range(1, 1001))
    else:
        assert len(kept) == count
        assert kept[0] == 0
        assert len(set(np.diff(kept))) <= 1


@given(st.integers(2, 60), st.integers(2, 40))
def test_a_respacing_of_a_respacing_keeps_original_timesteps(first, second):
    once = NoiseSchedule.linear().respaced(str(first))
    if second <= first:
        twice = once.respaced(str(second))
        assert set(twice.timesteps) <= set(once.timesteps)
        np.testing.assert_allclose(
            twice.alphas_cumprod, NoiseSchedule.linear().alphas_cumprod[list(twice.timesteps)], rtol=1e-9
        )


def test_plans_and_schedule_count_the_same_timesteps():
    assert len(NoiseSchedule.linear()) == TIMESTEPS


def test_known_respacings():
    assert respaced_timesteps("ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps("ddim25") == list(range(0, 1000, 40))  # a stride of 41 would keep 25 as well
    assert respaced_timesteps("1") == [0]
    assert respaced_timesteps("1000") == list(range(1000))
    assert respaced_timesteps("10,15,20")[:10] == [0, 37, 74, 111, 148, 185, 222, 259, 296, 333]
    assert respaced_timesteps("2, 3", steps=11) == [0, 5, 6, 8, 10]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("0", "from 1 to 1000"),
        ("1001", "from 1 to 1000"),
        ("400,100,100", "section 1 of 3"),
        ("10,0", "section 2 of 2"),
        ("many", "'many' are not understood"),
        ("", "not understood"),
        ("-5", "not understood"),
        ("2.5", "not understood"),
        ("10,,20", "not understood"),
        ("ddim", "not understood"),
        ("ddim0", "nearest that one does is ddim1"),
        ("ddim300", "nearest that one does is ddim334"),
        ([], "not understood"),
        ([-1], "not understood"),
    ],
)
def test_unusable_steps_are_refused_in_one_sentence(spec, words):
    with pytest.raises(InputError, match=words):
        respaced_timesteps(spec)


def test_tables_agree_with_their_definitions():
    schedule = NoiseSchedule.linear()
    assert schedule.betas.dtype == np.float64
    np.testing.assert_array_equal(schedule.betas, linear_betas())
    assert len(schedule) == 1000
    assert schedule.timesteps == tuple(range(1000))
    a, previous, betas = schedule.alphas_cumprod[1:], schedule.alphas_cumprod[:-1], schedule.betas[1:]
    precision = 1 / (1 - previous) + (1 - betas) / betas  # Bayes' rule
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_mean_x_t[1:], np.sqrt(1 - betas) / betas / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_mean_x0[1:], np.sqrt(previous) / (1 - previous) / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.snr[1:], a / (1 - a), rtol=1e-12)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]
    for name, table in vars(schedule).items():
        if isinstance(table, np.ndarray):
            assert np.isfinite(table).all(), name
            with pytest.raises(ValueError, match="read-only"):
                table[0] = 0.5


def test_a_schedule_of_one_step_is_finite():
    schedule = NoiseSchedule.linear().respaced("1")
    assert all(np.isfinite(table).all() for table in vars(schedule).values() if isinstance(table, np.ndarray))


@pytest.mark.parametrize(("betas", "timesteps"), [([0.1], (0, 1)), ([0.0], (0,)), ([1.0], (0,))])
def test_unusable_betas_are_refused(betas, timesteps):
    with pytest.raises(InputError, match="betas"):
        NoiseSchedule(np.array(betas), timesteps)


def test_tables_are_copied_to_a_device_once():
    schedule = NoiseSchedule.linear()
    device = torch.device("cpu")
    with torch.inference_mode():
        first = schedule.tables(device)
    assert schedule.tables(torch.device("cpu")) is first
    assert first.snr.dtype == torch.float32
    assert not first.snr.is_inference()
    picked = at(first.log_betas, torch.tensor([999, 0]), torch.zeros(2, 4, 3, 3))
    assert picked.shape == (2, 1, 1, 1)
    np.testing.assert_allclose(picked.flatten().numpy(), np.log([0.02, 1e-4]), rtol=1e-6)


def test_a_second_batch_copies_no_tables() -> None:
    """A copy from the host makes it wait for the device."""
    first, second = (NoiseSchedule.linear().respaced(spec) for spec in ("10", [10]))
    assert first.tables(torch.device("cpu")) is second.tables(torch.device("cpu"))
    assert NoiseSchedule.linear().respaced("11").tables(torch.device("cpu")) is not first.tables(torch.device("cpu"))
