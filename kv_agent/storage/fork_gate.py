"""Keeps the catalog's connections out of forked processes.

SQLite remembers per process which file locks it holds. A fork copies that memory but not the locks, so
a child that opens the same file - even with a new connection - believes it is protected and can lose
the write-ahead log. vLLM forks its engine from a process that may have a catalog open, hence: before a
fork every connection is closed, and afterwards parent and child open their own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Closable(Protocol):
    """Something whose connections can be closed at a moment when none is in use."""

    def drop_connections(self) -> None: ...


class ForkGate:
    """Lets many threads use connections at once, and a fork or a close wait until none does."""

    def __init__(self) -> None:
        self._owners: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._hooked = False
        self._reset()

    def watch(self, owner: Closable) -> None:
        """Drop ``owner``'s connections before every later fork, for as long as it lives."""
        with self._changed:
            self._owners.add(owner)
            if not self._hooked:
                os.register_at_fork(
                    before=self._before_fork,
                    after_in_parent=self._end_exclusive,
                    after_in_child=self._reset,
                )
                self._hooked = True

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use connections. Not to be nested: an exclusive thread waiting in between would wait forever."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No connection is in use in here."""
        self._begin_exclusive()
        try:
            yield
        finally:
            self._end_exclusive()

    def _before_fork(self) -> None:
        self._begin_exclusive()
        for owner in list(self._owners):
            owner.drop_connections()

    def _begin_exclusive(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive)
            self._exclusive = True
            self._changed.wait_for(lambda: not self._users)

    def _end_exclusive(self) -> None:
        with self._changed:
            self._exclusive = False
            self._changed.notify_all()

    def _reset(self) -> None:
        # In a forked child other threads are gone, and with them whoever held or awaited the old lock.
        self._changed = threading.Condition()
        self._users = 0
        self._exclusive = False
