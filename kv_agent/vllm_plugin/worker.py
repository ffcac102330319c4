"""The worker's half of the connector: moves bytes between paged cache and store. Makes no policy."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kv_agent.chunks import ChunkRecord, TurnId, TurnRecord
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.kv.rope import RotaryScheme, prepare_rotation
from kv_agent.machine import use_own_cpus
from kv_agent.retrieval.pooling import pool_keys, to_bytes, token_keys
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.writer import BackgroundWriter
from kv_agent.vllm_plugin.direct import DirectWriter
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
from kv_agent.vllm_plugin.staging import Piece, Staging

logger = logging.getLogger(__name__)

# A load that takes longer is given up and its tokens are computed; what arrives later is dropped.
LOAD_TIMEOUT_S = 30.0

# How long a step without a forward pass waits for a read; the engine polls us in such steps anyway.
IDLE_WAIT_S = 0.005

CLOSE_TIMEOUT_S = 30.0


# What became of a chunk: in the cache already (none left), to be put there, or lost.
_Fetched = Tensor | LoadFailure | None


@dataclass(slots=True, kw_only=True)
class _Loading:
    """A job whose chunks are read side by side. Whoever writes one into the cache holds its lock."""

    job: LoadJob
    deadline: float
    locks: tuple[threading.Lock, ...]
    reads: tuple[Future[_Fetched], ...] = ()
    is_given_up: bool = False

    @property
    def is_read(self) -> bool:
        return all(read.done() for read in self.reads)

    def give_up(self) -> None:
        """When this returns no thread writes for it any more, or ever will."""
        self.is_given_up = True
        for read in self.reads:  # what has not even begun must keep no thread from others
            read.cancel()
        for lock in self.locks:
            with lock:
                pass


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
        queue_bytes: int,
        load_threads: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._cache = cache
        self._store = store
        self._scheme = scheme
        self._pooled_layers = tuple(pooled_layers)
        self._decode = decode
        self._writer = BackgroundWriter(queue_bytes)
        self._staging = Staging(cache, scheme)
        self._direct = None if cache.copier is None else DirectWriter(cache.copier, scheme)
        self._readers = ThreadPoolExecutor(load_threads, "kv-agent-reader", initializer=use_own_cpus)
        if scheme is not None:
            self._readers.submit(prepare_rotation, scheme, cache.dtype, cache.device)
        self._loading: dict[str, _Loading] = {}
        self._report = WorkerReport()
        self._report_lock = threading.Lock()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid_blocks: set[int] = set()
        self._moved: defaultdict[str, float] = defaultdict(float)
        self._step_began: float | None = None

    @property
    def can_move(self) -> bool:
        return self._scheme is not None

    # -- called by the connector every step ------------------------------------------------------------

    def start(self, jobs: StepJobs, *, idle: bool = False) -> None:
        """Start reading for new loads, and finish those that have been read.

        An ``idle`` step computes nothing, so it may as well wait a little for what is being read.
        """
        self._step_began = None if idle else time.perf_counter()
        for job in jobs.loads:
            self._loading[job.request_id] = loading = _Loading(
                job=job,
                deadline=time.monotonic() + LOAD_TIMEOUT_S,
                locks=tuple(threading.Lock() for _ in job.chunks),
            )
            reads = (self._readers.submit(self._fetch, loading, number) for number in range(len(job.chunks)))
            loading.reads = tuple(reads)
        if idle and self._loading:
            wait(next(iter(self._loading.values())).reads, IDLE_WAIT_S)
        for loading in list(self._loading.values()):
            if loading.is_read or time.monotonic() > loading.deadline:
                del self._loading[loading.job.request_id]
                self._finish_load(loading)

    def save(self, jobs: StepJobs) -> None:
        """After the forward pass: read probed keys and copy finished turns off the cache."""
        if jobs.num_tokens and self._step_began is not None:
            seconds = time.perf_counter() - self._step_began
            with self._report_lock:
                self._report.steps.append((jobs.num_tokens, seconds))
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

    def counters(self) -> dict[str, float]:
        """See :mod:`kv_agent.vllm_plugin.tally`."""
        counts = self._writer.counts
        with self._report_lock:
            moved = dict(self._moved)
        return {
            **moved,
            "dropped_turns|queue full": counts.queue_full,
            "dropped_turns|storing is paused": counts.paused,
            "dropped_turns|disk trouble": counts.disk_trouble,
            "dropped_turns|unstorable": counts.unstorable,
            "dropped_turns|error": counts.bugs,
        }

    def gauges(self) -> dict[str, float]:
        """See :mod:`kv_agent.vllm_plugin.tally`."""
        numbers: dict[str, float] = {
            "queue_bytes|write": self._writer.pending_bytes,
            "queue_turns|write": self._writer.pending_jobs,
        }
        for name, counts in self._store.memory_counts().items():
            numbers[f"tier_bytes|{name}"] = counts["bytes"]
            numbers[f"tier_limit_bytes|{name}"] = counts["limit"]
            numbers[f"tier_chunks|{name}"] = counts["chunks"]
        return numbers

    def close(self) -> None:
        """Finish what was captured, then let go of files and threads."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        if not self._writer.close(CLOSE_TIMEOUT_S):
            logger.warning("closing before all captured turns were written", extra={"event": "turns_lost"})
        self._store.close()

    # -- loading ------------------------------------------------------------------------------------

    def _fetch(self, loading: _Loading, number: int) -> _Fetched:
        chunk = loading.job.chunks[number]
        try:
            kv_L2THD = self._read(chunk)
        except StorageError as err:
            return self._failure(chunk, err)
        if self._direct is None:
            return kv_L2THD
        began = time.perf_counter()
        with loading.locks[number]:
            if loading.is_given_up:  # its blocks may be somebody else's by now
                return None
            piece = Piece(kv_L2THD=kv_L2THD, start=chunk.start, delta=chunk.delta)
            self._direct.prepared([piece], loading.job.block_ids).run()
        self._note_moved("load", kv_L2THD.nbytes, began)
        return None

    def _read(self, chunk: ChunkLoad) -> Tensor:
        kv_L2THD = self._store.load(chunk.record)
        if not self._cache.fits(kv_L2THD):  # the checksum does not cover a blob's header
            raise CorruptChunkError(f"chunk {chunk.record.key} does not have the shape of this model's KV")
        return kv_L2THD[:, :, chunk.skip :]

    def _failure(self, chunk: ChunkLoad, err: StorageError) -> LoadFailure:
        key = chunk.record.key
        if isinstance(err, MissingBlobError | CorruptChunkError):
            reason = "blob is missing" if isinstance(err, MissingBlobError) else "blob is corrupt"
            self._quarantine(chunk.record, reason)
            outcome = "is computed again and quarantined"
        else:
            reason = "blob could not be read"
            outcome = "is computed again"
        about = {"event": "load_failed", "chunk": key[:8], "reason": reason}
        logger.warning("chunk %s %s: %s", key[:8], outcome, err, extra=about)
        return LoadFailure(key=key, start=chunk.start, reason=reason)

    def _quarantine(self, record: ChunkRecord, reason: str) -> None:
        try:
            # Forgotten and stored again meanwhile, the chunk has other bytes, and those may be fine.
            if self._store.catalog.chunks([record.key]).get(record.key) == record:
                self._store.quarantine(record.key, reason)
        except StorageError as err:
            about = {"event": "store_trouble", "chunk": record.key[:8]}
            logger.warning("chunk %s could not be quarantined: %s", record.key[:8], err, extra=about)

    def _finish_load(self, loading: _Loading) -> None:
        job, first = loading.job, loading.job.chunks[0]
        failed = partial(LoadFailure, key=first.record.key, start=first.start)
        failure: LoadFailure | None = failed(reason="load took too long")
        if loading.is_read:
            failure = attempt(partial(self._put, loading), failed(reason="chunk could not be loaded"))
        else:
            loading.give_up()
        if failure is not None:
            first_block = failure.start // self._cache.block_tokens
            last_block = (job.chunks[-1].end - 1) // self._cache.block_tokens
            self._invalid_blocks.update(job.block_ids[first_block : last_block + 1])
        self._received.add(job.request_id)
        with self._report_lock:
            self._report.loaded[job.request_id] = failure

    def _put(self, loading: _Loading) -> LoadFailure | None:
        """Put what is not yet in the cache there, up to the first chunk that could not be read."""
        pieces: list[Piece] = []
        failure: LoadFailure | None = None
        for chunk, read in zip(loading.job.chunks, loading.reads, strict=True):
            found = read.result()
            if isinstance(found, LoadFailure):
                failure = found
                break
            if found is not None:
                pieces.append(Piece(kv_L2THD=found, start=chunk.start, delta=chunk.delta))
        if pieces:
            began = time.perf_counter()
            self._staging.write(pieces, loading.job.block_ids)
            self._note_moved("load", sum(piece.kv_L2THD.nbytes for piece in pieces), began)
        return failure

    def _note_moved(self, direction: str, num_bytes: int, began: float) -> None:
        seconds = time.perf_counter() - began
        with self._report_lock:
            self._moved[f"moved_bytes|{direction}"] += num_bytes
            self._moved[f"moved_seconds|{direction}"] += seconds

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
        if refusal := self._writer.admit(num_bytes):
            return refusal
        began = time.perf_counter()
        kv_L2THD = self._cache.read(job.block_ids, start, end)
        self._note_moved("save", num_bytes, began)

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

        return self._writer.submit(num_bytes, run)

    def _settle(self, turn_id: TurnId, trouble: str | None) -> None:
        with self._report_lock:
            self._report.settled[turn_id] = trouble
