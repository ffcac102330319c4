"""Puts stored chunks into waiting requests' blocks: read in the background, or at once and layer by layer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from kv_agent.chunks import ChunkRecord
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import RotaryScheme, prepare_rotation
from kv_agent.machine import work_aside
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore
from kv_agent.vllm_plugin.direct import Prepare
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.jobs import ChunkLoad, LoadFailure, LoadJob
from kv_agent.vllm_plugin.layer_by_layer import LayerByLayer, LayerWork
from kv_agent.vllm_plugin.paged_cache import PagedCache
from kv_agent.vllm_plugin.residents import Residents
from kv_agent.vllm_plugin.staging import Staging
from kv_agent.vllm_plugin.streaming import chunk_writer

logger = logging.getLogger(__name__)

# A load that takes longer is given up and its tokens are computed; what arrives later is dropped.
LOAD_TIMEOUT_S = 30.0

# How long a step without a forward pass waits for a read; the engine polls us in such steps anyway.
IDLE_WAIT_S = 0.005

_NOT_PREPARED = "a kernel is made where it is needed, or torch does its work"

# What became of a chunk: in the cache already (none left), to be put there, or lost.
_Fetched = Piece | LoadFailure | None


@dataclass(slots=True, kw_only=True)
class _Loading:
    """A job whose chunks are read side by side. Whoever writes one into the cache holds its lock."""

    job: LoadJob
    deadline: float
    locks: tuple[threading.Lock, ...]
    prepare: Prepare | None  # the engine's thread writes where there is none
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


@dataclass(slots=True, kw_only=True)
class _AtOnce:
    """Jobs of a step whose forward pass uses their KV."""

    jobs: list[LoadJob]
    work: LayerByLayer
    began: float


class Loader:
    """Every method is called on the engine's step thread."""

    def __init__(
        self,
        cache: PagedCache,
        store: LocalStore,
        scheme: RotaryScheme | None,
        residents: Residents,
        num_threads: int,
    ) -> None:
        self._cache = cache
        self._store = store
        self._residents = residents
        self._staging = Staging(cache, scheme)
        self._writer = chunk_writer(cache, scheme)
        self._readers = ThreadPoolExecutor(num_threads, "kv-agent-reader", initializer=work_aside)
        prepares = [partial(store.codec.prepare, cache.dtype, cache.num_heads, cache.head_dim)]
        if scheme is not None:
            prepares.append(partial(prepare_rotation, scheme, cache.dtype, cache.device))
        for prepare in prepares:
            self._readers.submit(attempt, prepare, None, _NOT_PREPARED)
        self._loading: dict[str, _Loading] = {}
        self._at_once: _AtOnce | None = None
        self._loaded: dict[str, LoadFailure | None] = {}
        self._received: set[str] = set()
        self._invalid_blocks: set[int] = set()
        self._moved_lock = threading.Lock()
        self._moved_bytes = 0
        self._moved_seconds = 0.0

    def begin(self, jobs: Iterable[LoadJob]) -> None:
        """Start all of them, before the step's forward pass."""
        at_once = []
        for job in jobs:
            if job.at_once:
                at_once.append(job)
            else:
                self._begin_reading(job)
        if at_once:
            self._put_at_once(at_once)

    def wait_for_layer(self, layer: int) -> None:
        """Return when what the forward pass uses of this layer is in the cache."""
        if self._at_once is not None:
            self._at_once.work.wait(layer)

    def finish_at_once(self) -> None:
        """Return when all that the forward pass uses is in the cache."""
        if self._at_once is None:
            return
        at_once, self._at_once = self._at_once, None
        at_once.work.wait_for_all()
        if at_once.work.has_failed:
            for job in at_once.jobs:
                self._settle(job, _not_loaded(job))
            return
        num_tokens = sum(job.num_tokens for job in at_once.jobs)
        self._note_moved(num_tokens * self._cache.token_bytes, at_once.began)

    def finish_read(self, *, idle: bool) -> None:
        """Finish loads that have been read, and give up those that take too long.

        An ``idle`` step computes nothing, so it may as well wait a little for what is being read.
        """
        if idle and self._loading:
            wait(next(iter(self._loading.values())).reads, IDLE_WAIT_S)
        for loading in list(self._loading.values()):
            if loading.is_read or time.monotonic() > loading.deadline:
                del self._loading[loading.job.request_id]
                self._finish(loading)

    def take_loaded(self) -> dict[str, LoadFailure | None]:
        """What became of loads since the last call, by request."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    def take_received(self) -> set[str]:
        """Requests that need not wait for their load any more."""
        received, self._received = self._received, set()
        return received

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that do not hold what they should."""
        blocks, self._invalid_blocks = self._invalid_blocks, set()
        return blocks

    def moved(self) -> tuple[int, float]:
        """Bytes that were put into the cache so far, and the seconds of all threads that this took."""
        with self._moved_lock:
            return self._moved_bytes, self._moved_seconds

    def close(self) -> None:
        """Wait for what is being read now; nothing else is begun."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    # -- at once ------------------------------------------------------------------------------------

    def _put_at_once(self, jobs: list[LoadJob]) -> None:
        began = time.perf_counter()
        works: list[LayerWork] = []
        going: list[LoadJob] = []
        for job in jobs:
            if (found := attempt(partial(self._works_of, job), None)) is None:
                self._settle(job, _not_loaded(job))
            else:
                works += found
                going.append(job)
        work = LayerByLayer(works, self._cache.num_layers)
        self._at_once = _AtOnce(jobs=going, work=work, began=began)
        # One thread helps: the model's own want the cores as well. It counts uses, too, while the model
        # computes: afterwards others wait for the interpreter.
        self._readers.submit(self._help, work, going)

    def _help(self, work: LayerByLayer, jobs: Sequence[LoadJob]) -> None:
        work.help()
        for job in jobs:
            self._store.note_uses(job.chunks)

    def _works_of(self, job: LoadJob) -> list[LayerWork]:
        found = self._residents.get(job.chunks)
        pieces = [
            self._piece(chunk, kv_L2THD, chunk.delta)
            for chunk, kv_L2THD in zip(job.chunks, found, strict=True)
        ]
        if self._writer is not None:
            return [self._writer.into(job.block_ids)(pieces)]
        self._staging.write(pieces, job.block_ids)
        return []

    # -- in the background ---------------------------------------------------------------------------

    def _begin_reading(self, job: LoadJob) -> None:
        self._loading[job.request_id] = loading = _Loading(
            job=job,
            deadline=time.monotonic() + LOAD_TIMEOUT_S,
            locks=tuple(threading.Lock() for _ in job.chunks),
            prepare=None if self._writer is None else self._writer.into(job.block_ids),
        )
        reads = (self._readers.submit(self._fetch, loading, number) for number in range(len(job.chunks)))
        loading.reads = tuple(reads)

    def _fetch(self, loading: _Loading, number: int) -> _Fetched:
        chunk = loading.job.chunks[number]
        record = loading.job.records[chunk.key]
        try:
            piece = self._piece(chunk, *self._store.load(record, chunk.delta))
        except StorageError as err:
            return self._failure(record, chunk.start, err)
        if loading.prepare is None:
            return piece
        began = time.perf_counter()
        with loading.locks[number]:
            if loading.is_given_up:  # its blocks may be somebody else's by now
                return None
            loading.prepare([piece])(0, self._cache.num_layers)
        self._note_moved(piece.kv_L2THD.nbytes, began)
        return None

    def _piece(self, chunk: ChunkLoad, kv_L2THD: Tensor, delta: int) -> Piece:
        if not self._cache.fits(kv_L2THD):  # the checksum does not cover a blob's header
            raise CorruptChunkError(f"chunk {chunk.key} does not have the shape of this model's KV")
        used_L2THD = kv_L2THD[:, :, chunk.skip :] if chunk.skip else kv_L2THD
        return Piece(used_L2THD, chunk.start, delta)

    def _failure(self, record: ChunkRecord, start: int, err: StorageError) -> LoadFailure:
        key = record.key
        if isinstance(err, MissingBlobError | CorruptChunkError):
            reason = "blob is missing" if isinstance(err, MissingBlobError) else "blob is corrupt"
            self._quarantine(record, reason)
            outcome = "is computed again and quarantined"
        else:
            reason = "blob could not be read"
            outcome = "is computed again"
        about = {"event": "load_failed", "chunk": key[:8], "reason": reason}
        logger.warning("chunk %s %s: %s", key[:8], outcome, err, extra=about)
        return LoadFailure(key=key, start=start, reason=reason)

    def _quarantine(self, record: ChunkRecord, reason: str) -> None:
        try:
            # Forgotten and stored again meanwhile, the chunk has other bytes, and those may be fine.
            if self._store.catalog.chunks([record.key]).get(record.key) == record:
                self._store.quarantine(record.key, reason)
        except StorageError as err:
            about = {"event": "store_trouble", "chunk": record.key[:8]}
            logger.warning("chunk %s could not be quarantined: %s", record.key[:8], err, extra=about)

    def _finish(self, loading: _Loading) -> None:
        job = loading.job
        if loading.is_read:
            failure = attempt(partial(self._put, loading), _not_loaded(job))
        else:
            loading.give_up()
            failure = replace(_not_loaded(job), reason="load took too long")
        self._received.add(job.request_id)
        self._settle(job, failure)

    def _put(self, loading: _Loading) -> LoadFailure | None:
        """Put what is not yet in the cache there, up to the first chunk that could not be read."""
        pieces: list[Piece] = []
        failure: LoadFailure | None = None
        for read in loading.reads:
            found = read.result()
            if isinstance(found, LoadFailure):
                failure = found
                break
            if found is not None:
                pieces.append(found)
        if pieces:
            began = time.perf_counter()
            self._staging.write(pieces, loading.job.block_ids)
            self._note_moved(sum(piece.kv_L2THD.nbytes for piece in pieces), began)
        return failure

    def _settle(self, job: LoadJob, failure: LoadFailure | None) -> None:
        if failure is not None:
            first_block = failure.start // self._cache.block_tokens
            last_block = (job.chunks[-1].end - 1) // self._cache.block_tokens
            self._invalid_blocks.update(job.block_ids[first_block : last_block + 1])
        self._loaded[job.request_id] = failure

    def _note_moved(self, num_bytes: int, began: float) -> None:
        seconds = time.perf_counter() - began
        with self._moved_lock:
            self._moved_bytes += num_bytes
            self._moved_seconds += seconds


def _not_loaded(job: LoadJob) -> LoadFailure:
    first = job.chunks[0]
    return LoadFailure(key=first.key, start=first.start, reason="chunk could not be loaded")
