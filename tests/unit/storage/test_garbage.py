"""Garbage goes, and nothing that anyone may still want: rows, bytes, or a turn that is being stored."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent.chunks import TurnId
from kv_agent.errors import ConfigError
from kv_agent.storage import upkeep
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from kv_agent.storage.turn_writes import AddResult
from tests.unit.storage.builders import FINGERPRINT, chain, turn_of, whole
from tests.unit.storage.catalogs import found
from tests.unit.storage.stores import blob_files, holds, store_root

OLD_S = 7200.0


def leave(store: LocalStore, relpath: str, age_s: float = OLD_S, num_bytes: int = 100) -> Path:
    """A file as a crash leaves it, last modified ``age_s`` ago."""
    path = store_root(store) / relpath
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_old_orphans_go_young_and_foreign_files_and_all_chunks_stay(store: LocalStore) -> None:
    content = chain(3, 4)
    store.put_turn(turn_of(content), [], content)
    (blob,) = blob_files(store)
    os.utime(blob, (0, 0))  # however old, a row names it
    gone = [
        leave(store, "blobs/ab/ab-1.safetensors", num_bytes=10),
        leave(store, "blobs/ab/ab-2.0123abcd.tmp", num_bytes=20),
        leave(store, "index/.fp.safetensors.77.tmp", num_bytes=30),
        leave(store, "index/texts-x/.fp.safetensors.77.tmp", num_bytes=40),
    ]
    kept = [
        leave(store, "blobs/ab/ab-3.safetensors", age_s=3500),
        leave(store, "blobs/cd/cd-3.0123.tmp", age_s=3500),
        leave(store, "blobs/cd/notes.txt"),
        leave(store, "index/fp.safetensors"),
        leave(store, "index/.fp.safetensors.78.tmp", age_s=3500),
    ]

    garbage = store.collect_garbage(3600)

    assert (garbage.num_files, garbage.file_bytes, garbage.num_turns, garbage.num_chunks) == (4, 100, 0, 0)
    assert garbage.young == ("blobs/ab/ab-3.safetensors", "blobs/cd/cd-3.0123.tmp")
    assert garbage.foreign == ("blobs/cd/notes.txt",)
    assert [path.exists() for path in gone] == [False] * 4
    assert [path.exists() for path in kept] == [True] * 5
    assert holds(store, content)


def test_overdue_turns_and_chunks_of_no_turn_go_with_their_files_and_entries(store: LocalStore) -> None:
    short, long, stray = chain(3), chain(4, seed=1), chain(5, seed=2)
    for name, chunks, expires in (("short", short, 10.0), ("long", long, 1e12), ("stray", stray, None)):
        store.put_turn(replace(turn_of(chunks, name), expires=expires), [], chunks)
    with store.catalog._transaction() as db:  # what no release should leave behind
        db.execute("DELETE FROM turn_chunks WHERE turn_id = 'stray'")

    garbage = store.collect_garbage()

    assert (garbage.num_turns, garbage.num_chunks, garbage.num_files) == (1, 2, 2)
    assert store.catalog.known_turns(map(TurnId, ("short", "long"))) == {"long"}
    assert {record.key for record in store.catalog.all_chunks()} == {long[0].key}
    assert len(blob_files(store)) == 1
    assert found(store.catalog) == {("long", long[0].key)}
    assert holds(store, long)
    assert store.check() == []


def test_a_dry_run_tells_what_the_real_one_does_and_changes_nothing(store: LocalStore) -> None:
    short, long = chain(3, 4), chain(4, seed=1)
    store.put_turn(replace(turn_of(short), expires=10.0), [], short)
    store.put_turn(turn_of(long, "turn-2"), [], long)
    leave(store, "blobs/ab/ab-1.safetensors")
    leave(store, "index/.fp.safetensors.77.tmp")
    leave(store, "blobs/ab/ab-3.safetensors", age_s=0)
    files, seq = blob_files(store), store.catalog.last_seq(FINGERPRINT, "default")

    told = store.collect_garbage(dry_run=True)

    assert blob_files(store) == files
    assert (store_root(store) / "index/.fp.safetensors.77.tmp").exists()
    assert store.catalog.last_seq(FINGERPRINT, "default") == seq
    assert holds(store, [*short, *long])
    assert store.collect_garbage() == told
    assert (told.num_turns, told.num_chunks, told.num_files) == (1, 2, 3)
    assert told.young == ("blobs/ab/ab-3.safetensors",)  # and not the file of the turn that stays
    assert store.collect_garbage() == replace(told, num_turns=0, num_chunks=0, num_files=0, file_bytes=0)


def test_quarantined_chunks_stay_so_that_the_reason_can_be_told(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    store.quarantine(content[0].key, "test")

    store.collect_garbage(0)

    assert store.catalog.chunks([content[0].key])[content[0].key].quarantined
    assert len(blob_files(store)) == 1


def between_blob_and_row(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something else after a turn's bytes are written and before its row is."""
    real_add, left = Catalog.add_turn, [act]

    def add(*args: object, **options: object) -> AddResult:
        if left:
            left.pop()()
        return real_add(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "add_turn", add)


def test_a_turn_being_stored_keeps_its_bytes_within_the_grace_time(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3)
    kept: list[int] = []
    between_blob_and_row(monkeypatch, lambda: kept.append(len(store.collect_garbage().young)))

    store.put_turn(turn_of(content), [], content)

    assert kept == [1]
    assert holds(store, content)


def test_bytes_collected_before_their_row_are_written_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3)
    other = LocalStore(store_root(store), host_bytes=0)
    between_blob_and_row(monkeypatch, lambda: other.collect_garbage(0))

    assert store.put_turn(turn_of(content), [], content).new_turn

    assert holds(store, content)
    assert store.check() == []
    other.close()


def test_an_unfinished_file_collected_while_it_is_written_is_written_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3)
    real_replace = os.replace

    def collect_and_replace(*args: Path) -> None:
        monkeypatch.setattr(os, "replace", real_replace)
        assert store.collect_garbage(0).num_files == 1
        real_replace(*args)

    monkeypatch.setattr(os, "replace", collect_and_replace)
    store.put_turn(turn_of(content), [], content)

    assert holds(store, content)


def test_a_row_committed_after_the_files_were_listed_keeps_its_file(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3)
    real_files = BlobFiles.files

    def store_after_listing(blobs: BlobFiles) -> object:
        monkeypatch.setattr(BlobFiles, "files", real_files)
        blobs.write("half-stored", whole(b"bytes"))
        listed = real_files(blobs)
        store.put_turn(turn_of(content), [], content)
        return {**listed, **real_files(blobs)}  # as if the listing had taken that long

    monkeypatch.setattr(BlobFiles, "files", store_after_listing)
    assert store.collect_garbage(0).num_files == 1

    assert holds(store, content)
    assert len(blob_files(store)) == 1


def test_a_catalog_with_many_free_pages_gives_them_back(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, content = chain(2), chain(3, seed=1)
    store.put_turn(turn_of(kept, "kept"), [], kept)
    big = replace(turn_of(content), text="word " * 400_000)
    store.put_turn(big, [], content)
    path = store_root(store) / "catalog.sqlite3"
    store.collect_garbage()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or most of it stands in the log still
    before = path.stat().st_size
    store.forget([TurnId("turn-1")])
    monkeypatch.setattr(upkeep, "MAX_REWRITTEN_BYTES", 0)
    assert store.collect_garbage().catalog_bytes == 0  # too much to be rewritten while others wait
    monkeypatch.undo()

    freed = store.collect_garbage().catalog_bytes

    assert freed == before - path.stat().st_size > 1 << 20
    assert holds(store, kept)
    assert store.catalog.list_turns(turn_of(kept).scope)[0].turn_id == "kept"
    assert store.collect_garbage().catalog_bytes == 0


@pytest.mark.parametrize("age_s", [-1.0, float("nan")])
def test_an_age_that_is_none_is_refused(store: LocalStore, age_s: float) -> None:
    with pytest.raises(ConfigError, match="must be >= 0 seconds"):
        store.collect_garbage(age_s)
