"""What is loaded for a plan, what stands behind it, and what is left of it after a failed load."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import (
    ChunkKey,
)
from kv_agent.vllm_plugin.plan import CheckedPlan, Refusal
from tests.unit.vllm_plugin.builders import (
    chain,
    plan_options,
    record,
)
from tests.unit.vllm_plugin.plans import FRESH, check, check_in_a_row, reasons

# -- what is loaded -------------------------------------------------------------------------------


def three_chunks_and_a_gap() -> CheckedPlan:
    """Chunks at [0, 4), [4, 9), a gap, [12, 15)."""
    first, second = chain([1, 2, 3, 4], [5, 6, 7, 8, 9])
    last = record([13, 14, 15], start=2)
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, *FRESH)
    options = plan_options((first, 0), (second, 4), (last, 12), fresh_start=15)
    return check(options, first, second, last, prompt=prompt)


@pytest.mark.parametrize(
    ("local", "end"),
    [(0, 9), (2, 9), (4, 9), (8, 9), (9, 9), (10, 10), (11, 11), (12, 15), (14, 15), (15, 15), (16, 16)],
)
def test_tokens_reach_up_to_the_first_gap(local: int, end: int) -> None:
    assert three_chunks_and_a_gap().reach(local) == end


def test_nothing_is_reached_when_the_first_chunk_stands_behind_a_gap() -> None:
    late = record([1, 2], start=4)
    plan = check(plan_options((late, 4), fresh_start=6), late, prompt=(9, 9, 9, 9, 1, 2, *FRESH))
    assert (plan.reach(0), plan.reach(3), plan.reach(4)) == (0, 3, 6)
    assert plan.loads(0, 0) == ()


def test_a_local_hit_inside_a_chunk_skips_its_first_tokens() -> None:
    plan = three_chunks_and_a_gap()
    (load,) = plan.loads(6, 9)
    assert (load.skip, load.start, load.end, load.delta) == (2, 6, 9, 0)
    (moved,) = plan.loads(12, 15)
    assert (moved.skip, moved.start, moved.end, moved.delta) == (0, 12, 15, 10)


@st.composite
def plans(draw: st.DrawFn) -> tuple[tuple[int, ...], CheckedPlan]:
    """A prompt of distinct tokens and chunks of it, computed anywhere, some of them refused."""
    steps = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), max_size=6))
    moves = draw(st.lists(st.integers(0, 50), min_size=len(steps), max_size=len(steps)))
    skips = draw(st.lists(st.integers(0, 3), min_size=len(steps), max_size=len(steps)))
    good = draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))
    prompt = tuple(range(100, 100 + sum(gap + size for gap, size in steps) + 2))
    placements, position = [], 0
    for (gap, size), moved, skip, keep in zip(steps, moves, skips, good, strict=True):
        position += gap
        ids = (*range(9000, 9000 + skip), *prompt[position : position + size])
        one = record(ids, parent=ChunkKey("p"), start=moved, quarantined=not keep)
        placements.append((one, position, skip))
        position += size
    options = plan_options(*placements, fresh_start=position)
    return prompt, check(options, *(one for one, *_ in placements), prompt=prompt)


@given(case=plans(), local=st.integers(0, 45))
@settings(max_examples=150, deadline=None)
def test_loads_cover_each_reached_token_once_with_that_token_s_kv(
    case: tuple[tuple[int, ...], CheckedPlan], local: int
) -> None:
    prompt, plan = case
    covered_by = {position: chunk for chunk in plan.placed for position in range(chunk.start, chunk.end)}
    end = local
    while end in covered_by:
        end += 1

    assert plan.reach(local) == end
    for upto in {chunk.end for chunk in plan.placed if local < chunk.end <= end} | {end}:
        loaded: dict[int, tuple[int, int]] = {}
        loads = plan.loads(local, upto)
        records = plan.records(loads)
        assert records.keys() == {load.key for load in loads}
        for load in loads:
            one = records[load.key]
            assert (load.checksum, load.num_tokens) == (one.checksum, one.num_tokens)
            assert load.skip < load.num_tokens
            for index in range(load.skip, load.num_tokens):
                position = load.start + index - load.skip
                assert position not in loaded
                loaded[position] = (one.token_ids[index], one.start + index + load.delta)
        assert loaded == {position: (prompt[position], position) for position in range(local, upto)}


@pytest.mark.parametrize(
    ("cached_end", "last", "end"),
    [(0, None, 0), (3, None, 0), (4, 0, 4), (8, 0, 4), (9, 1, 9), (12, 1, 9), (15, 2, 15), (18, 2, 15)],
)
def test_what_is_computed_next_stands_behind_the_last_whole_chunk(
    cached_end: int, last: int | None, end: int
) -> None:
    plan = three_chunks_and_a_gap()
    expected = plan.root if last is None else plan.placed[last].after
    assert plan.base(cached_end) == (expected, end)


@pytest.mark.parametrize("cached_end", [13, 14])
def test_nothing_names_a_context_that_ends_inside_a_moved_chunk(cached_end: int) -> None:
    assert three_chunks_and_a_gap().base(cached_end) is None


def test_moves_are_the_adapted_chunks_as_far_as_they_are_cached() -> None:
    plan = three_chunks_and_a_gap()
    key = plan.placed[2].record.key
    assert [plan.moves(end) for end in (0, 9, 12)] == [(), (), ()]
    assert [plan.moves(end) for end in (13, 15, 99)] == [((12, end, key, 0),) for end in (13, 15, 15)]


def test_a_chunk_without_its_first_tokens_is_adapted_even_where_it_was_computed() -> None:
    first, second = chain([1, 2, 3], [4, 5, 6, 7])
    options = plan_options((first, 0), (second, 3, 1), fresh_start=6)
    plan = check(options, first, second, prompt=(1, 2, 3, 5, 6, 7, *FRESH))
    assert [chunk.exact for chunk in plan.placed] == [True, False]
    (_, load) = plan.loads(0, 6)
    assert (load.skip, load.start, load.end, load.delta) == (1, 3, 6, -1)
    assert plan.moves(6) == ((3, 6, second.key, 1),)
    whole = check(plan_options((second, 0), fresh_start=4), second, prompt=(4, 5, 6, 7, *FRESH))
    less = check(plan_options((second, 0, 1), fresh_start=3), second, prompt=(5, 6, 7, *FRESH))
    assert whole.placed[0].after != less.placed[0].after


@pytest.mark.parametrize("skip", [2, 3])
def test_a_placement_that_leaves_nothing_of_its_chunk_is_refused(skip: int) -> None:
    one = record([1, 2])
    plan = check(plan_options((one, 0, skip), fresh_start=2), one, prompt=(1, 2, *FRESH))
    assert reasons(plan) == {one.key: Refusal.SKIPPED}


# -- after a failed load --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "at", "kept"),
    [(0, 0, []), (0, 2, []), (1, 4, [0]), (1, 6, [0]), (2, 12, [0, 1])],
)
def test_what_stands_behind_a_failed_chunk_is_cut_off(failed: int, at: int, kept: list[int]) -> None:
    plan = three_chunks_and_a_gap()
    key = plan.placed[failed].record.key
    cut = plan.without(key, at, "blob is missing")
    assert cut.placed == tuple(plan.placed[index] for index in kept)
    expected: dict[str, str] = {chunk.record.key: Refusal.GAP for chunk in plan.placed[failed:]}
    assert reasons(cut) == expected | {key: "blob is missing"}
    assert cut.root == plan.root


def test_reasons_told_before_a_failure_are_kept() -> None:
    bad, good = record([1, 2], quarantined=True), record([3, 4], start=2)
    options = plan_options((bad, 0), (good, 2), fresh_start=4)
    plan = check(options, bad, good, prompt=(1, 2, 3, 4, *FRESH))
    cut = plan.without(good.key, 2, "load took too long")
    assert reasons(cut) == {bad.key: Refusal.QUARANTINED, good.key: "load took too long"}


def test_of_a_chunk_placed_twice_only_the_failed_copy_names_the_failure() -> None:
    one = record([1, 2])
    plan = check_in_a_row(one, one, one)
    cut = plan.without(one.key, 2, "blob is corrupt")
    assert [chunk.start for chunk in cut.placed] == [0]
    assert [refused.reason for refused in cut.refused] == ["blob is corrupt", Refusal.GAP]
