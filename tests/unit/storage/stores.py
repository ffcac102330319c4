"""What lies in the directory of a store, and whether it gives chunks back bit for bit."""

from __future__ import annotations

from pathlib import Path

from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.storage.builders import same_bits


def blob_files(store: LocalStore) -> list[Path]:
    return sorted(path for path in store_root(store).glob("blobs/*/*"))


def store_root(store: LocalStore) -> Path:
    return store._catalog._path.parent


def holds(store: LocalStore, chunks: list[NewChunk]) -> bool:
    records = store.catalog.chunks(chunk.key for chunk in chunks)
    return all(same_bits(store.load(records[chunk.key]).kv_L2THD, chunk.kv) for chunk in chunks)


def counts(store: LocalStore) -> set[int]:
    """All that a store counts; what its tiers may hold and have served so far left out."""
    stats = store.stats()
    return {stats[name] for name in stats if not name.endswith(("_hits", "_limit"))}
