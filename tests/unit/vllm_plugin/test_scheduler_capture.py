"""What of a finished request becomes a memory: new tokens only, behind the context they were computed in."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from kv_agent.chunks import ChunkKey, Scope, adapted_key, chain_key, content_key
from kv_agent.vllm_plugin.jobs import CaptureJob, Segment
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    ROOT,
    SCOPE,
    FakeCatalog,
    chain,
    plan_options,
    record,
)
from tests.unit.vllm_plugin.scheduling import NOW, Desk, request


def spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    return [(one.start, one.end) for one in segments]


def assert_chained(segments: Sequence[Segment], tokens: Sequence[int], context: ChunkKey) -> None:
    """Each segment holds the tokens of its place and is named by them and by all before it."""
    for one in segments:
        assert one.token_ids == tuple(tokens[one.start : one.end])
        assert one.parent == context
        assert one.key == chain_key(context, one.token_ids)
        assert one.content_key == content_key(FINGERPRINT, one.token_ids)
        context = one.key


def test_a_finished_request_is_captured_without_its_last_token(desk: Desk) -> None:
    served = desk.serve(request(range(6), metadata={"topic": "x", "n": 1}, ttl_s=30), outputs=(70, 71, 72))
    job = served.captured
    assert served.blocks_kept
    assert spans(job.content) == [(0, 4), (4, 8)]
    assert job.context == ()
    assert_chained(job.content, (*range(6), 70, 71, 72), ROOT)
    assert job.content_keys == tuple(one.key for one in job.content)
    assert job.content_tokens == (*range(6), 70, 71)
    assert (job.request_id, job.block_ids) == ("r", (100, 101, 102))
    assert (job.scope, job.fingerprint, job.created) == (SCOPE, FINGERPRINT, NOW)
    assert job.metadata == {"topic": "x", "n": 1}
    assert job.expires == NOW + 30
    assert re.fullmatch("[0-9a-f]{32}", job.turn_id)
    assert served.answer["turn_id"] == job.turn_id


def test_tokens_kept_for_a_stored_turn_are_its_context(desk: Desk) -> None:
    keys = [f"{number:032x}" for number in (1, 2)]
    job = desk.serve(request(range(6), part_of=keys, content_start=0), outputs=(70,)).captured
    assert job.is_part
    assert job.content == ()
    assert job.content_keys == tuple(keys)
    assert job.content_tokens == ()
    assert spans(job.context) == [(0, 4), (4, 6)]
    assert not desk.serve(request(range(9), "other"), outputs=(70,)).captured.is_part


def test_tokens_that_were_not_computed_are_not_captured(desk: Desk) -> None:
    one = request(range(10))
    desk.side.new_request(one)
    desk.wait_looked_up()
    one.num_computed_tokens = 7
    desk.side.finished(one, [1, 2, 3], complete=True)
    (job,) = desk.side.take_jobs().captures
    assert spans(job.content) == [(0, 4), (4, 7)]


def test_tokens_scheduled_ahead_of_sampling_are_not_captured(desk: Desk) -> None:
    """With asynchronous scheduling vLLM counts tokens whose values are not there yet."""
    one = request(range(6))
    desk.side.new_request(one)
    desk.wait_looked_up()
    one.output_token_ids, one.num_computed_tokens = [70, 71], 9
    desk.side.finished(one, [1, 2, 3], complete=True)
    (job,) = desk.side.take_jobs().captures
    assert job.content_tokens == (*range(6), 70)


def test_the_scope_s_agent_and_session_are_kept(desk: Desk) -> None:
    one = request(range(6))
    one.kv_transfer_params["kv_agent"]["scope"] |= {"agent_id": "a", "session_id": "s"}
    expected = Scope(namespace=SCOPE.namespace, user_id=SCOPE.user_id, agent_id="a", session_id="s")
    assert desk.serve(one).captured.scope == expected


def test_only_what_is_new_is_captured(desk: Desk, catalog: FakeCatalog) -> None:
    stored = chain(range(5), range(5, 8))
    catalog.add(*stored)
    served = desk.serve(request(range(11)))
    assert spans(served.captured.content) == [(8, 11)]
    assert_chained(served.captured.content, range(11), stored[-1].key)
    assert served.captured.content_keys == tuple(one.key for one in served.captured.content)
    assert served.captured.content_tokens == (8, 9, 10)


def test_what_is_in_vllm_s_own_cache_but_not_stored_is_captured(desk: Desk) -> None:
    served = desk.serve(request(range(11)), local=8)
    assert spans(served.captured.content) == [(0, 4), (4, 8), (8, 11)]


@pytest.mark.parametrize("stored", [[range(10)], [range(4), range(4, 10)]])
def test_when_everything_is_stored_nothing_is_captured(
    desk: Desk, catalog: FakeCatalog, stored: list[range]
) -> None:
    catalog.add(*chain(*stored))
    served = desk.serve(request(range(10)))
    assert (served.capture, served.blocks_kept) == (None, False)
    assert "turn_id" not in served.answer


def test_quarantined_chunks_are_captured_anew(desk: Desk, catalog: FakeCatalog) -> None:
    first, second = chain(range(4), range(4, 8))
    catalog.add(first, second)
    catalog.quarantine(second.key)
    served = desk.serve(request(range(8)))
    assert [one.key for one in served.captured.content] == [second.key]


# -- context and content ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_start", "context", "content"),
    [
        (0, [], [(0, 4), (4, 8), (8, 10)]),
        (3, [(0, 3)], [(3, 7), (7, 10)]),
        (4, [(0, 4)], [(4, 8), (8, 10)]),
        (6, [(0, 4), (4, 6)], [(6, 10)]),
        (10, [(0, 4), (4, 8), (8, 10)], []),
        (99, [(0, 4), (4, 8), (8, 10)], []),
    ],
)
def test_tokens_before_the_content_are_context(
    desk: Desk, content_start: int, context: list[tuple[int, int]], content: list[tuple[int, int]]
) -> None:
    job = desk.serve(request(range(9), content_start=content_start), outputs=(70, 71)).captured
    assert (spans(job.context), spans(job.content)) == (context, content)
    assert_chained(job.segments, (*range(9), 70), ROOT)
    assert job.content_keys == tuple(one.key for one in job.content)
    assert job.content_tokens == (*range(9), 70)[content_start:]


def test_stored_context_is_not_captured_again_and_is_no_content(desk: Desk, catalog: FakeCatalog) -> None:
    prefix = record(range(5))
    catalog.add(prefix)
    job = desk.serve(request(range(9), content_start=5)).captured
    assert (spans(job.context), spans(job.content)) == ([], [(5, 9)])
    assert job.content[0].parent == prefix.key
    assert job.content_keys == (job.content[0].key,)


def test_stored_content_belongs_to_the_turn_without_being_captured(desk: Desk, catalog: FakeCatalog) -> None:
    prefix, known = chain(range(5), range(5, 8))
    catalog.add(prefix, known)
    job = desk.serve(request(range(10), content_start=5)).captured
    assert spans(job.segments) == [(8, 10)]
    assert job.content_keys == (known.key, job.content[0].key)
    assert job.content_tokens == tuple(range(5, 10))


def test_a_turn_whose_content_is_all_stored_is_still_a_turn(desk: Desk, catalog: FakeCatalog) -> None:
    """The same question to the same effect, but perhaps in another session or with other metadata."""
    prefix, known = chain(range(5), range(5, 9))
    catalog.add(prefix, known)
    served = desk.serve(request(range(9), content_start=5))
    assert served.captured.segments == ()
    assert served.captured.content_keys == (known.key,)
    assert served.captured.content_tokens == tuple(range(5, 9))
    assert not served.blocks_kept
    assert served.answer["turn_id"] == served.captured.turn_id


def test_a_stored_prefix_alone_is_no_turn(desk: Desk, catalog: FakeCatalog) -> None:
    catalog.add(record(range(5)))
    assert desk.serve(request(range(5), content_start=5)).capture is None


def test_a_stored_chunk_across_the_content_s_start_is_context(desk: Desk, catalog: FakeCatalog) -> None:
    across = record(range(6))
    catalog.add(across)
    job = desk.serve(request(range(10), content_start=3)).captured
    assert (spans(job.context), spans(job.content)) == ([], [(6, 10)])
    assert job.content_keys == (job.content[0].key,)
    assert job.content_tokens == (6, 7, 8, 9)


# -- behind injected chunks -----------------------------------------------------------------------------


def test_text_behind_exact_chunks_continues_their_chain(desk: Desk, catalog: FakeCatalog) -> None:
    records = chain(range(6), range(6, 9))
    catalog.add(*records)
    options = plan_options((records[0], 0), (records[1], 6), fresh_start=9)
    job = desk.serve(request(range(12), plan=options, content_start=9)).captured
    assert spans(job.segments) == [(9, 12)]
    assert_chained(job.segments, range(12), records[1].key)


def test_text_behind_moved_chunks_has_a_chain_of_its_own(desk: Desk, catalog: FakeCatalog) -> None:
    first, moved = record(range(4)), record(range(4, 9), start=30)
    catalog.add(first, moved)
    options = plan_options((first, 0), (moved, 4), fresh_start=9)
    served = desk.serve(request(range(12), plan=options))
    assert spans(served.captured.segments) == [(9, 12)]
    context = adapted_key(first.key, moved.key)
    assert_chained(served.captured.segments, range(12), context)

    again = desk.serve(request(range(14), "again", plan=options, salt="other"))
    assert spans(again.captured.segments) == [(12, 14)]
    assert_chained(again.captured.segments, range(14), served.captured.segments[-1].key)


def test_without_its_moved_chunks_a_plan_captures_plain_text_or_nothing(
    desk: Desk, catalog: FakeCatalog
) -> None:
    """The moved chunk stands behind a gap, so all of this was computed."""
    moved = record(range(4, 9), start=30)
    catalog.add(moved)
    served = desk.serve(request(range(12), plan=plan_options((moved, 4), fresh_start=9)))
    assert served.counts == (0, 0, 0, 12)
    if served.capture is not None:
        assert_chained(served.captured.segments, range(12), ROOT)


def test_a_refused_plan_does_not_keep_its_text_from_being_captured(desk: Desk, catalog: FakeCatalog) -> None:
    other = record(range(50, 54))
    catalog.add(other)
    served = desk.serve(request(range(9), plan=plan_options((other, 0), fresh_start=4)))
    assert_chained(served.captured.segments, range(9), ROOT)
    assert spans(served.captured.segments) == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize("quarantined", [False, True])
def test_without_a_content_start_the_fresh_turn_of_a_plan_is_the_content(
    desk: Desk, catalog: FakeCatalog, quarantined: bool
) -> None:
    """Memories that had to be computed again are context of the new turn, not part of it."""
    memory = record(range(6), start=30, quarantined=quarantined)
    catalog.add(memory)
    served = desk.serve(request(range(9), plan=plan_options((memory, 0), fresh_start=6)))
    assert spans(served.captured.context) == ([(0, 4), (4, 6)] if quarantined else [])
    assert spans(served.captured.content) == [(6, 9)]
    assert served.captured.content_tokens == (6, 7, 8)


# -- captures that are not durable yet --------------------------------------------------------------------


def test_a_capture_is_known_to_the_next_request_before_it_is_durable(desk: Desk) -> None:
    first = desk.serve(request(range(8), "first"), durable=False)
    second = desk.serve(request(range(12), "second"), durable=False)
    assert spans(second.captured.segments) == [(8, 12)]
    assert_chained(second.captured.segments, range(12), first.captured.segments[-1].key)


def test_a_lost_capture_is_captured_anew(desk: Desk) -> None:
    first = desk.serve(request(range(8), "first"), durable=False)
    desk.lose(first.captured)
    second = desk.serve(request(range(8), "second"), durable=False)
    assert second.captured.segments == first.captured.segments
    assert second.captured.turn_id != first.captured.turn_id
    assert (desk.side.counters["turns|lost"], desk.side.counters["turns|stored"]) == (1, 0)


def test_a_durable_capture_is_known_from_the_catalog(desk: Desk, catalog: FakeCatalog) -> None:
    first = desk.serve(request(range(8), "first"))
    assert desk.serve(request(range(8), "second")).capture is None
    for one in first.captured.segments:  # forgotten by its user
        del catalog.records[one.key]
    assert desk.serve(request(range(8), "third")).captured.segments == first.captured.segments
    assert desk.side.counters["turns|stored"] == 2


def test_pending_captures_of_other_users_are_not_known(desk: Desk) -> None:
    desk.serve(request(range(8), "first"), durable=False)
    eve = Scope(namespace=SCOPE.namespace, user_id="eve")
    second = desk.serve(request(range(8), "second", scope=eve))
    assert spans(second.captured.segments) == [(0, 4), (4, 8)]
    assert second.captured.segments[0].parent != ROOT


# -- what is never captured -----------------------------------------------------------------------------


def capture_of(desk: Desk, **options: object) -> CaptureJob | None:
    return desk.serve(request(range(9), **options)).capture


def test_nothing_is_captured_when_asked_not_to(desk: Desk) -> None:
    assert capture_of(desk, store=False) is None


def test_an_aborted_request_is_not_captured(desk: Desk) -> None:
    served = desk.serve(request(range(9)), complete=False)
    assert (served.capture, served.blocks_kept) == (None, False)
    assert served.counts == (0, 0, 0, 9)


def test_a_request_cut_off_by_its_end_is_answered_once(desk: Desk) -> None:
    one = request(range(9))
    desk.serve(one)
    assert desk.side.finished(one, [1], complete=True) == (False, None)


def test_nothing_is_captured_of_a_request_that_computed_nothing(desk: Desk) -> None:
    one = request(range(9))
    desk.side.new_request(one)
    desk.wait_looked_up()
    assert desk.side.finished(one, [], complete=True)[0] is False
    assert desk.side.take_jobs().captures == []


def test_chunks_are_at_most_as_long_as_configured(catalog: FakeCatalog) -> None:
    desk = Desk(catalog, chunk_tokens=7)
    job = desk.serve(request(range(20), content_start=3), outputs=(70, 71, 72)).captured
    desk.close()
    assert (spans(job.context), spans(job.content)) == ([(0, 3)], [(3, 10), (10, 17), (17, 22)])
