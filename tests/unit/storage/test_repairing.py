"""Whatever happened to the files of a store, after a repair it is sound or says what is not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kv_agent.chunks import TurnId
from kv_agent.errors import StorageError
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.catalogs import found
from tests.unit.storage.stores import blob_files, holds, store_root


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def fill(store: LocalStore, number: int) -> list[list[NewChunk]]:
    turns = [chain(2, 3, seed=seed) for seed in range(number)]
    for seed, chunks in enumerate(turns):
        store.put_turn(turn_of(chunks, f"turn-{seed}"), [], chunks)
    return turns


def path_of(store: LocalStore, chunk: NewChunk) -> Path:
    return store_root(store) / store.catalog.chunks([chunk.key])[chunk.key].blob


def test_lost_and_damaged_chunks_are_quarantined_with_the_reason_and_can_be_stored_again(
    store: LocalStore,
) -> None:
    fine, lost, damaged = fill(store, 3)
    path_of(store, lost[0]).unlink()
    flip_last_byte(path_of(store, damaged[0]))
    inspection = store.inspect()
    (bad_key,) = {chunk.record.key for chunk in inspection.bad_chunks} & {chunk.key for chunk in damaged}
    expected = {chunk.key for chunk in lost} | {bad_key}

    quarantined = store.repair(inspection)

    assert {chunk.record.key for chunk in quarantined} == expected
    assert {record.key for record in store.catalog.all_chunks() if record.quarantined} == expected
    with store.catalog._connection() as db:
        reasons = dict(db.execute("SELECT key, quarantine_reason FROM chunks WHERE quarantine_reason > ''"))
    assert reasons == {chunk.record.key: chunk.problem for chunk in inspection.bad_chunks}
    assert store.inspect().problems == []
    assert {chunk for _, chunk in found(store.catalog)} == {
        chunk.key for turn in (fine, lost, damaged) for chunk in turn
    } - expected
    assert holds(store, fine)
    for seed, chunks in ((1, lost), (2, damaged)):
        store.put_turn(turn_of(chunks, f"turn-{seed}"), [], chunks)
    assert holds(store, [*fine, *lost, *damaged])
    assert store.check() == []


def test_after_any_damage_to_files_a_repaired_store_is_clean_and_serves_what_was_spared(
    store: LocalStore,
) -> None:
    picks = random.Random(5)
    turns = fill(store, 30)
    spared: list[NewChunk] = []
    for chunks in turns:
        path = path_of(store, chunks[0])
        match picks.randrange(5):
            case 0:
                path.unlink()
            case 1:
                os.truncate(path, picks.randrange(path.stat().st_size))
            case 2:
                path.write_bytes(b"")
            case 3:
                path.rename(path.with_name("moved-away.safetensors"))
            case _:
                spared += chunks

    store.repair(store.inspect(0))
    store.collect_garbage(0)

    assert store.check() == []
    assert 0 < len(spared) < 60
    # A file that was cut off may still hold its first chunk.
    live = {record.key for record in store.catalog.all_chunks() if not record.quarantined}
    assert {chunk.key for chunk in spared} <= live
    assert holds(store, [chunk for chunks in turns for chunk in chunks if chunk.key in live])


def test_what_cannot_be_read_now_is_named_and_not_quarantined(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chunks,) = fill(store, 1)

    def fail(*_: object) -> None:
        raise StorageError("input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(BlobFiles, "read_chunk", fail)
        inspection = store.inspect()
        assert store.repair(inspection) == []

    assert [problem.split(":")[0] for problem in inspection.problems] == [
        f"chunk {key} is unreadable" for key in sorted(chunk.key for chunk in chunks)
    ]
    assert holds(store, chunks)


def test_a_chunk_stored_anew_between_inspection_and_repair_is_not_quarantined(store: LocalStore) -> None:
    (chunks,) = fill(store, 1)
    path_of(store, chunks[0]).unlink()
    inspection = store.inspect()
    store.forget([TurnId("turn-0")])
    store.put_turn(turn_of(chunks), [], chunks)

    assert store.repair(inspection) == []
    assert store.stats()["quarantined"] == 0
    assert holds(store, chunks)


def test_a_turn_forgotten_while_its_chunks_are_read_is_no_problem(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 2)
    real_read = BlobFiles.read_chunk

    def forget_and_read(blobs: BlobFiles, relpath: str, name: str) -> object:
        store.forget([TurnId("turn-0"), TurnId("turn-1")])
        return real_read(blobs, relpath, name)

    monkeypatch.setattr(BlobFiles, "read_chunk", forget_and_read)

    assert store.check() == []


def test_young_files_are_told_apart_from_orphans_and_foreign_ones(store: LocalStore) -> None:
    folder = store_root(store) / "blobs" / "zz"
    folder.mkdir(parents=True)
    for name in ("zz-1.safetensors", "zz-2.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"12345")
    os.utime(folder / "zz-1.safetensors", (0, 0))
    (folder / "folder").mkdir()

    inspection = store.inspect(3600)

    assert [text.split()[1] for text in inspection.orphans] == ["blobs/zz/zz-1.safetensors"]
    assert [text.split()[1] for text in inspection.young] == ["blobs/zz/zz-2.safetensors"]
    assert [text.split()[1] for text in inspection.beyond_repair] == ["blobs/zz/notes.txt"]


def test_rows_that_refer_to_nothing_and_a_damaged_index_of_the_catalog_are_named(store: LocalStore) -> None:
    fill(store, 2)
    assert store.catalog.damage() == []
    with store.catalog._connection() as db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute("DELETE FROM turns WHERE turn_id = 'turn-0'")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("DELETE FROM sqlite_master WHERE name = 'chunks_by_content'")
        db.execute("PRAGMA writable_schema = OFF")
    path = store_root(store)
    store.close()
    reopened = LocalStore(path, host_bytes=0)

    problems = reopened.inspect().beyond_repair
    reopened.close()

    assert {problem.split(": ")[0] for problem in problems} == {
        "the catalog is damaged, restore it from a copy"
    }
    for table in ("turn_chunks", "entries", "turn_docs"):
        assert any(f": {table} refers to rows of turns that are gone" in problem for problem in problems)
    assert any("never used" in problem for problem in problems)  # pages of the index that is gone


def test_repairing_an_empty_store_finds_nothing(store: LocalStore) -> None:
    assert store.repair(store.inspect()) == []
    assert blob_files(store) == []
