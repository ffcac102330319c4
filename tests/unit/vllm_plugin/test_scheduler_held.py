"""Placed chunks within a turn's own content: they belong to the turn, which then has no hole."""

from __future__ import annotations

import pytest

from tests.unit.vllm_plugin.builders import FakeCatalog, plan_options, record
from tests.unit.vllm_plugin.scheduling import Desk, request


def test_known_text_within_the_content_belongs_to_the_turn(desk: Desk, catalog: FakeCatalog) -> None:
    prefix, gap = record(range(3)), record(range(3, 5), parent=record(range(3)).key, start=3)
    known = record(range(5, 11), start=40)
    catalog.add(prefix, gap, known)
    options = plan_options((prefix, 0), (gap, 3), (known, 5), fresh_start=11)

    job = desk.serve(request(range(14), plan=options, content_start=3)).captured

    assert [one.token_ids for one in job.content] == [(11, 12, 13)]
    assert job.content_keys == (gap.key, known.key, job.content[0].key)
    assert job.content_tokens == tuple(range(3, 14))


def test_a_link_is_replaced_by_the_tokens_that_were_left_out(desk: Desk, catalog: FakeCatalog) -> None:
    link, known = record(range(2)), record(range(6), start=40)
    catalog.add(link, known)
    options = plan_options((link, 0), (known, 2, 2), fresh_start=6)

    job = desk.serve(request(range(9), plan=options, content_start=0)).captured

    assert job.content_keys == (known.key, job.content[0].key)
    assert job.content_tokens == tuple(range(9))


@pytest.mark.parametrize("left_out", [(9, 9), (0, 1, 2)])
def test_left_out_tokens_that_are_not_those_before_leave_the_turn_to_the_new_ones(
    desk: Desk, catalog: FakeCatalog, left_out: tuple[int, ...]
) -> None:
    """The chunk as a whole says something else, or more than what stands before it."""
    before, known = record(range(2)), record([*left_out, *range(2, 6)], start=40)
    catalog.add(before, known)
    options = plan_options((before, 0), (known, 2, len(left_out)), fresh_start=6)

    job = desk.serve(request(range(9), plan=options, content_start=0)).captured

    assert job.content_keys == tuple(one.key for one in job.content)
    assert job.content_tokens == (6, 7, 8)


def test_content_that_begins_within_a_placed_chunk_is_new_only(desk: Desk, catalog: FakeCatalog) -> None:
    known = record(range(6), start=40)
    catalog.add(known)
    options = plan_options((known, 0), fresh_start=6)
    job = desk.serve(request(range(9), plan=options, content_start=3)).captured
    assert job.content_keys == tuple(one.key for one in job.content)
    assert job.content_tokens == (6, 7, 8)


def test_what_could_not_be_loaded_is_computed_and_belongs_to_the_turn(
    desk: Desk, catalog: FakeCatalog
) -> None:
    one, other = record(range(4), start=30), record(range(4, 8), start=40)
    catalog.add(one, other)
    options = plan_options((one, 0), (other, 4), fresh_start=8)
    job = desk.serve(request(range(10), plan=options, content_start=0), failing=[other.key]).captured
    assert job.content_tokens == tuple(range(10))
    assert job.content_keys == (one.key, *(part.key for part in job.content))
    assert [token for part in job.content for token in part.token_ids] == list(range(4, 10))
