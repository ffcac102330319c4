"""Bytes between a cache and a real store: what comes back, what is given up, and what is told of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId, TurnRecord
from kv_agent.errors import StorageError
from kv_agent.kv.rope import RotaryScheme, rotate_keys
from kv_agent.retrieval.pooling import pool_keys, to_bytes, token_keys
from kv_agent.retrieval.sketches import from_sketch, to_sketch
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.turn_writes import AddResult
from kv_agent.vllm_plugin import worker as worker_module
from kv_agent.vllm_plugin.chains import cut_segments
from kv_agent.vllm_plugin.jobs import (
    CaptureJob,
    ChunkLoad,
    LoadFailure,
    LoadJob,
    ProbeJob,
    StepJobs,
    WorkerReport,
)
from kv_agent.vllm_plugin.worker import WorkerSide
from tests.unit.vllm_plugin.builders import FINGERPRINT, ROOT, SCOPE

# L layers, T tokens, H kv heads, D head dim, P tokens per block, S slots of the whole cache
L, H, D, P = 3, 2, 8, 4
NUM_BLOCKS = 24
CHUNK = 6
WAIT_S = 30.0
SCHEME = RotaryScheme(
    inv_freq=tuple(1.0 / 100 ** (i / 3) for i in range(3)), rotary_dim=6, neox=True
)  # two of eight dims are not rotated
POOLED = (0, 2)


class DenseCache:
    """The paged cache's methods on one dense tensor ``[L, 2, S, H, D]``."""

    block_tokens = P
    num_layers = L
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        shape = (L, 2, NUM_BLOCKS * P, H, D)
        self.memory_L2SHD = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        self.broken: Exception | None = None

    @property
    def token_bytes(self) -> int:
        return self.memory_L2SHD[:, :, 0].nbytes

    def read(
        self, block_ids: Sequence[int], start: int, end: int, layers: Sequence[int] | None = None
    ) -> Tensor:
        self._fail_if_broken()
        chosen_L2SHD = self.memory_L2SHD[list(range(L) if layers is None else layers)]
        return chosen_L2SHD[:, :, slots(block_ids, start, end)]

    def write(self, kv_L2THD: Tensor, block_ids: Sequence[int], start: int) -> None:
        self._fail_if_broken()
        assert kv_L2THD.dtype == self.memory_L2SHD.dtype
        self.memory_L2SHD[:, :, slots(block_ids, start, start + kv_L2THD.shape[2])] = kv_L2THD

    def _fail_if_broken(self) -> None:
        if self.broken is not None:
            raise self.broken


def slots(block_ids: Sequence[int], start: int, end: int) -> list[int]:
    return [block_ids[position // P] * P + position % P for position in range(start, end)]


class TroubledStore(LocalStore):
    """A store that fails or waits where a test says so."""

    load_error: Exception | None = None
    put_error: Exception | None = None

    def __init__(self, root: Path, host_bytes: int) -> None:
        super().__init__(root, host_bytes)
        self.may_load = threading.Event()
        self.may_put = threading.Event()
        self.given_vectors: dict[ChunkKey, bytes | None] = {}
        self.may_load.set()
        self.may_put.set()

    def load(self, record: ChunkRecord) -> Tensor:
        assert self.may_load.wait(WAIT_S)
        if self.load_error is not None:
            raise self.load_error
        return super().load(record)

    def put_turn(
        self, turn: TurnRecord, context: Sequence[NewChunk], content: Sequence[NewChunk]
    ) -> AddResult:
        assert self.may_put.wait(WAIT_S)
        if self.put_error is not None:
            raise self.put_error
        self.given_vectors.update({chunk.key: chunk.vector for chunk in (*context, *content)})
        return super().put_turn(turn, context, content)


class Bench:
    """A worker's half with its store and cache, stepped as vLLM steps it."""

    def __init__(
        self,
        root: Path,
        *,
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 0,
        device_bytes: int = 0,
        queue_bytes: int = 1 << 30,
    ) -> None:
        self.cache = DenseCache(dtype)
        self.store = TroubledStore(root, host_bytes)
        self.worker = WorkerSide(
            self.cache,
            self.store,
            SCHEME,
            pooled_layers=POOLED,
            device_bytes=device_bytes,
            queue_bytes=queue_bytes,
            load_threads=2,
            decode=lambda ids: " ".join(map(str, ids)),
        )
        self.report = WorkerReport()
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.invalid_blocks: set[int] = set()

    def close(self) -> None:
        self.store.may_load.set()
        self.store.may_put.set()
        self.worker.close()

    def step(self, **jobs: list) -> None:
        step_jobs = StepJobs(**jobs)
        self.worker.start(step_jobs)
        self.worker.save(step_jobs)
        sent, received = self.worker.take_finished()
        self.sent |= sent
        self.received |= received
        self.invalid_blocks |= self.worker.take_invalid_blocks()
        self.report.merge(self.worker.take_report())

    def step_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.001)
            self.step()

    def capture(self, job: CaptureJob) -> list[ChunkRecord]:
        """Capture and wait until it is settled; the records of its segments that were stored."""
        self.step(captures=[job])
        self.step_until(lambda: job.turn_id in self.report.settled)
        found = self.store.catalog.chunks([segment.key for segment in job.segments])
        return [found[segment.key] for segment in job.segments if segment.key in found]

    def load(self, job: LoadJob) -> LoadFailure | None:
        self.step(loads=[job])
        self.step_until(lambda: job.request_id in self.received)
        return self.report.loaded[job.request_id]

    def kv(self, block_ids: Sequence[int], start: int, end: int) -> Tensor:
        return self.cache.memory_L2SHD[:, :, slots(block_ids, start, end)].clone()


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    opened: list[Bench] = []

    def make(**options: object) -> Bench:
        opened.append(Bench(tmp_path / "store", **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()


def capture_job(
    num_tokens: int = 16,
    *,
    name: str = "turn",
    blocks: Sequence[int] = (3, 1, 4, 9, 5),
    start: int = 0,
    content_start: int | None = None,
    parent: ChunkKey = ROOT,
    first_token: int = 100,
) -> CaptureJob:
    """Tokens ``[start, num_tokens)`` of a sequence, those before ``content_start`` as context."""
    tokens = range(first_token, first_token + num_tokens)
    split = start if content_start is None else content_start
    context = cut_segments(parent, tokens, start, split, CHUNK, FINGERPRINT)
    parent = context[-1].key if context else parent
    content = cut_segments(parent, tokens, split, num_tokens, CHUNK, FINGERPRINT)
    return CaptureJob(
        request_id=f"request of {name}",
        block_ids=tuple(blocks),
        turn_id=TurnId(name),
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        context=context,
        content=content,
        content_keys=tuple(one.key for one in content),
        content_tokens=tuple(tokens[split:]),
        created=12.5,
        metadata={"topic": "x"},
    )


def load_job(
    records: Sequence[ChunkRecord],
    *,
    at: int = 0,
    skip: int = 0,
    blocks: Sequence[int] = (20, 12, 17, 11, 14),
) -> LoadJob:
    """The records one behind the other from position ``at``, without the first ``skip`` tokens."""
    loads, position = [], at
    for one in records:
        missing = skip if not loads else 0
        loads.append(
            ChunkLoad(record=one, skip=missing, start=position + missing, delta=position - one.start)
        )
        position += one.num_tokens
    return LoadJob(request_id="loading", block_ids=tuple(blocks), chunks=tuple(loads))


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


# -- capture, then load ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kv_loaded_at_its_own_position_is_the_captured_kv(
    benches: Callable[..., Bench], dtype: torch.dtype
) -> None:
    bench = benches(dtype=dtype)
    job = capture_job(16)
    captured = bench.kv(job.block_ids, 0, 16)
    records = bench.capture(job)
    target = load_job(records)
    before = bench.cache.memory_L2SHD.clone()

    assert bench.load(target) is None

    assert same_bits(bench.kv(target.block_ids, 0, 16), captured)
    written = slots(target.block_ids, 0, 16)
    untouched = [slot for slot in range(NUM_BLOCKS * P) if slot not in written]
    assert same_bits(bench.cache.memory_L2SHD[:, :, untouched], before[:, :, untouched])
    assert bench.invalid_blocks == set()


@pytest.mark.parametrize("delta", [3, 1, -5])
def test_moved_keys_are_rotated_by_the_distance_and_values_stay(bench: Bench, delta: int) -> None:
    job = capture_job(16, start=6)
    captured = bench.kv(job.block_ids, 6, 16)
    records = bench.capture(job)
    target = load_job(records, at=6 + delta)

    assert bench.load(target) is None

    loaded = bench.kv(target.block_ids, 6 + delta, 16 + delta)
    assert same_bits(loaded[:, 1], captured[:, 1])
    assert same_bits(loaded[:, 0], rotate_keys(captured[:, 0], delta, SCHEME))
    # Written out once more: planes (i, i + 3) turn by delta * inv_freq, dims 6 and 7 stay.
    for i, freq in enumerate(SCHEME.inv_freq):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(delta * freq))
        plane = torch.complex(captured[:, 0, ..., i], captured[:, 0, ..., i + 3]) * turn
        torch.testing.assert_close(loaded[:, 0, ..., i], plane.real, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded[:, 0, ..., i + 3], plane.imag, rtol=0, atol=1e-5)
    assert same_bits(loaded[:, 0, ..., 6:], captured[:, 0, ..., 6:])


@pytest.mark.parametrize("skip", [1, 4, 5])
def test_skipped_tokens_are_not_written(bench: Bench, skip: int) -> None:
    job = capture_job(12)
    captured = bench.kv(job.block_ids, 0, 12)
    records = bench.capture(job)
    target = load_job(records, at=2, skip=skip)
    before = bench.kv(target.block_ids, 0, 2 + skip)

    assert bench.load(target) is None

    assert same_bits(bench.kv(target.block_ids, 0, 2 + skip), before)
    expected = rotate_keys(captured[:, 0], 2, SCHEME)
    assert same_bits(bench.kv(target.block_ids, 2 + skip, 14)[:, 0], expected[:, skip:])
    assert same_bits(bench.kv(target.block_ids, 2 + skip, 14)[:, 1], captured[:, 1, skip:])


@pytest.mark.parametrize("tier", ["host_bytes", "device_bytes"])
def test_moving_a_chunk_does_not_change_the_copy_that_stays_in_memory(
    benches: Callable[..., Bench], tier: str
) -> None:
    bench = benches(**{tier: 1 << 20})
    job = capture_job(6)
    captured = bench.kv(job.block_ids, 0, 6)
    records = bench.capture(job)
    for at in (5, 0, 9, 0):
        target = load_job(records, at=at)
        assert bench.load(target) is None
        bench.received.clear()
        loaded = bench.kv(target.block_ids, at, at + 6)
        assert same_bits(loaded[:, 0], rotate_keys(captured[:, 0], at, SCHEME))
        assert same_bits(loaded[:, 1], captured[:, 1])


def test_a_chunk_that_is_hot_on_the_device_needs_no_blob(
    benches: Callable[..., Bench], tmp_path: Path
) -> None:
    bench = benches(device_bytes=1 << 20)
    records = bench.capture(capture_job(6))
    assert bench.load(load_job(records)) is None
    bench.received.clear()
    (tmp_path / "store" / records[0].blob).unlink()
    assert bench.load(load_job(records)) is None


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
    records = bench.store.catalog.chunks([one.key for one in job.segments])
    stored = [bench.store.load(records[one.key]) for one in job.segments]
    assert same_bits(torch.cat(stored, dim=2), captured)


# -- what is stored ---------------------------------------------------------------------------------


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


# -- loads that fail ----------------------------------------------------------------------------------


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(bytes(data))


@pytest.fixture
def three(bench: Bench) -> list[ChunkRecord]:
    """Chunks of 6, 6 and 4 tokens in blobs of their own."""
    records: list[ChunkRecord] = []
    for index, (start, end) in enumerate([(0, 6), (6, 12), (12, 16)]):
        parent = records[-1].key if records else ROOT
        records += bench.capture(capture_job(end, name=f"turn {index}", start=start, parent=parent))
    return records


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(delete, "blob is missing"), (truncate, "blob is corrupt"), (flip_one_bit, "blob is corrupt")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize(
    ("failed", "start", "invalid"),
    [(0, 1, (20, 12, 17, 11, 14)), (1, 7, (12, 17, 11, 14)), (2, 13, (11, 14))],
)
def test_a_lost_chunk_ends_the_load_and_is_quarantined(
    bench: Bench,
    three: list[ChunkRecord],
    tmp_path: Path,
    damage: Callable[[Path], None],
    reason: str,
    failed: int,
    start: int,
    invalid: tuple[int, ...],
) -> None:
    damage(tmp_path / "store" / three[failed].blob)
    target = load_job(three, at=1)
    before = bench.kv(target.block_ids, 0, 20)

    failure = bench.load(target)

    assert failure == LoadFailure(key=three[failed].key, start=start, reason=reason)
    assert bench.invalid_blocks == set(invalid)  # from the failed token's block to the last one
    after = bench.kv(target.block_ids, 0, 20)
    assert same_bits(after[:, :, start:], before[:, :, start:])
    assert not same_bits(after[:, :, 1:start], before[:, :, 1:start]) or start == 1
    found = bench.store.catalog.chunks([one.key for one in three])
    assert [found[one.key].quarantined for one in three] == [index == failed for index in range(3)]


def test_a_lost_chunk_that_is_needed_in_part_fails_where_its_tokens_were_needed(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    delete(tmp_path / "store" / three[0].blob)
    failure = bench.load(load_job(three, skip=4))
    assert failure == LoadFailure(key=three[0].key, start=4, reason="blob is missing")
    assert bench.invalid_blocks == {12, 17, 11}


def test_blocks_behind_the_last_chunk_stay_valid(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    delete(tmp_path / "store" / three[1].blob)
    bench.load(load_job(three[:2], blocks=(20, 12, 17, 11, 14)))
    assert bench.invalid_blocks == {12, 17}


def test_a_chunk_that_cannot_be_read_right_now_is_not_quarantined(
    bench: Bench, three: list[ChunkRecord]
) -> None:
    bench.store.load_error = StorageError("too many open files")
    failure = bench.load(load_job(three))
    assert failure == LoadFailure(key=three[0].key, start=0, reason="blob could not be read")
    found = bench.store.catalog.chunks([one.key for one in three])
    assert not any(one.quarantined for one in found.values())


def test_bytes_lost_of_a_chunk_that_was_stored_anew_meanwhile_do_not_quarantine_it(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    old = three[0]
    bench.store.forget([TurnId("turn 0"), TurnId("turn 1"), TurnId("turn 2")])
    (new,) = bench.capture(capture_job(6, name="again"))
    assert (new.key, new.blob != old.blob) == (old.key, True)
    failure = bench.load(load_job([old]))
    assert failure is not None
    assert not bench.store.catalog.chunks([new.key])[new.key].quarantined


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_unexpected_error_fails_the_load_and_not_the_engine(
    bench: Bench, three: list[ChunkRecord], where: str
) -> None:
    if where == "reading":
        bench.store.load_error = RuntimeError("a bug")
    else:
        bench.cache.broken = RuntimeError("a kernel failed")
    failure = bench.load(load_job(three, at=1))
    assert failure is not None
    assert (failure.key, failure.start) == (three[0].key, 1)
    assert bench.invalid_blocks == {20, 12, 17, 11, 14}

    bench.store.load_error = bench.cache.broken = None
    bench.received.clear()
    assert bench.load(load_job(three)) is None


def test_a_load_that_takes_too_long_is_given_up_and_never_written(
    bench: Bench, three: list[ChunkRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LOAD_TIMEOUT_S", 0.02)
    bench.store.may_load.clear()
    target = load_job(three, at=2)
    before = bench.cache.memory_L2SHD.clone()

    failure = bench.load(target)

    assert failure == LoadFailure(key=three[0].key, start=2, reason="load took too long")
    assert bench.invalid_blocks == {20, 12, 17, 11, 14}
    assert not any(one.quarantined for one in bench.store.catalog.chunks([three[0].key]).values())
    bench.store.may_load.set()
    monkeypatch.setattr(worker_module, "LOAD_TIMEOUT_S", WAIT_S)
    bench.received.clear()
    other = LoadJob(request_id="other", block_ids=(2, 6, 7, 8), chunks=load_job(three).chunks)
    assert bench.load(other) is None  # the readers are free again, so the late result is there, too
    bench.step()
    assert bench.received == {"other"}
    late = slots(target.block_ids, 0, 20)
    assert same_bits(bench.cache.memory_L2SHD[:, :, late], before[:, :, late])


def test_loads_go_on_in_the_background_while_steps_run(bench: Bench, three: list[ChunkRecord]) -> None:
    bench.store.may_load.clear()
    bench.step(loads=[load_job(three)])
    for _ in range(5):
        bench.step()
    assert bench.received == set()
    assert bench.report.loaded == {}
    bench.store.may_load.set()
    bench.step_until(lambda: "loading" in bench.received)
    assert bench.report.loaded == {"loading": None}


# -- captures that are lost -----------------------------------------------------------------------------


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
    third = capture_job(6, name="third", first_token=500)
    bench.capture(third)
    assert bench.report.settled[third.turn_id] is None


class JustDrainedWriter:
    """A writer whose queue was full when asked and has room again a moment later."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def admit(self, num_bytes: int) -> bool:
        return False

    def submit(self, num_bytes: int, job: Callable[[], None]) -> bool:
        job()
        return True

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
    assert len(bench.capture(kept)) == 1
    assert bench.report.settled[kept.turn_id] is None


def test_a_cache_that_cannot_be_read_costs_the_turn_and_the_probe_only(bench: Bench) -> None:
    bench.cache.broken = RuntimeError("a kernel failed")
    lost = capture_job(6, name="lost")
    bench.step(captures=[lost], probes=[ProbeJob(request_id="asking", block_ids=(1,), start=0, end=2)])
    assert bench.report.settled[lost.turn_id] is not None
    assert bench.report.probes == {}
    assert bench.sent == {lost.request_id}

    bench.cache.broken = None
    assert len(bench.capture(capture_job(6, name="kept"))) == 1


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


# -- reports --------------------------------------------------------------------------------------------


def test_everything_is_reported_once(bench: Bench) -> None:
    job = capture_job(6)
    records = bench.capture(job)
    bench.load(load_job(records))
    assert bench.worker.take_finished() == (set(), set())
    assert not bench.worker.take_report()
    assert bench.worker.take_invalid_blocks() == set()
