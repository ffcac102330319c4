"""Turns as they are read; the catalog begins and ends the transactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_agent.chunks import ChunkKey, TurnId, TurnRecord
from kv_agent.storage import rows
from kv_agent.storage import statements as sql
from kv_agent.storage.schema import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTurn:
    """A turn with the further ids that it was stored under, and the chunks it stands behind, in order."""

    turn: TurnRecord
    aliases: tuple[TurnId, ...]
    context: tuple[ChunkKey, ...]


def stored(db: Database, turn_id: TurnId) -> StoredTurn | None:
    """See :meth:`kv_agent.storage.catalog.Catalog.stored_turn`."""
    found = records(db, db.execute(sql.TURNS_BY_ID, (rows.json_list([turn_id]),)).fetchall())
    for turn in found:
        aliases = tuple(alias for (alias,) in db.execute(sql.ALIASES_OF_TURN, (turn_id,)))
        context = tuple(key for (key,) in db.execute(sql.CONTEXT_OF_TURN, (turn_id,)))
        return StoredTurn(turn=turn, aliases=aliases, context=context)
    return None


def records(db: Database, turn_rows: Sequence[rows.Row]) -> list[TurnRecord]:
    """Rows of ``TURN_COLUMNS`` with the keys of their content chunks, in the order given."""
    keys: dict[TurnId, list[ChunkKey]] = {row[0]: [] for row in turn_rows}
    for turn_id, chunk_key in db.execute(sql.CONTENT_OF_TURNS, (rows.json_list(keys),)):
        keys[turn_id].append(chunk_key)
    return [rows.turn_from_row(row, keys[row[0]]) for row in turn_rows]
