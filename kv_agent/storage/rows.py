"""Catalog rows to values and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    ContentKey,
    Fingerprint,
    IndexChange,
    Scope,
    TurnFilter,
    TurnId,
    TurnRecord,
    token_bytes,
    tokens_from_bytes,
)

Row = Sequence[Any]


def json_list(values: Iterable[str]) -> str:
    """One SQL parameter that holds any number of strings; ``json_each`` takes it apart."""
    return json.dumps(list(values))


def turn_digest(turn: TurnRecord) -> str:
    """Equal for turns that are the same memory: same scope, fingerprint and chunks."""
    scope = turn.scope
    parts = [scope.namespace, scope.user_id, scope.agent_id, scope.session_id, turn.fingerprint]
    return hashlib.sha256(json.dumps([parts, turn.chunk_keys]).encode()).hexdigest()


def turn_to_row(turn: TurnRecord) -> dict[str, Any]:
    return {
        "turn_id": turn.turn_id,
        "digest": turn_digest(turn),
        **scope_to_row(turn.scope),
        "fingerprint": turn.fingerprint,
        "num_tokens": turn.num_tokens,
        "text": turn.text,
        "created": turn.created,
        "metadata": json.dumps(dict(turn.metadata)),
        "expires": turn.expires,
        "pinned": turn.pinned,
    }


def scope_to_row(scope: Scope) -> dict[str, Any]:
    return {
        "namespace": scope.namespace,
        "user_id": scope.user_id,
        "agent_id": scope.agent_id,
        "session_id": scope.session_id,
    }


def filter_to_row(only: TurnFilter) -> dict[str, Any]:
    return {"since": only.since, "until": only.until, "metadata": json.dumps(dict(only.metadata))}


TURN_COLUMNS = (
    "t.turn_id, t.namespace, t.user_id, t.agent_id, t.session_id, t.fingerprint, t.num_tokens, t.text,"
    " t.created, t.metadata, t.expires, t.pinned"
)


def turn_from_row(row: Row, chunk_keys: Sequence[ChunkKey]) -> TurnRecord:
    """A row of ``TURN_COLUMNS`` and the keys of its content chunks in order."""
    return TurnRecord(
        turn_id=TurnId(row[0]),
        scope=Scope(namespace=row[1], user_id=row[2], agent_id=row[3], session_id=row[4]),
        fingerprint=Fingerprint(row[5]),
        chunk_keys=tuple(chunk_keys),
        num_tokens=row[6],
        text=row[7],
        created=row[8],
        metadata=json.loads(row[9]),
        expires=row[10],
        pinned=bool(row[11]),
    )


def chunk_to_row(record: ChunkRecord, vector: bytes | None, created: float) -> dict[str, Any]:
    return {
        "key": record.key,
        "content_key": record.content_key,
        "parent": record.parent,
        "fingerprint": record.fingerprint,
        "namespace": record.namespace,
        "user_id": record.user_id,
        "start": record.start,
        "num_tokens": record.num_tokens,
        "token_ids": token_bytes(record.token_ids),
        "blob": record.blob,
        "tensor": record.tensor,
        "checksum": record.checksum,
        "num_bytes": record.num_bytes,
        "codec": record.codec,
        "vector": vector,
        "created": created,
    }


CHUNK_COLUMNS = (
    "key, content_key, parent, fingerprint, namespace, user_id, start, token_ids, blob, tensor, checksum,"
    " num_bytes, codec, quarantine_reason IS NOT NULL"
)


def chunk_from_row(row: Row) -> ChunkRecord:
    """A row of ``CHUNK_COLUMNS``."""
    return ChunkRecord(
        key=ChunkKey(row[0]),
        content_key=ContentKey(row[1]),
        parent=ChunkKey(row[2]),
        fingerprint=Fingerprint(row[3]),
        namespace=row[4],
        user_id=row[5],
        start=row[6],
        token_ids=tokens_from_bytes(row[7]),
        blob=row[8],
        tensor=row[9],
        checksum=row[10],
        num_bytes=row[11],
        codec=row[12],
        quarantined=bool(row[13]),
    )


def change_from_row(row: Row) -> IndexChange:
    """seq, entry, chunk key, content key, turn, namespace, user, agent, session, vector."""
    return IndexChange(
        seq=row[0],
        entry_id=row[1],
        chunk_key=ChunkKey(row[2]),
        content_key=ContentKey(row[3]),
        turn_id=TurnId(row[4]),
        scope=Scope(namespace=row[5], user_id=row[6], agent_id=row[7], session_id=row[8]),
        vector=row[9],
    )
