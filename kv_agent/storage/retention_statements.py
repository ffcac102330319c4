"""The SQL of the ledger: limits, totals, use and who may go."""

from __future__ import annotations

LIMITS = "policy, max_bytes, max_tokens, max_memories, window_tokens, ttl_s"

# Limits; those of '' are of all namespaces that have none of their own
LIMITS_OF = f"SELECT {LIMITS} FROM namespaces WHERE namespace IN (?, '') ORDER BY namespace DESC LIMIT 1"
ALL_LIMITS = f"SELECT namespace, {LIMITS} FROM namespaces ORDER BY namespace"
DROP_LIMITS = "DELETE FROM namespaces WHERE namespace = ?"
INSERT_LIMITS = f"INSERT INTO namespaces (namespace, {LIMITS}) VALUES (?, ?, ?, ?, ?, ?, ?)"

# Totals
HOLDING_OF = "SELECT num_bytes, num_tokens, num_memories FROM holdings WHERE namespace = ?"
DISK_BYTES = "SELECT num_bytes FROM disk"
ACCOUNTS = """
    SELECT namespace, num_bytes, num_tokens, num_memories, evicted_turns, evicted_bytes, refused_turns
    FROM holdings ORDER BY namespace
"""
LARGEST = """
    SELECT namespace, num_bytes, num_tokens, num_memories FROM holdings ORDER BY num_bytes DESC LIMIT ?
"""
TOTALS = """
    SELECT num_bytes, num_tokens, num_memories, num_chunks, num_documents, evicted_turns, refused_turns,
           forgotten_turns, expired_turns
    FROM totals
"""
# What the pinned turns of a namespace, or of all, and one more hold together.
HELD_BY_PINNED_AND = """
    WITH kept (turn_id) AS (
        SELECT turn_id FROM turns WHERE pinned AND (:namespace IS NULL OR namespace = :namespace)
        UNION SELECT turn_id FROM turns WHERE turn_id = :turn_id)
    SELECT coalesce(sum(num_bytes), 0), coalesce(sum(num_tokens), 0),
           (SELECT count(*) FROM turns WHERE num_tokens > 0 AND turn_id IN (SELECT turn_id FROM kept))
    FROM chunks
    WHERE key IN (SELECT chunk_key FROM turn_chunks WHERE turn_id IN (SELECT turn_id FROM kept))
"""
COUNT_EVICTED = """
    UPDATE holdings SET evicted_turns = evicted_turns + 1, evicted_bytes = evicted_bytes + ? - num_bytes
    WHERE namespace = ?
"""
# Before they go, which the trigger counts as forgotten.
COUNT_EXPIRED = """
    UPDATE totals SET (expired_turns, forgotten_turns) = (
        SELECT expired_turns + count(*), forgotten_turns - count(*) FROM turns
        WHERE num_tokens > 0 AND turn_id IN (SELECT value FROM json_each(?)))
"""
COUNT_REFUSED = "UPDATE holdings SET refused_turns = refused_turns + 1 WHERE namespace = ?"

# Use
PIN_TURNS = "UPDATE turns SET pinned = ? WHERE turn_id IN (SELECT value FROM json_each(?))"
TOUCH_TURNS = """
    UPDATE turns SET hits = hits + 1, last_used = max(coalesce(last_used, created), ?)
    WHERE turn_id IN (SELECT value FROM json_each(?))
"""
TURNS_WITH_CONTENT = """
    SELECT DISTINCT turn_id FROM turn_chunks
    WHERE role = 'content' AND chunk_key IN (SELECT value FROM json_each(?))
"""
DEPARTED = "SELECT turn_id FROM departures WHERE turn_id IN (SELECT value FROM json_each(?))"

# Who may go
UNPINNED_TURN = "SELECT namespace FROM turns WHERE turn_id = ? AND NOT pinned"
OVERDUE_TURNS = "SELECT turn_id FROM turns WHERE expires <= ? AND NOT pinned ORDER BY expires LIMIT ?"
SESSION_TURNS = """
    SELECT turn_id, num_tokens, pinned FROM turns
    WHERE namespace = :namespace AND user_id = :user_id AND agent_id IS :agent_id
        AND session_id = :session_id AND num_tokens > 0
    ORDER BY created DESC, turn_id DESC
"""
USAGES = """
    SELECT t.turn_id, t.num_tokens, t.created, coalesce(t.last_used, t.created), t.hits,
           (SELECT coalesce(sum(c.num_bytes), 0) FROM turn_chunks tc JOIN chunks c ON c.key = tc.chunk_key
            WHERE tc.turn_id = t.turn_id AND tc.role = 'content')
    FROM turns t
    WHERE NOT t.pinned AND (:namespace IS NULL OR t.namespace = :namespace)
"""
