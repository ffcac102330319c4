"""The SQLite catalog: which turns and chunks exist, the words in them, and the history an index follows.

It is the one source of truth: what has no committed row does not exist. Any number of threads and
processes may use one catalog file, on a local disk (WAL does not work over network file systems).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kv_agent.chunks import (
    EVERY_TURN,
    ChunkKey,
    ChunkRecord,
    ContentKey,
    Fingerprint,
    IndexChange,
    Scope,
    TurnFilter,
    TurnId,
    TurnRecord,
)
from kv_agent.config import Fsync
from kv_agent.errors import StorageError
from kv_agent.storage import documents, rows, schema, turn_reads, turn_writes, upkeep
from kv_agent.storage import statements as sql
from kv_agent.storage.connection import ThreadConnections, is_busy, is_worth_reopening, storage_error
from kv_agent.storage.documents import TextHit
from kv_agent.storage.fork_gate import ForkGate
from kv_agent.storage.history import History
from kv_agent.storage.ledger import Ledger
from kv_agent.storage.overview import Overview
from kv_agent.storage.turn_reads import StoredTurn
from kv_agent.storage.turn_writes import AddResult
from kv_agent.storage.upkeep import Dropped

_FORK_GATE = ForkGate()


class Catalog:
    """Rows of one store, one connection per thread. Every failure is a :class:`StorageError`.

    Where the file is no longer in its place, its disk is unmounted, say, it is read for as long as it can be,
    but nothing is written. ``fsync`` says whether a commit waits for the disk.
    """

    def __init__(self, path: Path, fsync: Fsync = "always") -> None:
        self._path = path
        self._closed = False
        self._connections = ThreadConnections(path, fsync)
        _FORK_GATE.watch(self)
        with self._connection() as db:
            schema.require_fts5(db)
            schema.migrate(db)
        self._connections.may_create = False  # were the file gone later, its disk would be, too

    @property
    def ledger(self) -> Ledger:
        """Who may keep how much, who holds how much, and how turns were used."""
        return Ledger(self._transaction)

    @property
    def history(self) -> History:
        """What became of memories lately."""
        return History(self._transaction)

    @property
    def overview(self) -> Overview:
        """Who has memories, and how many."""
        return Overview(self._transaction)

    # Fingerprints

    def register_fingerprint(self, fingerprint: Fingerprint, details: Mapping[str, object]) -> None:
        """Remember what a fingerprint was made of; the first registration stays."""
        with self._transaction() as db:
            db.execute(sql.INSERT_FINGERPRINT, (fingerprint, json.dumps(dict(details))))

    def fingerprint_details(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        row = self._fetch_one(sql.FINGERPRINT_DETAILS, (fingerprint,))
        return None if row is None else dict(json.loads(row[0]))

    # Turns

    def add_turn(
        self,
        turn: TurnRecord,
        context: Sequence[ChunkRecord | ChunkKey],
        chunks: Sequence[ChunkRecord],
        vectors: Mapping[ChunkKey, bytes],
        sketches: Mapping[ChunkKey, bytes] = MappingProxyType({}),
        *,
        is_part: bool = False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> AddResult:
        """Store a turn in one transaction; the bytes of ``context`` and ``chunks`` must be durable.

        ``chunks`` are new content chunks; other keys in ``turn.chunk_keys``, and context given as a
        bare key, must be in the catalog (:class:`UnknownChunkError`). Live rows stay as they are,
        quarantined ones are replaced. A turn with the scope, fingerprint and chunks of an older one is
        that turn: its id becomes an alias. ``vectors`` and ``sketches`` are what chunks are found by: their
        pooled keys and the keys of their tokens. With ``is_part`` only ``context`` is added, to a turn that
        must be there. What ``before_commit`` raises undoes it all; nobody else writes while it runs.
        """
        with self._transaction() as db:
            result = turn_writes.add_turn(db, turn, context, chunks, vectors, sketches, is_part)
            before_commit()
            return result

    def turns(self, ids: Iterable[TurnId]) -> dict[TurnId, TurnRecord]:
        """The turns that exist, by the id asked for, which may be an alias."""
        with self._transaction("BEGIN") as db:
            resolved = turn_writes.resolve(db, ids)
            turn_rows = db.execute(sql.TURNS_BY_ID, (rows.json_list(set(resolved.values())),)).fetchall()
            found = {turn.turn_id: turn for turn in turn_reads.records(db, turn_rows)}
        return {asked: found[turn_id] for asked, turn_id in resolved.items()}

    def list_turns(
        self,
        scope: Scope,
        limit: int = 100,
        before_created: float | None = None,
        before_id: str | None = None,
    ) -> list[TurnRecord]:
        """Turns that ``scope`` admits, newest first, created strictly before ``before_created``.

        With ``before_id`` also those created just then with a lower id, so that pages miss nothing.
        """
        limits = {"before": before_created, "before_id": before_id, "limit": _checked_limit(limit)}
        with self._transaction("BEGIN") as db:
            return turn_reads.records(
                db, db.execute(sql.LIST_TURNS, rows.scope_to_row(scope) | limits).fetchall()
            )

    def turns_by_age(
        self, namespace: str | None, user_id: str | None, agent_id: str | None
    ) -> dict[TurnId, Fingerprint]:
        """Turns of a namespace, user or agent, ``None`` being any, with their models, oldest first."""
        parameters = {"namespace": namespace, "user_id": user_id, "agent_id": agent_id}
        return {TurnId(row[0]): row[1] for row in self._fetch_all(sql.TURNS_BY_AGE, parameters)}

    def stored_turn(self, turn_id: TurnId) -> StoredTurn | None:
        """A turn, by its own id, with all that is needed to store it elsewhere but its chunks."""
        with self._transaction("BEGIN") as db:
            return turn_reads.stored(db, turn_id)

    def neighbours(self, turn: TurnRecord, num_turns: int) -> list[TurnRecord]:
        """Up to ``num_turns`` turns just before and just after this one in its session, oldest first.

        None without a session. Whether their agents may be seen is for the caller to check.
        """
        parameters = {
            "namespace": turn.scope.namespace,
            "user_id": turn.scope.user_id,
            "session_id": turn.scope.session_id,
            "created": turn.created,
            "turn_id": turn.turn_id,
            "limit": _checked_limit(num_turns),
        }
        with self._transaction("BEGIN") as db:
            before = db.execute(sql.TURNS_BEFORE, parameters).fetchall()
            after = db.execute(sql.TURNS_AFTER, parameters).fetchall()
            return turn_reads.records(db, [*reversed(before), *after])

    def turn_ids(self, scope: Scope, only: TurnFilter) -> frozenset[TurnId]:
        """All turns that ``scope`` and ``only`` admit."""
        parameters = rows.scope_to_row(scope) | rows.filter_to_row(only)
        return frozenset(turn_id for (turn_id,) in self._fetch_all(sql.FILTERED_TURNS, parameters))

    def search_text(
        self,
        query: str,
        scope: Scope,
        fingerprint: Fingerprint,
        limit: int,
        only: TurnFilter = EVERY_TURN,
    ) -> list[TextHit]:
        """The ``limit`` turns in ``scope`` and ``only`` that answer ``query`` best by BM25, best first.

        ``query`` is free text; a turn needs one of its words. Only turns of the model ``fingerprint`` with
        a usable chunk are found; a text stored more than once counts once, as its newest copy. Words are
        weighed by how rare they are in the whole catalog.
        """
        _checked_limit(limit)
        with self._transaction("BEGIN") as db:
            return documents.search(db, query, scope, fingerprint, limit, only)

    def known_turns(self, ids: Iterable[TurnId]) -> frozenset[TurnId]:
        """Which of these ids are durable, as a turn or as an alias of one."""
        with self._connection() as db:
            return frozenset(turn_writes.resolve(db, ids))

    def forget(self, turn_ids: Iterable[TurnId]) -> tuple[str, ...]:
        """Delete turns, given by id or alias, and the chunks nobody else uses.

        Returns the blobs that no row refers to any more; the caller deletes those files.
        """
        with self._transaction() as db:
            return turn_writes.forget(db, turn_ids)

    def expired(self, now: float) -> frozenset[TurnId]:
        """Turns whose time is over at ``now`` (Unix time)."""
        return frozenset(turn_id for (turn_id,) in self._fetch_all(sql.EXPIRED_TURNS, (now,)))

    # Chunks

    def chunk_keys_of_turns(self, ids: Iterable[TurnId]) -> frozenset[ChunkKey]:
        """Content and context chunks of turns given by id or alias."""
        with self._transaction("BEGIN") as db:
            resolved = rows.json_list(turn_writes.resolve(db, ids).values())
            return frozenset(key for (key,) in db.execute(sql.CHUNKS_OF_TURNS, (resolved,)))

    def chunks(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkRecord]:
        """The chunks that exist, quarantined ones included."""
        found = self._fetch_all(sql.CHUNKS_BY_KEY, (rows.json_list(keys),))
        return {record.key: record for record in map(rows.chunk_from_row, found)}

    def all_chunks(self, page: int = 1000) -> Iterator[ChunkRecord]:
        """Every chunk in key order; what changes meanwhile may or may not be seen."""
        last = ""
        while found := self._fetch_all(sql.CHUNKS_AFTER, (last, page)):
            yield from map(rows.chunk_from_row, found)
            last = found[-1][0]

    def child_lengths(self, parent: ChunkKey) -> tuple[int, ...]:
        """Distinct token counts, ascending, of the usable chunks computed right after ``parent``."""
        return tuple(length for (length,) in self._fetch_all(sql.CHILD_LENGTHS, {"parent": parent}))

    def same_text(
        self, content_keys: Iterable[ContentKey], scope: Scope, fingerprint: Fingerprint
    ) -> list[tuple[ChunkRecord, TurnId]]:
        """Usable chunks with these tokens in turns that ``scope`` admits, newest first, with their turns."""
        parameters = {
            "content_keys": rows.json_list(content_keys),
            "fingerprint": fingerprint,
            **rows.scope_to_row(scope),
        }
        found = self._fetch_all(sql.CHUNKS_BY_CONTENT, parameters)
        return [(rows.chunk_from_row(row), TurnId(row[-1])) for row in found]

    def quarantine(self, key: ChunkKey, reason: str, blob: str | None = None) -> bool:
        """No longer offer a chunk, until a turn stores it anew; the first reason stays.

        With ``blob`` only if its bytes are in that file still. Returns whether it was offered until now.
        """
        with self._transaction() as db:
            return turn_writes.quarantine(db, key, reason, blob)

    # What an index follows

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = 10_000
    ) -> list[IndexChange]:
        """The first changes after ``seq`` in order; an entry removed later has no vector already."""
        parameters = (fingerprint, namespace, seq, _checked_limit(limit))
        return [rows.change_from_row(row) for row in self._fetch_all(sql.CHANGES_SINCE, parameters)]

    def vectors(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, bytes]:
        """Pooled keys of these chunks, where they are stored."""
        return {ChunkKey(key): data for key, data in self._fetch_all(sql.VECTORS, (rows.json_list(keys),))}

    def sketches(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, bytes]:
        """Keys of the tokens of these chunks, where they are stored."""
        found = self._fetch_all(sql.SKETCHES, (rows.json_list(keys),))
        return {ChunkKey(key): data for key, data in found}

    def last_seq(self, fingerprint: Fingerprint, namespace: str) -> int:
        """Number of the newest change, 0 without any."""
        row = self._fetch_one(sql.LAST_SEQ, (fingerprint, namespace))
        return int(row[0]) if row else 0

    def stats(self) -> dict[str, int]:
        """Counts; ``chunks``, ``bytes`` and ``tokens`` include what is ``quarantined``."""
        row = self._fetch_one(sql.COUNTS, ())
        return dict(
            zip(
                ("turns", "chunks", "quarantined", "entries", "bytes", "tokens"), row or (0,) * 6, strict=True
            )
        )

    # Upkeep

    def require_writable(self) -> None:
        """Raise :class:`StorageError` where nothing can be stored now."""
        with self._transaction():
            pass

    def drop_overdue(self, now: float, *, dry_run: bool = False) -> Dropped:
        """Forget the turns whose time is over at ``now``, and delete chunks that no turn refers to."""
        with self._transaction() as db:
            dropped = upkeep.drop(db, now)
            if dry_run:
                db.rollback()
            return dropped

    def unnamed(self, relpaths: Iterable[str], delete: Callable[[str], None] | None = None) -> list[str]:
        """Which of these files no row names; ``delete`` is called with each, while nobody can commit."""
        with self._transaction("BEGIN" if delete is None else "BEGIN IMMEDIATE") as db:
            found = [path for (path,) in db.execute(sql.UNUSED_BLOBS, (rows.json_list(relpaths),))]
            if delete is not None:
                for relpath in found:
                    delete(relpath)
            return found

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the catalog file itself, in words; nothing if it is sound."""
        with self._connection() as db:
            return upkeep.damage(db)

    def shrink(self) -> int:
        """Give free pages back to the disk if that is worth while and quick -> bytes freed."""
        with self._connection() as db:
            try:
                return upkeep.shrink(db)
            except sqlite3.OperationalError as err:
                if not is_busy(err):
                    raise
                return 0  # others are writing without a break; the pages will be used again

    def close(self) -> None:
        """Close the connections of all threads, after what they are doing; twice is harmless."""
        with _FORK_GATE.exclusive():
            self._closed = True
            self.drop_connections()

    # Connections

    def drop_connections(self) -> None:
        """Close every connection; the fork gate calls this while none is in use."""
        self._connections.drop()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection; not to be nested."""
        with _FORK_GATE.shared():
            if self._closed:
                raise StorageError(f"catalog {self._path} is closed")
            mine = self._connections.mine()
            try:
                yield mine.connection
            except (sqlite3.Error, UnicodeError, OverflowError) as err:
                mine.has_failed = is_worth_reopening(err)
                raise storage_error(self._path, err) from err

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        # IMMEDIATE takes the write lock at once: a reader that upgrades later fails instead of waiting.
        writes = begin != "BEGIN"
        with self._connection() as db:
            db.execute(begin)
            try:
                if writes:
                    self._connections.require_in_place()
                yield db
                if writes:  # bytes written or deleted meanwhile went to the disk that is there now
                    self._connections.require_in_place()
                db.commit()
            except BaseException:
                db.rollback()
                raise

    def _fetch_all(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[rows.Row]:
        with self._connection() as db:
            return db.execute(statement, parameters).fetchall()

    def _fetch_one(self, statement: str, parameters: Sequence[Any]) -> rows.Row | None:
        with self._connection() as db:
            row: rows.Row | None = db.execute(statement, parameters).fetchone()
            return row


def _checked_limit(limit: int) -> int:
    if limit < 0:
        raise ValueError(f"limit must be >= 0, got {limit}")
    return limit
