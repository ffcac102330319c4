"""The worker's half of the connector: moves bytes between paged cache and store. Makes no policy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kv_agent.chunks import TurnId, TurnRecord
from kv_agent.kv.rope import RotaryScheme
from kv_agent.retrieval.pooling import pool_keys, to_bytes, token_keys
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.writer import BackgroundWriter
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.jobs import (
    CaptureJob,
    ProbeJob,
    Segment,
    StepJobs,
    StepTime,
    WorkerReport,
)
from kv_agent.vllm_plugin.loading import Loader
from kv_agent.vllm_plugin.paged_cache import PagedCache
from kv_agent.vllm_plugin.residents import Residents

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


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
        self._residents = Residents()
        store.watch_memory(self._residents)
        self._loader = Loader(cache, store, scheme, self._residents, load_threads)
        self._report = WorkerReport()
        self._report_lock = threading.Lock()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._saved_bytes = 0
        self._saved_seconds = 0.0
        self._step_began = 0.0
        self._is_idle = True
        self._next_layer = 0  # that the model has not asked for in this step
        self._goes_by_layers = False  # whether it asked for all of them, one after the other, in the last

    @property
    def can_move(self) -> bool:
        return self._scheme is not None

    # -- called by the connector every step ------------------------------------------------------------

    def begin(self, jobs: StepJobs) -> None:
        """Before a step: start what is to be loaded."""
        self._step_began = time.perf_counter()
        self._is_idle = True
        self._residents.heard(jobs.heard)
        self._loader.begin(jobs.loads)

    def start(self, *, idle: bool = False) -> None:
        """Before the forward pass of a step that loads at once, else behind it; finishes what has been read.

        An ``idle`` step computes nothing.
        """
        self._is_idle = idle
        if not self._goes_by_layers:
            self._loader.finish_at_once()
        self._loader.finish_read(idle=idle)

    def wait_for_layer(self, layer: int) -> None:
        """The model comes to this layer: what is loaded at once must be there."""
        self._next_layer += layer == self._next_layer
        self._loader.wait_for_layer(layer)

    def save(self, jobs: StepJobs) -> None:
        """After the forward pass: read probed keys and copy finished turns off the cache."""
        self._loader.finish_at_once()
        if not self._is_idle:
            self._goes_by_layers = self._next_layer == self._cache.num_layers
            self._next_layer = 0
            if jobs.num_tokens:
                step = StepTime(
                    num_tokens=jobs.num_tokens,
                    seconds=time.perf_counter() - self._step_began,
                    num_put_back=sum(load.num_tokens for load in jobs.loads if load.at_once),
                )
                with self._report_lock:
                    self._report.steps.append(step)
        for probe in jobs.probes:
            attempt(partial(self._probe, probe), None)
        for capture in jobs.captures:
            if trouble := attempt(partial(self._capture, capture), "could not be copied"):
                self._settle(capture.turn_id, trouble)
            if capture.segments:  # otherwise its blocks were not kept for us
                self._sent.add(capture.request_id)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks may be freed after capture, and those whose load has ended."""
        sent, self._sent = self._sent, set()
        return sent, self._loader.take_received()

    def take_invalid_blocks(self) -> set[int]:
        return self._loader.take_invalid_blocks()

    def take_report(self) -> WorkerReport:
        with self._report_lock:
            report, self._report = self._report, WorkerReport()
        report.loaded = self._loader.take_loaded()
        report.residents = self._residents.take_changes()
        return report

    def counters(self) -> dict[str, float]:
        """See :mod:`kv_agent.vllm_plugin.tally`."""
        counts = self._writer.counts
        loaded_bytes, loaded_seconds = self._loader.moved()
        return {
            "moved_bytes|load": loaded_bytes,
            "moved_seconds|load": loaded_seconds,
            "moved_bytes|save": self._saved_bytes,
            "moved_seconds|save": self._saved_seconds,
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
        self._loader.close()
        if not self._writer.close(CLOSE_TIMEOUT_S):
            logger.warning("closing before all captured turns were written", extra={"event": "turns_lost"})
        self._store.close()

    # -- probing and capturing -----------------------------------------------------------------------

    def _probe(self, job: ProbeJob) -> None:
        kv_L2THD = self._cache.read(job.block_ids, job.start, job.end, self._pooled_layers)
        sketch = to_sketch(self._token_keys(kv_L2THD, job.start, range(len(kv_L2THD))))
        with self._report_lock:
            self._report.probes[job.request_id] = sketch

    def _capture(self, job: CaptureJob) -> str | None:
        """Begin to copy the turn's new tokens and queue what is left; returns why it could not, if so."""
        segments = job.segments
        if not segments:
            return self._submit(job, 0, lambda: self._store_turn(job, (), ()))
        start, end = segments[0].start, segments[-1].end
        num_bytes = (end - start) * self._cache.token_bytes
        if refusal := self._writer.admit(num_bytes):
            return refusal
        began = time.perf_counter()
        reading = self._cache.begin_reading(job.block_ids, start, end)
        self._saved_bytes += num_bytes
        self._saved_seconds += time.perf_counter() - began

        def store() -> None:
            kv_L2THD = reading.wait()
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
