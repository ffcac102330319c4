"""Where each prompt token's KV came from: counted once, as exact, adapted, local or computed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, adapted_key, chain_key
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.vllm_plugin.builders import ROOT, FakeCatalog, plan_options, record
from tests.unit.vllm_plugin.scheduling import FRESH, Desk, request


@st.composite
def planned_requests(
    draw: st.DrawFn,
) -> tuple[list[tuple[ChunkRecord, int]], tuple[int, ...], int, int, set[ChunkKey]]:
    """Placements with gaps, some of them moved; a prompt, a fresh start, a local hit, failing chunks."""
    steps = draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7), st.booleans()), min_size=1, max_size=5)
    )
    num_tokens = sum(gap + size for gap, size, _ in steps) + draw(st.integers(1, 6))
    prompt = tuple(range(200, 200 + num_tokens))
    placements: list[tuple[ChunkRecord, int]] = []
    context, position = ROOT, 0
    for gap, size, moved in steps:
        if gap:
            context = chain_key(context, prompt[position : position + gap])
        position += gap
        parent = ChunkKey("elsewhere") if moved else context
        one = record(prompt[position : position + size], parent=parent, start=position + 40 * moved)
        placements.append((one, position))
        context = adapted_key(context, one.key) if moved else one.key
        position += size
    fresh_start = draw(st.integers(max(0, position - 3), num_tokens))
    local = draw(st.integers(0, (num_tokens - 1) // 4)) * 4
    failing = draw(st.sets(st.sampled_from([one.key for one, _ in placements]), max_size=2))
    return placements, prompt, fresh_start, local, failing


@given(case=planned_requests(), salted_by_another_plan=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_prompt_token_is_counted_once(
    case: tuple[list[tuple[ChunkRecord, int]], tuple[int, ...], int, int, set[ChunkKey]],
    salted_by_another_plan: bool,
) -> None:
    placements, prompt, fresh_start, local, failing = case
    catalog = FakeCatalog(one for one, _ in placements)
    desk = Desk(catalog)
    try:
        if salted_by_another_plan:
            other = record(prompt[:2], start=50)
            catalog.add(other)
            desk.serve(request(prompt, "o", plan=plan_options((other, 0), fresh_start=2), store=False))
        options = plan_options(*placements, fresh_start=fresh_start)
        served = desk.serve(request(prompt, plan=options), local=local, failing=failing)
    finally:
        desk.close()

    assert sum(served.counts) == len(prompt)
    assert min(served.counts) >= 0
    exact, adapted, _, computed = served.counts
    assert computed == len(prompt) - served.cached_end
    loaded = [
        (position, job.records[load.key].start != position - index)
        for job in served.loads[-1:]
        for load in job.chunks
        for index, position in enumerate(range(load.start, load.end), start=load.skip)
        if position < served.cached_end
    ]
    assert adapted >= sum(moved for _, moved in loaded)
    assert exact + adapted >= len(loaded)
    told = [*served.answer["chunk_ids"], *served.reasons]
    assert sorted(told) == sorted(one.key for one, _ in placements)


def test_chunks_behind_a_gap_are_told_as_unreached(desk: Desk, catalog: FakeCatalog) -> None:
    first = record(range(4))
    late = record(range(6, 9), start=6, parent=chain_key(first.key, (4, 5)))
    catalog.add(first, late)
    prompt = (*range(9), *FRESH)
    options = plan_options((first, 0), (late, 6), fresh_start=9)
    served = desk.serve(request(prompt, plan=options))
    assert served.counts == (4, 0, 0, 8)
    assert served.answer["chunk_ids"] == [first.key]
    assert served.reasons == {late.key: Refusal.GAP}


def test_a_local_hit_over_a_gap_brings_the_chunk_behind_it(desk: Desk, catalog: FakeCatalog) -> None:
    first = record(range(4))
    late = record(range(6, 9), start=6, parent=chain_key(first.key, (4, 5)))
    catalog.add(first, late)
    options = plan_options((first, 0), (late, 6), fresh_start=9)
    served = desk.serve(request((*range(9), *FRESH), plan=options), local=8)
    assert served.counts == (4 + 3, 0, 2, 3)
    assert [(load.start, load.end) for load in served.loads[0].chunks] == [(8, 9)]


def test_local_tokens_of_no_chunk_are_local(desk: Desk) -> None:
    served = desk.serve(request(range(11)), local=8)
    assert served.counts == (0, 0, 8, 3)


def test_a_resumed_request_counts_no_more_than_its_prompt(desk: Desk) -> None:
    """After a preemption, generated tokens can be found in vLLM's own cache, too."""
    served = desk.serve(request(range(6)), local=12, outputs=range(70, 80))
    assert served.counts == (0, 0, 6, 0)


def test_what_a_preempted_request_can_no_longer_reach_is_computed(desk: Desk, catalog: FakeCatalog) -> None:
    """First there was a local hit before the chunk; after the preemption it is gone."""
    late = record(range(4, 10))
    catalog.add(late)
    one = request((*range(10), *FRESH), plan=plan_options((late, 4), fresh_start=10))
    desk.side.new_request(one)
    assert desk.load(one, local=4)[1] == 10
    assert desk.load(one, local=0)[1] == 0  # preempted, evicted, scheduled again
    _, answer, jobs = desk.finish(one, [70])
    assert (answer["adapted"], answer["computed"]) == (0, 13)
    assert answer["chunk_ids"] == []
    # Nothing may be stored as if it had been computed behind the moved chunk.
    parents = {segment.parent for job in jobs.captures for segment in job.segments}
    assert parents.isdisjoint({adapted_key(chain_key(ROOT, range(4)), late.key)})
