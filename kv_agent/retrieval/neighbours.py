"""FAISS behind one interface: exact while there are few vectors, inverted lists of bytes when there are many.

Legend: N vectors, V values of a vector, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
Block = Callable[[int, int], Floats]  # unit vectors of the rows from one up to another

_FAISS: Any = faiss  # its stubs describe the C++ side, not the Python wrappers used here

MOST_EXACT = 20_000  # vectors; a scan of as many with 1,024 values takes some milliseconds
BLOCK_ROWS = 8192  # whitened at a time, to bound temporary memory
_LISTS_PER_ROOT = 2  # lists = 2 * sqrt(N)
_TRAINED_PER_LIST = 40
_TRAINING_STEPS = 6
_PROBED_QUERIES = 64
_NEAREST = 10
_WANTED_RECALL = 0.995  # of the nearest ten, by vectors of the index itself
_QUERY_NOISE = 0.5  # of a vector's length: queries are like stored vectors, not equal to them


class Neighbours:
    """Inner-product search over rows numbered from 0."""

    def __init__(self, index: Any, num_probes: int = 0) -> None:
        self._index = index
        self._num_probes = num_probes  # 0: exact
        if self.is_exact:
            return
        self._num_lists = int(_FAISS.extract_index_ivf(index).nlist)

    @property
    def num_rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def is_exact(self) -> bool:
        return self._num_probes == 0

    @property
    def num_probes(self) -> int:
        """Lists that are looked into; 0 when the search is exact."""
        return self._num_probes

    def add(self, unit_NV: Floats) -> None:
        self._index.add(unit_NV)

    def search(
        self, unit_1V: Floats, num_wanted: int, bitmap: npt.NDArray[np.uint8], share: float
    ) -> tuple[Floats, Rows]:
        """Scores and rows of the best among those that ``bitmap`` admits, a ``share`` of all; best first."""
        selector = _FAISS.IDSelectorBitmap(bitmap)
        if self.is_exact:
            params = _FAISS.SearchParameters(sel=selector)
        else:
            # Where fewer are admitted, more lists hold as many of them: the work stays the same.
            num_probes = min(self._num_lists, int(np.ceil(self._num_probes / share)))
            params = _FAISS.SearchParametersIVF(sel=selector, nprobe=num_probes)
        scores_1C, rows_1C = self._index.search(unit_1V, num_wanted, params=params)
        found_C = rows_1C[0] >= 0
        return scores_1C[0][found_C], rows_1C[0][found_C].astype(np.intp)

    def vectors(self, rows_C: Rows) -> Floats:
        """The vectors of an exact search as they were added -> [C, V]."""
        found_CV: Floats = self._index.reconstruct_batch(rows_C)
        return found_CV

    def to_array(self) -> npt.NDArray[np.uint8]:
        array: npt.NDArray[np.uint8] = _FAISS.serialize_index(self._index)
        return array

    @classmethod
    def from_array(cls, array: npt.NDArray[np.uint8], num_probes: int) -> Neighbours:
        return cls(_FAISS.deserialize_index(array), num_probes)


def build(size: int, num_rows: int, block: Block) -> Neighbours:
    """All rows searchable; above ``MOST_EXACT`` by lists, which are fitted to them."""
    if num_rows <= MOST_EXACT:
        exact = Neighbours(_FAISS.IndexFlatIP(size))
        fill(exact, num_rows, block)
        return exact
    num_lists = int(_LISTS_PER_ROOT * num_rows**0.5)
    index = _FAISS.IndexIVFScalarQuantizer(
        _FAISS.IndexFlatIP(size), size, num_lists, _FAISS.ScalarQuantizer.QT_8bit, _FAISS.METRIC_INNER_PRODUCT
    )
    index.cp.niter = _TRAINING_STEPS
    index.cp.max_points_per_centroid = _TRAINED_PER_LIST
    index.cp.min_points_per_centroid = 1
    index.train(_sample(num_rows, min(num_rows, num_lists * _TRAINED_PER_LIST), block))
    many = Neighbours(index, num_probes=1)
    fill(many, num_rows, block)
    queries_QV = _sample(num_rows, _PROBED_QUERIES, block)
    return Neighbours(index, _probes_for(index, _disturbed(queries_QV), num_rows, block))


def fill(neighbours: Neighbours, num_rows: int, block: Block) -> None:
    """Add the rows that are not there yet."""
    for start, end in _blocks(neighbours.num_rows, num_rows):
        neighbours.add(block(start, end))


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, BLOCK_ROWS):
        yield first, min(first + BLOCK_ROWS, end)


def _sample(num_rows: int, num_wanted: int, block: Block) -> Floats:
    """Single rows spread evenly; runs of rows would be of one session."""
    rows = np.linspace(0, num_rows - 1, num_wanted).astype(np.intp)
    parts = [
        block(start, end)[rows[(rows >= start) & (rows < end)] - start] for start, end in _blocks(0, num_rows)
    ]
    return np.concatenate(parts)


def _disturbed(unit_QV: Floats) -> Floats:
    rng = np.random.default_rng(0)
    noise_QV = rng.normal(size=unit_QV.shape).astype(np.float32)
    noise_QV *= _QUERY_NOISE / np.linalg.norm(noise_QV, axis=1, keepdims=True)
    return unit_QV + noise_QV


def _probes_for(index: Any, queries_QV: Floats, num_rows: int, block: Block) -> int:
    """The smallest power of two of lists that finds what is wanted of the exactly nearest."""
    exact = _FAISS.ResultHeap(len(queries_QV), _NEAREST, keep_max=True)
    for start, end in _blocks(0, num_rows):
        scores_QK, rows_QK = _FAISS.knn(
            queries_QV, block(start, end), _NEAREST, metric=_FAISS.METRIC_INNER_PRODUCT
        )
        exact.add_result(scores_QK, rows_QK + start)
    exact.finalize()
    num_probes = 1
    while num_probes < index.nlist:
        params = _FAISS.SearchParametersIVF(nprobe=num_probes)
        found_QK = index.search(queries_QV, 2 * _NEAREST, params=params)[1]
        pairs = zip(found_QK, exact.I, strict=True)
        if np.mean([np.isin(nearest, found).mean() for found, nearest in pairs]) >= _WANTED_RECALL:
            break
        num_probes *= 2
    return min(num_probes, int(index.nlist))
