"""Where each prompt token's KV came from, also after failed loads and under salts that others used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, adapted_key, chain_key
from kv_agent.config import PlanOptions
from kv_agent.vllm_plugin import salts
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.vllm_plugin.builders import (
    ROOT,
    FakeCatalog,
    chain,
    plan_options,
    record,
    tokens_of,
)
from tests.unit.vllm_plugin.scheduling import BLOCK, Desk, FakeRequest, Served, request

FRESH = (90, 91, 92)


@pytest.fixture
def catalog() -> FakeCatalog:
    return FakeCatalog()


@pytest.fixture
def desk(catalog: FakeCatalog) -> Iterator[Desk]:
    desk = Desk(catalog)
    yield desk
    desk.close()


def row(*records: ChunkRecord) -> tuple[tuple[int, ...], PlanOptions]:
    """A prompt of the records' tokens and a fresh turn, and the plan that goes with it."""
    placements, position = [], 0
    for one in records:
        placements.append((one, position))
        position += one.num_tokens
    return tokens_of(records) + FRESH, plan_options(*placements, fresh_start=position)


# -- accounting -------------------------------------------------------------------------------------


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
        (position, load.record.start != position - index)
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


# -- failed loads -----------------------------------------------------------------------------------


def three_exact() -> list[ChunkRecord]:
    """Chunks at [0, 6), [6, 11) and [11, 17); blocks hold 4 tokens."""
    return chain(range(6), range(6, 11), range(11, 17))


@pytest.mark.parametrize(
    ("failed", "valid", "exact"),
    [(0, 0, 0), (1, 4, 4), (2, 8, 8)],  # whole blocks before the failed chunk stay
)
def test_tokens_from_the_failed_chunk_s_block_on_are_computed(
    desk: Desk, catalog: FakeCatalog, failed: int, valid: int, exact: int
) -> None:
    records = three_exact()
    catalog.add(*records)
    prompt, options = row(*records)
    served = desk.serve(request(prompt, plan=options), failing=[records[failed].key])

    assert served.cached_end == valid
    assert served.counts == (exact, 0, 0, len(prompt) - exact)
    expected: dict[str, str] = {one.key: Refusal.GAP for one in records[failed:]}
    assert served.reasons == expected | {records[failed].key: "blob is missing"}
    assert desk.side.counters["load failed: blob is missing"] == 1
    assert served.answer["chunk_ids"] == [one.key for one in records[:failed]]


def test_when_no_block_is_left_the_shortened_plan_is_offered(desk: Desk, catalog: FakeCatalog) -> None:
    records = chain(range(3), range(3, 9), range(9, 12))
    catalog.add(*records)
    prompt, options = row(*records)
    one = request(prompt, plan=options)
    desk.side.new_request(one)

    loads, cached_end = desk.load(one, failing=[records[1].key])

    assert [[load.record for load in job.chunks] for job in loads] == [records, records[:1]]
    assert cached_end == 3
    _, answer, _ = desk.finish(one, [70])
    assert (answer["exact"], answer["computed"]) == (3, 12)


def test_a_failure_of_the_only_chunk_leaves_nothing_to_offer(desk: Desk, catalog: FakeCatalog) -> None:
    one = record(range(6))
    catalog.add(one)
    prompt, options = row(one)
    served = desk.serve(request(prompt, plan=options), failing=[one.key])
    assert len(served.loads) == 1
    assert served.counts == (0, 0, 0, 9)
    assert served.reasons == {one.key: "blob is missing"}


def test_a_failure_behind_a_local_hit_keeps_the_hit(desk: Desk, catalog: FakeCatalog) -> None:
    records = three_exact()
    catalog.add(*records)
    prompt, options = row(*records)
    served = desk.serve(request(prompt, plan=options), local=8, failing=[records[1].key])
    assert served.cached_end == 8
    assert sum(served.counts[:3]) == 8
    assert served.counts[3] == len(prompt) - 8
    assert served.reasons == {records[1].key: "blob is missing", records[2].key: Refusal.GAP}


def test_exact_kv_is_captured_although_a_later_load_failed(desk: Desk, catalog: FakeCatalog) -> None:
    records = three_exact()
    catalog.add(*records)
    prompt, options = row(*records)
    served = desk.serve(request(prompt, plan=options), failing=[records[2].key])
    assert served.captured.segments[-1].end == len(prompt)
    assert served.captured.segments[0].parent in {one.key for one in records}


@pytest.mark.parametrize("failed", [1, 2])
def test_a_chunk_that_could_not_be_loaded_is_captured_anew(
    desk: Desk, catalog: FakeCatalog, failed: int
) -> None:
    """Its bytes are lost, its tokens were just computed: this is when it can be healed."""
    records = three_exact()
    catalog.add(*records)
    prompt, options = row(*records)
    served = desk.serve(request(prompt, plan=options), failing=[records[failed].key])
    captured = [token for segment in served.captured.segments for token in segment.token_ids]
    assert tuple(captured) == prompt[records[failed].start :]
    assert served.captured.segments[0].parent == records[failed - 1].key


def moved_and_failed(desk: Desk, catalog: FakeCatalog, size: int) -> tuple[Served, ChunkRecord]:
    moved, behind = record(range(size), start=30), record(range(size, 12), start=60)
    catalog.add(moved, behind)
    prompt, options = row(moved, behind)
    served = desk.serve(request(prompt, plan=options), failing=[behind.key])
    kept = size // BLOCK * BLOCK
    assert served.counts == (0, kept, 0, len(prompt) - kept)
    return served, moved


def test_behind_a_moved_chunk_of_which_a_failure_left_a_part_nothing_is_captured(
    desk: Desk, catalog: FakeCatalog
) -> None:
    served, _ = moved_and_failed(desk, catalog, size=6)
    assert served.capture is None


def test_behind_a_moved_chunk_that_a_failure_left_whole_text_is_captured_in_its_context(
    desk: Desk, catalog: FakeCatalog
) -> None:
    served, moved = moved_and_failed(desk, catalog, size=8)
    first = served.captured.segments[0]
    assert (first.start, first.parent) == (8, adapted_key(ROOT, moved.key))
    # The lost chunk's text is context; only the fresh turn is this turn's content.
    assert [segment.start for segment in served.captured.content] == [12]


def test_a_moved_chunk_that_failed_leaves_plain_text_to_capture(desk: Desk, catalog: FakeCatalog) -> None:
    exact, moved = record(range(6)), record(range(6, 12), start=60)
    catalog.add(exact, moved)
    prompt, options = row(exact, moved)
    served = desk.serve(request(prompt, plan=options), failing=[moved.key])
    assert served.counts == (4, 0, 0, len(prompt) - 4)
    assert served.captured.segments[0].parent == exact.key
    assert served.captured.segments[0].start == 6


# -- salts that hold adapted KV -----------------------------------------------------------------------


@pytest.fixture
def moved(desk: Desk, catalog: FakeCatalog) -> ChunkRecord:
    """Ten tokens that a first request got from elsewhere, behind four of its own, under the salt "salt"."""
    lead, moved = record(range(4)), record(range(4, 14), start=50)
    catalog.add(lead, moved)
    prompt, options = row(lead, moved)
    served = desk.serve(request(prompt, "first", plan=options))
    assert served.counts == (4, 10, 0, 3)
    return moved


PROMPT = (*range(14), *FRESH, 93, 94)


def test_another_request_that_finds_adapted_kv_under_its_salt_says_so_and_is_not_captured(
    desk: Desk, moved: ChunkRecord
) -> None:
    served = desk.serve(request(PROMPT), local=16)
    assert served.counts == (0, 16, 0, 3)
    assert served.capture is None


def test_a_local_hit_before_the_moved_chunk_is_plain(desk: Desk, moved: ChunkRecord) -> None:
    served = desk.serve(request(PROMPT), local=4)
    assert served.counts == (0, 0, 4, 15)
    assert served.captured.segments[0].start == 4


@pytest.mark.parametrize("salt", ["another salt", None])
def test_other_salts_are_not_affected(desk: Desk, moved: ChunkRecord, salt: str | None) -> None:
    served = desk.serve(request(PROMPT, salt=salt), local=16)
    assert served.counts == (0, 0, 16, 3)
    assert served.capture is not None


def test_the_same_plan_again_is_labelled_by_its_plan(
    desk: Desk, catalog: FakeCatalog, moved: ChunkRecord
) -> None:
    prompt, options = row(record(range(4)), moved)
    served = desk.serve(request((*prompt, 93, 94), plan=options), local=16)
    assert served.counts == (4, 10, 2, 3)
    assert served.captured.segments[0].start >= 14


def test_an_extension_of_the_plan_is_labelled_by_its_plan(
    desk: Desk, catalog: FakeCatalog, moved: ChunkRecord
) -> None:
    more = record((80, 81, 82), start=7)
    catalog.add(more)
    prompt, options = row(record(range(4)), moved, more)
    served = desk.serve(request(prompt, plan=options), local=12)
    assert served.counts == (4, 13, 0, 3)
    assert served.captured.segments[0].parent == adapted_key(
        adapted_key(record(range(4)).key, moved.key), more.key
    )


def test_a_plan_without_the_moved_chunk_does_not_account_for_it(desk: Desk, moved: ChunkRecord) -> None:
    served = desk.serve(request(PROMPT, plan=plan_options((record(range(4)), 0), fresh_start=4)), local=16)
    assert served.counts == (0, 16, 0, 3)
    assert served.capture is None


def test_exact_chunks_loaded_behind_foreign_adapted_kv_are_not_exact(
    desk: Desk, catalog: FakeCatalog, moved: ChunkRecord
) -> None:
    """The local hit holds the moved chunk; what is loaded behind it was computed behind the plain text."""
    plain = chain(range(4), range(4, 14), (80, 81, 82))
    catalog.add(*plain)
    prompt, options = row(*plain)
    served = desk.serve(request(prompt, plan=options), local=12)
    assert served.counts == (0, 17, 0, 3)
    assert served.capture is None


def test_exact_chunks_leave_nothing_behind_under_their_salt(desk: Desk, catalog: FakeCatalog) -> None:
    records = chain(range(4), range(4, 14))
    catalog.add(*records)
    prompt, options = row(*records)
    desk.serve(request(prompt, "first", plan=options))
    served = desk.serve(request(PROMPT), local=16)
    assert served.counts == (0, 0, 16, 3)
    assert served.capture is not None


def test_a_refused_plan_leaves_nothing_behind_under_its_salt(desk: Desk, catalog: FakeCatalog) -> None:
    bad = record(range(4, 14), start=50, quarantined=True)
    catalog.add(bad)
    desk.serve(request(PROMPT, "first", plan=plan_options((bad, 4), fresh_start=14)))
    served = desk.serve(request(PROMPT), local=16)
    assert served.counts == (0, 0, 16, 3)


def test_plain_kv_found_where_the_plan_moves_a_chunk_is_not_captured_as_adapted_context(
    desk: Desk, catalog: FakeCatalog
) -> None:
    """A request without a plan computed the same text under this salt; its KV is not the moved chunk's."""
    moved = record(range(10), start=50)
    catalog.add(moved)
    prompt, options = row(moved)
    desk.serve(request((*prompt, 93), "plain", store=False))
    served = desk.serve(request((*prompt, 94), plan=options), local=12)
    assert sum(served.counts) == len(prompt) + 1
    behind_moved = adapted_key(ROOT, moved.key)
    assert served.capture is None or served.capture.segments[0].parent != behind_moved


def test_a_moved_chunk_of_which_only_the_local_hit_is_left_is_still_adapted(
    desk: Desk, catalog: FakeCatalog
) -> None:
    """The first request moved all of it into the cache; the second finds a part and cannot load the rest."""
    moved = record(range(10), start=50)
    catalog.add(moved)
    prompt, options = row(moved)
    desk.serve(request(prompt, "first", plan=options, store=False))
    served = desk.serve(request(prompt, plan=options), local=8, failing=[moved.key])
    assert served.counts == (0, 8, 0, 5)
    assert served.reasons == {moved.key: "blob is missing"}
    assert served.capture is None


def test_computed_kv_that_a_failed_load_left_is_not_captured_as_adapted_context(
    desk: Desk, catalog: FakeCatalog
) -> None:
    """The first load of the moved chunk failed and its text was computed; then it loads again."""
    moved = record(range(10), start=50)
    catalog.add(moved)
    prompt, options = row(moved)
    desk.serve(request((*prompt, 93), "first", plan=options, store=False), failing=[moved.key])
    served = desk.serve(request((*prompt, 94), plan=options), local=12)
    behind_moved = adapted_key(ROOT, moved.key)
    assert served.capture is None or served.capture.segments[0].parent != behind_moved


def test_a_hit_under_a_salt_that_was_forgotten_counts_as_adapted(
    desk: Desk, catalog: FakeCatalog, moved: ChunkRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salts, "MAX_SALTS", 1)
    for number in range(2):
        desk.serve(request(PROMPT, f"r{number}", salt=f"salt {number}", store=False))
    served = desk.serve(request(PROMPT, salt="salt 0"), local=16)
    assert served.counts == (0, 16, 0, 3)
    assert served.capture is None
    unsalted = desk.serve(request(PROMPT, "unsalted", salt=None), local=16)
    assert unsalted.counts == (0, 0, 16, 3)


def test_a_salt_with_too_many_histories_is_not_trusted(
    desk: Desk, catalog: FakeCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salts, "MAX_HISTORIES", 2)
    for number in range(3):
        one = record(range(10 + number), start=50)
        catalog.add(one)
        prompt, options = row(one)
        desk.serve(request(prompt, f"r{number}", plan=options, store=False))
    assert desk.serve(request(PROMPT), local=4).counts == (0, 4, 0, 15)


def test_requests_without_kv_agent_fields_are_remembered_under_their_salt(
    desk: Desk, catalog: FakeCatalog
) -> None:
    """They leave computed KV where a later plan would have moved a chunk."""
    moved = record(range(10), start=50)
    catalog.add(moved)
    prompt, options = row(moved)
    desk.serve(request(prompt, "first", plan=options, store=False))
    assert desk.serve(request(prompt, "again", plan=options)).capture is not None
    # Everything is evicted, and then:
    desk.side.new_request(FakeRequest(request_id="plain", prompt_token_ids=list(prompt), cache_salt="salt"))
    served = desk.serve(request((*prompt, 94), plan=options), local=12)
    assert served.counts[1] == 12
    assert served.capture is None
