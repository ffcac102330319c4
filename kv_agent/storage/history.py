"""What became of memories, whoever did it: the last comings and goings, for those who watch a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage.schema import Database

Happening = Literal["stored", "evicted", "forgotten"]

_EVENTS_SINCE = """
    SELECT seq, kind, turn_id, namespace, user_id, agent_id, session_id FROM turn_events
    WHERE seq > ? ORDER BY seq LIMIT ?
"""
# A table without rows still knows the last number it gave (AUTOINCREMENT).
_LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'turn_events'"


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEvent:
    """A memory came or went. It is evicted where there was no room, forgotten where somebody wished so or
    its time was over."""

    seq: int
    kind: Happening
    turn_id: TurnId
    scope: Scope


class History:
    """The last ten thousand events of a store. ``transaction`` begins one (see ``BEGIN``) and commits it."""

    def __init__(self, transaction: Callable[[str], AbstractContextManager[Database]]) -> None:
        self._transaction = transaction

    def last_seq(self) -> int:
        """Number of the newest event, 0 without any."""
        with self._transaction("BEGIN") as db:
            return int(db.execute(_LAST_SEQ).fetchone()[0])

    def since(self, seq: int, limit: int = 1000) -> list[TurnEvent]:
        """The first events after number ``seq``, oldest first."""
        with self._transaction("BEGIN") as db:
            found = db.execute(_EVENTS_SINCE, (seq, limit)).fetchall()
        return [
            TurnEvent(
                seq=row[0],
                kind=row[1],
                turn_id=row[2],
                scope=Scope(namespace=row[3], user_id=row[4], agent_id=row[5], session_id=row[6]),
            )
            for row in found
        ]
