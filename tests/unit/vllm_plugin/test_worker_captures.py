"""What a worker reads out of a cache: turns for the store, probes for searches, and turns that are lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_agent.chunks import TurnId, TurnRecord
from kv_agent.errors import StorageError
from kv_agent.retrieval.pooling import pool_keys, to_bytes, token_keys
from kv_agent.retrieval.sketches import from_sketch, to_sketch
from kv_agent.vllm_plugin import worker as worker_module
from kv_agent.vllm_plugin.jobs import CaptureJob, ProbeJob
from kv_agent.vllm_plugin.paged_cache import Reading
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.bench import POOLED, SCHEME, WAIT_S, Bench, capture_job, load_job
from tests.unit.vllm_plugin.builders import FINGERPRINT, SCOPE


def stored(bench: Bench, job: CaptureJob) -> Tensor:
    """What the store has of the job's tokens, one behind the other."""
    records = bench.store.catalog.chunks([one.key for one in job.segments])
    return torch.cat([bench.store.load(records[one.key]).kv_L2THD for one in job.segments], dim=2)


# -- what is stored ---------------------------------------------------------------------------------


def test_what_the_engine_writes_after_the_step_is_not_captured(bench: Bench) -> None:
    """The blocks are given back as soon as the step ends, long before the disk is done."""
    bench.store.may_put.clear()
    job = capture_job(16)
    captured = bench.kv(job.block_ids, 0, 16)
    bench.step(captures=[job])
    assert bench.sent == {job.request_id}
    bench.cache.memory_L2SHD.zero_()
    bench.store.may_put.set()
    bench.step_until(lambda: job.turn_id in bench.report.settled)
    assert same_bits(stored(bench, job), captured)


def test_the_thread_that_stores_waits_for_the_copy_and_the_engine_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is copied comes some time after the step."""
    job = capture_job(16)
    captured = bench.kv(job.block_ids, 0, 16)
    arriving, is_there, waiting = torch.zeros_like(captured), threading.Event(), threading.Event()

    class Arrival:
        def synchronize(self) -> None:
            waiting.set()
            assert is_there.wait(WAIT_S)
            arriving.copy_(captured)

    reading = Reading(kv_L2THD=arriving, is_there=Arrival())
    monkeypatch.setattr(bench.cache, "begin_reading", lambda *_: reading)

    bench.step(captures=[job])
    assert bench.sent == {job.request_id}
    assert waiting.wait(WAIT_S)
    assert not bench.report.settled
    is_there.set()
    bench.step_until(lambda: job.turn_id in bench.report.settled)

    assert same_bits(stored(bench, job), captured)


def test_a_copy_that_never_comes_is_a_turn_that_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fault:
        def synchronize(self) -> None:
            raise RuntimeError("the device has failed")

    job = capture_job(16)
    reading = Reading(kv_L2THD=bench.kv(job.block_ids, 0, 16), is_there=Fault())
    with monkeypatch.context() as patch:
        patch.setattr(bench.cache, "begin_reading", lambda *_: reading)
        assert bench.capture(job) == []
    assert bench.report.settled == {job.turn_id: "could not be written"}

    later = capture_job(16, name="later")
    assert len(bench.capture(later)) == len(later.segments)


def test_a_turn_is_stored_with_its_text_chunks_and_metadata(bench: Bench) -> None:
    job = capture_job(16, content_start=4)
    bench.capture(job)
    assert bench.report.settled == {job.turn_id: None}
    turn = bench.store.catalog.turns([job.turn_id])[job.turn_id]
    assert turn == TurnRecord(
        turn_id=job.turn_id,
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        chunk_keys=tuple(one.key for one in job.content),
        num_tokens=12,
        text=" ".join(map(str, range(104, 116))),
        created=12.5,
        metadata={"topic": "x"},
        expires=60.5,
    )


def test_records_say_where_and_behind_what_chunks_were_computed(bench: Bench) -> None:
    job = capture_job(16, start=2, content_start=5)
    records = bench.capture(job)
    assert [(one.start, one.token_ids, one.parent, one.content_key) for one in records] == [
        (one.start, one.token_ids, one.parent, one.content_key) for one in job.segments
    ]
    assert {(one.namespace, one.user_id, one.fingerprint) for one in records} == {
        (SCOPE.namespace, SCOPE.user_id, FINGERPRINT)
    }


def test_content_is_found_by_its_pooled_keys_and_context_is_not(bench: Bench) -> None:
    job = capture_job(16, content_start=5)
    captured = bench.kv(job.block_ids, 0, 16)
    bench.capture(job)
    pooled = {
        one.key: to_bytes(
            pool_keys(token_keys(captured[:, 0, one.start : one.end], one.start, SCHEME, POOLED))
        )
        for one in job.content
    }
    assert bench.store.given_vectors == pooled | dict.fromkeys(one.key for one in job.context)
    changes = bench.store.catalog.changes_since(FINGERPRINT, SCOPE.namespace, 0)
    assert {change.chunk_key: change.vector for change in changes} == pooled


def test_a_turn_of_stored_chunks_alone_is_stored_and_holds_no_blocks(bench: Bench) -> None:
    first = capture_job(16)
    bench.capture(first)
    again = CaptureJob(
        request_id="again",
        block_ids=(1, 2, 3),
        turn_id=TurnId("again"),
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        context=(),
        content=(),
        content_keys=first.content_keys[:2],
        content_tokens=tuple(range(12)),
        created=13.0,
        metadata={},
    )
    bench.sent.clear()
    bench.capture(again)
    assert bench.report.settled[again.turn_id] is None
    assert bench.store.catalog.turns(["again"])["again"].chunk_keys == first.content_keys[:2]
    assert bench.sent == set()  # nobody waits for these blocks; vLLM would fail on them


def test_closing_writes_what_was_captured(benches: Callable[..., Bench], tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store")
    bench.store.may_put.clear()
    jobs = [capture_job(6, name=f"turn {i}", first_token=100 * i) for i in range(5)]
    bench.step(captures=jobs)
    assert not bench.report.settled
    threading.Timer(0.05, bench.store.may_put.set).start()
    bench.worker.close()

    reopened = benches()
    assert reopened.store.catalog.known_turns([job.turn_id for job in jobs]) == {job.turn_id for job in jobs}
    assert reopened.store.check() == []


# -- probes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0, 16), (3, 4), (5, 11)])
def test_a_probe_is_the_keys_of_its_range(bench: Bench, start: int, end: int) -> None:
    blocks = (3, 1, 4, 9)
    bench.step(probes=[ProbeJob(request_id="asking", block_ids=blocks, start=start, end=end)])
    keys_LTHD = bench.kv(blocks, start, end)[:, 0]
    assert bench.report.probes == {"asking": to_sketch(token_keys(keys_LTHD, start, SCHEME, POOLED))}


def test_a_probe_of_a_text_points_the_same_way_wherever_it_stands(bench: Bench) -> None:
    job = capture_job(6)
    (one,) = bench.capture(job)
    target = load_job([one], at=7)
    bench.load(target)
    bench.step(
        probes=[
            ProbeJob(request_id="here", block_ids=job.block_ids, start=0, end=6),
            ProbeJob(request_id="there", block_ids=target.block_ids, start=7, end=13),
        ]
    )
    here, there = (
        torch.from_numpy(from_sketch(bench.report.probes[name]).mean(axis=0)) for name in ("here", "there")
    )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_without_a_rotary_scheme_turns_are_stored_without_keys_and_a_probe_is_like_nothing(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(scheme=None)
    job = capture_job(16, content_start=5)
    captured = bench.kv(job.block_ids, 0, 16)
    bench.step(probes=[ProbeJob(request_id="asking", block_ids=(3, 1, 4, 9), start=2, end=9)])
    records = bench.capture(job)
    assert not bench.worker.can_move
    assert bench.store.given_vectors == dict.fromkeys(one.key for one in job.segments)
    assert not from_sketch(bench.report.probes["asking"]).any()
    target = load_job(records)
    assert bench.load(target) is None
    assert torch.equal(bench.kv(target.block_ids, 0, 16), captured)


def test_without_a_rotary_scheme_a_load_that_moves_fails(benches: Callable[..., Bench]) -> None:
    bench = benches(scheme=None)
    job = capture_job(16)
    failure = bench.load(load_job(bench.capture(job), at=3))
    assert failure is not None
    assert (failure.start, bench.invalid_blocks) == (3, {20, 12, 17, 11, 14})


# -- captures that are lost -------------------------------------------------------------------------


def test_a_full_queue_loses_the_turn_and_gives_its_blocks_back(benches: Callable[..., Bench]) -> None:
    bench = benches(queue_bytes=1)
    bench.store.may_put.clear()
    first, second = capture_job(6, name="first"), capture_job(6, name="second", first_token=300)
    bench.step(captures=[first])
    bench.step(captures=[second])
    assert bench.sent == {first.request_id, second.request_id}
    assert bench.report.settled == {second.turn_id: "write queue is full"}

    bench.store.may_put.set()
    bench.step_until(lambda: first.turn_id in bench.report.settled)
    assert bench.report.settled[first.turn_id] is None
    assert bench.store.catalog.known_turns([first.turn_id, second.turn_id]) == {first.turn_id}
    bench.step_until(lambda: not bench.worker.gauges()["queue_bytes|write"])  # which is told a moment later
    third = capture_job(6, name="third", first_token=500)
    bench.capture(third)
    assert bench.report.settled[third.turn_id] is None


class JustDrainedWriter:
    """A writer whose queue was full when asked and has room again a moment later."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def admit(self, num_bytes: int) -> str | None:
        return "write queue is full"

    def submit(self, num_bytes: int, job: Callable[[], None]) -> str | None:
        job()
        return None

    def close(self, timeout_s: float) -> bool:
        return True


def test_a_turn_dropped_for_a_full_queue_is_not_reported_as_stored(
    benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue may drain between the question whether there is room and the count of the drop."""
    monkeypatch.setattr(worker_module, "BackgroundWriter", JustDrainedWriter)
    bench = benches()
    job = capture_job(6)
    bench.step(captures=[job])
    stored = job.turn_id in bench.store.catalog.known_turns([job.turn_id])
    assert (bench.report.settled[job.turn_id] is None) is stored


@pytest.mark.parametrize("error", [StorageError("disk is full"), RuntimeError("a bug")])
def test_a_turn_that_cannot_be_stored_is_reported_lost_and_the_next_one_is_stored(
    bench: Bench, error: Exception
) -> None:
    bench.store.put_error = error
    lost = capture_job(6, name="lost")
    assert bench.capture(lost) == []
    assert bench.report.settled[lost.turn_id] == "could not be written"
    assert bench.sent == {lost.request_id}

    bench.store.put_error = None
    kept = capture_job(6, name="kept")
    bench.step_until(lambda: bench.capture(kept) != [])  # after a pause, where the disk was in trouble
    bench.step_until(lambda: bench.report.settled[kept.turn_id] is None)


def test_while_storing_is_paused_turns_are_not_even_copied_and_the_report_says_why(bench: Bench) -> None:
    bench.store.put_error = StorageError("disk is full")
    bench.capture(capture_job(6, name="lost"))
    assert bench.worker._writer.flush(WAIT_S)
    bench.cache.broken = AssertionError("it was copied")

    job = capture_job(6, name="not copied")
    bench.step(captures=[job])

    assert bench.report.settled[job.turn_id] == "storing is paused: disk is full"
    assert job.request_id in bench.sent


def test_a_cache_that_cannot_be_read_costs_the_turn_and_the_probe_only(bench: Bench) -> None:
    bench.cache.broken = RuntimeError("a kernel failed")
    lost = capture_job(6, name="lost")
    bench.step(captures=[lost], probes=[ProbeJob(request_id="asking", block_ids=(1,), start=0, end=2)])
    assert bench.report.settled[lost.turn_id] is not None
    assert bench.report.probes == {}
    assert bench.sent == {lost.request_id}

    bench.cache.broken = None
    assert len(bench.capture(capture_job(6, name="kept"))) == 1
