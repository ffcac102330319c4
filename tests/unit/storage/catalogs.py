"""Rows for a catalog in a few words, and what an index that follows a catalog would hold."""

from __future__ import annotations

from kv_agent.chunks import ChunkKey, ChunkRecord, Scope
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, vector_for


def records(*lengths: int, seed: int = 0, scope: Scope | None = None, blob: str = "b0") -> list[ChunkRecord]:
    return [record_of(chunk, scope, blob) for chunk in chain(*lengths, seed=seed, scope=scope)]


def vectors(chunks: list[ChunkRecord]) -> dict[ChunkKey, bytes]:
    return {chunk.key: vector_for(chunk.key) for chunk in chunks}


def found(catalog: Catalog, seq: int = 0, limit: int = 10_000) -> set[tuple[str, str]]:
    """What an index that follows all changes would hold: (turn, chunk)."""
    entries: dict[int, tuple[str, str]] = {}
    while changes := catalog.changes_since(FINGERPRINT, "default", seq, limit):
        for change in changes:
            if change.vector is None:
                entries.pop(change.entry_id, None)
            else:
                assert change.vector == vector_for(change.chunk_key)
                entries[change.entry_id] = (change.turn_id, change.chunk_key)
        seq = changes[-1].seq
    assert len(set(entries.values())) == len(entries)
    return set(entries.values())
