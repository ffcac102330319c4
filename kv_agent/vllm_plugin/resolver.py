"""Catalog look-ups for the scheduler, on a thread of their own: the engine's loop never waits for SQLite."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint, Scope, root_key
from kv_agent.config import PlanOptions
from kv_agent.errors import StorageError
from kv_agent.machine import work_aside
from kv_agent.vllm_plugin.chains import ChainIndex, walk
from kv_agent.vllm_plugin.plan import CheckedPlan, Limits, Refusal, check_plan, refuse_all

logger = logging.getLogger(__name__)


class ChunkCatalog(Protocol):
    """The part of the catalog that look-ups need."""

    def chunks(self, keys: Sequence[ChunkKey]) -> Mapping[ChunkKey, ChunkRecord]: ...
    def child_lengths(self, parent: ChunkKey) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What the catalog says about one request: its checked plan and which of its text is stored."""

    plan: CheckedPlan
    known: ChainIndex


class Resolver:
    """Resolves requests in the background; a failed look-up refuses the plan, never the request.

    ``limits`` are to be set once it is known that the model's keys can be moved. ``moved_on`` is when the
    last look-up ended, of the monotonic clock: while that goes on those in the queue are not lost.
    """

    def __init__(self, catalog: ChunkCatalog, fingerprint: Fingerprint) -> None:
        self.limits: Limits | None = None
        self.moved_on = time.monotonic()
        self._catalog = catalog
        self._fingerprint = fingerprint
        self._pool = ThreadPoolExecutor(1, "kv-agent-resolver", initializer=work_aside)

    def submit(
        self, token_ids: Sequence[int], scope: Scope, plan: PlanOptions | None, *, find_stored: bool
    ) -> Future[Resolved]:
        """Look up ``plan`` for a prompt; with ``find_stored`` also which of its tokens are stored."""
        return self._pool.submit(self._look_up, tuple(token_ids), scope, plan, find_stored)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look_up(self, *asked: Any) -> Resolved:
        try:
            return self._resolve(*asked)
        finally:
            self.moved_on = time.monotonic()

    def _resolve(
        self, token_ids: tuple[int, ...], scope: Scope, options: PlanOptions | None, find_stored: bool
    ) -> Resolved:
        root = root_key(self._fingerprint, scope.namespace, scope.user_id)
        known = ChainIndex()
        try:
            plan = CheckedPlan(root=root)
            if options is not None:
                keys = [ChunkKey(p.chunk_id) for p in options.placements]
                records = self._catalog.chunks(keys)
                plan = check_plan(options, records, token_ids, scope, self._fingerprint, self.limits)
            if find_stored:
                self._find_stored(known, root, token_ids, 0)
                if plan.placed:
                    self._find_stored(known, plan.placed[-1].after, token_ids, plan.placed[-1].end)
        except StorageError as err:
            about = {"event": "store_trouble"}
            logger.warning("catalog look-up failed, the request is computed: %s", err, extra=about)
            if options is not None:
                return Resolved(plan=refuse_all(options, root, Refusal.LOOKUP), known=known)
            return Resolved(plan=CheckedPlan(root=root), known=known)
        return Resolved(plan=plan, known=known)

    def _find_stored(
        self, known: ChainIndex, context: ChunkKey, token_ids: tuple[int, ...], start: int
    ) -> None:
        def stored(keys: Sequence[ChunkKey]) -> set[ChunkKey]:
            return {k for k, record in self._catalog.chunks(keys).items() if not record.quarantined}

        for chunk in walk(context, token_ids, start, self._catalog.child_lengths, stored):
            known.add(context, chunk.key, chunk.end - chunk.start)
            context = chunk.key
