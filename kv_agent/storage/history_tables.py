"""The table of migration 8: the last comings and goings of memories."""

from __future__ import annotations

# A turn without tokens of its own only holds a prompt's prefix in place; nobody remembers it.
M008 = (
    """
    CREATE TABLE turn_events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        turn_id TEXT NOT NULL,
        namespace TEXT NOT NULL,
        user_id TEXT NOT NULL,
        agent_id TEXT,
        session_id TEXT
    )
    """,
    """
    CREATE TRIGGER turn_stored AFTER INSERT ON turns WHEN NEW.num_tokens > 0 BEGIN
        INSERT INTO turn_events (kind, turn_id, namespace, user_id, agent_id, session_id)
        VALUES ('stored', NEW.turn_id, NEW.namespace, NEW.user_id, NEW.agent_id, NEW.session_id);
    END
    """,
    """
    CREATE TRIGGER old_turn_events AFTER INSERT ON turn_events BEGIN
        DELETE FROM turn_events WHERE seq <= NEW.seq - 10000;
    END
    """,
)
