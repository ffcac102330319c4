"""The part of a catalog that says who may keep how much, who holds how much, and how turns were used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.storage import retention_statements as sql
from kv_agent.storage import rows, turn_writes
from kv_agent.storage import statements as turn_sql
from kv_agent.storage.history import Happening
from kv_agent.storage.policy import Usage
from kv_agent.storage.retention import Holding, Retention, SessionTurn
from kv_agent.storage.schema import Database

_OTHERS = ""  # no scope has an empty namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a namespace holds, and what became of turns for which there was no room since the store exists.

    Evicted turns went so that others could stay, refused ones were too large to be kept at all.
    """

    held: Holding
    evicted_turns: int = 0
    evicted_bytes: int = 0
    refused_turns: int = 0


NO_ACCOUNT = Account(held=Holding())


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What all namespaces hold together, and what became of their turns.

    ``num_documents`` are memories that can be found by words. Evicted and refused turns count since the store
    exists; forgotten memories, and those whose time was over, since it keeps these totals.
    """

    held: Holding
    num_chunks: int
    num_documents: int
    evicted_turns: int
    refused_turns: int
    forgotten_turns: int
    expired_turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Turns that went, the chunks that went with them, and the files that no row names any more."""

    turn_ids: tuple[TurnId, ...]
    keys: frozenset[ChunkKey]
    blobs: tuple[str, ...]


class Ledger:
    """Limits, totals and use. ``transaction`` begins one (see ``BEGIN``) and commits it."""

    def __init__(self, transaction: Callable[[str], AbstractContextManager[Database]]) -> None:
        self._transaction = transaction

    # Limits

    def retention(self, namespace: str) -> Retention:
        """What applies to a namespace: its own limits, else those of all others."""
        with self._transaction("BEGIN") as db:
            row = db.execute(sql.LIMITS_OF, (namespace,)).fetchone()
        return Retention() if row is None else _retention(row)

    def retentions(self) -> dict[str | None, Retention]:
        """Everything that is set, by namespace; ``None`` are the limits of all others."""
        with self._transaction("BEGIN") as db:
            found = db.execute(sql.ALL_LIMITS).fetchall()
        return {namespace or None: _retention(limits) for namespace, *limits in found}

    def set_retention(self, namespace: str | None, retention: Retention | None) -> None:
        """Set the limits of a namespace, or of all that have none of their own; ``None`` takes them away."""
        name = _OTHERS if namespace is None else Scope(namespace=namespace).namespace
        with self._transaction("BEGIN IMMEDIATE") as db:
            db.execute(sql.DROP_LIMITS, (name,))
            if retention is not None:
                db.execute(sql.INSERT_LIMITS, (name, *astuple(retention)))

    # Totals

    def held(self, namespace: str | None) -> Holding:
        """What a namespace holds; of ``None``, all together, the bytes of the files on disk alone."""
        with self._transaction("BEGIN") as db:
            return _held(db, namespace)

    def accounts(self) -> dict[str, Account]:
        """Every namespace that something was ever stored in."""
        with self._transaction("BEGIN") as db:
            found = db.execute(sql.ACCOUNTS).fetchall()
        return {
            row[0]: Account(
                held=_holding(row[1:4]), evicted_turns=row[4], evicted_bytes=row[5], refused_turns=row[6]
            )
            for row in found
        }

    def totals(self) -> Totals:
        """All namespaces together, without counting anything."""
        with self._transaction("BEGIN") as db:
            row = db.execute(sql.TOTALS).fetchone()
        return Totals(
            held=_holding(row[:3]),
            num_chunks=row[3],
            num_documents=row[4],
            evicted_turns=row[5],
            refused_turns=row[6],
            forgotten_turns=row[7],
            expired_turns=row[8],
        )

    def largest(self, limit: int) -> dict[str, Holding]:
        """What the namespaces hold that hold most bytes, at most ``limit`` of them, the largest first."""
        with self._transaction("BEGIN") as db:
            found = db.execute(sql.LARGEST, (limit,)).fetchall()
        return {namespace: _holding(held) for namespace, *held in found}

    # Use

    def pin(self, turn_ids: Iterable[TurnId], pinned: bool) -> None:
        """Keep turns, given by id or alias, whatever the limits and their time, or no longer."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            resolved = rows.json_list(set(turn_writes.resolve(db, turn_ids).values()))
            db.execute(sql.PIN_TURNS, (pinned, resolved))

    def touch(self, turn_ids: Iterable[TurnId], now: float) -> None:
        """Count one more use of each turn, at ``now`` (Unix time)."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            db.execute(sql.TOUCH_TURNS, (now, rows.json_list(turn_ids)))

    def turns_with(self, keys: Iterable[ChunkKey]) -> frozenset[TurnId]:
        """The turns whose own content has one of these chunks."""
        with self._transaction("BEGIN") as db:
            return frozenset(
                turn_id for (turn_id,) in db.execute(sql.TURNS_WITH_CONTENT, (rows.json_list(keys),))
            )

    def settled(self, turn_ids: Iterable[TurnId]) -> frozenset[TurnId]:
        """Which of these are stored, or were and went since (the last ten thousand that did are known)."""
        ids = list(turn_ids)
        with self._transaction("BEGIN") as db:
            departed = {turn_id for (turn_id,) in db.execute(sql.DEPARTED, (rows.json_list(ids),))}
            return frozenset(turn_writes.resolve(db, ids)) | departed

    # Who may go

    def session(self, scope: Scope) -> list[SessionTurn]:
        """The memories of one agent's session, newest first."""
        with self._transaction("BEGIN") as db:
            found = db.execute(sql.SESSION_TURNS, rows.scope_to_row(scope)).fetchall()
        return [SessionTurn(turn_id=row[0], num_tokens=row[1], pinned=bool(row[2])) for row in found]

    def usages(self, namespace: str | None) -> dict[TurnId, Usage]:
        """How the turns of a namespace, or of all, were used that are not pinned."""
        with self._transaction("BEGIN") as db:
            found = db.execute(sql.USAGES, {"namespace": namespace}).fetchall()
        return {
            row[0]: Usage(
                num_tokens=row[1], created=row[2], last_used=row[3], num_hits=row[4], num_bytes=row[5]
            )
            for row in found
        }

    def held_by_pinned(self, namespace: str | None) -> Holding:
        """What the pinned turns of a namespace, or of all, hold."""
        with self._transaction("BEGIN") as db:
            return _held_by_pinned_and(db, namespace, None)

    def evict(
        self, going: Iterator[TurnId], namespace: str | None, until: Retention | None, most: int
    ) -> Gone:
        """Forget turns in this order, ``most`` at a time, until what is held is within the limits ``until``.

        Without limits all go. That is looked at before each, while nobody else writes, so that of several
        processes in need of room none takes more than there is need for. A pinned turn stays.
        """
        with self._transaction("BEGIN IMMEDIATE") as db:
            gone = _Going(db)
            while len(gone.turn_ids) < most and (until is None or until.exceeded_by(_held(db, namespace))):
                if (turn_id := next(going, None)) is None:
                    break
                gone.evict(turn_id)
            return gone.result()

    def expire(self, now: float, most: int) -> Gone:
        """Forget turns whose time is over at ``now`` (Unix time), ``most`` at a time, the oldest first.

        They are looked for while nobody else writes: of several processes each forgets other turns, and none
        one whose time was prolonged just now.
        """
        with self._transaction("BEGIN IMMEDIATE") as db:
            gone = _Going(db)
            overdue = [turn_id for (turn_id,) in db.execute(sql.OVERDUE_TURNS, (now, most))]
            db.execute(sql.COUNT_EXPIRED, (rows.json_list(overdue),))
            for turn_id in overdue:
                gone.forget(turn_id, "forgotten")
            return gone.result()

    def refuse(self, turn_id: TurnId, namespace: str | None, limits: Retention) -> Gone | None:
        """Forget a turn that would not fit into exceeded limits if all went but it and what is pinned."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            own = db.execute(sql.UNPINNED_TURN, (turn_id,)).fetchone()
            if (
                own is None
                or not limits.exceeded_by(_held(db, namespace))
                or not limits.exceeded_by(_held_by_pinned_and(db, namespace, turn_id))
            ):
                return None
            gone = _Going(db)
            gone.forget(turn_id, "evicted")
            db.execute(sql.COUNT_REFUSED, own)
            return gone.result()


class _Going:
    """Turns that are forgotten one by one in a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.turn_ids: list[TurnId] = []
        self._keys: set[ChunkKey] = set()
        self._blobs: set[str] = set()

    def evict(self, turn_id: TurnId) -> None:
        own = self._db.execute(sql.UNPINNED_TURN, (turn_id,)).fetchone()
        if own is None:  # gone, or pinned meanwhile
            return
        before = _held(self._db, own[0]).num_bytes
        self.forget(turn_id, "evicted")
        self._db.execute(sql.COUNT_EVICTED, (before, own[0]))

    def forget(self, turn_id: TurnId, kind: Happening) -> None:
        keys = self._db.execute(turn_sql.CHUNKS_OF_TURNS, (rows.json_list([turn_id]),))
        self._keys.update(key for (key,) in keys.fetchall())
        self._blobs.update(turn_writes.forget(self._db, [turn_id], kind))
        self.turn_ids.append(turn_id)

    def result(self) -> Gone:
        left = self._db.execute(turn_sql.CHUNK_STATES, (rows.json_list(self._keys),)).fetchall()
        return Gone(
            turn_ids=tuple(self.turn_ids),
            keys=frozenset(self._keys - {key for key, *_ in left}),
            blobs=tuple(self._blobs),
        )


def _held(db: Database, namespace: str | None) -> Holding:
    if namespace is None:
        return Holding(num_bytes=db.execute(sql.DISK_BYTES).fetchone()[0])
    return _holding(db.execute(sql.HOLDING_OF, (namespace,)).fetchone() or (0, 0, 0))


def _held_by_pinned_and(db: Database, namespace: str | None, turn_id: TurnId | None) -> Holding:
    parameters = {"namespace": namespace, "turn_id": turn_id}
    return _holding(db.execute(sql.HELD_BY_PINNED_AND, parameters).fetchone())


def _holding(row: rows.Row) -> Holding:
    num_bytes, num_tokens, num_memories = row
    return Holding(num_bytes=num_bytes, num_tokens=num_tokens, num_memories=num_memories)


def _retention(row: rows.Row) -> Retention:
    return Retention(**dict(zip(sql.LIMITS.split(", "), row, strict=True)))
