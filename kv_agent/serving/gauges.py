"""What a server process can tell of its store and of itself, as plain numbers. Asks nothing that takes long.

The engine's own numbers are in :mod:`kv_agent.vllm_plugin.tally`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kv_agent.manager import CacheManager
from kv_agent.storage.ledger import Ledger

LARGEST = 50  # namespaces that are told one by one

# Family -> label value ("" where there is no label) -> number.
Readings = Mapping[str, Mapping[str, float]]
Together = Literal["livemostrecent", "livemax", "livesum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``together`` is how numbers of several processes of one server become one."""

    about: str
    label: str | None = None
    together: Together = "livemostrecent"  # all tell of the same store


FAMILIES: dict[str, Family] = {
    "disk_bytes": Family(about="bytes of the store's files of KV"),
    "disk_limit_bytes": Family(about="bytes these files may take; beyond it memories go"),
    "disk_free_bytes": Family(about="bytes the disk of the store still takes, whatever that limit"),
    "disk_chunks": Family(about="chunks in these files"),
    "store_memories": Family(about="memories of all namespaces"),
    "store_tokens": Family(about="tokens of all chunks, each chunk counted once"),
    "store_bytes": Family(about="bytes of all chunks, each chunk counted once"),
    "namespace_memories": Family(
        about=f"memories of the {LARGEST} namespaces with most bytes", label="namespace"
    ),
    "namespace_tokens": Family(about="tokens of the chunks of these namespaces", label="namespace"),
    "namespace_bytes": Family(about="bytes of the chunks of these namespaces", label="namespace"),
    "gone_memories": Family(
        about="memories that went, whoever let them go, since the store counts them; never falls", label="how"
    ),
    "index_entries": Family(
        about="what can be found: chunks by keys in indexes in memory (latent), memories by words (lexical)",
        label="kind",
        together="livemax",
    ),
    "index_bytes": Family(about="bytes of the indexes in memory", label="kind", together="livemax"),
    "index_lag": Family(
        about="changes of the catalog behind which the indexes in memory are at most, until the next search",
        together="livemax",
    ),
    "listeners": Family(about="open WebSockets of /memory/stream", together="livesum"),
    "requests_in_progress": Family(
        about="requests that a thread works on or that wait for one", together="livesum"
    ),
}


def readings(manager: CacheManager, *, num_listeners: int, num_in_progress: int) -> Readings:
    """All of them now; raises :class:`~kv_agent.errors.StorageError` where the store cannot be read."""
    store = manager.store
    on_disk = store.disk_counts()
    size = manager.index.size
    numbers = _held(store.catalog.ledger)
    return {
        **numbers,
        "disk_bytes": {"": on_disk["bytes"]},
        "disk_limit_bytes": {"": on_disk["limit"]},
        "disk_free_bytes": {"": store.free_bytes()},
        "disk_chunks": {"": on_disk["chunks"]},
        "index_entries": {"latent": size.num_entries, **numbers["index_entries"]},
        "index_bytes": {"latent": size.num_bytes},
        "index_lag": {"": index_lag(manager)},
        "listeners": {"": num_listeners},
        "requests_in_progress": {"": num_in_progress},
    }


def index_lag(manager: CacheManager) -> int:
    """Changes of the catalog behind which the index in memory that is furthest behind is, at most."""
    catalog = manager.store.catalog
    return max(
        (
            catalog.last_seq(manager.fingerprint, namespace) - seq
            for namespace, seq in manager.index.followed.items()
        ),
        default=0,
    )


def _held(ledger: Ledger) -> dict[str, dict[str, float]]:
    """What the catalog keeps totals of; no number of rows makes it slower."""
    totals, largest = ledger.totals(), ledger.largest(LARGEST)
    return {
        "store_memories": {"": totals.held.num_memories},
        "store_tokens": {"": totals.held.num_tokens},
        "store_bytes": {"": totals.held.num_bytes},
        "namespace_memories": {name: held.num_memories for name, held in largest.items()},
        "namespace_tokens": {name: held.num_tokens for name, held in largest.items()},
        "namespace_bytes": {name: held.num_bytes for name, held in largest.items()},
        "gone_memories": {
            "evicted": totals.evicted_turns,
            "refused": totals.refused_turns,
            "forgotten": totals.forgotten_turns,
            "expired": totals.expired_turns,
        },
        "index_entries": {"lexical": totals.num_documents},
    }
