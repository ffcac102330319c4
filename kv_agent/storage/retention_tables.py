"""The tables of migration 7: who may keep how much, and exact totals that triggers keep up to date."""

from __future__ import annotations

_ADD = """
    ON CONFLICT (namespace) DO UPDATE SET num_bytes = num_bytes + excluded.num_bytes,
        num_tokens = num_tokens + excluded.num_tokens, num_memories = num_memories + excluded.num_memories
"""
_ADD_TO_BLOB = "ON CONFLICT (blob) DO UPDATE SET num_bytes = num_bytes + excluded.num_bytes"
_DROP_OLD_BLOB = """
    DELETE FROM blobs WHERE blob = OLD.blob AND NOT EXISTS (SELECT 1 FROM chunks WHERE blob = OLD.blob)
"""

M007 = (
    "ALTER TABLE turns ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE turns ADD COLUMN hits INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE turns ADD COLUMN last_used REAL",
    "CREATE INDEX turns_pinned ON turns (namespace) WHERE pinned",
    """
    CREATE INDEX turns_by_session ON turns (namespace, user_id, session_id, created)
        WHERE session_id IS NOT NULL
    """,
    # The limits of all that have no row are those of the namespace '', which no turn can be in.
    """
    CREATE TABLE namespaces (
        namespace TEXT PRIMARY KEY,
        policy TEXT,
        max_bytes INTEGER,
        max_tokens INTEGER,
        max_memories INTEGER,
        window_tokens INTEGER,
        ttl_s REAL
    )
    """,
    # Invariant: the first three are the sums over chunks and turns of the namespace.
    """
    CREATE TABLE holdings (
        namespace TEXT PRIMARY KEY,
        num_bytes INTEGER NOT NULL DEFAULT 0,
        num_tokens INTEGER NOT NULL DEFAULT 0,
        num_memories INTEGER NOT NULL DEFAULT 0,
        evicted_turns INTEGER NOT NULL DEFAULT 0,
        evicted_bytes INTEGER NOT NULL DEFAULT 0,
        refused_turns INTEGER NOT NULL DEFAULT 0
    )
    """,
    # A file keeps all its bytes until the last chunk in it goes.
    "CREATE TABLE blobs (blob TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL)",
    "CREATE TABLE disk (num_bytes INTEGER NOT NULL)",
    # The last turns that went, so that whoever waits for one to be stored does not wait for ever.
    "CREATE TABLE departures (seq INTEGER PRIMARY KEY AUTOINCREMENT, turn_id TEXT NOT NULL)",
    "CREATE INDEX departures_by_turn ON departures (turn_id)",
    """
    INSERT INTO holdings (namespace, num_bytes, num_tokens, num_memories)
    SELECT namespace, sum(num_bytes), sum(num_tokens), sum(num_memories) FROM (
        SELECT namespace, num_bytes, num_tokens, 0 AS num_memories FROM chunks
        UNION ALL SELECT namespace, 0, 0, num_tokens > 0 FROM turns)
    GROUP BY namespace
    """,
    "INSERT INTO blobs SELECT blob, sum(num_bytes) FROM chunks GROUP BY blob",
    "INSERT INTO disk SELECT coalesce(sum(num_bytes), 0) FROM blobs",
    f"""
    CREATE TRIGGER chunk_added AFTER INSERT ON chunks BEGIN
        INSERT INTO holdings (namespace, num_bytes, num_tokens)
        VALUES (NEW.namespace, NEW.num_bytes, NEW.num_tokens) {_ADD};
        INSERT INTO blobs VALUES (NEW.blob, NEW.num_bytes) {_ADD_TO_BLOB};
    END
    """,
    f"""
    CREATE TRIGGER chunk_written_anew AFTER UPDATE OF blob, num_bytes ON chunks BEGIN
        UPDATE holdings SET num_bytes = num_bytes - OLD.num_bytes + NEW.num_bytes
        WHERE namespace = NEW.namespace;
        INSERT INTO blobs
        VALUES (NEW.blob, NEW.num_bytes - CASE WHEN NEW.blob = OLD.blob THEN OLD.num_bytes ELSE 0 END)
        {_ADD_TO_BLOB};
        {_DROP_OLD_BLOB};
    END
    """,
    f"""
    CREATE TRIGGER chunk_removed AFTER DELETE ON chunks BEGIN
        UPDATE holdings SET num_bytes = num_bytes - OLD.num_bytes, num_tokens = num_tokens - OLD.num_tokens
        WHERE namespace = OLD.namespace;
        {_DROP_OLD_BLOB};
    END
    """,
    f"""
    CREATE TRIGGER turn_added AFTER INSERT ON turns BEGIN
        INSERT INTO holdings (namespace, num_memories) VALUES (NEW.namespace, NEW.num_tokens > 0) {_ADD};
    END
    """,
    """
    CREATE TRIGGER turn_removed AFTER DELETE ON turns BEGIN
        UPDATE holdings SET num_memories = num_memories - (OLD.num_tokens > 0)
        WHERE namespace = OLD.namespace;
    END
    """,
    """
    CREATE TRIGGER blob_added AFTER INSERT ON blobs BEGIN
        UPDATE disk SET num_bytes = num_bytes + NEW.num_bytes;
    END
    """,
    """
    CREATE TRIGGER blob_changed AFTER UPDATE ON blobs BEGIN
        UPDATE disk SET num_bytes = num_bytes - OLD.num_bytes + NEW.num_bytes;
    END
    """,
    """
    CREATE TRIGGER blob_removed AFTER DELETE ON blobs BEGIN
        UPDATE disk SET num_bytes = num_bytes - OLD.num_bytes;
    END
    """,
)
