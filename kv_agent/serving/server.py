"""Everything the memory routes of one server process share: opened once, closed with the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry

from kv_agent.config import PluginConfig
from kv_agent.engines.base import Engine
from kv_agent.manager import CacheManager
from kv_agent.serving.access import Access, Caller, bearer
from kv_agent.serving.events import EventHub, follow
from kv_agent.serving.gauges import readings
from kv_agent.serving.limits import RateLimits
from kv_agent.serving.metrics import ServerMetrics
from kv_agent.serving.recent import RecentRequests
from kv_agent.serving.repeating import Repeating
from kv_agent.serving.schemas import HealthAnswer
from kv_agent.serving.service import MemoryService

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Requests that are worked on at once; others wait. Most wait for the engine, which takes many together.
_THREADS = 32
_CLOSING_TIMEOUT_S = 5.0
_GAUGES_EVERY_S = 1.0
_SWEEP_EVERY_S = 60.0


class ServerEngine(Engine, Protocol):
    """An engine that says whether it still runs."""

    @property
    def is_alive(self) -> bool: ...


class MemoryServer:
    """Open it with :meth:`open` on the server's event loop, and close it there."""

    def __init__(
        self,
        manager: CacheManager,
        engine: ServerEngine,
        access: Access,
        metrics: ServerMetrics,
        *,
        sweep_every_s: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.metrics = metrics
        self.hub = EventHub(loop, metrics.lost_event)
        self.service = MemoryService(manager, self.hub.publish, metrics)
        self.access = access
        self.recent = RecentRequests()
        self._engine = engine
        self._limits = RateLimits()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-agent-http")
        # Of its own, so that the server is not taken for dead because it is busy.
        self._watching = ThreadPoolExecutor(1, thread_name_prefix="kv-agent-watch")
        self._following = loop.create_task(follow(manager.store.catalog.history, self.hub, self._watching))
        self._num_in_progress = 0
        self._gauging = Repeating(
            self._show_gauges, _GAUGES_EVERY_S, name="gauges", trouble="gauges stand still while this lasts"
        )
        self._sweeping = Repeating(
            lambda: manager.store.forget_expired(time.time()),
            sweep_every_s,
            name="sweep",
            trouble="memories whose time is over stay while this lasts",
        )

    @classmethod
    async def open(
        cls,
        engine: Callable[[], ServerEngine],
        settings: PluginConfig,
        *,
        keys: Path | None = None,
        server_keys: Sequence[str] = (),
        registry: CollectorRegistry | None = None,
        sweep_every_s: float = _SWEEP_EVERY_S,
    ) -> MemoryServer:
        """``engine`` makes the engine that captures into the store of ``settings``; it may block.

        ``keys`` and ``server_keys``: see :class:`~kv_agent.serving.access.Access`. Its metrics are in
        ``registry``, without one nobody sees them. Every ``sweep_every_s`` seconds memories whose time is
        over are let go.
        """
        access = Access(keys, server_keys)

        def opened() -> tuple[CacheManager, ServerEngine]:
            running = engine()
            plain = settings.model_dump(include={"chunk_tokens", "disk_bytes"})
            return CacheManager(running, store=settings.store, settings=plain), running

        manager, running = await asyncio.to_thread(opened)
        if access.is_open:
            logger.warning(
                "no memory keys: whoever reaches this server may read and change all memories",
                extra={"event": "open_to_all"},
            )
        metrics = ServerMetrics(registry or CollectorRegistry())
        return cls(manager, running, access, metrics, sweep_every_s=sweep_every_s)

    def admit(self, authorization: str | None, namespace: str | None = None) -> Caller:
        """Who asks, by the ``Authorization`` header, counted against the rate of that namespace.

        Raises :class:`~kv_agent.serving.errors.RequestError`: 401, 403 or 429.
        """
        return self.admit_key(bearer(authorization), namespace)

    def admit_key(self, key: str | None, namespace: str | None = None) -> Caller:
        """As :meth:`admit`, by the key itself."""
        caller = self.access.caller(key, namespace)
        self._limits.take(caller.namespace, self.access.requests_per_minute(caller.namespace))
        return caller

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, done by one of a bounded number of threads."""
        self._num_in_progress += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_in_progress -= 1

    async def health(self) -> HealthAnswer:
        """See :meth:`~kv_agent.serving.service.MemoryService.health`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._watching, self.service.health, self._engine.is_alive)

    async def close(self) -> None:
        """Break off what runs, then let go of the store."""
        self._following.cancel()
        with suppress(asyncio.CancelledError):
            await self._following
        await asyncio.to_thread(self._close)

    def _show_gauges(self) -> None:
        self.metrics.show(
            readings(
                self.service.manager,
                num_listeners=self.hub.num_listeners,
                num_in_progress=self._num_in_progress,
            )
        )

    def _close(self) -> None:
        self._gauging.close()
        self._sweeping.close()
        self.metrics.close()
        self._engine.close()
        self._threads.shutdown(cancel_futures=True)
        self._watching.shutdown(cancel_futures=True)
        manager = self.service.manager
        manager.wait_durable(_CLOSING_TIMEOUT_S)  # an engine that was stopped at once stores nothing any more
        manager.close()
