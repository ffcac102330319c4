"""The tables of a catalog and the ordered migrations that make them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Protocol

from kv_agent.errors import StorageError
from kv_agent.storage.history_tables import M008
from kv_agent.storage.retention_tables import M007
from kv_agent.storage.totals_tables import M009
from kv_agent.storage.words import words


class Database(Protocol):
    """The part of a SQLite connection that is used outside ``catalog.py``."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...
    def executemany(self, sql: str, parameters: Any, /) -> Any: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...


def m001_initial(db: Database) -> None:
    """Everything the first release needs."""
    for statement in _M001:
        db.execute(statement)


def m002_text_search(db: Database) -> None:
    """A full-text index, filled from the turns that are there; later releases must not change this."""
    for statement in _M002:
        db.execute(statement)
    turns = db.execute(_M002_TURNS)
    for doc_id, (turn_id, *owner, agent_id, session_id, text, content_keys) in enumerate(turns, start=1):
        named = (("o",), ("a", agent_id), ("s", session_id))
        labels = (kind + _digest(json.dumps([*owner, *name])) for kind, *name in named)
        db.execute("INSERT INTO turn_docs VALUES (?, ?, ?)", (doc_id, turn_id, _digest(content_keys)))
        db.execute(
            "INSERT INTO turn_words (rowid, scope, words) VALUES (?, ?, ?)",
            (doc_id, " ".join(labels), " ".join(words(text))),
        )


def m003_sketches(db: Database) -> None:
    """Keys of single tokens, see ``retrieval/sketches.py``; chunks stored before have none."""
    db.execute(_M003)


def m004_expiry(db: Database) -> None:
    """When a turn is forgotten by itself; those stored before never are."""
    for statement in _M004:
        db.execute(statement)


def m005_content(db: Database) -> None:
    """To find the chunks of a text wherever it stood."""
    db.execute(_M005)


def m006_codecs(db: Database) -> None:
    """How a chunk's bytes are written; those stored before are KV as it is."""
    db.execute(_M006)


def m007_retention(db: Database) -> None:
    """Who may keep how much, how turns were used, and exact totals."""
    for statement in M007:
        db.execute(statement)


def m008_history(db: Database) -> None:
    """The last comings and goings of memories; those before are not known."""
    for statement in M008:
        db.execute(statement)


def m009_totals(db: Database) -> None:
    """What the whole store holds and has let go, exact and without counting."""
    for statement in M009:
        db.execute(statement)


def m010_checksums(db: Database) -> None:
    """Checksums are no longer of SHA-256 alone; those that are there stay."""
    db.execute(_M010)


MIGRATIONS: tuple[Callable[[Database], None], ...] = (
    m001_initial,
    m002_text_search,
    m003_sketches,
    m004_expiry,
    m005_content,
    m006_codecs,
    m007_retention,
    m008_history,
    m009_totals,
    m010_checksums,
)

_USES_FTS5 = "SELECT fts5_source_id()"
_VERSION = "SELECT coalesce(max(version), 0) FROM schema_migrations"


def require_fts5(db: Database) -> None:
    """Raise when this Python's SQLite was built without full-text search."""
    try:
        db.execute(_USES_FTS5)
    except sqlite3.OperationalError as err:
        if "no such function" not in str(err):
            raise
        raise StorageError(
            f"SQLite {sqlite3.sqlite_version} of this Python was built without FTS5, which the catalog"
            " needs to search text; use a Python whose sqlite3 module has it"
        ) from err


def migrate(db: Database) -> None:
    """Bring the tables up to date; refuses a schema that a newer release made."""
    if _is_current(db):  # without the write lock: others may be writing, and nobody may on a read-only disk
        return
    while True:
        # One transaction per migration, so that it is committed together with its record. Taking the
        # write lock before looking keeps two processes from both running it.
        db.execute("BEGIN IMMEDIATE")
        try:
            done = _migrate_once(db)
            db.commit()
        except BaseException:
            db.rollback()
            raise
        if done:
            return


def require_known_schema(version: int) -> None:
    """Raise when this release is too old to understand schema ``version``."""
    if version > len(MIGRATIONS):
        raise StorageError(
            f"the catalog has schema version {version}, this release of kv_agent knows up to"
            f" {len(MIGRATIONS)}; upgrade kv_agent or use another store directory"
        )


def _is_current(db: Database) -> bool:
    made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_migrations'").fetchone()
    return bool(made) and db.execute(_VERSION).fetchone()[0] == len(MIGRATIONS)


def _migrate_once(db: Database) -> bool:
    db.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations"
        " (version INTEGER PRIMARY KEY, name TEXT NOT NULL, applied REAL NOT NULL)"
    )
    version: int = db.execute(_VERSION).fetchone()[0]
    require_known_schema(version)
    if version == len(MIGRATIONS):
        return True
    migration = MIGRATIONS[version]
    migration(db)
    db.execute(
        "INSERT INTO schema_migrations (version, name, applied) VALUES (?, ?, ?)",
        (version + 1, migration.__name__, time.time()),
    )
    return False


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_M001 = (
    """
    CREATE TABLE fingerprints (
        fingerprint TEXT PRIMARY KEY,
        details TEXT NOT NULL
    )
    """,
    # digest: what makes two turns the same one, see rows.turn_digest.
    """
    CREATE TABLE turns (
        turn_id TEXT PRIMARY KEY,
        digest TEXT NOT NULL UNIQUE,
        namespace TEXT NOT NULL,
        user_id TEXT NOT NULL,
        agent_id TEXT,
        session_id TEXT,
        fingerprint TEXT NOT NULL,
        num_tokens INTEGER NOT NULL,
        text TEXT NOT NULL,
        created REAL NOT NULL,
        metadata TEXT NOT NULL
    )
    """,
    "CREATE INDEX turns_by_scope ON turns (namespace, user_id, created)",
    # Ids under which an already known turn was stored again.
    """
    CREATE TABLE turn_aliases (
        alias TEXT PRIMARY KEY,
        turn_id TEXT NOT NULL REFERENCES turns (turn_id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX turn_aliases_by_turn ON turn_aliases (turn_id)",
    # A row with a quarantine reason stays, so that it can be told why, until a turn brings new bytes.
    """
    CREATE TABLE chunks (
        key TEXT PRIMARY KEY,
        content_key TEXT NOT NULL,
        parent TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        namespace TEXT NOT NULL,
        user_id TEXT NOT NULL,
        start INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        token_ids BLOB NOT NULL,
        blob TEXT NOT NULL,
        tensor TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        num_bytes INTEGER NOT NULL,
        vector BLOB,
        created REAL NOT NULL,
        quarantine_reason TEXT
    )
    """,
    "CREATE INDEX chunks_by_parent ON chunks (parent, num_tokens)",
    "CREATE INDEX chunks_by_blob ON chunks (blob)",
    """
    CREATE TABLE turn_chunks (
        turn_id TEXT NOT NULL REFERENCES turns (turn_id) ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('content', 'context')),
        idx INTEGER NOT NULL,
        chunk_key TEXT NOT NULL REFERENCES chunks (key),
        PRIMARY KEY (turn_id, role, idx)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX turn_chunks_by_chunk ON turn_chunks (chunk_key, role)",
    # Invariant: an entry exists exactly for every content chunk of a turn that has a vector and is not
    # quarantined.
    """
    CREATE TABLE entries (
        entry_id INTEGER PRIMARY KEY AUTOINCREMENT,
        turn_id TEXT NOT NULL REFERENCES turns (turn_id),
        chunk_key TEXT NOT NULL REFERENCES chunks (key),
        UNIQUE (turn_id, chunk_key)
    )
    """,
    "CREATE INDEX entries_by_chunk ON entries (chunk_key)",
    # A removal must still name what went away after its turn, chunk and entry rows are gone, so a
    # change repeats their ids and has no foreign keys.
    """
    CREATE TABLE changes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        fingerprint TEXT NOT NULL,
        namespace TEXT NOT NULL,
        entry_id INTEGER NOT NULL,
        removed INTEGER NOT NULL,
        chunk_key TEXT NOT NULL,
        content_key TEXT NOT NULL,
        turn_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        agent_id TEXT,
        session_id TEXT
    )
    """,
    "CREATE INDEX changes_by_index ON changes (fingerprint, namespace, seq)",
)

_M002 = (
    # Invariant: a document exists exactly for every turn with a content chunk that is not quarantined.
    # copy_key: equal for turns with the same content. AUTOINCREMENT: the newest has the highest id.
    """
    CREATE TABLE turn_docs (
        doc_id INTEGER PRIMARY KEY AUTOINCREMENT,
        turn_id TEXT NOT NULL UNIQUE REFERENCES turns (turn_id),
        copy_key TEXT NOT NULL
    )
    """,
    # It keeps its own copy of the words, small beside their KV: what is removed is then exactly what was
    # put in, even if another release finds other words in the same text. words.py has already found
    # them, so this tokenizer has only to split at spaces.
    "CREATE VIRTUAL TABLE turn_words USING fts5 (scope, words, tokenize = 'ascii')",
)
_M003 = """
    CREATE TABLE sketches (
        chunk_key TEXT PRIMARY KEY REFERENCES chunks (key) ON DELETE CASCADE,
        keys BLOB NOT NULL
    )
"""
_M004 = (
    "ALTER TABLE turns ADD COLUMN expires REAL",
    "CREATE INDEX turns_by_expiry ON turns (expires) WHERE expires IS NOT NULL",
)
_M005 = "CREATE INDEX chunks_by_content ON chunks (content_key)"
_M006 = "ALTER TABLE chunks ADD COLUMN codec TEXT NOT NULL DEFAULT 'raw'"
_M010 = "ALTER TABLE chunks RENAME COLUMN sha256 TO checksum"
_M002_TURNS = """
    SELECT t.turn_id, t.fingerprint, t.namespace, t.user_id, t.agent_id, t.session_id, t.text,
           (SELECT json_group_array(content_key) FROM (
                SELECT c.content_key FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
                WHERE tc.turn_id = t.turn_id AND tc.role = 'content' ORDER BY tc.idx))
    FROM turns t
    WHERE EXISTS (
        SELECT 1 FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
        WHERE tc.turn_id = t.turn_id AND tc.role = 'content' AND c.quarantine_reason IS NULL)
    ORDER BY t.created, t.turn_id
"""
