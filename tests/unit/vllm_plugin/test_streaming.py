"""Chunks on a stream of their own: what is written, when, and what happens where streams do not work."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import rotate_keys
from kv_agent.vllm_plugin import streaming
from kv_agent.vllm_plugin.direct import DirectWriter
from kv_agent.vllm_plugin.paged_cache import PagedCache
from kv_agent.vllm_plugin.streaming import StreamWriter, chunk_writer
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.backends import PACKED, Backend, Sizes, token_rows_nhd
from tests.unit.vllm_plugin.bench import SCHEME, DenseCache
from tests.unit.vllm_plugin.told import Told

L = 3
SIZES = Sizes(B=9, P=4, H=2, D=8)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def pieces_of(lengths: list[int], dtype: torch.dtype, delta: int, device: str = "cpu") -> list[Piece]:
    """One behind the other, but for a gap of a token after the first."""
    pieces, start = [], 1
    for number, num_tokens in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        kv_L2THD = torch.randn(L, 2, num_tokens, SIZES.H, SIZES.D, generator=generator)
        pieces.append(Piece(kv_L2THD=kv_L2THD.to(device, dtype), start=start, delta=delta * (number % 2)))
        start += num_tokens + (number == 0)
    return pieces


def written_plainly(cache: PagedCache, pieces: list[Piece], blocks: list[int]) -> None:
    for piece in pieces:
        kv_L2THD = piece.kv_L2THD.clone()
        kv_L2THD[:, 0] = rotate_keys(piece.kv_L2THD[:, 0], piece.delta, SCHEME)
        cache.write(kv_L2THD, blocks, piece.start)


@pytest.mark.slow  # code is made for every layout
@given(
    build=st.sampled_from([token_rows_nhd, *PACKED]),
    dtype=st.sampled_from(DTYPES),
    blocks=st.permutations(range(1, SIZES.B)),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    delta=st.integers(-3, 3),
    cuts=st.sampled_from([(0, L), (0, 1, L), (0, 2, L), (0, 1, 2, L)]),
)
@settings(max_examples=40, deadline=None)
def test_layer_by_layer_the_blocks_get_what_the_backend_writes_plainly(
    build: Callable[[Sizes, torch.dtype], Backend],
    dtype: torch.dtype,
    blocks: list[int],
    lengths: list[int],
    delta: int,
    cuts: tuple[int, ...],
) -> None:
    ours, theirs = ([build(SIZES, dtype) for _ in range(L)] for _ in range(2))
    cache, expected = (PagedCache([one.layer() for one in backends], SIZES.P) for backends in (ours, theirs))
    pieces = pieces_of(lengths, dtype, delta)

    work = StreamWriter(cache, SCHEME).into(blocks)(pieces)
    for first, end in itertools.pairwise(cuts):
        work(first, end)

    written_plainly(expected, pieces, blocks)
    for one, other in zip(ours, theirs, strict=True):
        assert same_bits(one.memory, other.memory)


@pytest.mark.parametrize("fails", [False, True])
def test_it_begins_when_the_blocks_are_free_and_returns_when_all_is_written(told: Told, fails: bool) -> None:
    cache = DenseCache(torch.float32, has_streams=True)
    write = cache.write

    def told_write(*arguments: Any) -> None:
        told.said.append("written")
        if fails:
            raise OSError("no")
        write(*arguments)

    cache.write = told_write  # type: ignore[method-assign]
    prepare = StreamWriter(cache, SCHEME).into([3, 4])
    told.said.append("the model's thread goes on")
    work = prepare(pieces_of([4], torch.float32, 0))

    try:
        work(0, L)
    except OSError:
        assert fails

    assert (
        told.said[:-1]
        == [
            "event 1 is behind the model's work",
            "the model's thread goes on",
            "on own stream",
            "own stream waits for event 1",
            "written",
            "event 2 is behind own work",
            "waited for event 2",
        ][: len(told.said[:-1])]
    )
    assert ("off own stream" in told.said) is not fails
    assert "waited for event 2" in told.said


def test_host_memory_is_written_by_machine_code_and_other_by_streams_if_there_are_any() -> None:
    assert isinstance(chunk_writer(DenseCache(torch.float32, direct=True), SCHEME), DirectWriter)
    assert isinstance(chunk_writer(DenseCache(torch.float32, has_streams=True), SCHEME), StreamWriter)
    assert chunk_writer(DenseCache(torch.float32), SCHEME) is None


@pytest.mark.parametrize("trouble", [None, RuntimeError("no such stream")])
def test_a_stream_that_does_not_work_is_left_alone(
    trouble: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(self: StreamWriter, *_: object) -> None:
        if trouble is not None:
            raise trouble

    monkeypatch.setattr(streaming.StreamWriter, "_write", write)

    with caplog.at_level(logging.WARNING):
        assert chunk_writer(DenseCache(torch.float32, has_streams=True), SCHEME) is None

    assert [record.event for record in caplog.records][-1] == "stream_unavailable"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lies_in", ["cpu", "cuda"])
def test_on_a_gpu_blocks_get_what_they_get_in_host_memory(dtype: torch.dtype, lies_in: str) -> None:
    ours = [token_rows_nhd(SIZES, dtype, "cuda") for _ in range(L)]
    theirs = [token_rows_nhd(SIZES, dtype) for _ in range(L)]
    cache, expected = (PagedCache([one.layer() for one in backends], SIZES.P) for backends in (ours, theirs))
    writer = chunk_writer(cache, SCHEME)
    assert isinstance(writer, StreamWriter)
    blocks, lengths = [5, 2, 7, 3, 1], [6, 3, 8]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # the blocks are somebody else's until this is through
        busy = busy @ busy
    for backend in ours:
        backend.memory.view(torch.uint8).add_((busy[0, 0] == 0).to(torch.uint8))

    work = writer.into(blocks)(pieces_of(lengths, dtype, 5, lies_in))
    work(0, 1)
    work(1, L)

    written_plainly(expected, pieces_of(lengths, dtype, 5), blocks)
    num_tokens = 1 + sum(lengths) + 1
    assert_near(cache.read(blocks, 1, num_tokens), expected.read(blocks, 1, num_tokens), lengths[0])


def assert_near(ours_L2THD: Tensor, theirs_L2THD: Tensor, gap: int) -> None:
    """All but the gap between the pieces; keys may be rounded another way."""
    kept = [t for t in range(ours_L2THD.shape[2]) if t != gap]
    torch.testing.assert_close(ours_L2THD[:, :, kept], theirs_L2THD[:, :, kept])
