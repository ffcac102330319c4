"""Who has memories, and how many: counts for those who look around in a store, a page at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.storage import rows
from kv_agent.storage.retention import Holding
from kv_agent.storage.schema import Database

_NAMESPACES = """
    SELECT namespace, num_bytes, num_tokens, num_memories FROM holdings
    WHERE namespace > ? ORDER BY namespace LIMIT ?
"""
# From one user to the next through the index: each may have very many turns.
_USERS = """
    WITH RECURSIVE users (user_id) AS (
        SELECT min(user_id) FROM turns WHERE namespace = :namespace AND user_id > :after
        UNION ALL
        SELECT (SELECT min(t.user_id) FROM turns t WHERE t.namespace = :namespace AND t.user_id > u.user_id)
        FROM users u WHERE u.user_id IS NOT NULL LIMIT :limit
    )
    SELECT u.user_id, NULL, NULL, count(t.turn_id), coalesce(sum(t.num_tokens), 0), max(t.created)
    FROM users u LEFT JOIN turns t
        ON t.namespace = :namespace AND t.user_id = u.user_id AND t.num_tokens > 0
    WHERE u.user_id IS NOT NULL GROUP BY u.user_id ORDER BY u.user_id
"""
# Those without an agent or a session come first; no id is empty.
_SESSIONS = """
    SELECT :user_id, nullif(agent, ''), nullif(session, ''), count(*), sum(num_tokens), max(created) FROM (
        SELECT coalesce(agent_id, '') AS agent, coalesce(session_id, '') AS session, num_tokens, created
        FROM turns WHERE namespace = :namespace AND user_id = :user_id AND num_tokens > 0)
    WHERE :agent_id IS NULL OR (agent, session) > (:agent_id, :session_id)
    GROUP BY agent, session ORDER BY agent, session LIMIT :limit
"""
_OTHER_TURNS = """
    SELECT chunk_key, count(DISTINCT turn_id) FROM turn_chunks
    WHERE chunk_key IN (SELECT value FROM json_each(:keys)) AND role = 'content' AND turn_id <> :turn_id
    GROUP BY chunk_key
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The memories of a user, or of one agent's session; ``newest`` is Unix time, ``None`` without any."""

    scope: Scope
    num_memories: int
    num_tokens: int
    newest: float | None


class Overview:
    """Counts of memories. ``transaction`` begins one (see ``BEGIN``) and commits it."""

    def __init__(self, transaction: Callable[[str], AbstractContextManager[Database]]) -> None:
        self._transaction = transaction

    def namespaces(self, limit: int, after: str = "") -> dict[str, Holding]:
        """What the first namespaces behind ``after`` hold, by name, in order."""
        with self._transaction("BEGIN") as db:
            found = db.execute(_NAMESPACES, (after, limit)).fetchall()
        return {row[0]: Holding(num_bytes=row[1], num_tokens=row[2], num_memories=row[3]) for row in found}

    def users(self, namespace: str, limit: int, after: str = "") -> list[Contents]:
        """The first users of a namespace behind ``after``, in order.

        Also those of whom only the system prompt is left. Takes as long as these users have memories.
        """
        parameters = {"namespace": namespace, "after": after, "limit": limit}
        with self._transaction("BEGIN") as db:
            return [_contents(namespace, row) for row in db.execute(_USERS, parameters)]

    def sessions(self, owner: Scope, limit: int, after: Scope | None = None) -> list[Contents]:
        """The first sessions of the user ``owner``, agent by agent, behind those of the scope ``after``.

        Memories without an agent or a session count as those of ``None``. Takes as long as the user has
        memories.
        """
        parameters = {
            "namespace": owner.namespace,
            "user_id": owner.user_id,
            "agent_id": None if after is None else after.agent_id or "",
            "session_id": None if after is None else after.session_id or "",
            "limit": limit,
        }
        with self._transaction("BEGIN") as db:
            return [_contents(owner.namespace, row) for row in db.execute(_SESSIONS, parameters)]

    def sharing(self, turn_id: TurnId, keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
        """How many other turns have these chunks as content; those that none has are left out."""
        with self._transaction("BEGIN") as db:
            found = db.execute(_OTHER_TURNS, {"keys": rows.json_list(keys), "turn_id": turn_id}).fetchall()
        return {ChunkKey(key): count for key, count in found}


def _contents(namespace: str, row: rows.Row) -> Contents:
    return Contents(
        scope=Scope(namespace=namespace, user_id=row[0], agent_id=row[1], session_id=row[2]),
        num_memories=row[3],
        num_tokens=row[4],
        newest=row[5],
    )
