"""Links against the engine's own check of a plan: all of it is placed, and the links are exact."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId, TurnRecord
from kv_agent.config import PlanOptions, parse
from kv_agent.planning import MemoryPrompt, build_prompt
from kv_agent.prompting import FreshTurn
from kv_agent.repair import Ladder, exact_only, ladder_of, link_tokens
from kv_agent.vllm_plugin.plan import CheckedPlan, check_plan
from tests.unit.vllm_plugin.builders import FINGERPRINT, ROOT, SCOPE, chain, record

FRESH = FreshTurn(token_ids=(7, 8, 9), start=0, end=3)

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
    return check_plan(options, chunks, prompt.token_ids, SCOPE, FINGERPRINT)


def climbed(ladder: Ladder, chunks: Chunks) -> Chunks:
    """The chunks with those that the rungs leave behind, each below what the engine would compute."""
    known = dict(chunks)
    for rung in ladder.rungs:
        plan = checked(rung.prompt, known)
        assert plan.refused == ()
        assert plan.reach(0) == rung.prompt.fresh_start
        base = plan.base(rung.prompt.fresh_start)
        assert base is not None
        context, start = base
        link = record(rung.prompt.token_ids[start:], parent=context, start=start)
        assert link.key == rung.key
        known[link.key] = link
    return known


@given(case=prompts())
@settings(max_examples=150, deadline=None)
def test_a_ladder_leads_to_a_plan_that_holds_and_whose_links_are_exact(
    case: tuple[MemoryPrompt, Chunks],
) -> None:
    prompt, chunks = case
    ladder = ladder_of(prompt, chunks, ROOT)
    assert ladder.prompt.token_ids == prompt.token_ids
    assert ladder.prompt.fresh_start == prompt.fresh_start
    plan = checked(ladder.prompt, climbed(ladder, chunks))
    assert plan.refused == ()
    assert plan.reach(0) == prompt.fresh_start
    links = {rung.key for rung in ladder.rungs}
    assert all(one.exact for one in plan.placed if one.record.key in links)

    # Every moved memory that is long enough has one, the others none.
    before = checked(prompt, chunks)
    moved = {one.record.key for one in before.placed if not one.exact}
    expected = [
        turn
        for turn in prompt.turns
        if turn.chunk_keys[0] in moved and chunks[turn.chunk_keys[0]].num_tokens > link_tokens(turn) > 0
    ]
    assert [rung.turn for rung in ladder.rungs] == expected
    assert sum(map(link_tokens, expected)) <= sum(turn.num_tokens for turn in prompt.turns) / 10


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


def test_a_prompt_whose_prefix_is_computed_stays_as_it_is() -> None:
    chunks: Chunks = {}
    turn = remembered(0, [50], chunks, ChunkKey("elsewhere"), 9)
    prompt = build_prompt([], [turn], chunks, FRESH, max_prompt_tokens=200, bare_prefix=(1, 2))
    assert ladder_of(prompt, chunks, ROOT) == Ladder(prompt=prompt, rungs=())
    assert exact_only(prompt, chunks, ROOT).placements == ()
