"""The rows of an index: pooled vectors beside what they name and whose they are.

Legend: N rows (oldest first), V values per pooled vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kv_agent.chunks import ChunkKey, ContentKey, Scope, TurnId
from kv_agent.retrieval.snapshot import Arrays

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]

_NARROWING = ("user_id", "agent_id", "session_id")
_TURN = len(_NARROWING)  # its column
_KEYS = ("chunk_key", "content_key", "turn_id")
_DEAD = -1  # instead of the number of a name
_MIN_SPARE_ROWS = 16


class Entry(NamedTuple):
    """What one row stands for."""

    entry_id: int
    chunk_key: ChunkKey
    content_key: ContentKey
    turn_id: TurnId
    scope: Scope


class EntryTable:
    """Rows in the order they came; a removed one stays as a dead row until :meth:`compact`."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._row_of: dict[int, int] = {}
        # Both have spare rows at their end.
        self._raw_NV: Floats = np.empty((0, 0), dtype=np.float32)
        self._names_N4: npt.NDArray[np.int32] = np.empty((0, _TURN + 1), dtype=np.int32)
        self._name_ids: dict[str | None, int] = {None: 0}

    @property
    def num_rows(self) -> int:
        """Dead ones included."""
        return len(self._entries)

    @property
    def num_live(self) -> int:
        return len(self._row_of)

    @property
    def vectors(self) -> Floats:
        """The vectors as they came -> [N, V], dead rows included; a view."""
        return self._raw_NV[: self.num_rows]

    def vector(self, entry_id: int) -> Floats:
        """Of a live row -> [V]; a view."""
        row_V: Floats = self._raw_NV[self._row_of[entry_id]]
        return row_V

    def __getitem__(self, row: int) -> Entry:
        return self._entries[row]

    def append(self, entry: Entry, vector_V: Floats) -> None:
        """Add a row; its vector must have the size of the others. The entry id must not be there."""
        row = self.num_rows
        if row == 0:
            self._raw_NV = np.empty((0, vector_V.size), dtype=np.float32)
        if row == len(self._raw_NV):
            spare = max(row, _MIN_SPARE_ROWS)  # doubling
            self._raw_NV = np.concatenate((self._raw_NV, np.empty((spare, vector_V.size), dtype=np.float32)))
            self._names_N4 = np.concatenate((self._names_N4[:row], np.empty((spare, 4), dtype=np.int32)))
        self._raw_NV[row] = vector_V
        names = (*(getattr(entry.scope, name) for name in _NARROWING), entry.turn_id)
        self._names_N4[row] = [self._name_ids.setdefault(name, len(self._name_ids)) for name in names]
        self._entries.append(entry)
        self._row_of[entry.entry_id] = row

    def remove(self, entry_id: int) -> None:
        """Make its row dead; an unknown id is fine."""
        if (row := self._row_of.pop(entry_id, None)) is not None:
            self._names_N4[row] = _DEAD

    def compact(self) -> None:
        """Drop dead rows; the others keep their order."""
        rows_N = self._live_rows()
        if len(rows_N) < self.num_rows:
            self._raw_NV = self._raw_NV[rows_N]
            self._names_N4 = self._names_N4[rows_N]
            self._entries = [self._entries[row] for row in rows_N]
            self._row_of = {entry.entry_id: row for row, entry in enumerate(self._entries)}

    def admitted(self, scope: Scope) -> npt.NDArray[np.bool_]:
        """Which rows ``scope`` admits: :meth:`Scope.admits` for all rows at once -> [N]; dead rows never."""
        names_N4 = self._names_N4[: self.num_rows]
        admitted_N: npt.NDArray[np.bool_] = names_N4[:, 0] != _DEAD
        for column, name in enumerate(_NARROWING):
            if (wanted := getattr(scope, name)) is not None:
                admitted_N &= names_N4[:, column] == self._name_ids.get(wanted, _DEAD)
        return admitted_N

    def of_turns(self, turn_ids: Iterable[TurnId]) -> npt.NDArray[np.bool_]:
        """Which rows are parts of these turns -> [N]."""
        names = [self._name_ids[turn_id] for turn_id in turn_ids if turn_id in self._name_ids]
        return np.isin(self._names_N4[: self.num_rows, _TURN], names)

    def sample(self, most: int) -> list[Entry]:
        """At most ``most`` live entries, evenly over time."""
        rows_N = self._live_rows()
        step = max(1, -(-len(rows_N) // most))
        return [self._entries[row] for row in rows_N[::step]]

    def pack(self) -> Arrays:
        """The live rows as arrays without objects; strings as JSON."""
        rows_N = self._live_rows()
        entries = [self._entries[row] for row in rows_N]
        columns: dict[str, Any] = {name: [getattr(entry, name) for entry in entries] for name in _KEYS}
        columns |= {name: [getattr(entry.scope, name) for entry in entries] for name in _NARROWING}
        return {
            "vectors": self._raw_NV[rows_N],
            "entry_ids": np.array([entry.entry_id for entry in entries], dtype=np.int64),
            "columns": np.frombuffer(json.dumps(columns).encode(), dtype=np.uint8),
        }

    @classmethod
    def unpack(cls, arrays: Arrays, namespace: str) -> EntryTable:
        """Inverse of :meth:`pack`."""
        table = cls()
        columns = json.loads(arrays["columns"].tobytes())
        scopes = [
            Scope(namespace=namespace, user_id=user, agent_id=agent, session_id=session)
            for user, agent, session in zip(*(columns[name] for name in _NARROWING), strict=True)
        ]
        keys = (columns[name] for name in _KEYS)
        rows = zip(arrays["entry_ids"].tolist(), *keys, scopes, strict=True)
        for row, vector_V in zip(rows, arrays["vectors"], strict=True):
            table.append(Entry(*row), vector_V)
        return table

    def _live_rows(self) -> Rows:
        return np.flatnonzero(self._names_N4[: self.num_rows, 0] != _DEAD)
