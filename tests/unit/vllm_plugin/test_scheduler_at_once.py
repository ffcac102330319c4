"""Plans whose chunks are all in memory are put back by the step that computes the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.vllm_plugin.jobs import LoadFailure, ResidentChanges, WorkerReport
from tests.unit.vllm_plugin.builders import FakeCatalog, chain, plan_options, record
from tests.unit.vllm_plugin.scheduling import BLOCK, Desk, FakeRequest, request, row

LENGTH = 6


@pytest.fixture
def records() -> list[ChunkRecord]:
    return chain(*(range(LENGTH * i, LENGTH * (i + 1)) for i in range(3)))


@pytest.fixture
def desk(records: list[ChunkRecord]) -> Iterator[Desk]:
    desk = Desk(FakeCatalog([*records, record(range(50, 56), start=70)]))
    yield desk
    desk.close()


def tell(desk: Desk, checksums: Mapping[ChunkKey, str | None], number: int = 1) -> None:
    desk.side.report(WorkerReport(residents=ResidentChanges(number=number, checksums=checksums)))


def sums(*records: ChunkRecord) -> dict[ChunkKey, str | None]:
    return {one.key: one.checksum for one in records}


def arrived(desk: Desk, *records: ChunkRecord, name: str = "r") -> FakeRequest:
    prompt, plan = row(*records)
    one = request(prompt, name, plan=plan)
    desk.side.new_request(one)
    desk.wait_looked_up()
    return one


def admitted(desk: Desk, one: FakeRequest, count: int, local: int = 0) -> None:
    desk.side.allocated(one.request_id, list(range(100, 100 + -(-(local + count) // BLOCK))), count)


def test_what_is_in_memory_is_put_back_at_once_and_counted_as_ever(
    desk: Desk, records: list[ChunkRecord]
) -> None:
    tell(desk, sums(*records), number=7)
    one = arrived(desk, *records)

    assert desk.side.match("r", 0) == (3 * LENGTH, False)
    admitted(desk, one, 3 * LENGTH)

    jobs = desk.side.take_jobs()
    assert jobs.heard == 7
    (job,) = jobs.loads
    assert job.at_once
    assert [(load.key, load.checksum) for load in job.chunks] == [(one.key, one.checksum) for one in records]
    assert job.records == {}  # nothing of it is read
    _, answer, _ = desk.finish(one, [70])
    assert [answer[name] for name in ("exact", "adapted", "local", "computed")] == [18, 0, 0, 3]


@pytest.mark.parametrize("missing", [{}, {"checksum": "other bytes"}, {"gone": True}])
def test_where_one_chunk_is_not_in_memory_the_request_waits(
    desk: Desk, records: list[ChunkRecord], missing: dict[str, object]
) -> None:
    tell(desk, sums(*records[: 3 if missing else 2]))
    if missing:
        changed = None if "gone" in missing else str(missing["checksum"])
        tell(desk, {records[2].key: changed}, number=2)
    one = arrived(desk, *records)

    assert desk.side.match("r", 0) == (3 * LENGTH, True)
    admitted(desk, one, 3 * LENGTH)
    assert not desk.side.take_jobs().loads[0].at_once


def test_only_what_is_behind_the_local_hit_has_to_be_in_memory(
    desk: Desk, records: list[ChunkRecord]
) -> None:
    tell(desk, sums(*records[1:]))
    arrived(desk, *records)
    assert desk.side.match("r", 4) == (3 * LENGTH - 4, True)
    assert desk.side.match("r", 8) == (3 * LENGTH - 8, False)


def test_a_request_that_was_not_let_in_is_decided_anew(desk: Desk, records: list[ChunkRecord]) -> None:
    tell(desk, sums(*records))
    one = arrived(desk, *records)
    assert desk.side.match("r", 0) == (3 * LENGTH, False)
    tell(desk, {records[0].key: None}, number=2)
    assert desk.side.match("r", 0) == (3 * LENGTH, True)
    admitted(desk, one, 3 * LENGTH)
    assert not desk.side.take_jobs().loads[0].at_once


def test_of_a_prompt_that_is_all_in_memory_something_is_left_to_compute(
    desk: Desk, records: list[ChunkRecord]
) -> None:
    """vLLM must have a token to compute in the same step."""
    tell(desk, sums(*records))
    prompt, _ = row(*records)
    plan = plan_options(*((one, LENGTH * i) for i, one in enumerate(records)), fresh_start=3 * LENGTH)
    desk.side.new_request(request(prompt[: 3 * LENGTH], plan=plan))
    desk.wait_looked_up()
    assert desk.side.match("r", 0) == (2 * LENGTH, False)


def test_a_later_request_trusts_the_blocks_that_vllm_shares_at_once(
    desk: Desk, records: list[ChunkRecord]
) -> None:
    moved = record(range(50, 56), start=70)
    tell(desk, sums(moved))
    one = arrived(desk, moved, name="one")
    count, waits = desk.side.match("one", 0)
    assert (count, waits) == (LENGTH, False)
    admitted(desk, one, count)

    other = arrived(desk, moved, name="other")  # before any step has run
    assert desk.side.match("other", BLOCK) == (LENGTH - BLOCK, False)
    admitted(desk, other, LENGTH - BLOCK, local=BLOCK)
    _, answer, _ = desk.finish(other, [70])
    assert (answer["adapted"], answer["local"]) == (LENGTH, 0)


def test_what_could_not_be_put_back_is_counted_as_computed(desk: Desk, records: list[ChunkRecord]) -> None:
    tell(desk, sums(*records))
    one = arrived(desk, *records)
    count, _ = desk.side.match("r", 0)
    admitted(desk, one, count)
    desk.side.take_jobs()
    failure = LoadFailure(key=records[0].key, start=0, reason="chunk could not be loaded")
    desk.side.report(WorkerReport(loaded={"r": failure}))

    _, answer, _ = desk.finish(one, [70])
    assert [answer[name] for name in ("exact", "adapted", "local", "computed")] == [0, 0, 0, 21]
    assert desk.side.counters["load_failures|chunk could not be loaded"] == 1
