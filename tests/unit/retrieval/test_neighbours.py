"""Exact and listed search against brute force, and how an index changes from one to the other."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_agent.chunks import Scope
from kv_agent.retrieval import index as index_module
from kv_agent.retrieval import neighbours as neighbours_module
from kv_agent.retrieval.index import NamespaceIndex
from kv_agent.retrieval.neighbours import Neighbours, build, fill
from tests.unit.retrieval.histories import DIM, FINGERPRINT, change

ALL = np.packbits(np.ones(5000, dtype=bool), bitorder="little")


def clustered(num_rows: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors around forty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, size))
    rows = centres[rng.integers(40, size=num_rows)] + 0.5 * rng.normal(size=(num_rows, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def built(rows: np.ndarray) -> Neighbours:
    return build(rows.shape[1], len(rows), lambda start, end: rows[start:end])


def recall(
    found: Neighbours, rows: np.ndarray, queries: np.ndarray, admitted: np.ndarray | None = None
) -> float:
    admitted = np.ones(len(rows), dtype=bool) if admitted is None else admitted
    bitmap = np.packbits(admitted, bitorder="little")
    shares = []
    for query in queries:
        scores = np.where(admitted, rows @ query, -np.inf)
        exact = np.argsort(-scores)[:10]
        _, nearest = found.search(query[None], 20, bitmap, float(admitted.mean()))
        assert admitted[nearest].all()
        shares.append(np.isin(exact, nearest).mean())
    return float(np.mean(shares))


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists from 1,000 rows on, so that tests are quick."""
    monkeypatch.setattr(neighbours_module, "MOST_EXACT", 1000)


def test_few_rows_are_searched_exactly() -> None:
    rows = clustered(2000)
    found = built(rows)
    assert found.is_exact
    scores, nearest = found.search(rows[7:8], 5, ALL, 1.0)
    assert nearest[0] == 7
    assert scores == pytest.approx(np.sort(rows @ rows[7])[::-1][:5], abs=1e-6)
    assert np.array_equal(found.vectors(nearest), rows[nearest])


@pytest.mark.usefixtures("few_are_many")
def test_many_rows_are_found_by_lists_of_which_few_are_looked_into() -> None:
    rows = clustered(5000)
    found = built(rows)
    assert not found.is_exact
    assert 1 <= found.num_probes < 141
    assert recall(found, rows, clustered(100, seed=1)) >= 0.98


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("share", [0.5, 0.05, 0.002])
def test_a_filter_does_not_cost_recall(share: float) -> None:
    rows = clustered(5000)
    admitted = np.random.default_rng(3).random(5000) < share
    assert recall(built(rows), rows, clustered(50, seed=1), admitted) >= 0.98


@pytest.mark.usefixtures("few_are_many")
def test_vectors_without_any_order_are_found_as_well() -> None:
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(3000, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = built(rows)
    assert recall(found, rows, rows[:50] + 0.1 * rng.normal(size=(50, 16)).astype(np.float32)) >= 0.98


@pytest.mark.usefixtures("few_are_many")
def test_lists_come_back_from_bytes_and_grow() -> None:
    rows = clustered(3000)
    found = built(rows[:2500])
    again = Neighbours.from_array(found.to_array(), found.num_probes)
    for one in (found, again):
        fill(one, 3000, lambda start, end: rows[start:end])
    assert again.num_rows == 3000
    for query in clustered(20, seed=2):
        for got, wanted in zip(
            again.search(query[None], 9, ALL, 1.0), found.search(query[None], 9, ALL, 1.0), strict=True
        ):
            assert np.array_equal(got, wanted)


def fill_index(index: NamespaceIndex, rows: np.ndarray, first_seq: int = 1) -> None:
    index.apply(change(first_seq + number, row) for number, row in enumerate(rows))


@pytest.mark.usefixtures("few_are_many")
def test_an_index_with_lists_forgets_grows_and_survives_its_snapshot(tmp_path: Path) -> None:
    rows = clustered(3000, DIM)
    index = NamespaceIndex(FINGERPRINT, "default")
    fill_index(index, rows[:2500])
    index.apply(change(3001 + number, None, entry_id=number + 1) for number in range(0, 2500, 5))
    fill_index(index, rows[2500:], 6001)
    gone = {number + 1 for number in range(0, 2500, 5)}
    assert index.num_entries == 2500
    expected = [index.search(query, Scope(), 10) for query in clustered(30, DIM, seed=5)]
    assert index.neighbours is not None
    assert not index.neighbours.is_exact
    assert not gone & {hit.entry_id for hits in expected for hit in hits}
    assert any(hit.entry_id > 6000 for hits in expected for hit in hits)

    index.save(tmp_path / "index")
    loaded = NamespaceIndex.load(tmp_path / "index", FINGERPRINT, "default")
    assert loaded is not None
    assert [loaded.search(query, Scope(), 10) for query in clustered(30, DIM, seed=5)] == expected
    assert loaded.num_entries == 2500
    loaded.apply([change(9000, None, entry_id=expected[0][0].entry_id)])
    assert expected[0][0].entry_id not in {
        hit.entry_id for hit in loaded.search(clustered(30, DIM, seed=5)[0], Scope(), 10)
    }


class Held(Executor):
    """Runs what it was given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: function(*args, **kwargs)))
        return future

    def run(self) -> None:
        for future, function in self.waiting:
            try:
                future.set_result(function())
            except Exception as err:  # noqa: BLE001
                future.set_exception(err)
        self.waiting.clear()


def test_a_large_index_serves_on_while_it_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FITTED_AT_ONCE", 100)
    held = Held()
    index = NamespaceIndex(FINGERPRINT, "default", background=held)
    rows = clustered(600, DIM)
    fill_index(index, rows[:100])
    assert index.search(rows[4], Scope(), 1)[0].entry_id == 5
    assert not held.waiting
    fill_index(index, rows[100:300], 101)
    index.apply([change(301, None, entry_id=3)])
    before = index.space
    assert index.search(rows[4], Scope(), 299)[0].entry_id == 5
    assert index.search(rows[250], Scope(), 1)[0].entry_id == 251
    assert len(held.waiting) == 1
    index.apply([change(302, None, entry_id=7)])

    held.run()
    fill_index(index, rows[300:350], 1001)
    found = [hit.entry_id for hit in index.search(rows[4], Scope(), 999)]
    assert index.space is not before
    assert found[0] == 5
    assert sorted(found) == sorted({*range(1, 301), *range(1001, 1051)} - {3, 7})


def test_a_fit_that_fails_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_module, "FITTED_AT_ONCE", 100)
    held = Held()

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room for lists")

    index = NamespaceIndex(FINGERPRINT, "default", background=held)
    rows = clustered(300, DIM)
    fill_index(index, rows)
    assert index.search(rows[9], Scope(), 1)[0].entry_id == 10
    monkeypatch.setattr(index_module, "fit", out_of_memory)
    held.run()
    assert index.search(rows[9], Scope(), 1)[0].entry_id == 10
    assert ["no room for lists" in record.message for record in caplog.records] == [True]


def test_a_bulk_of_changes_is_waited_for_rather_than_searched_unfitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "FITTED_AT_ONCE", 50)
    rows = clustered(1000, DIM)
    with ThreadPoolExecutor(1) as threads:
        index = NamespaceIndex(FINGERPRINT, "default", background=threads)
        fill_index(index, rows)
        expected = NamespaceIndex(FINGERPRINT, "default")
        fill_index(expected, rows)
        assert index.search(rows[3], Scope(), 9) == expected.search(rows[3], Scope(), 9)


def test_searches_of_other_threads_go_on_during_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real executor: what a fit reads is not changed under it."""
    monkeypatch.setattr(index_module, "FITTED_AT_ONCE", 100)
    begun, go_on = threading.Event(), threading.Event()
    fit = index_module.fit

    def slow_fit(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return fit(*args)

    rows = clustered(400, DIM)
    with ThreadPoolExecutor(1) as threads:
        index = NamespaceIndex(FINGERPRINT, "default", background=threads)
        fill_index(index, rows[:100])
        assert index.search(rows[50], Scope(), 1)[0].entry_id == 51
        monkeypatch.setattr(index_module, "fit", slow_fit)
        fill_index(index, rows[100:300], 101)
        assert index.search(rows[250], Scope(), 1)[0].entry_id == 251
        assert begun.wait(10)
        fill_index(index, rows[300:], 301)
        index.apply([change(401, None, entry_id=8)])
        go_on.set()
        index._take_finished(waiting=True)
        for number in (50, 250, 399):
            assert index.search(rows[number], Scope(), 1)[0].entry_id == number + 1
        assert index.num_entries == 399
