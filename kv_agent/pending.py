"""Turns that were captured and are not known to be on disk yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from kv_agent.chunks import TurnId

logger = logging.getLogger(__name__)

_POLL_S = 0.002


class PendingTurns:
    """What :meth:`wait` waits for; any number of threads may, and one of them looks for all.

    ``settled`` says which of some turns are stored, or were. ``on_settled`` is called with those that are,
    each once, before anybody stops waiting for it.
    """

    def __init__(
        self,
        settled: Callable[[Iterable[TurnId]], frozenset[TurnId]],
        on_settled: Callable[[frozenset[TurnId]], None],
    ) -> None:
        self._settled = settled
        self._on_settled = on_settled
        self._changed = threading.Condition()
        self._pending: set[TurnId] = set()
        self._is_looked_for = False

    def add(self, turn_id: TurnId) -> None:
        with self._changed:
            self._pending.add(turn_id)

    def wait(self, timeout_s: float) -> bool:
        """Wait for every turn added so far; ``False`` if some are given up after ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            awaited = frozenset(self._pending)
        has_looked = False
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._is_looked_for or not awaited & self._pending,
                    timeout=max(deadline - time.monotonic(), 0),
                )
                missing = awaited & self._pending
                if not missing:
                    return True
                if has_looked and time.monotonic() >= deadline:
                    logger.warning(
                        "%d captured turns are not on disk after %.0f s",
                        len(missing),
                        timeout_s,
                        extra={"event": "store_slow", "count": len(missing), "seconds": timeout_s},
                    )
                    self._pending -= missing
                    return False
                has_looked = True
                if self._is_looked_for:  # by another thread, for longer than this one may wait
                    continue
                self._is_looked_for = True
            self._look(awaited)

    def _look(self, awaited: frozenset[TurnId]) -> None:
        try:
            with self._changed:
                known = frozenset(self._pending)
            settled = self._settled(known)
            if settled:
                self._on_settled(settled)
            with self._changed:
                self._pending -= settled
                self._changed.notify_all()
                is_done = not awaited & self._pending
            if not is_done:
                time.sleep(_POLL_S)
        finally:
            with self._changed:
                self._is_looked_for = False
                self._changed.notify_all()
