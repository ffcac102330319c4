"""KV that a step puts back and computes on: there layer by layer, whatever became of the tiers meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kv_agent.chunks import ChunkRecord
from kv_agent.kv.rope import rotate_keys
from kv_agent.vllm_plugin.jobs import LoadJob, StepJobs
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.bench import CHUNK, SCHEME, Bench, L, capture_job, load_job


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches(dtype=torch.bfloat16, host_bytes=1 << 20)


def at_once(records: list[ChunkRecord], at: int = 0) -> LoadJob:
    return replace(load_job(records, at=at), records={}, at_once=True)


def ran(bench: Bench, job: LoadJob, by_layers: bool = True) -> list[Tensor]:
    """A step of the engine with this job -> what the model saw of each layer when it came to it."""
    jobs = StepJobs(loads=[job])
    bench.worker.begin(jobs)
    bench.worker.start()
    seen = []
    end = job.chunks[-1].end
    for layer in range(L):
        if by_layers:
            bench.worker.wait_for_layer(layer)
        seen.append(bench.kv(job.block_ids, job.chunks[0].start, end)[layer])
    bench.worker.save(jobs)
    return seen


def step_of_layers(bench: Bench) -> None:
    """What tells that this model asks for its layers one after the other."""
    bench.worker.begin(StepJobs())
    for layer in range(L):
        bench.worker.wait_for_layer(layer)
    bench.worker.start()
    bench.worker.save(StepJobs())


@pytest.mark.parametrize("is_known_to_go_by_layers", [True, False])
@pytest.mark.parametrize("delta", [0, 3])
def test_every_layer_is_there_when_the_model_comes_to_it(
    bench: Bench, delta: int, is_known_to_go_by_layers: bool
) -> None:
    captured_job = capture_job(16)
    captured = bench.kv(captured_job.block_ids, 0, 16)
    records = bench.capture(captured_job)
    expected = captured.clone()
    expected[:, 0] = rotate_keys(captured[:, 0], delta, SCHEME)
    if is_known_to_go_by_layers:
        step_of_layers(bench)

    seen = ran(bench, at_once(records, at=delta), by_layers=is_known_to_go_by_layers)

    assert same_bits(torch.stack(seen), expected)
    report = bench.worker.take_report()
    assert (report.loaded, bench.worker.take_finished()) == ({}, (set(), set()))
    assert bench.worker.take_invalid_blocks() == set()
    assert bench.worker.counters()["moved_bytes|load"] == 16 * bench.cache.token_bytes


def test_a_use_at_once_counts_as_a_look_up(bench: Bench) -> None:
    records = bench.capture(capture_job(2 * CHUNK))
    hits = bench.store.memory_counts()["host"]["hits"]
    ran(bench, at_once(records))
    bench.step_until(lambda: bench.store.memory_counts()["host"]["hits"] == hits + 2)


def test_chunks_that_were_pushed_out_are_there_until_the_scheduler_has_heard(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(dtype=torch.bfloat16, host_bytes=3 * CHUNK * 3 * 2 * 2 * 8 * 2)  # three chunks
    first_job = capture_job(2 * CHUNK, name="first")
    captured = bench.kv(first_job.block_ids, 0, 2 * CHUNK)
    first = bench.capture(first_job)
    bench.step()
    other = capture_job(3 * CHUNK, name="other", blocks=(10, 11, 12, 13, 14), first_token=500)
    bench.capture(other)
    assert not {one.key for one in first} & bench.store._tiers.chunk_keys()
    for one in first:  # nothing on disk would help either
        (bench.store._root / one.blob).unlink(missing_ok=True)

    seen = ran(bench, at_once(first))

    assert same_bits(torch.stack(seen), captured)


def test_a_failure_is_told_and_the_blocks_are_not_trusted(bench: Bench) -> None:
    records = bench.capture(capture_job(16))
    bench.cache.broken = RuntimeError("a kernel failed")
    job = at_once(records, at=1)
    ran(bench, job)

    failure = bench.worker.take_report().loaded[job.request_id]
    assert failure is not None
    assert (failure.key, failure.start) == (records[0].key, 1)
    assert bench.worker.take_invalid_blocks() == {20, 12, 17, 11, 14}
    assert bench.worker.take_finished() == (set(), set())


def test_what_is_in_memory_is_told_with_the_next_report(bench: Bench) -> None:
    records = bench.capture(capture_job(16))
    bench.step_until(lambda: len(bench.told) == len(records))
    assert bench.told == {record.key: record.checksum for record in records}
