"""Memories of a store to an archive and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint, TurnId, TurnRecord
from kv_agent.errors import ConfigError, StorageError
from kv_agent.storage import rows
from kv_agent.storage.archive import Archive, ArchivedTurn, ArchiveWriter
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.turn_reads import StoredTurn
from kv_agent.storage.turn_writes import AddResult, TurnIdTakenError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """How much was exported; ``left_out`` names, with the reason, turns whose own chunks are not sound."""

    num_turns: int
    num_chunks: int
    left_out: Mapping[TurnId, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """How much was in an archive and what was new here.

    ``renamed`` are turns whose id names another turn here, with the id they have got.
    """

    num_turns: int
    num_new_turns: int
    num_new_chunks: int
    renamed: Mapping[TurnId, TurnId]


def export_turns(
    store: LocalStore,
    file: BinaryIO,
    *,
    namespace: str | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
) -> Exported:
    """Write the turns of a namespace, user or agent, or all, to an empty file; one at a time in memory.

    What others store or forget meanwhile may or may not be in it.
    """
    catalog = store.catalog
    chosen = catalog.turns_by_age(namespace, user_id, agent_id)
    details = {name: catalog.fingerprint_details(name) for name in sorted(set(chosen.values()))}
    writer = ArchiveWriter(file, details, time.time())
    written: set[ChunkKey] = set()
    left_out: dict[TurnId, str] = {}
    num_turns = 0
    for turn_id in chosen:
        stored = catalog.stored_turn(turn_id)
        if stored is None:  # forgotten meanwhile
            continue
        try:
            archived = _archived(store, stored, written)
        except StorageError as err:
            if catalog.stored_turn(turn_id) is not None:
                left_out[turn_id] = str(err)
            continue
        if not (archived.context or archived.turn.chunk_keys):  # a prompt prefix that is not sound
            continue
        writer.add(archived)
        written.update(chunk.key for chunk in archived.chunks)
        num_turns += 1
    writer.close()
    return Exported(num_turns=num_turns, num_chunks=len(written), left_out=left_out)


def import_archive(store: LocalStore, archive: Archive, only: Fingerprint | None = None) -> Imported:
    """Store every turn of an archive as it was: scope, text, time, metadata, time to live and ids.

    Each turn is stored in one transaction, so an import that is interrupted can simply be repeated: what is
    stored already stays as it is. With ``only``, a turn of another model is a :class:`ConfigError` before
    anything is stored.
    """
    _require_models(store, archive, only)
    num_turns = num_new_turns = num_new_chunks = 0
    renamed: dict[TurnId, TurnId] = {}
    for archived in archive.turns():
        turn, result = _put(store, archived)
        if turn.turn_id != archived.turn.turn_id:
            renamed[archived.turn.turn_id] = turn.turn_id
        num_turns += 1
        num_new_turns += result.new_turn
        num_new_chunks += len(result.new_chunks)
    return Imported(
        num_turns=num_turns, num_new_turns=num_new_turns, num_new_chunks=num_new_chunks, renamed=renamed
    )


def _archived(store: LocalStore, stored: StoredTurn, written: set[ChunkKey]) -> ArchivedTurn:
    """A turn with those of its chunks that no turn before had; raises if one of its own is not sound."""
    turn, context = stored.turn, list(stored.context)
    records = store.catalog.chunks([*context, *turn.chunk_keys])
    vectors, sketches = store.catalog.vectors(records), store.catalog.sketches(records)
    chunks: dict[ChunkKey, NewChunk] = {}
    for key in dict.fromkeys([*context, *turn.chunk_keys]):
        if key in written:
            continue
        try:
            chunks[key] = _loaded(store, key, records.get(key), vectors.get(key), sketches.get(key))
        except StorageError:
            if key in turn.chunk_keys:
                raise
            context.remove(key)  # what it stood behind only lets more of it be exact
    return ArchivedTurn(
        turn=turn, aliases=stored.aliases, context=tuple(context), chunks=tuple(chunks.values())
    )


def _loaded(
    store: LocalStore,
    key: ChunkKey,
    record: ChunkRecord | None,
    vector: bytes | None,
    sketch: bytes | None,
) -> NewChunk:
    if record is None or record.quarantined:
        raise StorageError(f"chunk {key} is quarantined")
    return NewChunk(
        key=key,
        content_key=record.content_key,
        parent=record.parent,
        start=record.start,
        token_ids=record.token_ids,
        kv=store.stored(record),
        vector=vector,
        sketch=sketch,
    )


def _require_models(store: LocalStore, archive: Archive, only: Fingerprint | None) -> None:
    """Check and register the models of an archive before anything else of it is stored."""
    others = sorted(set(archive.fingerprints) - {only})
    if only is not None and others:
        raise ConfigError(
            f"the archive holds memories of model {', '.join(others)}, not only of {only}; nothing was"
            " imported. Export that model's memories from a store of their own, or leave out --fingerprint"
        )
    for name, details in archive.fingerprints.items():
        known = store.catalog.fingerprint_details(name)
        if details is not None and known is not None and details != known:
            differing = sorted(part for part in {*details, *known} if details.get(part) != known.get(part))
            raise ConfigError(
                f"memories of model {name} differ from this store's in {', '.join(differing)}, so they could"
                " not be searched together; nothing was imported. Import them into another store"
            )
    for name, details in archive.fingerprints.items():
        if details is not None:
            store.catalog.register_fingerprint(name, details)


def _put(store: LocalStore, archived: ArchivedTurn) -> tuple[TurnRecord, AddResult]:
    """Store one turn and its aliases -> the turn as it was stored, and what is new."""
    turn = archived.turn
    chunks = {chunk.key: chunk for chunk in archived.chunks}
    context = [chunks.get(key, key) for key in archived.context]
    content = [chunk for key, chunk in chunks.items() if key in turn.chunk_keys]
    try:
        result = store.put_turn(turn, context, content)
    except TurnIdTakenError:
        turn = replace(turn, turn_id=TurnId(f"{turn.turn_id}-{rows.turn_digest(turn)[:16]}"))
        result = store.put_turn(turn, context, content)
    for alias in archived.aliases:
        if store.catalog.known_turns([alias]) == frozenset():
            store.put_turn(replace(turn, turn_id=alias), [], [])
    return turn, result
