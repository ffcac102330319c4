"""Memories in a prompt: the tokens really stand where the plan says, and only what fits is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, Scope, TurnId, TurnRecord
from kv_agent.config import PlanOptions, parse
from kv_agent.planning import MemoryPrompt, Placed, build_prompt
from kv_agent.vllm_plugin.plan import check_plan
from tests.unit.vllm_plugin.builders import FINGERPRINT, LIMITS, SCOPE, chain, record, tokens_of

FRESH = (90, 91, 92)
PREFIX = record([1, 2])


def turn(name: str, *chunks: ChunkRecord, created: float = 0.0) -> TurnRecord:
    return TurnRecord(
        turn_id=TurnId(name),
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        chunk_keys=tuple(chunk.key for chunk in chunks),
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        text=name,
        created=created,
    )


def by_key(*records: ChunkRecord) -> dict[ChunkKey, ChunkRecord]:
    return {one.key: one for one in records}


def text(first: int, size: int) -> ChunkRecord:
    """A chunk of distinct tokens that was computed somewhere else."""
    return record(range(first, first + size), start=50)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[TurnRecord], dict[ChunkKey, ChunkRecord]]:
    """Turns in any order of relevance; some chunks are quarantined, some are not at hand."""
    turns, chunks = [], {}
    for number in range(draw(st.integers(0, 6))):
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        records = [text(1000 * number + 100 * i, size) for i, size in enumerate(sizes)]
        turns.append(turn(f"t{number}", *records, created=draw(st.integers(0, 3))))
        for one in records:
            state = draw(st.sampled_from(["good", "good", "good", "good", "quarantined", "missing"]))
            if state != "missing":
                chunks[one.key] = replace(one, quarantined=state == "quarantined")
    return turns, chunks


@given(history=histories(), stored_prefix=st.booleans(), limit=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_prompts_hold_the_best_turns_that_fit_at_their_places(
    history: tuple[list[TurnRecord], dict[ChunkKey, ChunkRecord]], stored_prefix: bool, limit: int
) -> None:
    turns, chunks = history
    prefix = [PREFIX] if stored_prefix else []

    prompt = build_prompt(prefix, turns, chunks, FRESH, max_prompt_tokens=limit, bare_prefix=PREFIX.token_ids)

    # One after the other, best first, whatever still fits and is whole.
    room = limit - PREFIX.num_tokens - len(FRESH)
    expected = []
    for one in turns:
        whole = all(key in chunks and not chunks[key].quarantined for key in one.chunk_keys)
        if whole and one.num_tokens <= room:
            expected.append(one)
            room -= one.num_tokens
    assert list(prompt.turns) == sorted(expected, key=lambda one: (one.created, one.turn_id))
    assert len(prompt.token_ids) <= max(limit, PREFIX.num_tokens + len(FRESH))

    # Prefix, then all chunks of the turns in order, then the fresh turn, without a gap.
    known = chunks | by_key(PREFIX)
    position = 0 if stored_prefix else PREFIX.num_tokens
    assert prompt.token_ids[: PREFIX.num_tokens] == PREFIX.token_ids
    for key, start, skip in prompt.placements:
        assert (start, skip) == (position, 0)
        position += known[key].num_tokens
        assert prompt.token_ids[start:position] == known[key].token_ids
    assert prompt.fresh_start == position
    assert prompt.token_ids[position:] == FRESH
    keys = [PREFIX.key] if stored_prefix else []
    for one in prompt.turns:
        keys += one.chunk_keys
    assert [one.key for one in prompt.placements] == keys


def test_a_smaller_turn_takes_the_room_that_a_better_one_would_exceed() -> None:
    big, small = text(100, 10), text(200, 3)
    prompt = build_prompt(
        (), [turn("big", big), turn("small", small)], by_key(big, small), FRESH, max_prompt_tokens=8
    )
    assert [one.turn_id for one in prompt.turns] == ["small"]
    assert prompt.token_ids == small.token_ids + FRESH


def test_turns_that_fit_alone_but_not_together_are_not_both_taken() -> None:
    records = [text(100, 4), text(200, 4), text(300, 1)]
    turns = [turn(name, one) for name, one in zip("abc", records, strict=True)]
    prompt = build_prompt((), turns, by_key(*records), FRESH, max_prompt_tokens=3 + 6)
    assert [one.turn_id for one in prompt.turns] == ["a", "c"]


def test_a_turn_of_exactly_the_room_fits() -> None:
    one = text(100, 5)
    for limit, num_turns in [(8, 1), (7, 0)]:
        prompt = build_prompt((), [turn("one", one)], by_key(one), FRESH, max_prompt_tokens=limit)
        assert len(prompt.turns) == num_turns


def test_a_turn_is_taken_whole_or_not_at_all() -> None:
    one, two = text(100, 3), text(200, 3)
    memories = [turn("whole", one, two)]
    prompt = build_prompt(
        [PREFIX], memories, by_key(one, replace(two, quarantined=True)), FRESH, max_prompt_tokens=99
    )
    assert (prompt.turns, prompt.placements) == ((), ((PREFIX.key, 0, 0),))


def test_the_oldest_memory_stands_first() -> None:
    records = [text(100 * i, 2) for i in range(1, 4)]
    ages = {"new": 3.0, "old": 1.0, "middle": 2.0}
    turns = [
        turn(name, one, created=created) for (name, created), one in zip(ages.items(), records, strict=True)
    ]
    prompt = build_prompt((), turns, by_key(*records), FRESH, max_prompt_tokens=99)
    assert [one.turn_id for one in prompt.turns] == ["old", "middle", "new"]


def test_the_engine_accepts_every_placement_of_a_prompt() -> None:
    first, second = chain([1, 2], [3, 4, 5])
    moved = text(100, 4)
    turns = [turn("behind the prefix", second, created=1), turn("from elsewhere", moved, created=2)]
    records = by_key(first, second, moved)
    prompt = build_prompt([first], turns, records, FRESH, max_prompt_tokens=99)

    options = parse(PlanOptions, prompt.options(), "plan")
    checked = check_plan(options, records, prompt.token_ids, SCOPE, FINGERPRINT, LIMITS)

    assert checked.refused == ()
    assert [chunk.exact for chunk in checked.placed] == [True, True, False]
    assert checked.reach(0) == prompt.fresh_start == len(tokens_of([first, second, moved]))


# -- salts ------------------------------------------------------------------------------------------------


def prompt_of(*placements: tuple[str, int] | tuple[str, int, int]) -> MemoryPrompt:
    return MemoryPrompt(
        token_ids=(1, 2, 3),
        fresh_start=2,
        placements=tuple(Placed(ChunkKey(key), *rest) for key, *rest in placements),
        turns=(),
    )


def test_the_same_plan_of_the_same_user_has_one_salt() -> None:
    plan = prompt_of(("a", 0), ("b", 4))
    other_question = replace(plan, token_ids=(1, 2, 9, 9))
    other_session = replace(SCOPE, agent_id="agent", session_id="session")
    assert plan.salt(SCOPE) == other_question.salt(SCOPE) == plan.salt(other_session)


@pytest.mark.parametrize(
    ("placements", "scope"),
    [
        ([("a", 0), ("b", 4)], {"user_id": "eve"}),
        ([("a", 0), ("b", 4)], {"namespace": "other"}),
        ([("a", 0), ("b", 4)], {"namespace": "teama", "user_id": "nn"}),
        ([("a", 0), ("b", 5)], {}),
        ([("a", 0), ("c", 4)], {}),
        ([("a", 0)], {}),
        ([("b", 4), ("a", 0)], {}),
        ([("a", 0), ("b", 4), ("b", 8)], {}),
        ([], {}),
    ],
)
def test_another_user_plan_or_position_has_another_salt(
    placements: list[tuple[str, int] | tuple[str, int, int]], scope: dict[str, str]
) -> None:
    mine = prompt_of(("a", 0), ("b", 4)).salt(SCOPE)
    theirs = Scope(**({"namespace": SCOPE.namespace, "user_id": SCOPE.user_id} | scope))
    assert prompt_of(*placements).salt(theirs) != mine
