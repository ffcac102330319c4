"""Pieces written together end up where each of them alone would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import rotate_keys
from kv_agent.vllm_plugin.staging import Staging
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.bench import NUM_BLOCKS, SCHEME, D, DenseCache, H, L, P


def pieces_of(plan: list[tuple[int, int, int]], dtype: torch.dtype) -> list[Piece]:
    """Gap before it, tokens and delta of each, one after the other."""
    pieces, position = [], 0
    for number, (gap, num_tokens, delta) in enumerate(plan):
        generator = torch.Generator().manual_seed(number)
        whole_L2THD = torch.randn(L, 2, num_tokens + 1, H, D, generator=generator).to(dtype)
        pieces.append(Piece(kv_L2THD=whole_L2THD[:, :, 1:], start=position + gap, delta=delta))
        position += gap + num_tokens
    return pieces


@settings(max_examples=80, deadline=None)
@given(
    plan=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.sampled_from([0, 5, -2])), max_size=6),
    blocks=st.permutations(range(NUM_BLOCKS)),
    capacity=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_the_cache_is_as_if_every_piece_was_written_alone(
    plan: list[tuple[int, int, int]], blocks: list[int], capacity: int, dtype: torch.dtype
) -> None:
    pieces = pieces_of(plan, dtype)
    cache, expected = DenseCache(dtype), DenseCache(dtype)
    staging = Staging(cache, SCHEME, limit_bytes=capacity * cache.token_bytes)

    for _ in range(2):  # what is left in the buffer does no harm
        staging.write(pieces, blocks)

    for piece in pieces:
        kv_L2THD = piece.kv_L2THD.clone()
        kv_L2THD[:, 0] = rotate_keys(piece.kv_L2THD[:, 0], piece.delta, SCHEME)
        expected.write(kv_L2THD, blocks, piece.start)
    assert same_bits(cache.memory_L2SHD, expected.memory_L2SHD)


def test_neighbours_are_written_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DenseCache(torch.float32)
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(cache, "write", lambda kv, _, start, __: written.append((start, kv.shape[2])))

    Staging(cache, SCHEME).write(
        pieces_of([(0, 3, 1), (0, 4, 0), (2, 5, 0), (0, 1, 2)], torch.float32), range(NUM_BLOCKS)
    )

    assert written == [(0, 7), (9, 6)]


def test_after_a_write_that_failed_the_next_one_begins_anew() -> None:
    cache = DenseCache(torch.float32)
    staging = Staging(cache, SCHEME)
    cache.broken = OSError("no")
    with pytest.raises(OSError, match="no"):
        staging.write(pieces_of([(0, 3, 1)], torch.float32), range(NUM_BLOCKS))
    cache.broken = None
    before = cache.memory_L2SHD.clone()

    staging.write(pieces_of([(3 * P, 2, 0)], torch.float32), range(NUM_BLOCKS))

    assert same_bits(cache.memory_L2SHD[:, :, : 3 * P], before[:, :, : 3 * P])


def test_without_a_scheme_nothing_is_moved() -> None:
    staging = Staging(DenseCache(torch.float32), None)

    with pytest.raises(UnsupportedModelError):
        staging.write(pieces_of([(0, 3, 1)], torch.float32), range(NUM_BLOCKS))
