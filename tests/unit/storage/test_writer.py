"""Jobs run in order, bounded in bytes, and one that fails does not stop the rest."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from kv_agent.errors import StorageError, UnstorableError
from kv_agent.storage.pause import Pause
from kv_agent.storage.writer import BackgroundWriter, WriterCounts
from tests.unit.storage.clock import Clock

TIMEOUT_S = 10.0


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter(100)
    yield writer
    assert writer.close(TIMEOUT_S)


@pytest.fixture
def gate(writer: BackgroundWriter) -> Iterator[threading.Event]:
    """The writer stands in a job of 60 bytes until this is set."""
    gate, started = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        gate.wait(TIMEOUT_S)

    assert writer.submit(60, job) is None
    assert started.wait(TIMEOUT_S)
    yield gate
    gate.set()


def test_jobs_run_in_the_order_they_came(writer: BackgroundWriter) -> None:
    seen: list[int] = []

    assert not any(writer.submit(1, lambda n=n: seen.append(n)) for n in range(50))  # type: ignore[misc]

    assert writer.flush(TIMEOUT_S)
    assert seen == list(range(50))
    assert writer.counts == WriterCounts(done=50)


def test_what_exceeds_the_bound_is_dropped_and_warned_about_once(
    writer: BackgroundWriter, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []

    with caplog.at_level(logging.WARNING):
        fits = writer.submit(40, lambda: ran.append("fits"))
        too_much = [writer.submit(1, lambda: ran.append("too much")) for _ in range(3)]
    pending = writer.pending_bytes
    gate.set()

    assert fits is None
    assert too_much == ["write queue is full"] * 3
    assert pending == 100
    assert writer.flush(TIMEOUT_S)
    assert ran == ["fits"]
    assert writer.pending_bytes == 0
    assert writer.counts == WriterCounts(done=2, queue_full=3)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("num_bytes", [40, 41])
def test_what_is_admitted_is_taken_and_what_is_not_counts_as_dropped_once(
    writer: BackgroundWriter, gate: threading.Event, num_bytes: int
) -> None:
    refusal = writer.admit(num_bytes)

    assert refusal == (None if num_bytes == 40 else "write queue is full")
    assert writer.counts.dropped == (0 if refusal is None else 1)
    assert writer.submit(num_bytes, lambda: None) == refusal


def test_room_comes_back_when_a_job_has_run(writer: BackgroundWriter, gate: threading.Event) -> None:
    assert writer.submit(41, lambda: None) is not None
    gate.set()
    assert writer.flush(TIMEOUT_S)

    assert writer.submit(100, lambda: None) is None


def test_a_job_larger_than_the_bound_runs_when_nothing_is_pending(writer: BackgroundWriter) -> None:
    ran = threading.Event()

    assert writer.submit(10_000, ran.set) is None

    assert writer.flush(TIMEOUT_S)
    assert ran.is_set()


def test_a_job_larger_than_the_bound_waits_for_nobody(
    writer: BackgroundWriter, gate: threading.Event
) -> None:
    assert writer.submit(10_000, lambda: None) is not None


def test_a_bug_is_logged_with_its_traceback_once_and_the_next_job_runs(
    writer: BackgroundWriter, caplog: pytest.LogCaptureFixture
) -> None:
    ran = threading.Event()

    def fail() -> None:
        raise RuntimeError("a bug")

    def fail_elsewhere() -> None:
        raise RuntimeError("another bug")

    for job in [fail] * 5 + [fail_elsewhere] * 3:
        writer.submit(1, job)
    writer.submit(1, ran.set)

    assert writer.flush(TIMEOUT_S)
    assert ran.is_set()
    assert writer.counts == WriterCounts(done=1, bugs=8)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        "a bug",
        "another bug",
    ]
    assert len(caplog.records) == 2


def test_a_turn_that_cannot_be_stored_is_no_trouble_of_the_disk(
    writer: BackgroundWriter, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        writer.submit(1, raising(UnstorableError("a chunk is not known")))
    writer.submit(1, lambda: None)

    assert writer.flush(TIMEOUT_S)
    assert writer.counts == WriterCounts(done=1, unstorable=3)
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]


# -- trouble with the disk --------------------------------------------------------------------------


class Disk:
    """A disk that is full until a test says otherwise, and the jobs that reached it."""

    def __init__(self) -> None:
        self.trouble: str | None = "no space left"
        self.reached: list[int] = []

    def job(self, number: int) -> Callable[[], None]:
        def store() -> None:
            self.reached.append(number)
            if self.trouble:
                raise StorageError(self.trouble)

        return store


def raising(err: Exception) -> Callable[[], None]:
    def job() -> None:
        raise err

    return job


@pytest.fixture
def paused(clock: Clock) -> Iterator[tuple[BackgroundWriter, Disk]]:
    """A writer whose first job has met a full disk."""
    writer, disk = BackgroundWriter(100, pause=Pause(1, 30, clock)), Disk()
    assert writer.submit(1, disk.job(0)) is None
    assert writer.flush(TIMEOUT_S)
    yield writer, disk
    assert writer.close(TIMEOUT_S)


def test_trouble_gives_one_warning_without_a_traceback_and_stops_new_jobs(
    writer: BackgroundWriter, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    writer.submit(1, disk.job(0))
    assert writer.flush(TIMEOUT_S)

    refusals = {writer.admit(1) for _ in range(500)} | {writer.submit(0, disk.job(1)) for _ in range(500)}

    assert refusals == {"storing is paused: no space left"}
    assert disk.reached == [0]
    assert writer.counts == WriterCounts(disk_trouble=1, paused=1000)
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]
    assert "no space left" in caplog.text


def test_after_a_pause_one_job_is_let_through_and_the_next_pause_is_longer(
    paused: tuple[BackgroundWriter, Disk], clock: Clock
) -> None:
    writer, disk = paused
    gate = threading.Event()
    clock.now += 1

    assert writer.admit(1) is None
    assert writer.submit(1, lambda: bool(gate.wait(TIMEOUT_S)) and disk.job(1)()) is None  # type: ignore
    while_it_runs = writer.admit(1)
    gate.set()
    assert writer.flush(TIMEOUT_S)
    clock.now += 1.5
    too_early = writer.admit(1)
    clock.now += 0.5

    assert while_it_runs == too_early == "storing is paused: no space left"
    assert writer.admit(1) is None
    assert disk.reached == [0, 1]


def test_storing_resumes_with_the_first_success_and_one_line_tells_what_was_lost(
    paused: tuple[BackgroundWriter, Disk], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer, disk = paused
    for _ in range(5):
        writer.admit(1)
    clock.now += 1
    writer.submit(1, disk.job(1))
    assert writer.flush(TIMEOUT_S)
    disk.trouble = None
    clock.now += 2
    caplog.clear()

    writer.submit(1, disk.job(2))
    assert writer.flush(TIMEOUT_S)
    assert [writer.submit(1, disk.job(number)) for number in range(3, 6)] == [None] * 3
    assert writer.flush(TIMEOUT_S)

    assert disk.reached == [0, 1, 2, 3, 4, 5]
    assert writer.counts == WriterCounts(done=4, disk_trouble=2, paused=5)
    assert [record.getMessage() for record in caplog.records] == [
        "kv-agent-writer: storing works again; 7 turns were lost"
    ]


def disk_that_failed_once(writer: BackgroundWriter, num_jobs: int) -> Disk:
    """So many jobs wait when it fails; it works again, but the writer has met the trouble."""
    disk, gate = Disk(), threading.Event()
    writer.submit(1, lambda: bool(gate.wait(TIMEOUT_S)))  # type: ignore[arg-type, return-value]
    for number in range(num_jobs):
        writer.submit(1, disk.job(number))
    gate.set()
    deadline = time.monotonic() + TIMEOUT_S
    while not writer.counts.disk_trouble:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    disk.trouble = None
    return disk


def test_jobs_that_wait_when_the_trouble_begins_are_kept_for_its_end() -> None:
    writer = BackgroundWriter(1000, pause=Pause(0.01, 0.02))
    disk = disk_that_failed_once(writer, num_jobs=50)

    assert writer.flush(TIMEOUT_S)
    lost = writer.counts.disk_trouble
    assert disk.reached == list(range(50))
    assert writer.counts == WriterCounts(done=51 - lost, disk_trouble=lost)
    assert 1 <= lost < 10  # one a pause, not all at once
    assert writer.close(TIMEOUT_S)


def test_closing_waits_for_no_pause(clock: Clock) -> None:
    writer = BackgroundWriter(1000, pause=Pause(1000, 1000, clock))
    disk = disk_that_failed_once(writer, num_jobs=3)

    assert writer.close(TIMEOUT_S)
    assert disk.reached == [0, 1, 2]


def test_what_fails_otherwise_while_paused_neither_ends_nor_prolongs_it(
    paused: tuple[BackgroundWriter, Disk], clock: Clock
) -> None:
    writer, disk = paused
    disk.trouble = None
    clock.now += 1

    for err in (UnstorableError("not this one"), RuntimeError("a bug")):
        assert writer.submit(1, raising(err)) is None
        assert writer.flush(TIMEOUT_S)
    assert writer.submit(1, disk.job(1)) is None
    assert writer.flush(TIMEOUT_S)

    assert writer.counts == WriterCounts(done=1, disk_trouble=1, unstorable=1, bugs=1)


def test_flush_gives_up_after_its_timeout(writer: BackgroundWriter, gate: threading.Event) -> None:
    assert not writer.flush(0.01)
    gate.set()
    assert writer.flush(TIMEOUT_S)


def test_close_runs_what_is_queued_and_then_refuses(caplog: pytest.LogCaptureFixture) -> None:
    writer = BackgroundWriter(1000)
    seen: list[int] = []
    for number in range(20):
        writer.submit(1, lambda n=number: seen.append(n))  # type: ignore[misc]

    closed = writer.close(TIMEOUT_S)
    late = [writer.submit(1, lambda: None) for _ in range(2)]

    assert closed
    assert writer.close(0)
    assert seen == list(range(20))
    assert late == ["the writer is closed"] * 2
    assert writer.counts == WriterCounts(done=20, closed=2)
    assert caplog.text.count("closed") == 1


def test_close_tells_when_jobs_are_still_running() -> None:
    writer, gate = BackgroundWriter(1000), threading.Event()
    writer.submit(1, lambda: bool(gate.wait(TIMEOUT_S)))  # type: ignore[arg-type, return-value]

    assert not writer.close(0.01)
    gate.set()
    assert writer.close(TIMEOUT_S)


def test_a_job_that_has_run_is_released(writer: BackgroundWriter) -> None:
    class Payload:
        def __call__(self) -> None: ...

    payload = Payload()
    reference = weakref.ref(payload)
    writer.submit(1, payload)
    del payload
    writer.flush(TIMEOUT_S)
    # The thread drops it before it counts it as done.
    assert reference() is None
