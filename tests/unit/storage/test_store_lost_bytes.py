"""Bytes that a store lost, quarantined or forgot: how it is told, what stays, and how they come back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import CorruptChunkError
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.stores import blob_files, counts, holds, store_root


def test_loading_names_missing_and_damaged_blobs_apart_and_does_not_quarantine(store: LocalStore) -> None:
    (lost,), (damaged,) = chain(3), chain(3, seed=1)
    store.put_turn(turn_of([lost]), [], [lost])
    store.put_turn(turn_of([damaged], "turn-2"), [], [damaged])
    records = store.catalog.chunks([lost.key, damaged.key])
    (store_root(store) / records[lost.key].blob).unlink()
    path = store_root(store) / records[damaged.key].blob
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    with pytest.raises(MissingBlobError):
        store.load(records[lost.key])
    with pytest.raises(CorruptChunkError, match="checksum"):
        store.load(records[damaged.key])

    assert store.stats()["quarantined"] == 0
    assert [problem.split(":")[0] for problem in store.check()] == [
        f"chunk {chunk.key} is {kind}"
        for chunk, kind in sorted([(lost, "lost"), (damaged, "damaged")], key=lambda pair: pair[0].key)
    ]


def test_a_catalog_row_that_points_outside_is_refused(store: LocalStore) -> None:
    (chunk,) = chain(3)
    store.put_turn(turn_of([chunk]), [], [chunk])
    record = store.catalog.chunks([chunk.key])[chunk.key]

    with pytest.raises(CorruptChunkError, match="blob path"):
        store.load(dataclasses.replace(record, blob="../../etc/passwd"))


def test_recapture_replaces_quarantined_bytes_and_drops_the_old_file(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    (old_file,) = blob_files(store)
    old_file.write_bytes(b"damaged")
    store.quarantine(content[0].key, "damaged")
    assert store.stats()["entries"] == 0
    assert store.check() == []

    result = store.put_turn(turn_of(content), [], content)

    assert result.new_chunks == {content[0].key}
    assert not old_file.exists()
    assert holds(store, content)
    assert store.stats()["entries"] == 1
    assert store.check() == []


def test_recapture_under_the_same_turn_id_keeps_the_healthy_bytes(store: LocalStore) -> None:
    content = chain(3, 4)
    store.put_turn(turn_of(content), [], content)
    store.quarantine(content[0].key, "test")

    store.put_turn(turn_of(content), [], content)

    assert len(blob_files(store)) == 2
    assert holds(store, content)


def test_forgetting_removes_a_blob_only_with_its_last_user(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, host_bytes=1 << 20)
    system, *content = chain(3, 4, 2)
    later = chain(5, seed=1, parent=content[-1].key)
    store.put_turn(turn_of(content), [system], content)
    store.put_turn(turn_of(later, "turn-2"), [system, *content], later)
    store.put_turn(turn_of(content[:1], "turn-3", scope=Scope(session_id="s")), [], content[:1])

    store.forget([TurnId("turn-1"), TurnId("unknown")])
    assert len(blob_files(store)) == 2
    assert holds(store, [system, *content, *later])

    store.forget([TurnId("turn-2")])
    assert len(blob_files(store)) == 1
    assert store.catalog.chunks([system.key, later[0].key]) == {}
    assert holds(store, content[:1])
    assert store.stats()["host_chunks"] == 1

    store.forget([TurnId("turn-3")])
    assert blob_files(store) == []
    assert counts(store) == {0}
    assert store.check() == []
    store.close()


def test_a_forgotten_turn_can_be_stored_again(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    store.forget([TurnId("turn-1")])

    assert store.put_turn(turn_of(content), [], content).new_turn
    assert holds(store, content)
