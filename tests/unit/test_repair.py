"""What stays together when it is moved, and what is exact by the engine's own check of a plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId, TurnRecord
from kv_agent.config import PlanOptions, parse
from kv_agent.planning import MemoryPrompt, build_prompt
from kv_agent.repair import exact_only, stretches_of
from kv_agent.vllm_plugin.plan import CheckedPlan, check_plan
from tests.unit.vllm_plugin.builders import FINGERPRINT, LIMITS, ROOT, SCOPE, chain, record

FRESH = (7, 8, 9)

Chunks = dict[ChunkKey, ChunkRecord]


def remembered(number: int, sizes: list[int], chunks: Chunks, parent: ChunkKey, start: int) -> TurnRecord:
    """A turn of these chunks, computed behind ``parent``."""
    first = 1000 * (number + 1)
    parts = [range(first + 100 * i, first + 100 * i + size) for i, size in enumerate(sizes)]
    records = chain(*parts, parent=parent, start=start)
    chunks.update((one.key, one) for one in records)
    return TurnRecord(
        turn_id=TurnId(f"t{number}"),
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        chunk_keys=tuple(one.key for one in records),
        num_tokens=sum(sizes),
        text="",
        created=float(number),
    )


@st.composite
def prompts(draw: st.DrawFn) -> tuple[MemoryPrompt, Chunks]:
    """Memories that were computed right behind the prefix, or elsewhere."""
    prefix = record([1, 2, 3])
    chunks: Chunks = {prefix.key: prefix}
    turns = []
    for number in range(draw(st.integers(0, 4))):
        sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
        parent, start = draw(st.sampled_from([(prefix.key, 3), (ChunkKey("elsewhere"), 40)]))
        turns.append(remembered(number, sizes, chunks, parent, start))
    return build_prompt([prefix], turns, chunks, FRESH, max_prompt_tokens=10_000), chunks


def checked(prompt: MemoryPrompt, chunks: Chunks) -> CheckedPlan:
    options = parse(PlanOptions, prompt.options(), "plan")
    return check_plan(options, chunks, prompt.token_ids, SCOPE, FINGERPRINT, LIMITS)


@given(case=prompts())
@settings(max_examples=80, deadline=None)
def test_stretches_are_the_placements_and_what_went_on_stays_together(
    case: tuple[MemoryPrompt, Chunks],
) -> None:
    prompt, chunks = case
    stretches = stretches_of(prompt, chunks)
    assert [one for stretch in stretches for one in stretch.placed] == list(prompt.placements)
    assert all(one.link_tokens <= (one.end - one.start) / 10 for one in stretches)
    assert all(one.link_tokens < one.records[0].num_tokens for one in stretches)
    starts = {turn.chunk_keys[0] for turn in prompt.turns}
    for stretch in stretches:
        keys = [one.key for one in stretch.placed]
        assert all(a.key == b.parent for a, b in pairwise(stretch.records))
        assert not starts & set(keys[1:]) or stretch.stands(ROOT)


@given(case=prompts())
@settings(max_examples=80, deadline=None)
def test_only_what_stands_where_it_was_computed_is_left_of_an_exact_plan(
    case: tuple[MemoryPrompt, Chunks],
) -> None:
    prompt, chunks = case
    plan = checked(exact_only(prompt, chunks, ROOT), chunks)
    assert plan.refused == ()
    assert all(one.exact for one in plan.placed)
    rest = [one for one in checked(prompt, chunks).placed if one.start >= plan.reach(0)]
    assert not rest or not rest[0].exact


def test_behind_a_computed_prefix_nothing_is_exact() -> None:
    chunks: Chunks = {}
    turn = remembered(0, [50], chunks, ChunkKey("elsewhere"), 9)
    prompt = build_prompt([], [turn], chunks, FRESH, max_prompt_tokens=200, bare_prefix=(1, 2))
    assert exact_only(prompt, chunks, ROOT).placements == ()


def test_exact_only_stops_at_a_chunk_that_was_stored_with_loss() -> None:
    chunks: Chunks = {}
    turn = remembered(0, [3, 4, 5], chunks, ROOT, 0)
    prompt = build_prompt([], [turn], chunks, FRESH, max_prompt_tokens=100)
    assert exact_only(prompt, chunks, ROOT).placements == prompt.placements

    middle = turn.chunk_keys[1]
    chunks[middle] = replace(chunks[middle], codec="int4")

    assert exact_only(prompt, chunks, ROOT).placements == prompt.placements[:1]
