"""What the memory routes do. No HTTP, and everything blocks: never call it on an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.manager import CacheManager
from kv_agent.memories import Memory, Share, reading_scope
from kv_agent.memory import AgentMemory
from kv_agent.serving.access import Caller
from kv_agent.serving.errors import RequestError, not_found
from kv_agent.serving.events import Event
from kv_agent.serving.gauges import index_lag
from kv_agent.serving.metrics import ServerMetrics
from kv_agent.serving.schemas import (
    ForgetBody,
    HealthAnswer,
    LimitsBody,
    ListAnswer,
    MemoryBody,
    QueryAnswer,
    QueryBody,
    StatsAnswer,
    StoreBody,
    cursor_after,
    read_cursor,
)
from kv_agent.storage.ledger import NO_ACCOUNT

_ROOM_TIMEOUT_S = 1.0  # how long making room for a stored turn may take until it is taken as kept
_POLL_S = 0.005
_FORGOTTEN_AT_ONCE = 500


class MemoryService:
    """Memories of one manager; thread-safe. ``publish`` is told what was retrieved."""

    def __init__(
        self, manager: CacheManager, publish: Callable[[Event], None], metrics: ServerMetrics
    ) -> None:
        self._manager = manager
        self._publish = publish
        self._metrics = metrics

    @property
    def manager(self) -> CacheManager:
        return self._manager

    def store(self, caller: Caller, body: StoreBody) -> TurnId:
        """Compute a turn and keep it; it is on disk and can be found when this returns.

        Raises :class:`RequestError`: 503 where it could not be captured or written, 507 where the limits of
        the namespace leave no room for it.
        """
        memory = AgentMemory(
            self._manager,
            namespace=caller.namespace,
            user_id=body.user_id,
            agent_id=body.agent_id,
            session_id=body.session_id,
            system_prompt=body.system_prompt,
        )
        turn_id = memory.store(body.prompt, body.response, metadata=body.metadata, ttl_s=body.ttl_s)
        if turn_id is None:
            raise RequestError(503, "the turn was not captured, the server's log says why; try again later")
        if not self._manager.wait_durable():
            raise RequestError(
                503, "the turn is not on disk yet, the server's log says why; look it up later"
            )
        self._require_kept(caller.namespace, turn_id)
        return turn_id

    def query(self, caller: Caller, body: QueryBody) -> QueryAnswer:
        """The memories that fit best, at least ``threshold``, and their neighbours."""
        started = time.perf_counter()
        reading = _reading(caller, body)
        if reading is None:
            return QueryAnswer(memories=[], took_ms=0.0, probe_ms=0.0)
        found = _memory_of(self._manager, reading).search(
            body.query,
            body.top_k,
            body.mode,
            only=body.filters.turn_filter,
            neighbours=body.neighbours,
            explain=body.explain,
            peek=body.peek,
        )
        memories = _at_least(found.memories, body.threshold)
        took_s = time.perf_counter() - started
        self._metrics.searched(body.mode, took_s, found.probe_s)
        if memories and not body.peek:
            details = {"mode": body.mode, "took_ms": _ms(took_s)}
            ids = tuple(memory.id for memory in memories)
            self._publish(Event(kind="retrieved", scope=reading, ids=ids, details=details))
        return QueryAnswer(
            memories=[MemoryBody.of(memory) for memory in memories],
            took_ms=_ms(took_s),
            probe_ms=_ms(found.probe_s),
        )

    def get(self, caller: Caller, memory_id: str, user_id: str | None = None) -> MemoryBody:
        """One memory of the namespace, or of one user of it; 404 if there is none such."""
        return MemoryBody.of(self._known(caller, memory_id, user_id)[1])

    def page(self, scope: Scope, limit: int, cursor: str | None) -> ListAnswer:
        """A page of the memories of a user, agent or session, newest first."""
        before, before_id = read_cursor(cursor) if cursor is not None else (None, None)
        found = _memory_of(self._manager, scope).list(limit + 1, before, before_id)
        page = found[:limit]
        return ListAnswer(
            memories=[MemoryBody.of(memory) for memory in page],
            next=cursor_after(page) if len(found) > limit else None,
        )

    def forget_one(self, caller: Caller, memory_id: str, user_id: str | None = None) -> TurnId:
        """Forget one memory; 404 if there is none such."""
        memory, found = self._known(caller, memory_id, user_id)
        if not memory.forget([found.id]):
            raise not_found()
        return found.id

    def forget(self, caller: Caller, body: ForgetBody) -> list[TurnId]:
        """Forget all memories of a user that the filters admit -> their ids, oldest first."""
        scope = Scope(
            namespace=caller.namespace,
            user_id=body.user_id,
            agent_id=body.agent_id,
            session_id=body.session_id,
        )
        store = self._manager.store
        self._manager.catch_up()
        ids = sorted(store.catalog.turn_ids(scope, body.turn_filter))
        gone: dict[TurnId, float] = {}
        for start in range(0, len(ids), _FORGOTTEN_AT_ONCE):
            turns = store.catalog.turns(ids[start : start + _FORGOTTEN_AT_ONCE])
            store.forget(turns)
            # Turns without tokens of their own only held a prompt's prefix in place.
            gone |= {turn_id: turn.created for turn_id, turn in turns.items() if turn.num_tokens}
        return sorted(gone, key=lambda turn_id: (gone[turn_id], turn_id))

    def pin(self, caller: Caller, memory_id: str, pinned: bool, user_id: str | None = None) -> TurnId:
        """Keep a memory whatever happens, or no longer; 404 if there is none such."""
        memory, found = self._known(caller, memory_id, user_id)
        if not (memory.pin(found.id) if pinned else memory.unpin(found.id)):
            raise not_found()
        return found.id

    def stats(self, caller: Caller, requests_per_minute: int | None) -> StatsAnswer:
        """What the caller's namespace holds and may hold; for an admin also all namespaces together."""
        ledger = self._manager.store.catalog.ledger
        account = ledger.accounts().get(caller.namespace, NO_ACCOUNT)
        return StatsAnswer(
            namespace=caller.namespace,
            memories=account.held.num_memories,
            tokens=account.held.num_tokens,
            bytes=account.held.num_bytes,
            evicted=account.evicted_turns,
            refused=account.refused_turns,
            limits=LimitsBody(
                **asdict(ledger.retention(caller.namespace)), requests_per_minute=requests_per_minute
            ),
            store=self._manager.stats() if caller.is_admin else None,
        )

    def health(self, is_engine_alive: bool) -> HealthAnswer:
        """Whether the engine answers and the store can be written."""
        catalog = self._manager.store.catalog
        lag = 0
        try:
            catalog.require_writable()
            lag = index_lag(self._manager)
            is_writable = True
        except StorageError:
            is_writable = False
        status: Literal["ok", "unwell"] = "ok" if is_engine_alive and is_writable else "unwell"
        return HealthAnswer(status=status, engine=is_engine_alive, store=is_writable, index_lag=lag)

    def _known(self, caller: Caller, memory_id: str, user_id: str | None) -> tuple[AgentMemory, Memory]:
        """A memory of the caller's namespace, and its user's memory of which it is part."""
        self._manager.catch_up()
        wanted = TurnId(memory_id)
        turn = self._manager.store.catalog.turns([wanted]).get(wanted)
        if (
            turn is None
            or turn.scope.namespace != caller.namespace
            or user_id not in (None, turn.scope.user_id)
        ):
            raise not_found()
        memory = AgentMemory(self._manager, namespace=caller.namespace, user_id=turn.scope.user_id)
        found = memory.get(wanted)
        if found is None:
            raise not_found()
        return memory, found

    def _require_kept(self, namespace: str, turn_id: TurnId) -> None:
        """Raise unless the turn stays once room was made, which the engine does right after storing it."""
        catalog = self._manager.store.catalog
        deadline = time.monotonic() + _ROOM_TIMEOUT_S
        while True:
            is_full = catalog.ledger.retention(namespace).exceeded_by(catalog.ledger.held(namespace))
            if not catalog.known_turns([turn_id]):
                raise RequestError(507, "the limits of this namespace leave no room for so large a turn")
            if not is_full or time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)


def _memory_of(manager: CacheManager, reading: Scope) -> AgentMemory:
    """A memory that reads just this scope."""
    share: Share = "user"
    if reading.session_id is not None:
        share = "session"
    elif reading.agent_id is not None:
        share = "agent"
    return AgentMemory(
        manager,
        namespace=reading.namespace,
        user_id=reading.user_id,
        agent_id=reading.agent_id,
        session_id=reading.session_id,
        share=share,
    )


def _reading(caller: Caller, body: QueryBody) -> Scope | None:
    """The scope that a query reads; ``None`` where its filters leave nothing of it."""
    asking = reading_scope(
        Scope(
            namespace=caller.namespace,
            user_id=body.user_id,
            agent_id=body.agent_id,
            session_id=body.session_id,
        ),
        body.share,
    )
    narrowed = Scope(
        namespace=caller.namespace,
        user_id=body.user_id,
        agent_id=body.filters.agent_id or asking.agent_id,
        session_id=body.filters.session_id or asking.session_id,
    )
    return narrowed if asking.admits(narrowed) else None


def _at_least(memories: tuple[Memory, ...], threshold: float | None) -> tuple[Memory, ...]:
    """Those with this score, and the neighbours of those."""
    if threshold is None:
        return memories
    good = {memory.id for memory in memories if memory.score is not None and memory.score >= threshold}
    return tuple(memory for memory in memories if memory.id in good or memory.neighbour_of in good)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
