"""Local hits under a salt: whether they may hold adapted KV, and what is then told and captured."""

from __future__ import annotations

import pytest

from kv_agent.chunks import ChunkRecord, adapted_key
from kv_agent.vllm_plugin import salts
from tests.unit.vllm_plugin.builders import ROOT, FakeCatalog, chain, plan_options, record
from tests.unit.vllm_plugin.scheduling import FRESH, Desk, FakeRequest, request, row

PROMPT = (*range(14), *FRESH, 93, 94)


@pytest.fixture
def moved(desk: Desk, catalog: FakeCatalog) -> ChunkRecord:
    """Ten tokens that a first request got from elsewhere, behind four of its own, under the salt "salt"."""
    lead, moved = record(range(4)), record(range(4, 14), start=50)
    catalog.add(lead, moved)
    prompt, options = row(lead, moved)
    served = desk.serve(request(prompt, "first", plan=options))
    assert served.counts == (4, 10, 0, 3)
    return moved


def moved_to_the_front(catalog: FakeCatalog) -> ChunkRecord:
    """Ten tokens that were computed elsewhere, stored."""
    moved = record(range(10), start=50)
    catalog.add(moved)
    return moved


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
    moved = moved_to_the_front(catalog)
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
    moved = moved_to_the_front(catalog)
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
    moved = moved_to_the_front(catalog)
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
    moved = moved_to_the_front(catalog)
    prompt, options = row(moved)
    desk.serve(request(prompt, "first", plan=options, store=False))
    assert desk.serve(request(prompt, "again", plan=options)).capture is not None
    # Everything is evicted, and then:
    desk.side.new_request(FakeRequest(request_id="plain", prompt_token_ids=list(prompt), cache_salt="salt"))
    served = desk.serve(request((*prompt, 94), plan=options), local=12)
    assert served.counts[1] == 12
    assert served.capture is None
