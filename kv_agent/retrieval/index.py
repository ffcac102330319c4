"""The index of one namespace: FAISS inner product over whitened pooled keys, with scopes.

Its state is a function of the changes and samples it was given, in ``seq`` order: at once, in parts, or from
a snapshot on makes no difference. Not thread-safe; the engine above holds the lock.

Legend: N rows (oldest first), C candidates of one search, V values per pooled vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.chunks import ChunkKey, ContentKey, Fingerprint, IndexChange, Scope, TurnId
from kv_agent.retrieval.entries import Entry, EntryTable, Floats, Rows
from kv_agent.retrieval.interaction import Background
from kv_agent.retrieval.pooling import as_array, from_bytes
from kv_agent.retrieval.snapshot import Snapshot, read_snapshot, write_snapshot
from kv_agent.retrieval.spaces import Space, centred_on, whitening_of

logger = logging.getLogger(__name__)

_FAISS: Any = faiss  # its stubs describe the C++ side, not the Python wrappers used here

MIN_CENTRED = 2  # of one entry alone nothing would be left
_SAMPLED_ENTRIES = 256  # chunks that stand for all ...
_SAMPLED_TOKENS = 16_384  # ... unless they have more tokens than this: then fewer
_BLOCK_ROWS = 8192  # rows normalised at a time, to bound temporary memory
_EQUAL_SCORES = 1e-5  # FAISS sums in float32 and in an order of its own
_NO_CHANGE = (0, 0, "", "")

TokenKeys = Callable[[Sequence[ChunkKey]], dict[ChunkKey, Floats]]  # [T, V] by chunk, where they are known


def no_token_keys(_: Sequence[ChunkKey]) -> dict[ChunkKey, Floats]:
    """For an index that knows pooled keys only: it is centred, not whitened."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHit:
    """One stored chunk that a search found; ``score`` is a cosine."""

    entry_id: int
    chunk_key: ChunkKey
    content_key: ContentKey
    turn_id: TurnId
    score: float


class NamespaceIndex:
    """Entries of one (fingerprint, namespace), kept up to date with :meth:`apply`."""

    def __init__(
        self, fingerprint: Fingerprint, namespace: str, token_keys: TokenKeys = no_token_keys
    ) -> None:
        self.fingerprint = fingerprint
        self.namespace = namespace
        self._last: tuple[int, int, str, str] = _NO_CHANGE
        self._table = EntryTable()
        self._token_keys = token_keys
        self._space = Space()
        self._background: Background | None = None
        self._num_fitted = 0
        self._changes_since_fit = 0
        self._faiss: Any = None  # IndexFlatIP of the first rows; a search adds the rest
        self._warned = False

    @property
    def seq(self) -> int:
        """Of the last change applied; 0 before the first."""
        return self._last[0]

    @property
    def num_entries(self) -> int:
        return self._table.num_live

    def vector(self, entry_id: int) -> Floats:
        """The pooled keys of an entry that is there -> [V]."""
        return self._table.vector(entry_id)

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
            self._table.remove(change.entry_id)
            if change.vector is not None:
                self._add(change, from_bytes(change.vector))
            self._last = _identity(change)
            self._changes_since_fit += 1
            # As many changes as entries: at the latest when their number has doubled. Amortised O(1).
            if self._changes_since_fit >= self._num_fitted:
                self._fit()

    @property
    def space(self) -> Space:
        """Where vectors of this namespace are compared."""
        return self._space

    @property
    def background(self) -> Background | None:
        """A sample of the entries in that space; ``None`` if nothing is known of single tokens."""
        return self._background

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
        query_V, size = as_array(vector), self._table.vectors.shape[1]
        if top_n < 1:
            raise ValueError(f"top_n must be >= 1, got {top_n}")
        if scope.namespace != self.namespace:
            raise ValueError(f"search of namespace {scope.namespace!r}, index of {self.namespace!r}")
        if self.num_entries == 0:
            return []
        if query_V.size != size:
            raise ValueError(f"the query has {query_V.size} values, stored vectors have {size}")
        if not np.isfinite(query_V).all():
            raise ValueError("the query has values that are not finite")
        unit_1V = self._space.unit(query_V[None])
        admitted_N = self._table.admitted(scope)
        if only is not None:
            admitted_N &= self._table.of_turns(only)
        rows_C = self._candidates(unit_1V, admitted_N, top_n)
        # Again in float64 and row by row, so that equal vectors have equal scores.
        scores_C = (self._space.unit(self._table.vectors[rows_C]).astype(np.float64) * unit_1V).sum(axis=1)
        best_first = np.lexsort((-rows_C, -scores_C))[:top_n]
        return [_hit(self._table[rows_C[i]], float(scores_C[i])) for i in best_first]

    def save(self, path: Path) -> None:
        """Write a snapshot, replacing ``path`` at once; raises ``OSError``."""
        header = {
            "fingerprint": self.fingerprint,
            "namespace": self.namespace,
            "last_change": self._last,
            "num_fitted": self._num_fitted,
            "changes_since_fit": self._changes_since_fit,
        }
        arrays = self._table.pack()
        fitted: dict[str, npt.NDArray[Any] | None] = {
            "mean": self._space.mean_V,
            "matrix": self._space.matrix_VV,
        }
        if self._background is not None:
            fitted |= {"tokens": self._background.tokens_TV, "sizes": self._background.sizes_N}
        arrays |= {name: values for name, values in fitted.items() if values is not None}
        write_snapshot(path, Snapshot(header=header, arrays=arrays))

    @classmethod
    def load(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        namespace: str,
        token_keys: TokenKeys = no_token_keys,
    ) -> NamespaceIndex | None:
        """The saved index; ``None`` if there is none, and with a warning if it is damaged or another's."""
        snapshot = read_snapshot(path, {"fingerprint": fingerprint, "namespace": namespace})
        if snapshot is None:
            return None
        index = cls(fingerprint, namespace, token_keys)
        index._last = tuple(snapshot.header["last_change"])
        index._table = EntryTable.unpack(snapshot.arrays, namespace)
        arrays = snapshot.arrays
        index._space = Space(mean_V=arrays.get("mean"), matrix_VV=arrays.get("matrix"))
        if "tokens" in arrays:
            index._background = Background(tokens_TV=arrays["tokens"], sizes_N=arrays["sizes"])
        index._num_fitted = snapshot.header["num_fitted"]
        index._changes_since_fit = snapshot.header["changes_since_fit"]
        return index

    def _add(self, change: IndexChange, vector_V: Floats) -> None:
        size = self._table.vectors.shape[1] if self._table.num_rows else vector_V.size
        if vector_V.size == size > 0 and np.isfinite(vector_V).all():
            entry = Entry(change.entry_id, change.chunk_key, change.content_key, change.turn_id, change.scope)
            self._table.append(entry, vector_V)
        elif not self._warned:
            self._warned = True
            logger.warning(
                "chunk %s of namespace %r will not be found: its vector has %d values, others have %d, or "
                "some are not finite (this is said once)",
                change.chunk_key, self.namespace, vector_V.size, size,
            )  # fmt: skip

    def _fit(self) -> None:
        """Drop dead rows, fit the space to the live ones, and have FAISS built again."""
        self._table.compact()
        self._fit_space()
        self._num_fitted = self.num_entries
        self._changes_since_fit = 0
        self._faiss = None

    def _fit_space(self) -> None:
        self._space, self._background = Space(), None
        if self.num_entries < MIN_CENTRED:
            return
        sample = self._sampled_tokens()
        if sum(map(len, sample)) < MIN_CENTRED:
            self._space = centred_on(self._table.vectors)
            return
        tokens_TV = np.concatenate(sample)
        self._space = whitening_of(tokens_TV)
        self._background = Background(
            tokens_TV=self._space.unit(tokens_TV), sizes_N=np.array([len(keys_TV) for keys_TV in sample])
        )

    def _sampled_tokens(self) -> list[Floats]:
        keys = [entry.chunk_key for entry in self._table.sample(_SAMPLED_ENTRIES)]
        size = self._table.vectors.shape[1]
        sample = [keys_TV for keys_TV in self._token_keys(keys).values() if keys_TV.shape[1] == size]
        while len(sample) > 1 and sum(map(len, sample)) > _SAMPLED_TOKENS:
            sample = sample[::2]
        return sample

    def _candidates(self, unit_1V: Floats, admitted_N: npt.NDArray[np.bool_], top_n: int) -> Rows:
        """Rows of the ``top_n`` best admitted entries, and of all that may tie with the last -> [C]."""
        num_admitted = int(admitted_N.sum())
        if num_admitted == 0:
            return np.empty(0, dtype=np.intp)
        self._fill_faiss()
        bitmap = np.packbits(admitted_N, bitorder="little")
        params = _FAISS.SearchParameters(sel=_FAISS.IDSelectorBitmap(bitmap))
        asked = wanted = min(top_n, num_admitted)
        while True:
            asked = min(2 * asked + 16, num_admitted)
            scores_1C, rows_1C = self._faiss.search(unit_1V, asked, params=params)
            if asked == num_admitted or scores_1C[0, -1] < scores_1C[0, wanted - 1] - _EQUAL_SCORES:
                return np.asarray(rows_1C[0], dtype=np.intp)

    def _fill_faiss(self) -> None:
        raw_NV = self._table.vectors
        if self._faiss is None:
            self._faiss = _FAISS.IndexFlatIP(raw_NV.shape[1])
        for start in range(self._faiss.ntotal, len(raw_NV), _BLOCK_ROWS):
            self._faiss.add(self._space.unit(raw_NV[start : start + _BLOCK_ROWS]))


def _hit(entry: Entry, score: float) -> IndexHit:
    return IndexHit(
        entry_id=entry.entry_id,
        chunk_key=entry.chunk_key,
        content_key=entry.content_key,
        turn_id=entry.turn_id,
        score=score,
    )


def _identity(change: IndexChange) -> tuple[int, int, str, str]:
    return (change.seq, change.entry_id, change.chunk_key, change.turn_id)
