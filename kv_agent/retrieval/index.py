"""The index of one namespace: nearest pooled keys in a whitened space, with scopes.

It follows the catalog's changes. Whenever their number has doubled it is fitted anew; small indexes at once,
so that their state is a function of the changes, large ones on another thread while the old fit serves on.
Not thread-safe; the engine above holds the lock.

Legend: N rows (oldest first), C candidates of one search, V values per pooled vector.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.chunks import ChunkKey, ContentKey, Fingerprint, IndexChange, Scope, TurnId
from kv_agent.errors import KVAgentError
from kv_agent.retrieval.entries import Entry, EntryTable, Floats, Halves, Rows
from kv_agent.retrieval.fitting import Fit, fit, fitted_arrays, fitted_from
from kv_agent.retrieval.neighbours import Neighbours, build, fill
from kv_agent.retrieval.pooling import as_array, from_bytes
from kv_agent.retrieval.sketches import Sketch
from kv_agent.retrieval.snapshot import Snapshot, read_snapshot, write_snapshot
from kv_agent.retrieval.spaces import Space, Spaces
from kv_agent.retrieval.token_cache import TokenCache
from kv_agent.retrieval.token_space import Tokens, TokenSpace

logger = logging.getLogger(__name__)

FITTED_AT_ONCE = 4096  # entries; more of them take longer than a search may wait
_SAMPLED_CHUNKS = 256  # whose tokens say what the space is like
_EQUAL_SCORES = 1e-5  # FAISS sums in float32 and in an order of its own
_SCORE_DIGITS = 6
_KEPT_BITMAPS = 16
_KEPT_TOKEN_BYTES = 128 << 20
_MOST_ADDED = 4  # times as many rows as were fitted: then waiting for the fit under way is faster
_NO_CHANGE = (0, 0, "", "")

TokenKeys = Callable[[Sequence[ChunkKey]], dict[ChunkKey, Sketch]]  # by chunk, where they are known


def no_token_keys(_: Sequence[ChunkKey]) -> dict[ChunkKey, Sketch]:
    """For an index that knows pooled keys only: it is centred, not whitened."""
    return {}


class IndexHit(NamedTuple):
    """One stored chunk that a search found; ``score`` is a cosine."""

    entry_id: int
    chunk_key: ChunkKey
    content_key: ContentKey
    turn_id: TurnId
    score: float


class _Due(NamedTuple):
    """A fit to be made: the table's vectors, its live rows, and the chunks that stand for all."""

    vectors_NV: Halves
    rows_N: Rows
    sampled: list[ChunkKey]


class _Admitted(NamedTuple):
    """Rows that a scope admits, one bit each, and their number."""

    bitmap: npt.NDArray[np.uint8]
    num: int


class NamespaceIndex:
    """Entries of one (fingerprint, namespace), kept up to date with :meth:`apply`.

    ``background`` runs what takes long; without it everything happens at once.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        namespace: str,
        token_keys: TokenKeys = no_token_keys,
        background: Executor | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.namespace = namespace
        self._last: tuple[int, int, str, str] = _NO_CHANGE
        self._token_keys = token_keys
        self._threads = background
        self._table = EntryTable()
        self._spaces = Spaces()
        self._background: list[Tokens] = []
        self._fitted_bytes = 0  # of both
        self._neighbours: Neighbours | None = None  # of the first rows; a search adds the rest
        self._num_fitted = 0
        self._changes_since_fit = 0
        self._sampled: list[ChunkKey] = []  # whose tokens the spaces and the background are from
        self._due: _Due | None = None
        self._fitting: Future[Fit] | None = None
        self._compared = TokenCache(_KEPT_TOKEN_BYTES)
        self._bitmaps: OrderedDict[Scope, _Admitted] = OrderedDict()
        self._warned = False

    @property
    def seq(self) -> int:
        """Of the last change applied; 0 before the first."""
        return self._last[0]

    @property
    def num_entries(self) -> int:
        return self._table.num_live

    @property
    def num_bytes(self) -> int:
        """Of columns, spaces, background and kept tokens; what FAISS holds comes on top."""
        return self._table.num_bytes + self._fitted_bytes + self._compared.num_bytes

    @property
    def space(self) -> Space:
        """Where vectors of this namespace are compared."""
        return self._spaces.pooled

    @property
    def token_space(self) -> TokenSpace:
        """Where tokens of this namespace are compared."""
        return self._spaces.tokens

    @property
    def background(self) -> Sequence[Tokens]:
        """A sample of the entries in the tokens' space; empty if nothing is known of single tokens."""
        return self._background

    @property
    def neighbours(self) -> Neighbours | None:
        """How nearest vectors are found; ``None`` before the first search."""
        return self._neighbours

    @property
    def size(self) -> int:
        """Values of a vector; 0 before the first."""
        return self._table.size

    def vector(self, entry_id: int) -> Floats:
        """The pooled keys of an entry that is there -> [V]."""
        return self._table.vector(entry_id)

    def tokens(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Tokens]:
        """Tokens of these chunks in their space, where they are known."""
        found = self._compared.get(keys)
        loaded = self._token_keys([key for key in keys if key not in found])
        fitting = {
            key: one
            for key, one in loaded.items()
            if one.levels_TV.shape[1] == self.size and len(one.scales_T)
        }
        if fitting:
            for key, tokens in zip(fitting, self.token_space.place(list(fitting.values())), strict=True):
                found[key] = tokens
                self._compared.put(key, tokens)
        return found

    def ends_with(self, change: IndexChange) -> bool:
        """Whether ``change`` is the last one applied."""
        return self._last == _identity(change)

    def apply(self, changes: Iterable[IndexChange]) -> None:
        """Add and remove, in ``seq`` order; a change applied before is skipped."""
        for change in changes:
            if change.seq <= self.seq:
                continue
            if change.scope.namespace != self.namespace:
                raise ValueError(
                    f"change of namespace {change.scope.namespace!r}, index of {self.namespace!r}"
                )
            self._bitmaps.clear()
            self._table.remove(change.entry_id)
            if change.vector is not None:
                self._add(change, from_bytes(change.vector))
            self._last = _identity(change)
            self._changes_since_fit += 1
            # As many changes as entries: at the latest when their number has doubled. Amortised O(1).
            if self._changes_since_fit >= self._num_fitted:
                self._num_fitted, self._changes_since_fit = self._table.num_live, 0
                self._due = self._due_now()

    def search(
        self,
        vector: Tensor | Floats,
        scope: Scope,
        top_n: int,
        *,
        only: Iterable[TurnId] | None = None,
    ) -> list[IndexHit]:
        """The ``top_n`` entries in ``scope`` most like ``vector``, best first, newer first among equals.

        ``only`` narrows the search to parts of these turns.
        """
        query_V = as_array(vector)
        if top_n < 1:
            raise ValueError(f"top_n must be >= 1, got {top_n}")
        if scope.namespace != self.namespace:
            raise ValueError(f"search of namespace {scope.namespace!r}, index of {self.namespace!r}")
        if self.num_entries == 0:
            return []
        if query_V.size != self._table.size:
            raise ValueError(f"the query has {query_V.size} values, stored vectors have {self._table.size}")
        if not np.isfinite(query_V).all():
            raise ValueError("the query has values that are not finite")
        self._fit()
        neighbours = self._filled()  # may take a fit: what follows is in its space and its rows
        admitted = self._admitted(scope, only)
        if admitted.num == 0:
            return []
        unit_1V = self.space.unit(query_V[None])
        scores_C, rows_C = self._candidates(neighbours, unit_1V, admitted, top_n)
        best_first = np.lexsort((-rows_C, -scores_C.round(_SCORE_DIGITS)))[:top_n]
        found = zip(self._table.named(rows_C[best_first]), scores_C[best_first].tolist(), strict=True)
        return [IndexHit(*names, score) for names, score in found]

    def save(self, path: Path) -> None:
        """Write a snapshot, replacing ``path`` at once; raises ``OSError``."""
        if not self._takes_long(self._due):
            self._fit()
        has_lists = self._neighbours is not None and not self._neighbours.is_exact
        header = {
            "fingerprint": self.fingerprint,
            "namespace": self.namespace,
            "last_change": self._last,
            "num_fitted": self._num_fitted,
            # A fit that is under way is begun again by whoever loads this.
            "changes_since_fit": self._num_fitted if self._fitting or self._due else self._changes_since_fit,
        }
        # Lists number all rows; without lists everything is made again as fast as it is read.
        arrays = self._table.pack(with_dead=has_lists)
        if not self._background or has_lists:
            arrays |= fitted_arrays(self._spaces, self._background)
        else:  # they are larger than the vectors of few entries, and soon made again
            header["sampled"] = self._sampled
        if self._neighbours is not None and has_lists:
            header["num_probes"] = self._neighbours.num_probes
            arrays["lists"] = self._neighbours.to_array()
        write_snapshot(path, Snapshot(header=header, arrays=arrays))

    @classmethod
    def load(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        namespace: str,
        token_keys: TokenKeys = no_token_keys,
        background: Executor | None = None,
    ) -> NamespaceIndex | None:
        """The saved index; ``None`` if there is none, and with a warning if it is damaged or another's."""
        snapshot = read_snapshot(path, {"fingerprint": fingerprint, "namespace": namespace})
        if snapshot is None:
            return None
        index = cls(fingerprint, namespace, token_keys, background)
        header, arrays = snapshot.header, snapshot.arrays
        index._last = tuple(header["last_change"])
        index._table = EntryTable.unpack(arrays)
        index._search_in(*fitted_from(arrays))
        index._sampled = header.get("sampled", [])
        if index._sampled:
            index._due = _Due(index._table.vectors, index._table.live_rows(), index._sampled)
        if "lists" in arrays:
            index._neighbours = Neighbours.from_array(arrays["lists"], header["num_probes"])
        index._num_fitted = header["num_fitted"]
        index._changes_since_fit = header["changes_since_fit"]
        return index

    def _add(self, change: IndexChange, vector_V: Floats) -> None:
        size = self._table.size if self._table.num_rows else vector_V.size
        limit = np.finfo(np.float16).max
        if vector_V.size == size > 0 and (np.abs(vector_V) <= limit).all():  # NaN is not
            entry = Entry(change.entry_id, change.chunk_key, change.content_key, change.turn_id, change.scope)
            self._table.append(entry, vector_V)
        elif not self._warned:
            self._warned = True
            logger.warning(
                "chunk %s of namespace %r will not be found: its vector has %d values, others have %d, or "
                "some are not finite or too large (this is said once)",
                change.chunk_key, self.namespace, vector_V.size, size,
                extra={
                    "event": "chunk_damaged", "chunk": change.chunk_key[:8], "namespace": self.namespace
                },
            )  # fmt: skip

    def _due_now(self) -> _Due | None:
        if not self._table.num_rows:
            return None
        sampled = self._table.sampled_chunks(_SAMPLED_CHUNKS)
        return _Due(self._table.vectors, self._table.live_rows(), sampled)

    def _takes_long(self, due: _Due | None) -> bool:
        return due is not None and self._threads is not None and len(due.rows_N) > FITTED_AT_ONCE

    def _fit(self) -> None:
        """Make the fit that is due, now or on another thread; take one that was made there."""
        self._take_finished()
        due = self._due
        if due is None or self._fitting is not None:
            return
        self._due = None
        if self._threads is not None and self._takes_long(due):
            self._fitting = self._threads.submit(self._fitted, due)
        else:
            self._take(self._fitted(due))

    def _fitted(self, due: _Due) -> Fit:
        known = self._token_keys(due.sampled)
        return fit(due.vectors_NV, due.rows_N, {key: known[key] for key in due.sampled if key in known})

    def _take_finished(self, *, waiting: bool = False) -> None:
        """Take the fit of another thread, if there is one and it is done; trouble with it is a warning."""
        if self._fitting is None or not (waiting or self._fitting.done()):
            return
        try:
            self._take(self._fitting.result())
        except (KVAgentError, RuntimeError, MemoryError, CancelledError) as err:
            self._fitting = None
            logger.warning(
                "index of namespace %r goes on as it was fitted before: %s",
                self.namespace,
                err,
                extra={"event": "index_not_fitted", "namespace": self.namespace},
            )

    def _take(self, fitted: Fit) -> None:
        """From now on search with this fit; rows that were dead when it was made are dropped."""
        self._fitting = None
        self._bitmaps.clear()
        self._compared.clear()
        later_N = np.arange(fitted.num_rows, self._table.num_rows)
        self._table.keep(np.concatenate([fitted.rows_N, later_N]))
        self._search_in(fitted.spaces, fitted.background)
        self._sampled = fitted.sampled
        self._neighbours = fitted.neighbours
        if self._due is not None:  # its rows have other numbers now
            self._due = self._due_now()

    def _search_in(self, spaces: Spaces, background: list[Tokens]) -> None:
        """From now on; of the arrays only the size is wanted, once, for each search asks for it."""
        self._spaces, self._background = spaces, background
        arrays = fitted_arrays(spaces, background)
        self._fitted_bytes = sum(values.nbytes for values in arrays.values())

    def _admitted(self, scope: Scope, only: Iterable[TurnId] | None) -> _Admitted:
        if only is None and scope in self._bitmaps:
            self._bitmaps.move_to_end(scope)
            return self._bitmaps[scope]
        admitted_N = self._table.admitted(scope)
        if only is not None:
            admitted_N &= self._table.of_turns(only)
        admitted = _Admitted(np.packbits(admitted_N, bitorder="little"), int(admitted_N.sum()))
        if only is None:
            self._bitmaps[scope] = admitted
            if len(self._bitmaps) > _KEPT_BITMAPS:
                self._bitmaps.popitem(last=False)
        return admitted

    def _candidates(
        self, neighbours: Neighbours, unit_1V: Floats, admitted: _Admitted, top_n: int
    ) -> tuple[Floats, Rows]:
        """Scores and rows of the ``top_n`` best admitted entries, and of all that may tie with the last."""
        share = admitted.num / self._table.num_rows
        asked = wanted = min(top_n, admitted.num)
        while True:
            asked = min(2 * asked + 16, admitted.num)
            scores_C, rows_C = neighbours.search(unit_1V, asked, admitted.bitmap, share)
            is_all = asked == admitted.num or len(rows_C) < asked
            if is_all or scores_C[-1] < scores_C[wanted - 1] - _EQUAL_SCORES:
                break
        if neighbours.is_exact:
            # Again and row by row, so that equal vectors have equal scores.
            scores_C = np.einsum("cv,v->c", neighbours.vectors(rows_C), unit_1V[0])
        return scores_C, rows_C

    def _filled(self) -> Neighbours:
        """The neighbours with every row that came since they were fitted."""
        num_fitted = 0 if self._neighbours is None else self._neighbours.num_rows
        if self._table.num_rows > _MOST_ADDED * max(num_fitted, FITTED_AT_ONCE):
            self._take_finished(waiting=True)
        if self._neighbours is None:
            self._neighbours = build(self._table.size, self._table.num_rows, self._block)
        fill(self._neighbours, self._table.num_rows, self._block)
        return self._neighbours

    def _block(self, start: int, end: int) -> Floats:
        return self.space.unit(self._table.vectors[start:end].astype(np.float32))


def _identity(change: IndexChange) -> tuple[int, int, str, str]:
    return (change.seq, change.entry_id, change.chunk_key, change.turn_id)
