"""The table of migration 9: what a whole store holds and has let go, kept up to date by triggers."""

from __future__ import annotations

_HELD = ("num_bytes", "num_tokens", "num_memories", "evicted_turns", "refused_turns")
_ADD_NEW = ", ".join(f"{name} = {name} + NEW.{name}" for name in _HELD)
_ADD_DIFFERENCE = ", ".join(f"{name} = {name} + NEW.{name} - OLD.{name}" for name in _HELD)
_SUMS = ", ".join(f"coalesce(sum({name}), 0)" for name in _HELD)


def _counting(trigger: str, table: str, column: str) -> tuple[str, str]:
    """Two triggers that keep the number of a table's rows in a column."""
    return (
        f"CREATE TRIGGER {trigger}_counted AFTER INSERT ON {table} BEGIN"
        f" UPDATE totals SET {column} = {column} + 1; END",
        f"CREATE TRIGGER {trigger}_uncounted AFTER DELETE ON {table} BEGIN"
        f" UPDATE totals SET {column} = {column} - 1; END",
    )


M009 = (
    # Invariant: the sums over holdings, and the numbers of rows of chunks and turn_docs. What was forgotten
    # and whose time was over counts from this migration on.
    """
    CREATE TABLE totals (
        num_bytes INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        num_memories INTEGER NOT NULL,
        num_chunks INTEGER NOT NULL,
        num_documents INTEGER NOT NULL,
        evicted_turns INTEGER NOT NULL,
        refused_turns INTEGER NOT NULL,
        forgotten_turns INTEGER NOT NULL DEFAULT 0,
        expired_turns INTEGER NOT NULL DEFAULT 0
    )
    """,
    f"""
    INSERT INTO totals ({", ".join(_HELD)}, num_chunks, num_documents)
    SELECT {_SUMS}, (SELECT count(*) FROM chunks), (SELECT count(*) FROM turn_docs) FROM holdings
    """,
    # Who holds most is asked again and again, and there may be very many namespaces.
    "CREATE INDEX holdings_by_bytes ON holdings (num_bytes)",
    f"CREATE TRIGGER holding_added AFTER INSERT ON holdings BEGIN UPDATE totals SET {_ADD_NEW}; END",
    f"CREATE TRIGGER holding_changed AFTER UPDATE ON holdings BEGIN UPDATE totals SET {_ADD_DIFFERENCE}; END",
    *_counting("chunk", "chunks", "num_chunks"),
    *_counting("document", "turn_docs", "num_documents"),
    """
    CREATE TRIGGER forgotten_counted AFTER INSERT ON turn_events WHEN NEW.kind = 'forgotten' BEGIN
        UPDATE totals SET forgotten_turns = forgotten_turns + 1;
    END
    """,
)
