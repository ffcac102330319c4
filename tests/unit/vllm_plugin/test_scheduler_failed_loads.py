"""What the scheduler's half makes of a failed load: what is computed, told, offered again and captured."""

from __future__ import annotations

import pytest

from kv_agent.chunks import ChunkRecord, adapted_key
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.vllm_plugin.builders import ROOT, FakeCatalog, chain, record
from tests.unit.vllm_plugin.scheduling import BLOCK, Desk, Served, request, row


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
    assert desk.side.counters["load_failures|blob is missing"] == 1
    assert served.answer["chunk_ids"] == [one.key for one in records[:failed]]


def test_when_no_block_is_left_the_shortened_plan_is_offered(desk: Desk, catalog: FakeCatalog) -> None:
    records = chain(range(3), range(3, 9), range(9, 12))
    catalog.add(*records)
    prompt, options = row(*records)
    one = request(prompt, plan=options)
    desk.side.new_request(one)

    loads, cached_end = desk.load(one, failing=[records[1].key])

    assert [list(job.records.values()) for job in loads] == [records, records[:1]]
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
