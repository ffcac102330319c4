"""The rows of an index as columns: pooled vectors beside what they name and whose they are.

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
Halves = npt.NDArray[np.float16]
Rows = npt.NDArray[np.intp]

_NARROWING = ("user_id", "agent_id", "session_id")
_NAMES = (*_NARROWING, "turn_id")
_DEAD = -1  # instead of the number of a user
_KEY = np.dtype("S32")
_MIN_SPARE_ROWS = 16


class Entry(NamedTuple):
    """What one row stands for."""

    entry_id: int
    chunk_key: ChunkKey
    content_key: ContentKey
    turn_id: TurnId
    scope: Scope


class EntryTable:
    """Rows in the order they came; a removed one stays as a dead row until :meth:`keep` leaves it out.

    Vectors are kept in half precision, and names as numbers: a million rows are few objects.
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._columns: Arrays = {
            "vectors": np.empty((0, 0), dtype=np.float16),
            "entry_ids": np.empty(0, dtype=np.int64),
            "chunk_keys": np.empty(0, dtype=_KEY),
            "content_keys": np.empty(0, dtype=_KEY),
            **{name: np.empty(0, dtype=np.int32) for name in _NAMES},
        }  # all with spare rows at their end
        self._names: list[str | None] = [None]
        self._name_ids: dict[str | None, int] | None = None  # made when needed
        self._row_of: dict[int, int] | None = None  # likewise: entry id -> live row
        self._num_dead = 0

    @property
    def num_rows(self) -> int:
        """Dead ones included."""
        return self._num_rows

    @property
    def num_live(self) -> int:
        return self._num_rows - self._num_dead

    @property
    def size(self) -> int:
        """Values of a vector; 0 before the first."""
        return int(self._columns["vectors"].shape[1])

    @property
    def num_bytes(self) -> int:
        """Of the columns, spare rows included."""
        return sum(column.nbytes for column in self._columns.values())

    @property
    def vectors(self) -> Halves:
        """The vectors as they came -> [N, V], dead rows included; a view that later changes leave alone."""
        return self._column("vectors")

    def vector(self, entry_id: int) -> Floats:
        """Of a live row -> [V]."""
        vector_V: Floats = self._columns["vectors"][self._rows_by_id()[entry_id]].astype(np.float32)
        return vector_V

    def named(self, rows_C: Rows) -> list[tuple[int, ChunkKey, ContentKey, TurnId]]:
        """Entry id, chunk, content and turn of live rows."""
        columns = self._columns
        entry_ids = columns["entry_ids"][rows_C].tolist()
        chunk_keys, content_keys = (
            columns[name][rows_C].astype(str).tolist() for name in ("chunk_keys", "content_keys")
        )
        turn_ids = [self._names[number] for number in columns["turn_id"][rows_C].tolist()]
        return list(zip(entry_ids, chunk_keys, content_keys, turn_ids, strict=True))

    def append(self, entry: Entry, vector_V: Floats) -> None:
        """Add a row; its vector must have the size of the others. The entry id must not be there."""
        row, columns = self._num_rows, self._columns
        if row == 0:
            columns["vectors"] = np.empty((0, vector_V.size), dtype=np.float16)
        if row == len(columns["entry_ids"]):
            self._reserve(max(2 * row, _MIN_SPARE_ROWS))
        columns["vectors"][row] = vector_V
        columns["entry_ids"][row] = entry.entry_id
        columns["chunk_keys"][row] = entry.chunk_key.encode()
        columns["content_keys"][row] = entry.content_key.encode()
        for name in _NARROWING:
            columns[name][row] = self._named(getattr(entry.scope, name))
        columns["turn_id"][row] = self._named(entry.turn_id)
        self._num_rows += 1
        self._rows_by_id()[entry.entry_id] = row

    def remove(self, entry_id: int) -> None:
        """Make its row dead; an unknown id is fine."""
        if self._num_rows and (row := self._rows_by_id().pop(entry_id, None)) is not None:
            self._columns["user_id"][row] = _DEAD
            self._num_dead += 1

    def live_rows(self) -> Rows:
        return np.flatnonzero(self._column("user_id") != _DEAD)

    def keep(self, rows_N: Rows) -> None:
        """Drop all other rows; these keep their order."""
        if len(rows_N) < self._num_rows:
            self._columns = {name: column[rows_N] for name, column in self._columns.items()}
            self._num_rows = len(rows_N)
            self._num_dead = int((self._columns["user_id"] == _DEAD).sum())
            self._row_of = None

    def admitted(self, scope: Scope) -> npt.NDArray[np.bool_]:
        """Which rows ``scope`` admits: :meth:`Scope.admits` for all rows at once -> [N]; dead rows never."""
        admitted_N: npt.NDArray[np.bool_] = self._column("user_id") != _DEAD
        for name in _NARROWING:
            if (wanted := getattr(scope, name)) is not None:
                admitted_N &= self._column(name) == self._ids_by_name().get(wanted, _DEAD)
        return admitted_N

    def of_turns(self, turn_ids: Iterable[TurnId]) -> npt.NDArray[np.bool_]:
        """Which rows are parts of these turns -> [N]."""
        known = self._ids_by_name()
        return np.isin(self._column("turn_id"), [known[name] for name in turn_ids if name in known])

    def sampled_chunks(self, most: int) -> list[ChunkKey]:
        """Chunks of at most ``most`` live rows, evenly over time."""
        rows_N = self.live_rows()
        step = max(1, -(-len(rows_N) // most))
        return [ChunkKey(key.decode()) for key in self._columns["chunk_keys"][rows_N[::step]]]

    def pack(self, *, with_dead: bool = False) -> Arrays:
        """The live rows, or all, as arrays without objects; names as JSON."""
        rows_N = np.arange(self._num_rows) if with_dead else self.live_rows()
        arrays = {name: column[rows_N] for name, column in self._columns.items()}
        dead_N = arrays["user_id"] == _DEAD
        arrays["user_id"][dead_N] = 0  # any name
        used, numbers = np.unique(np.stack([arrays[name] for name in _NAMES]), return_inverse=True)
        for name, column in zip(_NAMES, numbers.reshape(len(_NAMES), -1), strict=True):
            arrays[name] = column.astype(np.int32)
        arrays["user_id"][dead_N] = _DEAD
        names = json.dumps([self._names[number] for number in used])
        for name in ("chunk_keys", "content_keys"):
            arrays[name] = arrays[name].view(np.uint8).reshape(-1, _KEY.itemsize)
        return arrays | {"names": np.frombuffer(names.encode(), dtype=np.uint8)}

    @classmethod
    def unpack(cls, arrays: Arrays) -> EntryTable:
        """Inverse of :meth:`pack`; takes the arrays as they are."""
        table = cls()
        table._columns = {name: arrays[name] for name in table._columns}
        for name in ("chunk_keys", "content_keys"):
            table._columns[name] = np.ascontiguousarray(arrays[name]).view(_KEY).reshape(-1)
        table._num_rows = len(arrays["entry_ids"])
        table._num_dead = int((arrays["user_id"] == _DEAD).sum())
        table._names = json.loads(arrays["names"].tobytes())
        return table

    def _column(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name][: self._num_rows]

    def _reserve(self, num_rows: int) -> None:
        for name, column in self._columns.items():
            larger = np.empty((num_rows, *column.shape[1:]), dtype=column.dtype)
            larger[: self._num_rows] = column[: self._num_rows]
            self._columns[name] = larger

    def _rows_by_id(self) -> dict[int, int]:
        if self._row_of is None:
            rows_N = self.live_rows()
            ids = self._columns["entry_ids"][rows_N]
            self._row_of = dict(zip(ids.tolist(), rows_N.tolist(), strict=True))
        return self._row_of

    def _ids_by_name(self) -> dict[str | None, int]:
        if self._name_ids is None:
            self._name_ids = {name: number for number, name in enumerate(self._names)}
        return self._name_ids

    def _named(self, name: str | None) -> int:
        number = self._ids_by_name().setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        return number
