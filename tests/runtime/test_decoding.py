"""Decoding beside sampling: the same pictures as decoding in place, one block at a time, errors as themselves, nothing left."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data.latents import Codec, bytes_from_pixels
from runtime.config import InputError
from runtime.decoding import DECODED_AT_ONCE, InlineDecoder, OverlappedDecoder, make_decoder, resolve_overlap
from runtime.execution import Execution

CPU = torch.device("cpu")
PATIENCE = 10
"""Seconds after which a test that waits has failed."""


class NotedCodec(Codec):
    """Pixels as latents; `before` is called before each part is decoded."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing is encoded here")

    def decode_pixels(self, latents: Tensor) -> Tensor:
        self.before()
        return latents


def blocks(count: int, size: int = 2 * DECODED_AT_ONCE + 3) -> list[Tensor]:
    return list(torch.randn(count, size, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def delivered(decoder: InlineDecoder, content: list[Tensor]) -> list[tuple[int, int, Tensor]]:
    """(block, place, pictures) in the order in which they came."""
    came: list[tuple[int, int, Tensor]] = []
    with decoder:
        for number, block in enumerate(content):
            decoder.submit(block, lambda place, pictures, number=number: came.append((number, place, pictures)))  # type: ignore[misc]
    return came


@pytest.mark.parametrize("overlap", [False, True])
def test_every_picture_is_delivered_once_and_in_order(overlap: bool) -> None:
    content = blocks(3)
    came = delivered(make_decoder(NotedCodec(), CPU, overlap), content)
    assert [(block, place) for block, place, _ in came] == [(block, place) for block in range(3) for place in (0, 8, 16)]
    assert torch.equal(torch.cat([pictures for *_, pictures in came]), bytes_from_pixels(torch.cat(content)))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_caller_goes_on_while_a_block_is_decoded(overlap: bool) -> None:
    """Known-bad variant: in place, nobody is there to open the gate."""
    gate, seen = threading.Event(), []
    decoder = make_decoder(NotedCodec(lambda: seen.append(gate.wait(PATIENCE if overlap else 0.01))), CPU, overlap)
    with decoder:
        decoder.submit(blocks(1, 1)[0], lambda place, pictures: None)
        gate.set()
    assert seen == [overlap]


class Unbounded(OverlappedDecoder):
    """Known bad: sampled blocks pile up where decoding is slower."""

    def _settle(self) -> None:
        if self._stopped.is_set():
            super()._settle()


@pytest.mark.parametrize("kind", [OverlappedDecoder, Unbounded])
def test_no_block_waits_beside_the_one_that_is_decoded(kind: type[OverlappedDecoder]) -> None:
    slowly, done, waiting = threading.Event(), [], []
    with kind(NotedCodec(lambda: bool(slowly.wait(0.02))), CPU) as decoder:  # type: ignore[arg-type]
        for number, block in enumerate(blocks(4, 1)):
            decoder.submit(block, lambda place, pictures: done.append(place))
            waiting.append(number + 1 - len(done))
    assert (max(waiting) <= 1) is (kind is OverlappedDecoder)


def fails() -> None:
    raise ZeroDivisionError("the decoder's own")


def full(place: int, pictures: Tensor) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_decoding_is_raised_by_the_next_submit() -> None:
    decoder = OverlappedDecoder(NotedCodec(fails), CPU)
    decoder.submit(blocks(1)[0], lambda place, pictures: None)
    with pytest.raises(ZeroDivisionError, match="the decoder's own"):
        decoder.submit(blocks(1)[0], lambda place, pictures: None)
    decoder.__exit__(None, None, None)


def test_an_error_of_the_last_block_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match="No space left"), OverlappedDecoder(NotedCodec(), CPU) as decoder:
        decoder.submit(blocks(1)[0], full)


def test_where_the_caller_fails_the_rest_is_dropped_and_no_thread_is_left() -> None:
    arrived = threading.Event()
    places: list[int] = []
    parts: list[int] = []

    def second_part_waits() -> None:
        parts.append(len(parts))
        if len(parts) == 2:
            assert decoder._stopped.wait(PATIENCE)

    def deliver(place: int, pictures: Tensor) -> None:
        places.append(place)
        arrived.set()

    def interrupted() -> None:
        with decoder:
            decoder.submit(blocks(1)[0], deliver)
            assert arrived.wait(PATIENCE)
            raise KeyboardInterrupt

    decoder = OverlappedDecoder(NotedCodec(second_part_waits), CPU)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert places == [0]
    assert parts == [0, 1]
    assert not any(thread.name.startswith("decoding") for thread in threading.enumerate())


def test_what_is_chosen_where_nothing_is_asked() -> None:
    gpu = torch.device("cuda")
    assert resolve_overlap(None, Execution(gpu))
    assert not resolve_overlap(None, Execution(CPU))
    assert not resolve_overlap(False, Execution(gpu))
    assert resolve_overlap(True, Execution(CPU))
    assert not resolve_overlap(None, Execution(gpu, attention="cudnn"))


def test_a_chosen_kernel_would_reach_the_decoder() -> None:
    """Why the two exclude each other."""
    from runtime.execution import numerics

    seen = []
    with numerics(Execution(CPU, attention="math")):
        thread = threading.Thread(target=lambda: seen.append(torch.backends.cuda.flash_sdp_enabled()))
        thread.start()
        thread.join()
    assert seen == [False]
    with pytest.raises(InputError, match="--overlap-decoding and --attention math exclude each other"):
        resolve_overlap(True, Execution(CPU, attention="math"))
