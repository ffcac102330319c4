"""The transactions that change what can be found; the catalog begins and commits them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId, TurnRecord
from kv_agent.errors import UnstorableError
from kv_agent.storage import documents, rows
from kv_agent.storage import statements as sql
from kv_agent.storage.history import Happening
from kv_agent.storage.schema import Database


class UnknownChunkError(UnstorableError):
    """A turn refers to chunks (``keys``) that are not, or no longer, in the catalog."""

    def __init__(self, message: str, keys: frozenset[ChunkKey]) -> None:
        super().__init__(message)
        self.keys = keys


class TurnIdTakenError(UnstorableError):
    """The id of a turn names a different one already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddResult:
    """What adding a turn changed; ``turn_id`` is the turn that holds it, maybe an older one.

    ``unused_blobs`` are files whose last quarantined chunk was replaced; their bytes may go.
    """

    new_chunks: frozenset[ChunkKey]
    new_turn: bool
    turn_id: TurnId
    unused_blobs: tuple[str, ...] = ()


def add_turn(
    db: Database,
    turn: TurnRecord,
    context: Sequence[ChunkRecord | ChunkKey],
    chunks: Sequence[ChunkRecord],
    vectors: Mapping[ChunkKey, bytes],
    sketches: Mapping[ChunkKey, bytes],
    is_part: bool,
) -> AddResult:
    """See :meth:`kv_agent.storage.catalog.Catalog.add_turn`."""
    records = [*(item for item in context if isinstance(item, ChunkRecord)), *chunks]
    _require_consistent(turn, records, chunks)
    context_keys = [item.key if isinstance(item, ChunkRecord) else item for item in context]
    keys = {*context_keys, *turn.chunk_keys}

    new_chunks, old_blobs = _put_chunks(db, records, vectors, turn.created)
    _require_known(db, turn, keys)
    late_vectors = [(vector, key) for key, vector in vectors.items() if key in keys]
    db.executemany(sql.SET_MISSING_VECTOR, late_vectors)
    db.executemany(sql.INSERT_SKETCH, [(key, data) for key, data in sketches.items() if key in keys])
    turn_id, new_turn = _put_turn(db, turn, context_keys, is_part)
    _add_missing_entries(db, keys)
    documents.add_missing(db, keys)
    unused = db.execute(sql.UNUSED_BLOBS, (rows.json_list(old_blobs),)).fetchall()
    return AddResult(
        new_chunks=new_chunks,
        new_turn=new_turn,
        turn_id=turn_id,
        unused_blobs=tuple(blob for (blob,) in unused),
    )


def forget(db: Database, turn_ids: Iterable[TurnId], kind: Happening = "forgotten") -> tuple[str, ...]:
    """See :meth:`kv_agent.storage.catalog.Catalog.forget`; ``kind`` is what history calls it."""
    ids = rows.json_list(set(resolve(db, turn_ids).values()))
    keys = rows.json_list(key for (key,) in db.execute(sql.CHUNKS_OF_TURNS, (ids,)))
    db.execute(sql.RECORD_TURNS_REMOVED, (ids,))
    db.execute(sql.DELETE_TURNS_ENTRIES, (ids,))
    documents.remove_of_turns(db, ids)
    db.execute(sql.RECORD_DEPARTURES, {"ids": ids})
    db.execute(sql.DROP_OLD_DEPARTURES)
    db.execute(sql.RECORD_GOING, {"kind": kind, "ids": ids})
    db.execute(sql.DELETE_TURNS, (ids,))
    blobs = rows.json_list(blob for (blob,) in db.execute(sql.BLOBS_OF_CHUNKS, (keys,)))
    db.execute(sql.DELETE_UNUSED_CHUNKS, (keys,))
    return tuple(blob for (blob,) in db.execute(sql.UNUSED_BLOBS, (blobs,)))


def quarantine(db: Database, key: ChunkKey, reason: str, blob: str | None) -> bool:
    """See :meth:`kv_agent.storage.catalog.Catalog.quarantine`."""
    quarantined = bool(
        db.execute(sql.QUARANTINE_CHUNK, {"key": key, "reason": reason, "blob": blob}).rowcount
    )
    if quarantined:
        remove_entries(db, key)
        documents.remove_dead(db, key)
    return quarantined


def remove_entries(db: Database, key: ChunkKey) -> None:
    """Take a chunk out of the index, with a record of it."""
    db.execute(sql.RECORD_CHUNK_REMOVED, (key,))
    db.execute(sql.DELETE_CHUNK_ENTRIES, (key,))


def resolve(db: Database, ids: Iterable[TurnId]) -> dict[TurnId, TurnId]:
    """Id asked for -> id of the turn, for those that exist."""
    return dict(db.execute(sql.RESOLVE_TURNS, {"ids": rows.json_list(ids)}).fetchall())


def _require_consistent(
    turn: TurnRecord, records: Sequence[ChunkRecord], content: Sequence[ChunkRecord]
) -> None:
    if "\0" in turn.turn_id:  # SQLite's JSON functions end a string there, so it could not be looked up
        raise UnstorableError(f"turn id {turn.turn_id!r} contains a NUL character; use another id")
    owner = (turn.fingerprint, turn.scope.namespace, turn.scope.user_id)
    for record in records:
        if (record.fingerprint, record.namespace, record.user_id) != owner:
            raise ValueError(f"chunk {record.key} has another fingerprint or owner than turn {turn.turn_id}")
    if stray := {record.key for record in content} - set(turn.chunk_keys):
        raise ValueError(f"chunks {sorted(stray)} are not among the chunk keys of turn {turn.turn_id}")


def _put_chunks(
    db: Database,
    records: Sequence[ChunkRecord],
    vectors: Mapping[ChunkKey, bytes],
    created: float,
) -> tuple[frozenset[ChunkKey], set[str]]:
    """Insert absent and replace quarantined rows -> their keys, and the blobs that were replaced."""
    by_key = {record.key: record for record in records}
    states = {
        key: (quarantined, blob)
        for key, quarantined, blob in db.execute(sql.CHUNK_STATES, (rows.json_list(by_key),))
    }
    new_chunks: set[ChunkKey] = set()
    old_blobs: set[str] = set()
    for key, record in by_key.items():
        quarantined, old_blob = states.get(key, (True, None))
        if not quarantined:
            continue
        row = rows.chunk_to_row(record, vectors.get(key), created)
        db.execute(sql.INSERT_CHUNK if old_blob is None else sql.REVIVE_CHUNK, row)
        new_chunks.add(key)
        if old_blob is not None:
            old_blobs.add(old_blob)
    return frozenset(new_chunks), old_blobs


def _require_known(db: Database, turn: TurnRecord, keys: Collection[ChunkKey]) -> None:
    parameters = {
        "keys": rows.json_list(keys),
        "fingerprint": turn.fingerprint,
        "namespace": turn.scope.namespace,
        "user_id": turn.scope.user_id,
    }
    unknown = frozenset(key for (key,) in db.execute(sql.UNKNOWN_CHUNKS, parameters))
    if unknown:
        raise UnknownChunkError(
            f"turn {turn.turn_id} refers to chunks that are not stored for its user and model:"
            f" {', '.join(sorted(unknown))}",
            unknown,
        )


def _put_turn(
    db: Database, turn: TurnRecord, context_keys: Sequence[ChunkKey], is_part: bool
) -> tuple[TurnId, bool]:
    """Insert the turn, or make its id an alias of the same turn stored before."""
    same = db.execute(sql.SAME_TURN, (rows.turn_digest(turn),)).fetchone()
    taken = db.execute(sql.RESOLVE_TURN, {"id": turn.turn_id}).fetchone()
    if taken is not None and taken != same:
        raise TurnIdTakenError(f"turn id {turn.turn_id} already names a different turn")
    turn_id: TurnId = turn.turn_id if same is None else same[0]
    if same is None and is_part:
        raise UnstorableError(f"the turn that {turn.turn_id} is a part of is not, or no longer, stored")
    if same is None:
        db.execute(sql.INSERT_TURN, rows.turn_to_row(turn))
        content = [(turn_id, "content", idx, key) for idx, key in enumerate(turn.chunk_keys)]
        db.executemany(sql.INSERT_TURN_CHUNK, content)
    else:
        if not is_part:
            db.execute(sql.PROLONG_TURN, {"turn_id": turn_id, "expires": turn.expires})
            again = {"turn_id": turn_id, "created": turn.created, "pinned": turn.pinned}
            db.execute(sql.USE_AGAIN, again)
        if taken is None:
            db.execute(sql.INSERT_ALIAS, (turn.turn_id, turn_id))
    # Also for a known turn: every chunk row must be used by some turn, or it could never be forgotten.
    known = [key for (key,) in db.execute(sql.CONTEXT_OF_TURN, (turn_id,))]
    added = [key for key in dict.fromkeys(context_keys) if key not in known]
    context = [(turn_id, "context", len(known) + idx, key) for idx, key in enumerate(added)]
    db.executemany(sql.INSERT_TURN_CHUNK, context)
    return turn_id, same is None


def _add_missing_entries(db: Database, keys: Iterable[ChunkKey]) -> None:
    (last,) = db.execute(sql.LAST_ENTRY).fetchone()
    db.execute(sql.ADD_MISSING_ENTRIES, (rows.json_list(keys),))
    # Entry ids are never used twice (AUTOINCREMENT), so all later ones are those just added.
    db.execute(sql.RECORD_ADDED, (last,))
