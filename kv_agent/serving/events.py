"""Live events: what happens to memories, told to those who listen, each namespace for itself."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.serving.errors import RequestError
from kv_agent.storage.history import History, TurnEvent

logger = logging.getLogger(__name__)

Kind = Literal["stored", "retrieved", "injected", "evicted", "forgotten"]

MAX_LISTENERS = 4000
_QUEUE = 256  # events that wait for one listener
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to the memories ``ids``, to all of them at once. Texts are never part of it."""

    kind: Kind
    scope: Scope
    ids: tuple[TurnId, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, at: float) -> str:
        """As listeners get it; ``at`` is Unix time."""
        fields = {"event": self.kind, "at": round(at, 3), **self.scope.to_dict(), "ids": self.ids}
        return json.dumps({**fields, **self.details})


class Listener:
    """What waits for one listener. Used on the event loop only."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[str] = asyncio.Queue(_QUEUE)
        self._num_lost = 0

    def offer(self, text: str) -> bool:
        """Queue an event, or count it as lost where there is no room -> whether there was."""
        if self._num_lost and not self._waiting.full():
            self._waiting.put_nowait(self._lost())
        if self._waiting.full():
            self._num_lost += 1
            return False
        self._waiting.put_nowait(text)
        return True

    async def next(self) -> str:
        """The next event, as JSON; after events that were lost, one that says how many."""
        if self._num_lost and self._waiting.empty():
            return self._lost()
        return await self._waiting.get()

    @property
    def has_more(self) -> bool:
        """Whether :meth:`next` would not wait."""
        return bool(self._num_lost) or not self._waiting.empty()

    def _lost(self) -> str:
        text = json.dumps({"event": "lost", "count": self._num_lost})
        self._num_lost = 0
        return text


class EventHub:
    """Passes events on to listeners. ``loop`` is where these live; publishing is for any thread.

    ``on_lost`` is called for each event that a listener misses.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[], None] = lambda: None) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._listeners: dict[str, set[Listener]] = {}

    @property
    def num_listeners(self) -> int:
        return sum(map(len, list(self._listeners.values())))

    def publish(self, event: Event) -> None:
        """Tell all who listen to the event's namespace now; never waits for them."""
        if event.scope.namespace in self._listeners:
            self._loop.call_soon_threadsafe(self._deliver, event.scope.namespace, event.to_json(time.time()))

    def add(self, namespace: str) -> Listener:
        """A new listener, which must be removed; raises :class:`RequestError` when there are too many."""
        if self.num_listeners >= MAX_LISTENERS:
            raise RequestError(503, f"{MAX_LISTENERS} listeners are connected already; try again later")
        listener = Listener()
        self._listeners.setdefault(namespace, set()).add(listener)
        return listener

    def remove(self, namespace: str, listener: Listener) -> None:
        listeners = self._listeners[namespace]
        listeners.discard(listener)
        if not listeners:
            del self._listeners[namespace]

    def _deliver(self, namespace: str, text: str) -> None:
        for listener in self._listeners.get(namespace, ()):
            if not listener.offer(text):
                self._on_lost()


async def follow(
    history: History, hub: EventHub, executor: Executor | None = None, poll_s: float = _POLL_S
) -> None:
    """Publish what becomes of memories, whichever process does it, until cancelled.

    The catalog is read by a thread of ``executor``.
    """
    loop = asyncio.get_running_loop()
    seq: int | None = None
    is_in_trouble = False
    while True:
        try:
            if seq is None:
                seq = await loop.run_in_executor(executor, history.last_seq)
            else:
                events = await loop.run_in_executor(executor, history.since, seq)
                for event in _together(events):
                    hub.publish(event)
                seq = events[-1].seq if events else seq
                is_in_trouble = False
        except StorageError as err:
            if not is_in_trouble:
                about = {"event": "store_trouble"}
                logger.warning("no events of the store while this lasts: %s", err, extra=about)
            is_in_trouble = True
        await asyncio.sleep(poll_s)


def _together(events: Iterable[TurnEvent]) -> Sequence[Event]:
    """Events of one kind and scope that follow each other as one."""
    grouped: list[Event] = []
    for one in events:
        last = grouped[-1] if grouped else None
        if last is not None and (last.kind, last.scope) == (one.kind, one.scope):
            grouped[-1] = Event(kind=one.kind, scope=one.scope, ids=(*last.ids, one.turn_id))
        else:
            grouped.append(Event(kind=one.kind, scope=one.scope, ids=(one.turn_id,)))
    return grouped
