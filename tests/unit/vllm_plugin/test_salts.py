"""What a local hit may hold, against a list of everything that was ever put under a salt."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey
from kv_agent.vllm_plugin import salts
from kv_agent.vllm_plugin.salts import UNKNOWN, Moves, SaltLedger, cut_moves


def moves(*placed: tuple[int, int, str]) -> Moves:
    """``"a2"`` is chunk ``a`` without its first two tokens."""
    return tuple((start, end, ChunkKey(name[0] * 32), int(name[1:] or 0)) for start, end, name in placed)


@st.composite
def histories(draw: st.DrawFn) -> Moves:
    """Up to three moved chunks one after the other, or nothing known."""
    if draw(st.integers(0, 9)) == 0:
        return UNKNOWN
    placed, position = [], 0
    for _ in range(draw(st.integers(0, 3))):
        position += draw(st.integers(0, 2))
        end = position + draw(st.integers(1, 3))
        placed.append((position, end, draw(st.sampled_from(["a", "b", "a2"]))))
        position = end
    return moves(*placed)


def source_of(history: Moves, position: int) -> tuple[int, str, int] | None:
    """Where a token's KV came from: from which chunk, moved to where; ``None``: computed in place."""
    return next(((start, key, skip) for start, end, key, skip in history if start <= position < end), None)


salt_names = st.sampled_from(["s", "t", "u"])


@given(
    records=st.lists(st.tuples(salt_names, histories()), max_size=8),
    salt=salt_names,
    expected=histories().filter(lambda history: history != UNKNOWN),
    end=st.integers(0, 12),
)
@settings(max_examples=200, deadline=None)
def test_a_hit_is_trusted_when_all_histories_put_the_same_into_it(
    records: list[tuple[str, Moves]], salt: str, expected: Moves, end: int
) -> None:
    ledger = SaltLedger()
    for name, history in records:
        ledger.record(name, history)
    past = [history for name, history in records if name == salt] or [()]
    same = all(
        [source_of(history, position) for position in range(end)]
        == [source_of(expected, position) for position in range(end)]
        for history in past
    )
    assert ledger.agrees(salt, expected, end) is same


@given(
    records=st.lists(st.tuples(salt_names, histories()), max_size=12),
    salt=salt_names,
    expected=histories().filter(lambda history: history != UNKNOWN),
    end=st.integers(0, 12),
)
@settings(max_examples=200, deadline=None)
def test_forgetting_makes_hits_untrusted_and_never_trusted(
    records: list[tuple[str, Moves]], salt: str, expected: Moves, end: int
) -> None:
    full, small = SaltLedger(), SaltLedger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(salts, "MAX_SALTS", 2)
        patch.setattr(salts, "MAX_HISTORIES", 2)
        for name, history in records:
            small.record(name, history)
    for name, history in records:
        full.record(name, history)
    if small.agrees(salt, expected, end):
        assert full.agrees(salt, expected, end)


def test_a_salt_that_was_forgotten_and_is_used_again_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with its moved chunks may outlive the memory of them."""
    monkeypatch.setattr(salts, "MAX_SALTS", 1)
    ledger = SaltLedger()
    ledger.record("s", moves((0, 4, "a")))
    ledger.record("t", ())
    assert not ledger.agrees("s", (), 4)
    ledger.record("s", ())
    assert not ledger.agrees("s", (), 4)


def test_the_salt_used_last_is_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salts, "MAX_SALTS", 2)
    ledger = SaltLedger()
    for salt in ("s", "t", "s", "u"):
        ledger.record(salt, ())
    assert ledger.agrees("s", (), 4)
    assert not ledger.agrees("t", (), 4)


def test_nothing_is_moved_without_a_salt_nor_into_no_tokens() -> None:
    ledger = SaltLedger()
    ledger.record("s", UNKNOWN)
    assert ledger.agrees(None, (), 100)
    assert ledger.agrees("s", (), 0)
    assert not ledger.agrees("s", (), 1)


@given(history=histories(), end=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_cut_moves_keep_what_concerns_the_first_tokens(history: Moves, end: int) -> None:
    cut = cut_moves(history, end)
    assert [source_of(cut, position) for position in range(end)] == [
        source_of(history, position) for position in range(end)
    ]
    assert all(start < stop <= end for start, stop, *_ in cut)


def test_a_plan_of_ten_moved_chunks_is_remembered_in_half_a_kilobyte() -> None:
    """There may be ``MAX_SALTS`` of them: as tuples they took 526 MB."""
    ledger = SaltLedger()
    tracemalloc.start()
    for number in range(1000):
        keys = (ChunkKey(f"{10 * number + place:032x}") for place in range(10))
        starts = range(1000, 2000, 100)
        ledger.record(str(number), tuple((at, at + 90, key, 0) for at, key in zip(starts, keys, strict=True)))
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert num_bytes < 1000 * 600
