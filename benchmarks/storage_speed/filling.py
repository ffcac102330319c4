"""A catalog with very many chunks, made in a few large transactions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from benchmarks.storage_speed.turns import Shape, Turns, rows_of
from kv_agent.storage import turn_writes
from kv_agent.storage.catalog import Catalog

SMALL = Shape(name="made up", layers=1, heads=1, head_dim=64)
CHUNK_TOKENS = 24
TURN_CHUNKS = 8
_TURNS_AT_ONCE = 2000


def fill(path: Path, num_chunks: int) -> None:
    """Turns of ``TURN_CHUNKS`` chunks of ``CHUNK_TOKENS`` tokens, all of one user, as rows without bytes."""
    Catalog(path, "never").close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -1000000")
    turns = Turns(SMALL, seed=1)
    for first in range(0, num_chunks // TURN_CHUNKS, _TURNS_AT_ONCE):
        db.execute("BEGIN")
        for _ in range(first, min(first + _TURNS_AT_ONCE, num_chunks // TURN_CHUNKS)):
            turn, chunks = turns.turn([CHUNK_TOKENS] * TURN_CHUNKS)
            records, vectors, sketches = rows_of(turn, chunks)
            turn_writes.add_turn(db, turn, [], records, vectors, sketches, False)
        db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
