"""A namespace's index against brute force, its snapshots, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Fingerprint, IndexChange, Scope
from kv_agent.retrieval.index import IndexHit, NamespaceIndex
from tests.unit.retrieval.histories import (
    DIM,
    FINGERPRINT,
    Oracle,
    Vector,
    change,
    random_history,
    random_scope,
)


def new_index(changes: list[IndexChange] | None = None) -> NamespaceIndex:
    index = NamespaceIndex(FINGERPRINT, "default")
    index.apply(changes or [])
    return index


def normal(rng: np.random.Generator) -> Vector:
    return rng.normal(size=DIM).astype(np.float32)


def ids(hits: list[IndexHit]) -> list[int]:
    return [hit.entry_id for hit in hits]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 150), removals=st.sampled_from([0.0, 0.3, 0.6]))
def test_search_is_brute_force_while_changes_come_in(seed: int, length: int, removals: float) -> None:
    rng = np.random.default_rng(seed)
    history = random_history(rng, length, removals=removals)
    index, oracle = new_index(), Oracle()
    done = 0
    while done < length:
        step = int(rng.integers(1, 40))
        index.apply(history[done : done + step])
        oracle.apply(history[done : done + step])
        done += step
        query, scope, top_n = normal(rng), random_scope(rng), int(rng.integers(1, 12))
        hits, expected = index.search(query, scope, top_n), oracle.search(query, scope, top_n)
        assert ids(hits) == [entry_id for entry_id, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert index.num_entries == len(oracle.live)
    assert index.seq == history[-1].seq


def test_search_is_brute_force_among_many_whose_mean_drifts() -> None:
    """Many more entries than one search looks at again, so the order of FAISS itself counts."""
    rng = np.random.default_rng(11)
    index, oracle, live = new_index(), Oracle(), list[int]()
    for seq in range(1, 3001):
        if live and rng.random() < 0.4:
            step = change(seq, None, entry_id=live.pop(int(rng.integers(len(live)))))
        else:
            drift = np.full(DIM, seq / 100)
            step = change(seq, (drift + rng.normal(size=DIM)).astype(np.float32))
            live.append(seq)
        index.apply([step])
        oracle.apply([step])
        if seq % 100 == 0:
            query = (np.full(DIM, rng.uniform(0, 30)) + rng.normal(size=DIM)).astype(np.float32)
            assert ids(index.search(query, Scope(), 2)) == [i for i, _ in oracle.search(query, Scope(), 2)]


def test_every_scope_sees_what_scope_admits() -> None:
    rng = np.random.default_rng(0)
    history = random_history(rng, 200, removals=0.0)
    index = new_index(history)
    for _ in range(50):
        scope = random_scope(rng)
        seen = {hit.entry_id for hit in index.search(normal(rng), scope, 1000)}
        assert seen == {c.entry_id for c in history if scope.admits(c.scope)}


def test_the_scope_is_applied_before_the_cut() -> None:
    rng = np.random.default_rng(1)
    query = normal(rng)
    others = [
        change(i, query + normal(rng) * 0.01, scope=Scope(agent_id="loud")) for i in range(1, 1001)
    ]  # all far better matches
    mine = [change(i, normal(rng), scope=Scope(agent_id="quiet")) for i in range(1001, 1004)]
    index = new_index(others + mine)
    assert set(ids(index.search(query, Scope(agent_id="quiet"), 3))) == {1001, 1002, 1003}
    assert index.search(query, Scope(user_id="nobody"), 3) == []
    assert index.search(query, Scope(agent_id="nobody"), 3) == []


@pytest.mark.parametrize("num_entries", [1, 2, 3, 5])
def test_a_small_index_finds_each_of_its_entries(num_entries: int) -> None:
    rng = np.random.default_rng(2)
    common = normal(rng) * 10
    vectors = [common + normal(rng) for _ in range(num_entries)]
    index = new_index([change(i + 1, v) for i, v in enumerate(vectors)])
    for i, vector in enumerate(vectors):
        hits = index.search(vector, Scope(), 10)
        assert (hits[0].entry_id, len(hits)) == (i + 1, num_entries)
        assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_an_empty_index_finds_nothing() -> None:
    assert new_index().search(np.ones(3, dtype=np.float32), Scope(), 5) == []


def test_an_index_whose_entries_all_went_away_finds_nothing_and_takes_new_ones() -> None:
    rng = np.random.default_rng(3)
    index = new_index([change(i, normal(rng)) for i in range(1, 6)])
    index.apply([change(i + 10, None, entry_id=i) for i in range(1, 6)])
    assert index.search(normal(rng), Scope(), 5) == []
    index.apply([change(20, normal(rng))])
    assert ids(index.search(normal(rng), Scope(), 5)) == [20]


@pytest.mark.parametrize("top_n", [1, 3, 49, 50])
def test_newer_comes_first_among_equals_also_at_the_cut(top_n: int) -> None:
    rng = np.random.default_rng(4)
    same, query = normal(rng), normal(rng)
    index = new_index([change(i, -query) for i in range(1, 8)] + [change(i, same) for i in range(8, 58)])
    assert ids(index.search(same, Scope(), top_n)) == list(range(57, 57 - top_n, -1))


def test_entries_that_are_all_alike_are_all_found() -> None:
    same = normal(np.random.default_rng(5))
    index = new_index([change(i, same) for i in range(1, 20)])
    hits = index.search(same, Scope(), 4)
    assert ids(hits) == [19, 18, 17, 16]
    assert all(np.isfinite(hit.score) for hit in hits)


def test_a_change_applied_before_is_skipped() -> None:
    rng = np.random.default_rng(6)
    history = random_history(rng, 60)
    once, again = new_index(history), new_index(history)
    again.apply(history[10:50])
    again.apply(history)
    query = normal(rng)
    assert again.search(query, Scope(user_id="user1"), 99) == once.search(query, Scope(user_id="user1"), 99)
    assert (again.seq, again.num_entries) == (once.seq, once.num_entries)


def test_an_entry_that_comes_again_is_replaced() -> None:
    rng = np.random.default_rng(7)
    old, new = normal(rng), normal(rng)
    index = new_index([change(1, old, entry_id=5), change(2, -new, entry_id=6), change(3, new, entry_id=5)])
    assert ids(index.search(new, Scope(), 9)) == [5, 6]
    assert index.num_entries == 2


def test_removing_what_was_never_there_is_fine() -> None:
    assert new_index([change(1, None, entry_id=99)]).num_entries == 0


def test_numpy_and_torch_queries_of_any_float_type_are_the_same() -> None:
    rng = np.random.default_rng(8)
    index = new_index(random_history(rng, 30, removals=0))
    query = torch.from_numpy(normal(rng)).bfloat16()
    scope = Scope(user_id="user0")
    assert index.search(query, scope, 5) == index.search(query.float().numpy(), scope, 5)
    assert index.search(query.double(), scope, 5) == index.search(query, scope, 5)


def test_a_query_of_another_size_is_refused_with_both_sizes() -> None:
    index = new_index([change(1, np.ones(12, dtype=np.float32))])
    with pytest.raises(ValueError, match=r"7 .* 12"):
        index.search(np.ones(7, dtype=np.float32), Scope(), 1)


def test_a_query_that_is_not_finite_is_refused() -> None:
    index = new_index([change(1, np.ones(2, dtype=np.float32))])
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.array([1, np.nan], dtype=np.float32), Scope(), 1)


def test_another_namespace_is_refused_both_ways() -> None:
    index = new_index([change(1, np.ones(2, dtype=np.float32))])
    with pytest.raises(ValueError, match="'other'"):
        index.search(np.ones(2, dtype=np.float32), Scope(namespace="other"), 1)
    with pytest.raises(ValueError, match="'other'"):
        index.apply([change(2, np.ones(2, dtype=np.float32), scope=Scope(namespace="other"))])


@pytest.mark.parametrize("bad", [np.ones(5), np.full(DIM, np.inf), np.full(DIM, np.nan), np.empty(0)])
def test_a_vector_that_does_not_fit_is_left_out_with_one_warning(
    bad: Vector, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(9)
    good = normal(rng)
    with caplog.at_level(logging.WARNING):
        index = new_index([change(1, good), change(2, bad), change(3, bad), change(4, -good)])
    assert ids(index.search(good, Scope(), 9)) == [1, 4]
    assert index.seq == 4
    assert len(caplog.records) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 120), cut=st.floats(0, 1))
def test_a_snapshot_followed_on_equals_an_index_built_from_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, length: int, cut: float
) -> None:
    rng = np.random.default_rng(seed)
    history = random_history(rng, length)
    path = tmp_path_factory.mktemp("snapshots") / "index"
    split = int(cut * length)
    new_index(history[:split]).save(path)
    followed = NamespaceIndex.load(path, FINGERPRINT, "default")
    assert followed is not None
    assert followed.seq == (history[split - 1].seq if split else 0)
    followed.apply(history)
    built = new_index(history)
    for _ in range(5):
        query, scope = normal(rng), random_scope(rng)
        assert followed.search(query, scope, 20) == built.search(query, scope, 20)
    assert [p.name for p in path.parent.iterdir()] == ["index"]  # no unfinished file is left


def test_a_missing_snapshot_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert NamespaceIndex.load(tmp_path / "none", FINGERPRINT, "default") is None
    assert not caplog.records


def test_a_snapshot_of_another_index_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new_index([change(1, np.ones(2, dtype=np.float32))]).save(tmp_path / "index")
    assert NamespaceIndex.load(tmp_path / "index", FINGERPRINT, "other") is None
    assert NamespaceIndex.load(tmp_path / "index", Fingerprint("another model"), "default") is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_a_snapshot_of_an_earlier_format_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("kv_agent.retrieval.snapshot._FORMAT", "kv_agent.index.3")
        new_index([change(1, np.ones(2, dtype=np.float32))]).save(tmp_path / "index")
    assert NamespaceIndex.load(tmp_path / "index", FINGERPRINT, "default") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_damaged_byte_anywhere_in_a_snapshot_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(10)
    path = tmp_path / "index"
    new_index(random_history(rng, 6, removals=0.2)).save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):  # prime to what is aligned, so every field is hit
        caplog.clear()
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        assert NamespaceIndex.load(path, FINGERPRINT, "default") is None, position
        assert len(caplog.records) == 1


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_cut_off_snapshot_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int) -> None:
    path = tmp_path / "index"
    new_index([change(1, np.ones(2, dtype=np.float32))]).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert NamespaceIndex.load(path, FINGERPRINT, "default") is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("foreign", [b"", b"hello", b"\xff" * 100, b"PK\x03\x04" + bytes(200)])
def test_a_foreign_file_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture, foreign: bytes) -> None:
    (tmp_path / "index").write_bytes(foreign)
    assert NamespaceIndex.load(tmp_path / "index", FINGERPRINT, "default") is None
    assert len(caplog.records) == 1


def test_a_failed_save_keeps_the_old_snapshot_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index"
    new_index([change(1, np.ones(2, dtype=np.float32))]).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kv_agent.retrieval.snapshot.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        new_index([change(2, np.ones(2, dtype=np.float32))]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
