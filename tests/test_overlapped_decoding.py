"""sample_ddp.py with its decoding beside the sampling: the bytes of decoding in place, also after it was stopped."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_runs import COUNT
from sampling_runs import checkpoint as checkpoint
from sampling_runs import words as words
from small_runs import call, recorded, succeed

import sample_ddp
from data.latents import AutoencoderCodec, load_codec, resolve_codec
from runtime import pictures
from runtime.decoding import InlineDecoder, OverlappedDecoder, make_decoder

BOTH = ["--overlap-decoding", "--no-overlap-decoding"]


@pytest.fixture
def decoded_words(pretrained: Path, tiny_vae: Path, tmp_path: Path) -> list[str]:
    """Sampling with a decoder, more pictures a block than are decoded at once."""
    return ["--ckpt", str(pretrained), "--model", "DiT-T/2", "--image-size", "64", "--vae", str(tiny_vae), "--num-fid-samples",
            "24", "--per-proc-batch-size", "10", "--num-sampling-steps", "2", "--sample-dir", str(tmp_path)]  # fmt: skip


def test_the_same_bytes_as_in_place(decoded_words: list[str], tmp_path: Path) -> None:
    for flag in BOTH:
        succeed("sample_ddp", *decoded_words, flag, "--sample-name", flag.strip("-"))
    overlapped, inline = ([path.read_bytes() for path in sorted((tmp_path / flag.strip("-")).glob("*.png"))] for flag in BOTH)
    assert overlapped == inline
    assert len(set(inline)) == 24


@pytest.mark.parametrize("flag", BOTH)
def test_where_it_is_decoded(flag: str, decoded_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is not without effect."""
    made: list[InlineDecoder] = []
    monkeypatch.setattr(sample_ddp, "make_decoder", recorded(make_decoder, made))
    succeed("sample_ddp", *decoded_words, flag, "--num-fid-samples", "1")
    assert [type(decoder) for decoder in made] == [OverlappedDecoder if flag == "--overlap-decoding" else InlineDecoder]


def stop_at(call_number: int, owner: Any, name: str, error: Callable[[], BaseException], patch: pytest.MonkeyPatch) -> None:
    """The call of that number fails."""
    function: Callable[..., Any] = getattr(owner, name)
    made = 0

    def counting(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == call_number:
            raise error()
        return function(*arguments)

    patch.setattr(owner, name, counting)


def no_space() -> OSError:
    return OSError(28, "No space left on device")


STOPS: dict[str, tuple[int, Any, str, Callable[[], BaseException], int]] = {
    "Ctrl-C while the third block is sampled": (3, sample_ddp, "sample_latents", KeyboardInterrupt, 130),
    "the disk is full at the sixth picture": (6, pictures, "atomic_write", no_space, 1),
}


@pytest.mark.parametrize("flag", BOTH)
@pytest.mark.parametrize("case", list(STOPS))
def test_what_was_stopped_is_completed_to_the_same_bytes(case: str, flag: str, words: list[str], tmp_path: Path) -> None:
    succeed("sample_ddp", *words, "--sample-name", "whole")
    number, owner, name, error, code = STOPS[case]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(number, owner, name, error, patch)
        result = call("sample_ddp", *words, flag)
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    gc.collect()  # with the error goes the lock of the folder, as with the process
    assert len(list((tmp_path / "set").glob("[0-9]*.png"))) < COUNT
    succeed("sample_ddp", *words, flag)
    assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_an_error_of_the_decoder_is_raised_as_itself(decoded_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(2, AutoencoderCodec, "decode_pixels", lambda: RuntimeError("out of memory"), monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        call("sample_ddp", *decoded_words, "--overlap-decoding")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_waits_for_what_it_decodes(tiny_vae: Path) -> None:
    """Each block is made by a long chain of products and its memory is free for the next one as soon as it is submitted."""
    device = torch.device("cuda")
    codec, square = load_codec(resolve_codec(str(tiny_vae)), device), torch.eye(4096, device=device)
    made: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for overlap, came in made.items():
        with make_decoder(codec, device, overlap) as decoder:
            for number in range(6):
                for _ in range(20):
                    square = square @ square
                latents = torch.full((20, 4, 8, 8), number / 3, device=device) * square[0, 0]
                decoder.submit(latents, lambda place, pictures, came=came: came.append(pictures))  # type: ignore[misc]
                del latents
    assert torch.equal(torch.cat(made[True]), torch.cat(made[False]))
