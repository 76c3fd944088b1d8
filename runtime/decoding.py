"""Latents to pictures: at once, or in a thread of its own while the next block is sampled.

Both ways decode the same parts with the same operations, so they make the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType

import torch
from torch import Tensor

from data.latents import Codec
from runtime.config import InputError
from runtime.execution import Execution

DECODED_AT_ONCE = 8
"""A decoder needs far more memory a picture than the network does."""

Deliver = Callable[[int, Tensor], None]
"""Takes the place in the block of the first of some pictures, and the pictures (n, H, W, 3) uint8 on the CPU."""


def decoded(codec: Codec, latents: Tensor) -> Iterator[Tensor]:
    """Latents (N, C, h, w) -> pictures (n, H, W, 3) uint8 on the CPU, part by part in order."""
    for part in latents.split(DECODED_AT_ONCE):
        yield codec.decode(part).cpu()


def decode_pictures(codec: Codec, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> pictures (N, H, W, 3) uint8 on the CPU"""
    return torch.cat(list(decoded(codec, latents)))


def resolve_overlap(asked: bool | None, execution: Execution) -> bool:
    """Whether decoding runs beside sampling; None: on a GPU. InputError where it cannot."""
    if execution.attention != "auto":
        # Torch keeps the choice of kernels for the whole process: the decoder's own attention would meet it, and few kernels
        # take heads as large as the decoder's.
        if asked:
            raise InputError(f"--overlap-decoding and --attention {execution.attention} exclude each other, since the decoder "
                             "would be given the same kernel; leave one out.")  # fmt: skip
        return False
    return execution.device.type == "cuda" if asked is None else asked


def make_decoder(codec: Codec, device: torch.device, overlap: bool) -> InlineDecoder:
    """A context in which blocks of latents are decoded; at its end every block has been delivered."""
    return OverlappedDecoder(codec, device) if overlap else InlineDecoder(codec)


class InlineDecoder:
    """Decodes each block where it is submitted."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def submit(self, latents: Tensor, deliver: Deliver) -> None:
        """Decodes a block of latents (N, C, h, w) and delivers its pictures in order."""
        place = 0
        for pictures in decoded(self.codec, latents):
            deliver(place, pictures)
            place += len(pictures)

    def __enter__(self) -> InlineDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        pass


class OverlappedDecoder(InlineDecoder):
    """Decodes each block in one thread, on a GPU in one stream, while the caller goes on.

    `submit` waits for the block before: one block is decoded while one is sampled, and no other is kept. An error of decoding
    or delivering is raised by the next `submit`, or at the end. Where the caller fails, what is not yet decoded is dropped.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        super().__init__(codec)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "decoding")
        self._before: Future[None] | None = None
        self._stopped = threading.Event()

    def submit(self, latents: Tensor, deliver: Deliver) -> None:
        """As the inline one, but returns while the block is being decoded; `deliver` is called in the thread."""
        self._settle()
        sampled = None
        if self._stream is not None:
            sampled = torch.cuda.Event()
            sampled.record(torch.cuda.current_stream(latents.device))
        self._before = self._thread.submit(self._decode, latents, sampled, deliver)

    def _decode(self, latents: Tensor, sampled: torch.cuda.Event | None, deliver: Deliver) -> None:
        # Streams and the current device belong to a thread. Copies to the host wait for the current stream alone.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and sampled is not None:
                self._stream.wait_event(sampled)
                latents.record_stream(self._stream)  # its memory must not be reused before it is decoded
            super().submit(latents, self._unless_stopped(deliver))

    def _unless_stopped(self, deliver: Deliver) -> Deliver:
        def checked(place: int, pictures: Tensor) -> None:
            if self._stopped.is_set():
                raise InterruptedError("decoding was stopped")
            deliver(place, pictures)

        return checked

    def _settle(self) -> None:
        if self._before is not None:
            before, self._before = self._before, None
            before.result()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._stopped.set()
            self._thread.shutdown(wait=True)
