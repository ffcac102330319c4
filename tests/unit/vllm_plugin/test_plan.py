"""Which placements of a plan may be used, and whether they are exact."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kv_agent.chunks import (
    ChunkKey,
    Fingerprint,
    Scope,
    adapted_key,
    chain_key,
    root_key,
)
from kv_agent.vllm_plugin.plan import Limits, Refusal, Refused, refuse_all
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    LIMITS,
    ROOT,
    SCOPE,
    chain,
    plan_options,
    record,
    tokens_of,
)
from tests.unit.vllm_plugin.plans import FRESH, check, check_in_a_row, reasons

# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"namespace": "other"}, Refusal.NAMESPACE),
        ({"user_id": "eve"}, Refusal.USER),
        ({"namespace": "other", "user_id": "eve"}, Refusal.NAMESPACE),
        ({"fingerprint": Fingerprint("fp-2")}, Refusal.FINGERPRINT),
        ({"quarantined": True}, Refusal.QUARANTINED),
        ({"token_ids": (1, 2, 3, 5)}, Refusal.TOKENS),
        ({"token_ids": (0, 2, 3, 4)}, Refusal.TOKENS),
    ],
)
def test_a_record_that_is_not_the_request_s_own_is_refused(
    changes: dict[str, object], reason: Refusal
) -> None:
    good = record([1, 2, 3, 4])
    options = plan_options((good, 0), fresh_start=4)

    plan = check(options, replace(good, **changes), prompt=(1, 2, 3, 4, *FRESH))

    assert plan.placed == ()
    assert plan.refused == (Refused(chunk_id=good.key, reason=reason),)


def test_the_same_record_unchanged_is_placed() -> None:
    good = record([1, 2, 3, 4])
    plan = check(plan_options((good, 0), fresh_start=4), good, prompt=(1, 2, 3, 4, *FRESH))
    assert [(chunk.record, chunk.start) for chunk in plan.placed] == [(good, 0)]
    assert plan.refused == ()


def test_a_chunk_the_catalog_does_not_have_is_refused() -> None:
    good = record([1, 2])
    plan = check(plan_options((good, 0), fresh_start=2), prompt=(1, 2, *FRESH))
    assert reasons(plan) == {good.key: Refusal.UNKNOWN}


@pytest.mark.parametrize("position", [0, 1, 3])
def test_one_different_prompt_token_refuses_the_chunk(position: int) -> None:
    good = record([1, 2, 3, 4])
    prompt = [1, 2, 3, 4, *FRESH]
    prompt[position] += 1
    plan = check(plan_options((good, 0), fresh_start=4), good, prompt=tuple(prompt))
    assert reasons(plan) == {good.key: Refusal.TOKENS}


def test_a_chunk_that_starts_before_the_end_of_the_one_before_is_refused() -> None:
    one, other = record([7, 7, 7, 7]), record([7, 7, 7], start=9)
    options = plan_options((one, 0), (other, 3), fresh_start=6)
    plan = check(options, one, other, prompt=(7,) * 10)
    assert [chunk.record for chunk in plan.placed] == [one]
    assert reasons(plan) == {other.key: Refusal.OVERLAP}


def test_a_refused_chunk_does_not_make_the_next_one_overlap() -> None:
    bad, good = record([7, 7, 7, 7], quarantined=True), record([7, 7, 7], start=9)
    plan = check(plan_options((bad, 0), (good, 2), fresh_start=6), bad, good, prompt=(7,) * 10)
    assert [chunk.record for chunk in plan.placed] == [good]


@pytest.mark.parametrize(
    ("fresh_start", "num_fresh", "placed"),
    [
        (4, 3, True),  # ends right before the fresh turn
        (3, 3, False),
        (0, 3, False),
        (4, 1, True),
        (4, 0, False),  # nothing would be left to compute
        (5, 0, False),
        (5, 1, True),  # the fresh turn is said to begin behind the prompt, yet one token is computed
        (900, 0, False),
        (900, 1, True),
    ],
)
def test_a_chunk_may_not_reach_into_the_fresh_turn_nor_cover_the_last_token(
    fresh_start: int, num_fresh: int, placed: bool
) -> None:
    good = record([1, 2, 3, 4])
    prompt = (1, 2, 3, 4, *range(90, 90 + num_fresh))
    plan = check(plan_options((good, 0), fresh_start=fresh_start), good, prompt=prompt)
    assert [chunk.record for chunk in plan.placed] == ([good] if placed else [])
    assert reasons(plan) == ({} if placed else {good.key: Refusal.FRESH_TURN})


@pytest.mark.parametrize("start", [6, 7, 8, 1000])
def test_a_chunk_that_ends_behind_the_prompt_is_refused(start: int) -> None:
    good = record([1, 2])
    plan = check(plan_options((good, start), fresh_start=2000), good, prompt=(1, 2) * 4)
    assert reasons(plan) == {good.key: Refusal.FRESH_TURN}


def test_refusing_all_names_every_placement() -> None:
    one, other = chain([1], [2])
    plan = refuse_all(plan_options((one, 0), (other, 1), fresh_start=2), ROOT, Refusal.NO_SALT)
    assert plan.placed == ()
    assert reasons(plan) == {one.key: Refusal.NO_SALT, other.key: Refusal.NO_SALT}
    assert plan.reach(0) == 0


# -- exact or adapted -----------------------------------------------------------------------------


def test_a_chain_at_its_own_place_is_exact() -> None:
    records = chain([1, 2, 3, 4], [5, 6, 7], [8, 9])
    plan = check_in_a_row(*records)
    assert [chunk.exact for chunk in plan.placed] == [True, True, True]
    assert [chunk.context for chunk in plan.placed] == [ROOT, records[0].key, records[1].key]
    assert [chunk.after for chunk in plan.placed] == [one.key for one in records]
    assert [(chunk.start, chunk.end) for chunk in plan.placed] == [(0, 4), (4, 7), (7, 9)]


def test_a_chunk_stored_with_loss_is_adapted_even_at_its_own_place_and_what_follows_it_too() -> None:
    first, second = chain([1, 2, 3], [4, 5])
    lossy = replace(first, codec="int8")

    prompt = (1, 2, 3, 4, 5, *FRESH)
    plan = check(plan_options((lossy, 0), (second, 3), fresh_start=5), lossy, second, prompt=prompt)

    assert [one.exact for one in plan.placed] == [False, False]
    assert plan.placed[1].context == adapted_key(ROOT, first.key)
    assert [load.delta for load in plan.loads(0, 5)] == [0, 0]
    packed = replace(first, codec="raw+zstd")
    assert check(plan_options((packed, 0), fresh_start=3), packed, prompt=prompt).placed[0].exact


def test_the_order_of_placements_does_not_matter() -> None:
    records = chain([1, 2], [3, 4], [5, 6])
    placements = [(records[0], 0), (records[1], 2), (records[2], 4)]
    expected = check(plan_options(*placements, fresh_start=6), *records, prompt=(1, 2, 3, 4, 5, 6, 7))
    for seed in range(5):
        random.Random(seed).shuffle(placements)
        options = plan_options(*placements, fresh_start=6)
        assert check(options, *records, prompt=(1, 2, 3, 4, 5, 6, 7)) == expected


def test_a_chunk_behind_another_context_is_adapted() -> None:
    first, second = chain([1, 2, 3, 4], [5, 6, 7])
    other = record([4, 3, 2, 1])
    plan = check_in_a_row(other, second)
    assert [chunk.exact for chunk in plan.placed] == [True, False]
    assert plan.placed[1].start == second.start
    assert plan.placed[1].after == adapted_key(other.key, second.key) != second.key
    assert first.key != other.key


def test_a_chunk_at_another_position_is_adapted_even_with_the_right_parent() -> None:
    moved = record([1, 2, 3], start=6)
    assert [chunk.exact for chunk in check_in_a_row(moved).placed] == [False]


def test_a_chunk_behind_an_adapted_copy_of_its_own_context_is_adapted() -> None:
    lead, first = chain([8, 8, 8], [1, 2, 3])
    second = record([4, 5], parent=record([1, 2, 3]).key, start=3)
    plan = check_in_a_row(first, second)  # `first` was computed behind `lead`
    assert [chunk.exact for chunk in plan.placed] == [False, False]
    assert lead.key == first.parent


def test_what_was_computed_behind_an_adapted_chunk_is_exact_behind_the_same_one() -> None:
    moved = record([1, 2, 3], parent=record([8]).key, start=1)
    behind = record([4, 5], parent=adapted_key(ROOT, moved.key), start=3)
    plan = check_in_a_row(moved, behind)
    assert [chunk.exact for chunk in plan.placed] == [False, True]
    assert plan.placed[1].after == behind.key


def test_the_same_chunk_twice_is_exact_once() -> None:
    one = record([1, 2])
    assert [chunk.exact for chunk in check_in_a_row(one, one).placed] == [True, False]


def test_a_chunk_behind_a_refused_parent_is_exact_because_the_parent_s_text_is_computed() -> None:
    first, second = chain([1, 2, 3, 4], [5, 6, 7])
    plan = check_in_a_row(replace(first, quarantined=True), second)
    assert reasons(plan) == {first.key: Refusal.QUARANTINED}
    assert [(chunk.record, chunk.start, chunk.exact) for chunk in plan.placed] == [(second, 4, True)]


def test_a_chunk_behind_a_parent_refused_for_other_text_is_adapted() -> None:
    first, second = chain([1, 2, 3, 4], [5, 6, 7])
    options = plan_options((first, 0), (second, 4), fresh_start=7)
    plan = check(options, first, second, prompt=(1, 2, 3, 0, 5, 6, 7, *FRESH))
    assert [(chunk.record, chunk.exact) for chunk in plan.placed] == [(second, False)]


def test_text_between_chunks_counts_as_computed_behind_what_is_before_it() -> None:
    (first,) = chain([1, 2])
    gap = (3, 4, 5)
    behind = record([6, 7], parent=chain_key(first.key, gap), start=5)
    options = plan_options((first, 0), (behind, 5), fresh_start=7)
    plan = check(options, first, behind, prompt=(1, 2, *gap, 6, 7, *FRESH))
    assert [chunk.exact for chunk in plan.placed] == [True, True]


def test_text_behind_an_adapted_chunk_never_makes_a_chunk_exact() -> None:
    moved = record([1, 2], start=9)
    behind = record([6, 7], parent=chain_key(record([1, 2]).key, (3, 4)), start=4)
    options = plan_options((moved, 0), (behind, 4), fresh_start=6)
    plan = check(options, moved, behind, prompt=(1, 2, 3, 4, 6, 7, *FRESH))
    assert [chunk.exact for chunk in plan.placed] == [False, False]


def test_contexts_of_different_users_differ() -> None:
    eve = Scope(namespace=SCOPE.namespace, user_id="eve")
    hers = record([1, 2], parent=root_key(FINGERPRINT, eve.namespace, eve.user_id), scope=eve)
    plan = check(plan_options((hers, 0), fresh_start=2), hers, prompt=(1, 2, *FRESH), scope=eve)
    assert [chunk.exact for chunk in plan.placed] == [True]
    assert plan.root == hers.parent != ROOT


@pytest.mark.parametrize(
    ("start", "skip", "computed_at", "is_refused"),
    [
        (36, 0, 0, False),
        (37, 0, 0, True),
        (39, 3, 0, False),
        (40, 3, 0, True),
        (0, 0, 36, False),
        (0, 0, 37, True),
    ],
)
def test_moved_chunks_must_lie_and_have_lain_within_the_window(
    start: int, skip: int, computed_at: int, is_refused: bool
) -> None:
    moved = record(range(4), parent=ChunkKey("elsewhere"), start=computed_at)
    prompt = (*[50] * start, *moved.token_ids[skip:], 90)
    options = plan_options((moved, start, skip), fresh_start=len(prompt) - 1)
    plan = check(options, moved, prompt=prompt, limits=replace(LIMITS, window=40))
    assert reasons(plan) == ({moved.key: Refusal.WINDOW} if is_refused else {})


def test_exact_chunks_and_what_stands_behind_a_refused_one_are_judged_as_ever() -> None:
    one, other = chain(range(8), range(8, 12))
    moved = record(range(20, 24), start=3)
    prompt = tokens_of([one, other, moved]) + FRESH
    options = plan_options((one, 0), (other, 8), (moved, 12), fresh_start=16)
    plan = check(options, one, other, moved, prompt=prompt, limits=replace(LIMITS, window=10))
    assert reasons(plan) == {moved.key: Refusal.WINDOW}
    assert [chunk.exact for chunk in plan.placed] == [True, True]


def test_where_keys_cannot_be_moved_exact_chunks_stay_and_moved_ones_are_refused() -> None:
    one, other = chain(range(8), range(8, 12))
    moved = record(range(20, 60), start=3)
    prompt = tokens_of([one, other, moved]) + FRESH
    options = plan_options((one, 0), (other, 8), (moved, 12), fresh_start=52)
    plan = check(options, one, other, moved, prompt=prompt, limits=None)
    assert reasons(plan) == {moved.key: Refusal.ROTARY}
    assert [chunk.exact for chunk in plan.placed] == [True, True]


@pytest.mark.parametrize(
    ("sizes", "is_refused"),
    [
        ((3, 4), True),
        ((7, 8), True),
        ((8, 8), False),
        ((2, 14), False),
        ((7,), False),  # one alone is not many
        ((7, 7, 7, 7, 11), True),
    ],
)
def test_several_moved_runs_of_next_to_nothing_are_computed(sizes: tuple[int, ...], is_refused: bool) -> None:
    moved = [
        record(range(10 * i, 10 * i + n), parent=ChunkKey(f"before {i}"), start=50)
        for i, n in enumerate(sizes)
    ]
    (exact,) = chain(range(90, 96))
    prompt = tokens_of([exact, *moved]) + FRESH
    places, at = [(exact, 0)], 6
    for one in moved:
        places.append((one, at))
        at += one.num_tokens
    plan = check(
        plan_options(*places, fresh_start=at), exact, *moved, prompt=prompt, limits=Limits(window=1000)
    )
    assert reasons(plan) == ({one.key: Refusal.CRUMBS for one in moved} if is_refused else {})
    assert plan.placed[0].record == exact


def test_small_chunks_that_were_computed_in_a_row_are_one_run() -> None:
    other = record(range(80, 90), start=70)
    row = chain(*(range(4 * i, 4 * i + 4) for i in range(5)), parent=ChunkKey("elsewhere"), start=3)
    places = [(other, 0), *((one, 10 + 4 * i) for i, one in enumerate(row))]
    prompt = tokens_of([other, *row]) + FRESH
    plan = check(
        plan_options(*places, fresh_start=30), other, *row, prompt=prompt, limits=Limits(window=1000)
    )
    assert reasons(plan) == {}


def test_chunks_whose_beginning_is_computed_do_not_become_crumbs() -> None:
    moved = [record(range(10 * i, 10 * i + 9), parent=ChunkKey(f"before {i}"), start=50) for i in (1, 2)]
    prompt = (*[90] * 7, *moved[0].token_ids[7:], *[90] * 7, *moved[1].token_ids[7:], *FRESH)
    options = plan_options((moved[0], 7, 7), (moved[1], 16, 7), fresh_start=18)
    plan = check(options, *moved, prompt=prompt, limits=Limits(window=1000))
    assert reasons(plan) == {}


def test_a_chunk_and_what_replaces_its_beginning_are_one_run() -> None:
    opening = record([1, 2], parent=ChunkKey("neutral"), start=7)
    moved = [record([1, 2, *range(10 * i, 10 * i + 7)], start=0) for i in (1, 2)]
    prompt = (*range(90, 96), *moved[0].token_ids, *moved[1].token_ids, *FRESH)
    (exact,) = chain(range(90, 96))
    options = plan_options(
        (exact, 0), (opening, 6), (moved[0], 8, 2), (opening, 15), (moved[1], 17, 2), fresh_start=24
    )
    plan = check(options, exact, opening, *moved, prompt=prompt, limits=Limits(window=1000))
    assert reasons(plan) == {}
    assert plan.reach(0) == 24
