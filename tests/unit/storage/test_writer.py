"""Jobs run in order, bounded in bytes, and one that fails does not stop the rest."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator

import pytest

from kv_agent.storage.writer import BackgroundWriter, WriterCounts

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

    assert writer.submit(60, job)
    assert started.wait(TIMEOUT_S)
    yield gate
    gate.set()


def test_jobs_run_in_the_order_they_came(writer: BackgroundWriter) -> None:
    seen: list[int] = []

    assert all(writer.submit(1, lambda n=n: seen.append(n)) for n in range(50))  # type: ignore[misc]

    assert writer.flush(TIMEOUT_S)
    assert seen == list(range(50))
    assert writer.counts == WriterCounts(done=50, failed=0, dropped=0)


def test_what_exceeds_the_bound_is_dropped_and_warned_about_once(
    writer: BackgroundWriter, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []

    with caplog.at_level(logging.WARNING):
        fits = writer.submit(40, lambda: ran.append("fits"))
        too_much = [writer.submit(1, lambda: ran.append("too much")) for _ in range(3)]
    pending = writer.pending_bytes
    gate.set()

    assert fits
    assert too_much == [False, False, False]
    assert pending == 100
    assert writer.flush(TIMEOUT_S)
    assert ran == ["fits"]
    assert writer.pending_bytes == 0
    assert writer.counts == WriterCounts(done=2, failed=0, dropped=3)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("num_bytes", [40, 41])
def test_what_is_admitted_is_taken_and_what_is_not_counts_as_dropped_once(
    writer: BackgroundWriter, gate: threading.Event, num_bytes: int
) -> None:
    admitted = writer.admit(num_bytes)

    assert admitted is (num_bytes == 40)
    assert writer.counts.dropped == (0 if admitted else 1)
    assert writer.submit(num_bytes, lambda: None) is admitted


def test_room_comes_back_when_a_job_has_run(writer: BackgroundWriter, gate: threading.Event) -> None:
    assert not writer.submit(41, lambda: None)
    gate.set()
    assert writer.flush(TIMEOUT_S)

    assert writer.submit(100, lambda: None)


def test_a_job_larger_than_the_bound_runs_when_nothing_is_pending(writer: BackgroundWriter) -> None:
    ran = threading.Event()

    assert writer.submit(10_000, ran.set)

    assert writer.flush(TIMEOUT_S)
    assert ran.is_set()


def test_a_job_larger_than_the_bound_waits_for_nobody(
    writer: BackgroundWriter, gate: threading.Event
) -> None:
    assert not writer.submit(10_000, lambda: None)


def test_a_failing_job_is_logged_and_counted_and_the_next_one_runs(
    writer: BackgroundWriter, caplog: pytest.LogCaptureFixture
) -> None:
    ran = threading.Event()

    def fail() -> None:
        raise RuntimeError("disk on fire")

    writer.submit(10, fail)
    writer.submit(10, ran.set)

    assert writer.flush(TIMEOUT_S)
    assert ran.is_set()
    assert writer.counts == WriterCounts(done=1, failed=1, dropped=0)
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert "disk on fire" in caplog.text


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
    assert late == [False, False]
    assert writer.counts == WriterCounts(done=20, failed=0, dropped=2)
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
