"""The catalog's SQL. A parameter that stands for many strings is a JSON list, which has no size limit."""

from __future__ import annotations

from kv_agent.storage.rows import CHUNK_COLUMNS, TURN_COLUMNS

INSERT_FINGERPRINT = "INSERT OR IGNORE INTO fingerprints (fingerprint, details) VALUES (?, ?)"
FINGERPRINT_DETAILS = "SELECT details FROM fingerprints WHERE fingerprint = ?"

# Chunks
CHUNKS_BY_KEY = f"SELECT {CHUNK_COLUMNS} FROM chunks WHERE key IN (SELECT value FROM json_each(?))"
CHUNKS_AFTER = f"SELECT {CHUNK_COLUMNS} FROM chunks WHERE key > ? ORDER BY key LIMIT ?"
# With the newest turn that a scope admits and that has the chunk as content.
CHUNKS_BY_CONTENT = f"""
    SELECT * FROM (
        SELECT {CHUNK_COLUMNS}, (
            SELECT t.turn_id FROM turn_chunks tc JOIN turns t ON t.turn_id = tc.turn_id
            WHERE tc.chunk_key = key AND tc.role = 'content'
                AND (:agent_id IS NULL OR t.agent_id = :agent_id)
                AND (:session_id IS NULL OR t.session_id = :session_id)
            ORDER BY t.created DESC, t.turn_id LIMIT 1) AS owner
        FROM chunks
        WHERE content_key IN (SELECT value FROM json_each(:content_keys)) AND fingerprint = :fingerprint
            AND namespace = :namespace AND user_id = :user_id AND quarantine_reason IS NULL
        ORDER BY created DESC, key)
    WHERE owner IS NOT NULL
"""
CHUNK_STATES = """
    SELECT key, quarantine_reason IS NOT NULL, blob FROM chunks
    WHERE key IN (SELECT value FROM json_each(?))
"""
INSERT_CHUNK = """
    INSERT INTO chunks (key, content_key, parent, fingerprint, namespace, user_id, start, num_tokens,
                        token_ids, blob, tensor, checksum, num_bytes, codec, vector, created)
    VALUES (:key, :content_key, :parent, :fingerprint, :namespace, :user_id, :start, :num_tokens,
            :token_ids, :blob, :tensor, :checksum, :num_bytes, :codec, :vector, :created)
"""
# The key fixes everything else; the vector does not come from the damaged bytes and stays good.
REVIVE_CHUNK = """
    UPDATE chunks SET start = :start, blob = :blob, tensor = :tensor, checksum = :checksum,
        num_bytes = :num_bytes, codec = :codec, vector = coalesce(:vector, vector), created = :created,
        quarantine_reason = NULL
    WHERE key = :key
"""
SET_MISSING_VECTOR = "UPDATE chunks SET vector = ? WHERE key = ? AND vector IS NULL"
INSERT_SKETCH = "INSERT OR IGNORE INTO sketches (chunk_key, keys) VALUES (?, ?)"
VECTORS = """
    SELECT key, vector FROM chunks
    WHERE key IN (SELECT value FROM json_each(?)) AND vector IS NOT NULL
"""
SKETCHES = "SELECT chunk_key, keys FROM sketches WHERE chunk_key IN (SELECT value FROM json_each(?))"
UNKNOWN_CHUNKS = """
    SELECT DISTINCT value FROM json_each(:keys)
    WHERE NOT EXISTS (
        SELECT 1 FROM chunks WHERE key = value AND fingerprint = :fingerprint
            AND namespace = :namespace AND user_id = :user_id
    )
"""
UNUSED_BLOBS = """
    SELECT value FROM json_each(?)
    WHERE NOT EXISTS (SELECT 1 FROM chunks WHERE blob = value)
"""
# From one length to the next through the index: very many chunks may begin a sequence, of few lengths.
CHILD_LENGTHS = """
    WITH RECURSIVE lengths (length) AS (
        SELECT 0
        UNION ALL
        SELECT (SELECT num_tokens FROM chunks
                WHERE parent = :parent AND num_tokens > length AND quarantine_reason IS NULL
                ORDER BY num_tokens LIMIT 1)
        FROM lengths WHERE length IS NOT NULL
    )
    SELECT length FROM lengths WHERE length > 0
"""
QUARANTINE_CHUNK = """
    UPDATE chunks SET quarantine_reason = :reason
    WHERE key = :key AND quarantine_reason IS NULL AND (:blob IS NULL OR blob = :blob)
"""

# Turns
SAME_TURN = "SELECT turn_id FROM turns WHERE digest = ?"
RESOLVE_TURN = """
    SELECT turn_id FROM turns WHERE turn_id = :id
    UNION ALL SELECT turn_id FROM turn_aliases WHERE alias = :id
"""
RESOLVE_TURNS = """
    SELECT turn_id, turn_id FROM turns WHERE turn_id IN (SELECT value FROM json_each(:ids))
    UNION ALL SELECT alias, turn_id FROM turn_aliases WHERE alias IN (SELECT value FROM json_each(:ids))
"""
INSERT_TURN = """
    INSERT INTO turns (turn_id, digest, namespace, user_id, agent_id, session_id, fingerprint, num_tokens,
                       text, created, metadata, expires, pinned)
    VALUES (:turn_id, :digest, :namespace, :user_id, :agent_id, :session_id, :fingerprint, :num_tokens,
            :text, :created, :metadata, :expires, :pinned)
"""
# To store a turn again is to use it, and may pin it.
USE_AGAIN = """
    UPDATE turns SET pinned = max(pinned, :pinned),
        last_used = CASE WHEN :created > coalesce(last_used, created) THEN :created ELSE last_used END
    WHERE turn_id = :turn_id
"""
# Whoever stores a turn again keeps it at least as long as it was to be kept already.
PROLONG_TURN = """
    UPDATE turns SET expires = CASE WHEN :expires IS NOT NULL THEN max(expires, :expires) END
    WHERE turn_id = :turn_id AND expires IS NOT NULL
"""
EXPIRED_TURNS = "SELECT turn_id FROM turns WHERE expires <= ? AND NOT pinned"
INSERT_ALIAS = "INSERT INTO turn_aliases (alias, turn_id) VALUES (?, ?)"
INSERT_TURN_CHUNK = "INSERT INTO turn_chunks (turn_id, role, idx, chunk_key) VALUES (?, ?, ?, ?)"
CONTEXT_OF_TURN = "SELECT chunk_key FROM turn_chunks WHERE turn_id = ? AND role = 'context' ORDER BY idx"
ALIASES_OF_TURN = "SELECT alias FROM turn_aliases WHERE turn_id = ? ORDER BY alias"
TURNS_BY_AGE = """
    SELECT turn_id, fingerprint FROM turns
    WHERE (:namespace IS NULL OR namespace = :namespace) AND (:user_id IS NULL OR user_id = :user_id)
        AND (:agent_id IS NULL OR agent_id = :agent_id)
    ORDER BY created, turn_id
"""
TURNS_BY_ID = f"SELECT {TURN_COLUMNS} FROM turns t WHERE t.turn_id IN (SELECT value FROM json_each(?))"
CONTENT_OF_TURNS = """
    SELECT turn_id, chunk_key FROM turn_chunks
    WHERE role = 'content' AND turn_id IN (SELECT value FROM json_each(?))
    ORDER BY turn_id, idx
"""
# A turn without content only holds a prompt prefix in place; nobody remembers it.
LIST_TURNS = f"""
    SELECT {TURN_COLUMNS} FROM turns t
    WHERE t.namespace = :namespace AND t.user_id = :user_id
        AND EXISTS (SELECT 1 FROM turn_chunks c WHERE c.turn_id = t.turn_id AND c.role = 'content')
        AND (:agent_id IS NULL OR t.agent_id = :agent_id)
        AND (:session_id IS NULL OR t.session_id = :session_id)
        AND (:before IS NULL OR t.created < :before OR (t.created = :before AND t.turn_id < :before_id))
    ORDER BY t.created DESC, t.turn_id DESC LIMIT :limit
"""

_BESIDE = f"""
    SELECT {TURN_COLUMNS} FROM turns t
    WHERE t.namespace = :namespace AND t.user_id = :user_id AND t.session_id = :session_id
        AND (t.created, t.turn_id) {{order}} (:created, :turn_id)
        AND EXISTS (SELECT 1 FROM turn_chunks c WHERE c.turn_id = t.turn_id AND c.role = 'content')
    ORDER BY t.created {{direction}}, t.turn_id {{direction}} LIMIT :limit
"""
TURNS_BEFORE = _BESIDE.format(order="<", direction="DESC")
TURNS_AFTER = _BESIDE.format(order=">", direction="ASC")

# Documents of the text search
_IS_LIVE_CONTENT = "tc.role = 'content' AND c.quarantine_reason IS NULL"
TURNS_WITHOUT_DOCUMENT = f"""
    SELECT t.turn_id, t.fingerprint, t.namespace, t.user_id, t.agent_id, t.session_id, t.text,
           (SELECT json_group_array(content_key) FROM (
                SELECT c.content_key FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
                WHERE tc.turn_id = t.turn_id AND tc.role = 'content' ORDER BY tc.idx))
    FROM turns t
    WHERE t.turn_id IN (
            SELECT tc.turn_id FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
            WHERE {_IS_LIVE_CONTENT} AND tc.chunk_key IN (SELECT value FROM json_each(?)))
        AND NOT EXISTS (SELECT 1 FROM turn_docs d WHERE d.turn_id = t.turn_id)
    ORDER BY t.created, t.turn_id
"""
INSERT_DOCUMENT = "INSERT INTO turn_docs (turn_id, copy_key) VALUES (?, ?)"
INSERT_WORDS = "INSERT INTO turn_words (rowid, scope, words) VALUES (?, ?, ?)"
DOCUMENTS_OF_TURNS = "SELECT doc_id FROM turn_docs WHERE turn_id IN (SELECT value FROM json_each(?))"
DEAD_DOCUMENTS = f"""
    SELECT DISTINCT d.doc_id FROM turn_chunks mine JOIN turn_docs d ON d.turn_id = mine.turn_id
    WHERE mine.chunk_key = ? AND mine.role = 'content' AND NOT EXISTS (
        SELECT 1 FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
        WHERE tc.turn_id = mine.turn_id AND {_IS_LIVE_CONTENT})
"""
DELETE_WORDS = "DELETE FROM turn_words WHERE rowid = ?"
DELETE_DOCUMENT = "DELETE FROM turn_docs WHERE doc_id = ?"
COUNT_DOCUMENTS = "SELECT count(*) FROM turn_words WHERE turn_words MATCH ?"
# What a TurnFilter admits; in JSON, true is 1 to SQLite.
_IS_WANTED = """
    (:since IS NULL OR t.created >= :since) AND (:until IS NULL OR t.created < :until)
    AND NOT EXISTS (
        SELECT 1 FROM json_each(:metadata) wanted WHERE NOT EXISTS (
            SELECT 1 FROM json_each(t.metadata) had
            WHERE had.key = wanted.key AND had.value = wanted.value
                AND (had.type IN ('true', 'false')) = (wanted.type IN ('true', 'false'))))
"""
FILTERED_TURNS = f"""
    SELECT t.turn_id FROM turns t
    WHERE t.namespace = :namespace AND t.user_id = :user_id
        AND (:agent_id IS NULL OR t.agent_id = :agent_id)
        AND (:session_id IS NULL OR t.session_id = :session_id)
        AND {_IS_WANTED}
"""
# The rank of FTS5 is BM25 with its sign turned; weight 0: scope words only select. Of copies of one text the
# newest is kept, with the score of the best, as a search of an index does.
_SEARCH_TEXT = """
    WITH found AS (
        SELECT max(d.doc_id) AS doc_id, max(-w.rank) AS score
        FROM turn_words w CROSS JOIN turn_docs d ON d.doc_id = w.rowid {join}
        WHERE w.turn_words MATCH :match AND w.rank MATCH 'bm25(0.0, 1.0)' {which}
        GROUP BY d.copy_key ORDER BY score DESC, doc_id DESC LIMIT :limit
    )
    SELECT d.turn_id, f.score FROM found f JOIN turn_docs d ON d.doc_id = f.doc_id
    ORDER BY f.score DESC, f.doc_id DESC
"""
SEARCH_TEXT = _SEARCH_TEXT.format(join="", which="")
SEARCH_FILTERED_TEXT = _SEARCH_TEXT.format(
    join="CROSS JOIN turns t ON t.turn_id = d.turn_id", which=f"AND {_IS_WANTED}"
)

# Forgetting; entries and their changes go first
CHUNKS_OF_TURNS = """
    SELECT DISTINCT chunk_key FROM turn_chunks WHERE turn_id IN (SELECT value FROM json_each(?))
"""
RECORD_DEPARTURES = """
    INSERT INTO departures (turn_id)
    SELECT value FROM json_each(:ids)
    UNION ALL SELECT alias FROM turn_aliases WHERE turn_id IN (SELECT value FROM json_each(:ids))
"""
RECORD_GOING = """
    INSERT INTO turn_events (kind, turn_id, namespace, user_id, agent_id, session_id)
    SELECT :kind, turn_id, namespace, user_id, agent_id, session_id FROM turns
    WHERE num_tokens > 0 AND turn_id IN (SELECT value FROM json_each(:ids)) ORDER BY created, turn_id
"""
DROP_OLD_DEPARTURES = "DELETE FROM departures WHERE seq <= (SELECT max(seq) - 10000 FROM departures)"
DELETE_TURNS = "DELETE FROM turns WHERE turn_id IN (SELECT value FROM json_each(?))"
BLOBS_OF_CHUNKS = "SELECT DISTINCT blob FROM chunks WHERE key IN (SELECT value FROM json_each(?))"
DELETE_UNUSED_CHUNKS = """
    DELETE FROM chunks WHERE key IN (SELECT value FROM json_each(?))
        AND NOT EXISTS (SELECT 1 FROM turn_chunks WHERE chunk_key = key)
"""

# Upkeep
UNREFERENCED_CHUNKS = """
    SELECT key FROM chunks WHERE NOT EXISTS (SELECT 1 FROM turn_chunks WHERE chunk_key = key)
"""
COUNT_CHUNKS = "SELECT count(*) FROM chunks"
PAGES = """
    SELECT page_size, page_count, freelist_count
    FROM pragma_page_size, pragma_page_count, pragma_freelist_count
"""
INTEGRITY = "PRAGMA integrity_check(20)"
FOREIGN_KEYS = 'SELECT DISTINCT "table", parent FROM pragma_foreign_key_check'
VACUUM = "VACUUM"
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"

# Entries and changes
LAST_ENTRY = "SELECT coalesce(max(entry_id), 0) FROM entries"
# Older turns first, as documents are made: the newest copy of a text has the highest id in both.
ADD_MISSING_ENTRIES = """
    INSERT INTO entries (turn_id, chunk_key)
    SELECT tc.turn_id, tc.chunk_key
    FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key JOIN turns t ON t.turn_id = tc.turn_id
    WHERE tc.role = 'content' AND tc.chunk_key IN (SELECT value FROM json_each(?))
        AND c.vector IS NOT NULL AND c.quarantine_reason IS NULL
        AND NOT EXISTS (SELECT 1 FROM entries e WHERE e.turn_id = tc.turn_id AND e.chunk_key = tc.chunk_key)
    GROUP BY tc.turn_id, tc.chunk_key ORDER BY t.created, tc.turn_id, min(tc.idx)
"""
_RECORD_CHANGES = """
    INSERT INTO changes (fingerprint, namespace, entry_id, removed, chunk_key, content_key, turn_id,
                         user_id, agent_id, session_id)
    SELECT t.fingerprint, t.namespace, e.entry_id, {removed}, e.chunk_key, c.content_key, e.turn_id,
           t.user_id, t.agent_id, t.session_id
    FROM entries e JOIN turns t ON t.turn_id = e.turn_id JOIN chunks c ON c.key = e.chunk_key
    WHERE {which} ORDER BY e.entry_id
"""
RECORD_ADDED = _RECORD_CHANGES.format(removed=0, which="e.entry_id > ?")
RECORD_CHUNK_REMOVED = _RECORD_CHANGES.format(removed=1, which="e.chunk_key = ?")
RECORD_TURNS_REMOVED = _RECORD_CHANGES.format(
    removed=1, which="e.turn_id IN (SELECT value FROM json_each(?))"
)
DELETE_CHUNK_ENTRIES = "DELETE FROM entries WHERE chunk_key = ?"
DELETE_TURNS_ENTRIES = "DELETE FROM entries WHERE turn_id IN (SELECT value FROM json_each(?))"
# Entry ids are never used twice, so a change finds a vector only while its own entry exists.
CHANGES_SINCE = """
    SELECT h.seq, h.entry_id, h.chunk_key, h.content_key, h.turn_id, h.namespace, h.user_id, h.agent_id,
           h.session_id, c.vector
    FROM changes h LEFT JOIN entries e ON e.entry_id = h.entry_id LEFT JOIN chunks c ON c.key = e.chunk_key
    WHERE h.fingerprint = ? AND h.namespace = ? AND h.seq > ? ORDER BY h.seq LIMIT ?
"""
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM changes WHERE fingerprint = ? AND namespace = ?"

COUNTS = """
    SELECT (SELECT count(*) FROM turns), count(*), count(quarantine_reason),
           (SELECT count(*) FROM entries), coalesce(sum(num_bytes), 0), coalesce(sum(num_tokens), 0)
    FROM chunks
"""
