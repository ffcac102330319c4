"""Races and interruptions of a store: whoever loses or is killed leaves no row without bytes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kv_agent.chunks import TurnId
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from kv_agent.storage.turn_writes import AddResult, UnknownChunkError
from tests.unit.storage.builders import FINGERPRINT, SPAWN, chain, kv_of, same_bits, turn_of
from tests.unit.storage.stores import blob_files, counts, holds, store_root

pytestmark = pytest.mark.slow

JOIN_TIMEOUT_S = 60


def test_whoever_loses_the_race_for_the_same_chunks_deletes_its_own_blob(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3, 4)
    rival = LocalStore(store_root(store), host_bytes=0)
    real_write = BlobFiles.write

    def write_after_the_rival(blobs: BlobFiles, name: str, data: bytes) -> str:
        monkeypatch.setattr(BlobFiles, "write", real_write)
        rival.put_turn(turn_of(content), [], content)
        return real_write(blobs, name, data)

    monkeypatch.setattr(BlobFiles, "write", write_after_the_rival)
    result = store.put_turn(turn_of(content, "turn-2"), [], content)

    assert (result.new_turn, result.new_chunks, result.turn_id) == (False, frozenset(), "turn-1")
    assert len(blob_files(store)) == 1
    assert holds(store, content)
    rival.close()


def test_a_turn_that_is_forgotten_the_moment_it_is_stored_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path, host_bytes=1 << 20)
    content = chain(3, 4)
    add_turn = Catalog.add_turn

    def forgotten_at_once(catalog: Catalog, *args: Any, **kwargs: Any) -> AddResult:
        result = add_turn(catalog, *args, **kwargs)
        store.forget([result.turn_id])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "add_turn", forgotten_at_once)
        store.put_turn(turn_of(content), [], content)

    assert (store.stats()["host_bytes"], blob_files(store)) == (0, [])
    store.put_turn(turn_of(content), [], content)
    assert store.stats()["host_chunks"] == len(content)
    store.close()


@pytest.mark.parametrize("is_evicted", [False, True])
def test_a_chunk_that_is_read_while_it_is_forgotten_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_evicted: bool
) -> None:
    store = LocalStore(tmp_path, host_bytes=1 << 20)
    (chunk,) = content = chain(3)
    store.put_turn(replace(turn_of(content), expires=5.0), [], content)
    record = store.catalog.chunks([chunk.key])[chunk.key]
    delete = BlobFiles.delete

    def read_first(blobs: BlobFiles, relpath: str) -> None:
        assert same_bits(store.load(record).kv_L2THD, kv_of(chunk))
        delete(blobs, relpath)

    monkeypatch.setattr(BlobFiles, "delete", read_first)
    if is_evicted:
        assert store.forget_expired(6.0) == 1
    else:
        store.forget([TurnId("turn-1")])

    assert (store.stats()["host_bytes"], blob_files(store)) == (0, [])
    store.close()


@pytest.mark.parametrize("as_context", [True, False])
def test_a_chunk_forgotten_between_look_up_and_commit_is_written_anew(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, as_context: bool
) -> None:
    first, second = chain(3, 4)
    store.put_turn(turn_of([first]), [], [first])
    real_add = Catalog.add_turn

    def forget_first(*args: object, **options: object) -> AddResult:
        monkeypatch.setattr(Catalog, "add_turn", real_add)
        store.forget([TurnId("turn-1")])
        return real_add(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "add_turn", forget_first)
    if as_context:
        store.put_turn(turn_of([second], "turn-2"), [first], [second])
    else:
        store.put_turn(turn_of([first, second], "turn-2"), [], [first, second])

    assert holds(store, [first, second])
    assert len(blob_files(store)) == 1
    assert store.check() == []


def test_a_failed_transaction_leaves_neither_rows_nor_bytes(store: LocalStore) -> None:
    content = chain(3, 4)

    with pytest.raises(UnknownChunkError):
        store.put_turn(turn_of(content), [], content[1:])
    with pytest.raises(ValueError, match="not among"):
        store.put_turn(turn_of(content[:1]), [], content)

    assert blob_files(store) == []
    assert counts(store) == {0}


def test_an_orphan_is_reported_and_a_stored_turn_is_not(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    orphan = store_root(store) / "blobs" / "zz" / "zz-1.safetensors"
    orphan.parent.mkdir()
    orphan.write_bytes(b"12345")

    (problem,) = store.check()

    assert problem.startswith("file blobs/zz/zz-1.safetensors (5 bytes) belongs to no chunk")


def die_while_storing(root: str, moment: str) -> None:
    """Store one turn, then be killed at ``moment`` of storing the next."""
    store = LocalStore(Path(root), host_bytes=0)
    before, during = chain(3), chain(3, 4, seed=1)
    store.put_turn(turn_of(before), [], before)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the rename":
        os.replace = die  # type: ignore[assignment]
    elif moment == "between blob and row":
        Catalog.add_turn = die  # type: ignore[method-assign, assignment]
    else:
        add_turn = Catalog.add_turn

        def add_and_die(*args: object, **options: object) -> None:
            add_turn(*args, **options)  # type: ignore[arg-type]
            die()

        Catalog.add_turn = add_and_die  # type: ignore[method-assign, assignment]
    store.put_turn(turn_of(during, "turn-2"), [], during)


@pytest.mark.parametrize(
    ("moment", "stored", "left_files"),
    [("before the rename", False, 2), ("between blob and row", False, 2), ("after the row", True, 2)],
)
def test_killed_at_any_moment_no_row_is_without_bytes(
    tmp_path: Path, moment: str, stored: bool, left_files: int
) -> None:
    process = SPAWN.Process(target=die_while_storing, args=(str(tmp_path), moment))
    process.start()
    process.join(JOIN_TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL

    store = LocalStore(tmp_path, host_bytes=0)
    before, during = chain(3), chain(3, 4, seed=1)

    assert holds(store, before)
    assert store.catalog.known_turns([TurnId("turn-2")]) == ({"turn-2"} if stored else set())
    assert len(store.check()) == (0 if stored else 1)  # at worst a file nobody refers to
    assert len(blob_files(store)) == left_files
    assert store.put_turn(turn_of(during, "turn-2"), [], during).new_turn == (not stored)
    assert holds(store, [*before, *during])
    store.close()


def put_many(root: str, name: str, results: object) -> None:
    """Turns that both processes store, and turns of its own."""
    store = LocalStore(Path(root), host_bytes=0)
    for number in range(12):
        shared, own = chain(2, 3, seed=number), chain(2, seed=100 + number + 50 * (name == "b"))
        store.put_turn(turn_of(shared, f"shared-{name}-{number}"), [], shared)
        store.put_turn(turn_of(own, f"own-{name}-{number}"), shared[:1], own)
    store.close()
    results.put(name)  # type: ignore[attr-defined]


def test_two_processes_store_into_one_new_directory_at_once(tmp_path: Path) -> None:
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=put_many, args=(str(tmp_path), name, results)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(JOIN_TIMEOUT_S)

    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(results.get(timeout=5) for _ in processes) == ["a", "b"]
    store = LocalStore(tmp_path, host_bytes=0)
    ids = [TurnId(f"{kind}-{name}-{n}") for kind in ("shared", "own") for name in "ab" for n in range(12)]
    assert store.catalog.known_turns(ids) == set(ids)
    assert store.stats()["turns"] == 36  # 12 shared ones, stored once, and 12 of each process
    assert store.stats()["chunks"] == 48
    for number in range(12):
        assert holds(store, chain(2, 3, seed=number))
        assert holds(store, chain(2, seed=100 + number))
        assert holds(store, chain(2, seed=150 + number))
    assert store.check() == []  # no loser left its blob behind
    changes = store.catalog.changes_since(FINGERPRINT, "default", 0)
    assert len({(change.turn_id, change.chunk_key) for change in changes}) == len(changes) == 48
    store.close()
