"""Keyed random numbers: Random123's known answers, independence of the batch, and the distributions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import runtime.seeding as seeding
from runtime.seeding import Keys, integers, normal, permutation, philox, uniform

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and result of philox4x32-10 in Random123's kat_vectors."""

DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "normal": normal,
    "integers": lambda keys, purpose, shape=(): integers(keys, purpose, 1000, shape),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def keys(index: list[int] | range, seed: int = 0, step: int = 0) -> Keys:
    return Keys(seed, step, torch.tensor(list(index), dtype=torch.int64))


def failed_answers(generator: Callable[..., tuple[Tensor, ...]]) -> int:
    def answer(counter: str, key: str) -> list[int]:
        first, second = words(key)
        c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
        return [int(word) for word in generator((c0, c1, c2, c3), (first, second))]

    return sum(answer(counter, key) != words(expected) for counter, key, expected in KNOWN_ANSWERS)


def test_philox_gives_the_known_answers() -> None:
    assert failed_answers(philox) == 0


@pytest.mark.parametrize(("constant", "value"), [("_ROUNDS", 9), ("_MULTIPLIER_0", 0xD2511F55), ("_WEYL_1", 0xBB67AE87)])
def test_the_known_answers_catch_a_wrong_constant(constant: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, constant, value)
    assert failed_answers(philox) == 3


def test_philox_takes_many_counters_at_once() -> None:
    counters = [words(counter) for counter, key, _ in KNOWN_ANSWERS]
    c0, c1, c2, c3 = torch.tensor(counters).t()
    first, second = words(KNOWN_ANSWERS[2][1])
    assert torch.stack(philox((c0, c1, c2, c3), (first, second))).t()[2].tolist() == words(KNOWN_ANSWERS[2][2])


# Names, not streams --------------------------------------------------------------------------------------------------


@every_draw
@settings(max_examples=30, deadline=None)
@given(
    index=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    shape=st.sampled_from([(), (1,), (3,), (2, 5), (4, 2, 2)]),
)
def test_a_sample_draws_the_same_in_every_batch(draw: Callable[..., Tensor], index: list[int], shape: tuple[int, ...]) -> None:
    together = draw(keys(index, seed=5, step=9), "noise", shape)
    assert together.shape == (len(index), *shape)
    for place, one in enumerate(index):
        assert torch.equal(draw(keys([one], seed=5, step=9), "noise", shape)[0], together[place])
    assert torch.equal(draw(keys(index[::-1], seed=5, step=9), "noise", shape), together.flip(0))


@every_draw
def test_a_longer_draw_begins_with_the_shorter_one(draw: Callable[..., Tensor]) -> None:
    """So a latent of another size is not another picture from its first row on, and no block of words is used twice."""
    long = draw(keys(range(4)), "noise", (64,))
    for count in (1, 2, 5, 7, 63):
        assert torch.equal(draw(keys(range(4)), "noise", (count,)), long[:, :count])


@every_draw
def test_a_step_in_a_tensor_draws_the_same(draw: Callable[..., Tensor]) -> None:
    for step in (0, 7, 2**31 + 5):
        named = Keys(3, torch.tensor(step), torch.arange(4))
        assert torch.equal(draw(named, "noise", (3,)), draw(keys(range(4), seed=3, step=step), "noise", (3,)))
        assert torch.equal(draw(named.on(torch.device("cpu")), "noise", (3,)), draw(named, "noise", (3,)))


def test_a_bound_in_a_tensor_draws_the_same() -> None:
    for high in (1, 7, 1000, 2**31):
        assert torch.equal(integers(keys(range(50)), "i", torch.tensor(high)), integers(keys(range(50)), "i", high))


@every_draw
def test_drawing_leaves_global_generators_alone(draw: Callable[..., Tensor]) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    first = draw(keys(range(3)), "noise", (5,))
    permutation(0, "order", 0, 10)
    torch.manual_seed(99)
    assert torch.equal(draw(keys(range(3)), "noise", (5,)), first)
    torch.set_rng_state(torch_state)
    assert (np.random.get_state(legacy=False)["state"]["key"] == numpy_state).all()  # noqa: NPY002


COUNT = 100_000


def correlations(streams: list[Tensor]) -> float:
    """The largest correlation between any two of the streams, in standard errors."""
    matrix = torch.corrcoef(torch.stack([stream.flatten().double() for stream in streams]))
    return float((matrix - torch.eye(len(streams))).abs().max() * streams[0].numel() ** 0.5)


NEIGHBOURS: dict[str, Callable[[int], Tensor]] = {
    "seeds": lambda i: normal(keys(range(1000), seed=i), "noise", (100,)),
    "steps": lambda i: normal(keys(range(1000), step=i), "noise", (100,)),
    "indices": lambda i: normal(keys(range(1000 * i, 1000 * (i + 1))), "noise", (100,)),
    "purposes": lambda i: normal(keys(range(1000)), f"noise {i}", (100,)),
    "shifted indices": lambda i: normal(keys(range(i, 1000 + i)), "noise", (100,)),
    "negative seeds": lambda i: normal(keys(range(1000), seed=-i), "noise", (100,)),
    "large steps": lambda i: normal(keys(range(1000), step=1_000_000 + i), "noise", (100,)),
}


@pytest.mark.parametrize("stream", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbouring_names_are_uncorrelated(stream: Callable[[int], Tensor]) -> None:
    assert correlations([stream(i) for i in range(4)]) < 5


@pytest.mark.parametrize("dropped", ["seed", "purpose", "step", "index"])
def test_the_correlation_test_catches_a_name_that_is_not_used(dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = seeding._words

    def words_without(given: Keys, purpose: str, count: int) -> Tensor:
        seed, step, index = given.seed, given.step, given.index
        kept = Keys(
            0 if dropped == "seed" else seed, 0 if dropped == "step" else step, index % 1000 if dropped == "index" else index
        )
        return genuine(kept, "" if dropped == "purpose" else purpose, count)

    monkeypatch.setattr(seeding, "_words", words_without)
    stream = NEIGHBOURS[{"index": "indices"}.get(dropped, dropped + "s")]
    assert correlations([stream(i) for i in range(4)]) > 5


def test_coordinates_of_one_sample_are_uncorrelated() -> None:
    values = normal(keys(range(COUNT // 10)), "noise", (10,))
    assert correlations(list(values.t())) < 5


# Distributions -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(COUNT, ()), (1, (COUNT,)), (COUNT // 5, (5,))], ids=["many samples", "one large sample", "odd count"])
def sizes(request: pytest.FixtureRequest) -> tuple[Keys, tuple[int, ...]]:
    count, shape = request.param
    return keys(range(count), seed=2), shape


def kolmogorov_smirnov(values: Tensor, distribution: str) -> float:
    return float(scipy.stats.kstest(values.flatten().double().numpy(), distribution).pvalue)


def test_uniform_numbers_are_uniform(sizes: tuple[Keys, tuple[int, ...]]) -> None:
    values = uniform(sizes[0], "u", sizes[1])
    assert values.dtype == torch.float32
    assert kolmogorov_smirnov(values, "uniform") > 1e-3
    assert kolmogorov_smirnov(values.clamp(max=0.98), "uniform") < 1e-3  # known bad


def test_normal_numbers_are_normal(sizes: tuple[Keys, tuple[int, ...]]) -> None:
    values = normal(sizes[0], "n", sizes[1])
    assert values.dtype == torch.float32
    assert kolmogorov_smirnov(values, "norm") > 1e-3
    assert kolmogorov_smirnov(1.03 * values, "norm") < 1e-3  # known bad
    for moment, expected, error in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float(values.double().pow(moment).mean()) - expected) < 5 * error / COUNT**0.5


def chi_square(values: Tensor, high: int) -> float:
    return float(scipy.stats.chisquare(np.bincount(values.flatten().numpy(), minlength=high)).pvalue)


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_integers_are_uniform(sizes: tuple[Keys, tuple[int, ...]], high: int) -> None:
    values = integers(sizes[0], "i", high, sizes[1])
    assert values.dtype == torch.int64
    assert int(values.min()) == 0
    assert int(values.max()) == high - 1
    assert chi_square(values, high) > 1e-3
    biased = torch.where((values == 0) & (torch.arange(COUNT).reshape(values.shape) % 5 == 0), 1, values)  # known bad
    assert chi_square(biased, high) < 1e-3 or high == 1000


def test_integers_up_to_two_to_the_31() -> None:
    values = integers(keys(range(1000)), "i", 2**31)
    assert 0 <= int(values.min()) < 2**24
    assert 2**31 - 2**24 < int(values.max()) < 2**31


def test_one_choice_is_zero() -> None:
    assert not integers(keys(range(10)), "i", 1).any()


@pytest.fixture
def extreme_words(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the generator give one word, whatever is asked: what else happens once in billions of draws."""

    def give(word: int) -> None:
        monkeypatch.setattr(seeding, "_words", lambda keys, purpose, count: torch.full((len(keys.index), count), word))

    return give


@pytest.mark.parametrize("word", [0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFEFF, 0xFFFFFF00, 0xFFFFFFFE, 0xFFFFFFFF])
def test_the_ends_are_never_reached(word: int, extreme_words: Callable[[int], None]) -> None:
    """0 and 1 are outside uniform's range: a logarithm, or `uniform < 1`, must not fail once in 16 million draws."""
    extreme_words(word)
    assert 0 < float(uniform(keys([0]), "u")) < 1
    assert abs(float(normal(keys([0]), "n"))) < 7
    assert 0 <= int(integers(keys([0]), "i", 1000)) < 1000


@every_draw
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0)])
def test_empty_batches_and_shapes(draw: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    assert draw(keys([]), "noise", shape).shape == (0, *shape)
    assert draw(keys([1, 2]), "noise", shape).shape == (2, *shape)


def test_recorded_values() -> None:
    """Another version of this code or of torch, and another device, must draw the same."""
    labels = integers(keys([0, 1, 2**32 - 1], seed=3, step=4), "label", 1000)
    assert labels.tolist() == [766, 323, 978]
    noise = normal(keys([7], seed=3, step=4), "noise", (3,))
    torch.testing.assert_close(noise, torch.tensor([[0.18455416, -0.40409428, 0.46742797]]), rtol=1e-6, atol=0)


# Orders --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 10**6), size=st.integers(0, 300))
def test_a_permutation_holds_every_place_once(seed: int, epoch: int, size: int) -> None:
    order = permutation(seed, "order", epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    assert (order == permutation(seed, "order", epoch, size)).all()


def test_permutations_differ_by_seed_purpose_and_epoch() -> None:
    names = [(seed, purpose, epoch) for seed in range(5) for purpose in ("order", "other") for epoch in range(5)]
    orders = {tuple(permutation(*name, 50)) for name in names}
    assert len(orders) == len(names)


def test_first_places_of_permutations_are_uniform() -> None:
    first = torch.tensor([permutation(0, "order", epoch, 10)[0] for epoch in range(5000)])
    assert chi_square(first, 10) > 1e-3


@pytest.mark.parametrize("key", [2**31, 2**63 - 1, 2**63 + 2**62, 2**64 - 1])
def test_every_bit_of_the_key_counts(key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key above 2**63 in a Python list reaches numpy as a float64, which forgets its last eleven bits."""

    def order(value: int) -> list[int]:
        monkeypatch.setattr(seeding, "key_words", lambda seed, purpose: (value & 0xFFFFFFFF, value >> 32))
        return permutation(0, "order", 1, 100).tolist()

    assert len({tuple(order(value)) for value in (key, key - 1, key - 200)}) == 3
    expected = np.random.Generator(np.random.Philox(key=np.array([key, 1], dtype=np.uint64))).permutation(100)
    assert order(key) == expected.tolist()
