"""The worker's half of the connector: moves bytes between paged cache and store. Makes no policy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kv_agent.chunks import ChunkRecord, TurnId, TurnRecord
from kv_agent.errors import CorruptChunkError, StorageError, UnsupportedModelError
from kv_agent.kv.rope import RotaryScheme, rotate_keys
from kv_agent.retrieval.pooling import pool_keys, to_bytes, token_keys
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.lru import ChunkCache
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.writer import BackgroundWriter
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.jobs import (
    CaptureJob,
    ChunkLoad,
    LoadFailure,
    LoadJob,
    ProbeJob,
    Segment,
    StepJobs,
    WorkerReport,
)
from kv_agent.vllm_plugin.paged_cache import PagedCache

logger = logging.getLogger(__name__)

# A load that takes longer is given up and its tokens are computed; what arrives later is dropped.
LOAD_TIMEOUT_S = 30.0

# How long a step without a forward pass waits for a read; the engine polls us in such steps anyway.
IDLE_WAIT_S = 0.005

CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetched:
    """Chunks read for one job, rotated to their new positions, up to the first that failed."""

    parts: tuple[tuple[ChunkLoad, Tensor], ...]
    failure: LoadFailure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    job: LoadJob
    fetched: Future[_Fetched]
    deadline: float


class WorkerSide:
    """Executes the scheduler's jobs; every method is called on the engine's step thread.

    Without a ``scheme`` keys are neither moved nor compared.
    """

    def __init__(
        self,
        cache: PagedCache,
        store: LocalStore,
        scheme: RotaryScheme | None,
        *,
        pooled_layers: Sequence[int],
        device_bytes: int,
        queue_bytes: int,
        load_threads: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._cache = cache
        self._store = store
        self._scheme = scheme
        self._pooled_layers = tuple(pooled_layers)
        self._decode = decode
        self._on_device = ChunkCache(device_bytes)
        self._writer = BackgroundWriter(queue_bytes)
        self._readers = ThreadPoolExecutor(load_threads, thread_name_prefix="kv-agent-reader")
        self._loading: dict[str, _Loading] = {}
        self._report = WorkerReport()
        self._report_lock = threading.Lock()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid_blocks: set[int] = set()

    @property
    def can_move(self) -> bool:
        return self._scheme is not None

    # -- called by the connector every step ------------------------------------------------------------

    def start(self, jobs: StepJobs, *, idle: bool = False) -> None:
        """Start reading for new loads and put what has been read into the cache.

        An ``idle`` step computes nothing, so it may as well wait a little for what is being read.
        """
        for job in jobs.loads:
            self._loading[job.request_id] = _Loading(
                job=job,
                fetched=self._readers.submit(self._fetch, job),
                deadline=time.monotonic() + LOAD_TIMEOUT_S,
            )
        if idle and self._loading:
            reads = [loading.fetched for loading in self._loading.values()]
            wait(reads, IDLE_WAIT_S, return_when=FIRST_COMPLETED)
        for loading in list(self._loading.values()):
            if loading.fetched.done() or time.monotonic() > loading.deadline:
                del self._loading[loading.job.request_id]
                self._finish_load(loading)

    def save(self, jobs: StepJobs) -> None:
        """After the forward pass: read probed keys and copy finished turns off the cache."""
        for probe in jobs.probes:
            attempt(partial(self._probe, probe), None)
        for capture in jobs.captures:
            if trouble := attempt(partial(self._capture, capture), "could not be copied"):
                self._settle(capture.turn_id, trouble)
            if capture.segments:  # otherwise its blocks were not kept for us
                self._sent.add(capture.request_id)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks may be freed after capture, and those whose load has ended."""
        done = self._sent, self._received
        self._sent, self._received = set(), set()
        return done

    def take_invalid_blocks(self) -> set[int]:
        blocks, self._invalid_blocks = self._invalid_blocks, set()
        return blocks

    def take_report(self) -> WorkerReport:
        with self._report_lock:
            report, self._report = self._report, WorkerReport()
        return report

    def close(self) -> None:
        """Finish what was captured, then let go of files and threads."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        if not self._writer.close(CLOSE_TIMEOUT_S):
            logger.warning("closing before all captured turns were written")
        self._store.close()

    # -- loading ------------------------------------------------------------------------------------

    def _fetch(self, job: LoadJob) -> _Fetched:
        parts: list[tuple[ChunkLoad, Tensor]] = []
        for chunk in job.chunks:
            try:
                parts.append((chunk, self._read(chunk)))
            except StorageError as err:
                return _Fetched(parts=tuple(parts), failure=self._failure(chunk, err))
        return _Fetched(parts=tuple(parts), failure=None)

    def _read(self, chunk: ChunkLoad) -> Tensor:
        kv_L2THD = self._on_device.get(chunk.record.key)
        if kv_L2THD is None:
            kv_L2THD = self._store.load(chunk.record)
            if not self._cache.fits(kv_L2THD):  # the checksum does not cover a blob's header
                raise CorruptChunkError(
                    f"chunk {chunk.record.key} does not have the shape of this model's KV"
                )
            if self._on_device.limit_bytes:
                kv_L2THD = kv_L2THD.to(self._cache.device)
                self._on_device.put(chunk.record.key, kv_L2THD)
        kv_L2THD = kv_L2THD[:, :, chunk.skip :]
        if chunk.delta == 0:
            return kv_L2THD
        if self._scheme is None:
            raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
        moved_L2THD = kv_L2THD.clone()
        moved_L2THD[:, 0] = rotate_keys(kv_L2THD[:, 0], chunk.delta, self._scheme)
        return moved_L2THD

    def _failure(self, chunk: ChunkLoad, err: StorageError) -> LoadFailure:
        key = chunk.record.key
        if isinstance(err, MissingBlobError | CorruptChunkError):
            reason = "blob is missing" if isinstance(err, MissingBlobError) else "blob is corrupt"
            self._quarantine(chunk.record, reason)
            logger.warning("chunk %s is computed again and quarantined: %s", key[:8], err)
        else:
            reason = "blob could not be read"
            logger.warning("chunk %s is computed again: %s", key[:8], err)
        return LoadFailure(key=key, start=chunk.start, reason=reason)

    def _quarantine(self, record: ChunkRecord, reason: str) -> None:
        try:
            # Forgotten and stored again meanwhile, the chunk has other bytes, and those may be fine.
            if self._store.catalog.chunks([record.key]).get(record.key) == record:
                self._store.quarantine(record.key, reason)
        except StorageError as err:
            logger.warning("chunk %s could not be quarantined: %s", record.key[:8], err)

    def _finish_load(self, loading: _Loading) -> None:
        job, first = loading.job, loading.job.chunks[0]
        failed = partial(LoadFailure, key=first.record.key, start=first.start)
        failure: LoadFailure | None = failed(reason="load took too long")
        # A read that has not even begun must not keep a thread from those that wait behind it.
        if not loading.fetched.cancel() and loading.fetched.done():
            failure = attempt(partial(self._write, loading), failed(reason="chunk could not be loaded"))
        if failure is not None:
            first_block = failure.start // self._cache.block_tokens
            last_block = (job.chunks[-1].end - 1) // self._cache.block_tokens
            self._invalid_blocks.update(job.block_ids[first_block : last_block + 1])
        self._received.add(job.request_id)
        with self._report_lock:
            self._report.loaded[job.request_id] = failure

    def _write(self, loading: _Loading) -> LoadFailure | None:
        fetched = loading.fetched.result()
        for chunk, kv_L2THD in fetched.parts:
            self._cache.write(kv_L2THD, loading.job.block_ids, chunk.start)
        return fetched.failure

    # -- probing and capturing -----------------------------------------------------------------------

    def _probe(self, job: ProbeJob) -> None:
        kv_L2THD = self._cache.read(job.block_ids, job.start, job.end, self._pooled_layers)
        sketch = to_sketch(self._token_keys(kv_L2THD, job.start, range(len(kv_L2THD))))
        with self._report_lock:
            self._report.probes[job.request_id] = sketch

    def _capture(self, job: CaptureJob) -> str | None:
        """Copy and queue the turn's new tokens; returns why it could not, if so."""
        segments = job.segments
        if not segments:
            return self._submit(job, 0, lambda: self._store_turn(job, (), ()))
        start, end = segments[0].start, segments[-1].end
        num_bytes = (end - start) * self._cache.token_bytes
        if not self._writer.admit(num_bytes):
            return "write queue is full"
        kv_L2THD = self._cache.read(job.block_ids, start, end)

        def store() -> None:
            context = [self._new_chunk(part, kv_L2THD, start, found=False) for part in job.context]
            content = [self._new_chunk(part, kv_L2THD, start, found=True) for part in job.content]
            self._store_turn(job, context, content)

        return self._submit(job, num_bytes, store)

    def _new_chunk(self, part: Segment, kv_L2THD: Tensor, first: int, *, found: bool) -> NewChunk:
        part_L2THD = kv_L2THD[:, :, part.start - first : part.end - first].contiguous()
        vector = sketch = None
        if found and self.can_move:
            keys_TV = self._token_keys(part_L2THD, part.start, self._pooled_layers)
            vector, sketch = to_bytes(pool_keys(keys_TV)), to_sketch(keys_TV)
        return NewChunk(
            key=part.key,
            content_key=part.content_key,
            parent=part.parent,
            start=part.start,
            token_ids=part.token_ids,
            kv=part_L2THD,
            vector=vector,
            sketch=sketch,
        )

    def _token_keys(self, kv_L2THD: Tensor, start: int, layers: Sequence[int]) -> Tensor:
        if self._scheme is None:  # a question is answered all the same: nothing is like it
            return torch.zeros(1, len(layers) * kv_L2THD[0, 0, 0].numel())
        return token_keys(kv_L2THD[:, 0], start, self._scheme, layers)

    def _store_turn(self, job: CaptureJob, context: Sequence[NewChunk], content: Sequence[NewChunk]) -> None:
        turn = TurnRecord(
            turn_id=job.turn_id,
            scope=job.scope,
            fingerprint=job.fingerprint,
            chunk_keys=job.content_keys,
            num_tokens=len(job.content_tokens),
            text=self._decode(job.content_tokens),
            created=job.created,
            metadata=job.metadata,
            expires=job.expires,
        )
        self._store.put_turn(turn, context, content, is_part=job.is_part)

    def _submit(self, job: CaptureJob, num_bytes: int, store: Callable[[], None]) -> str | None:
        def run() -> None:
            trouble: str | None = "could not be written"
            try:
                store()
                trouble = None
            finally:
                self._settle(job.turn_id, trouble)

        return None if self._writer.submit(num_bytes, run) else "write queue is full"

    def _settle(self, turn_id: TurnId, trouble: str | None) -> None:
        with self._report_lock:
            self._report.settled[turn_id] = trouble
