"""Transactions that keep the catalog small; the catalog begins and commits them."""

from __future__ import annotations

from dataclasses import dataclass

from kv_agent.storage import retention_statements as retention_sql
from kv_agent.storage import rows, turn_writes
from kv_agent.storage import statements as sql
from kv_agent.storage.schema import Database

# A catalog is rewritten when that makes it a good deal smaller and is done in a moment: whoever wants to
# store meanwhile waits. Free pages that stay are used again.
MIN_FREE_BYTES = 1 << 20
MIN_FREE_FRACTION = 0.25
MAX_REWRITTEN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Rows that went: turns whose time was over and chunks; ``blobs`` are files no row names any more."""

    num_turns: int
    num_chunks: int
    blobs: tuple[str, ...]


def drop(db: Database, now: float) -> Dropped:
    """See :meth:`kv_agent.storage.catalog.Catalog.drop_overdue`."""
    (before,) = db.execute(sql.COUNT_CHUNKS).fetchone()
    expired = [turn_id for (turn_id,) in db.execute(sql.EXPIRED_TURNS, (now,))]
    db.execute(retention_sql.COUNT_EXPIRED, (rows.json_list(expired),))
    blobs = turn_writes.forget(db, expired)
    stray = [key for (key,) in db.execute(sql.UNREFERENCED_CHUNKS)]
    for key in stray:
        turn_writes.remove_entries(db, key)
    keys = rows.json_list(stray)
    stray_blobs = rows.json_list(blob for (blob,) in db.execute(sql.BLOBS_OF_CHUNKS, (keys,)))
    db.execute(sql.DELETE_UNUSED_CHUNKS, (keys,))
    blobs += tuple(blob for (blob,) in db.execute(sql.UNUSED_BLOBS, (stray_blobs,)))
    (after,) = db.execute(sql.COUNT_CHUNKS).fetchone()
    return Dropped(num_turns=len(expired), num_chunks=before - after, blobs=blobs)


def shrink(db: Database) -> int:
    """See :meth:`kv_agent.storage.catalog.Catalog.shrink`."""
    page_bytes, num_pages, num_free = db.execute(sql.PAGES).fetchone()
    if (
        num_free * page_bytes < MIN_FREE_BYTES
        or num_free < num_pages * MIN_FREE_FRACTION
        or (num_pages - num_free) * page_bytes > MAX_REWRITTEN_BYTES
    ):
        return 0
    db.execute(sql.VACUUM)
    db.execute(sql.TRUNCATE_WAL)  # in WAL mode the rewritten pages stand in the log until then
    page_bytes, pages_left, _ = db.execute(sql.PAGES).fetchone()
    return max(0, int(num_pages - pages_left)) * int(page_bytes)


def damage(db: Database) -> list[str]:
    """See :meth:`kv_agent.storage.catalog.Catalog.damage`."""
    found = [text for (text,) in db.execute(sql.INTEGRITY) if text != "ok"]
    found += [
        f"{table} refers to rows of {parent} that are gone" for table, parent in db.execute(sql.FOREIGN_KEYS)
    ]
    return [f"the catalog is damaged, restore it from a copy: {text}" for text in found]
