"""A catalog in trouble: other schemas, broken files, locks, values SQLite cannot hold, threads and forks."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.config import Fsync
from kv_agent.errors import StorageError, UnstorableError
from kv_agent.storage import connection, schema
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import turn_of
from tests.unit.storage.catalogs import found, records, vectors


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c"
    Catalog(path).close()
    newer = len(schema.MIGRATIONS) + 1
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO schema_migrations VALUES (?, 'm002_future', 0)", (newer,))
    db.close()

    with pytest.raises(StorageError, match="upgrade"):
        Catalog(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT max(version) FROM schema_migrations").fetchone() == (newer,)
    db.close()


def test_a_migration_that_fails_leaves_the_former_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    content = records(3)
    old = Catalog(path)
    old.add_turn(turn_of(content), [], content, vectors(content))
    old.close()

    def m002_broken(db: schema.Database) -> None:
        db.execute("DROP TABLE entries")
        db.execute("no SQL")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, m002_broken))
        with pytest.raises(StorageError, match="syntax error"):
            Catalog(path)

    again = Catalog(path)
    assert found(again) == {("turn-1", content[0].key)}
    again.close()


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"certainly not SQLite" * 100)

    with pytest.raises(StorageError, match="not a database"):
        Catalog(path)


def test_a_missing_folder_is_a_storage_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open"):
        Catalog(tmp_path / "no" / "c")


def test_a_locked_catalog_is_a_storage_error_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", 0.05)
    content = records(3)
    catalog = Catalog(tmp_path / "c")
    holder = sqlite3.connect(tmp_path / "c", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StorageError, match="locked"):
        catalog.add_turn(turn_of(content), [], content, {})
    assert catalog.turns([TurnId("turn-1")]) == {}

    holder.execute("ROLLBACK")
    holder.close()
    assert catalog.add_turn(turn_of(content), [], content, {}).new_turn
    catalog.close()


def test_a_catalog_that_is_up_to_date_is_opened_beside_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", 0.05)
    Catalog(tmp_path / "c").close()
    writer = sqlite3.connect(tmp_path / "c", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")

    catalog = Catalog(tmp_path / "c")

    assert set(catalog.stats().values()) == {0}
    catalog.close()
    writer.close()


def test_a_connection_is_closed_without_a_word_when_the_interpreter_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = connection.connect(tmp_path / "c", "never", create=True)
    kept = mine.connection
    monkeypatch.setattr(connection, "sqlite3", None)  # as the names of modules are by then
    monkeypatch.setattr(connection, "suppress", None)

    del mine  # what it raised would be a warning, and so an error here

    with pytest.raises(sqlite3.ProgrammingError):
        kept.execute("SELECT 1")


def test_values_sqlite_cannot_hold_are_storage_errors(catalog: Catalog) -> None:
    (chunk,) = records(3)

    with pytest.raises(StorageError):
        catalog.add_turn(dataclasses.replace(turn_of([chunk]), text="\ud800"), [], [chunk], {})
    with pytest.raises(StorageError):
        catalog.add_turn(turn_of([chunk]), [], [dataclasses.replace(chunk, start=1 << 80)], {})
    with pytest.raises(StorageError, match="NUL"):
        catalog.add_turn(turn_of([chunk], "turn\0"), [], [chunk], {})
    with pytest.raises(StorageError):
        catalog.list_turns(Scope(user_id="\ud800"))
    assert set(catalog.stats().values()) == {0}


def test_a_closed_catalog_says_so(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()

    with pytest.raises(StorageError, match="closed"):
        catalog.stats()


@pytest.mark.parametrize(("fsync", "synchronous"), [("always", 2), ("never", 1)])  # FULL and NORMAL
def test_a_commit_waits_for_the_disk_or_leaves_it_to_checkpoints(
    tmp_path: Path, fsync: Fsync, synchronous: int
) -> None:
    catalog = Catalog(tmp_path / "c", fsync)
    with catalog._connection() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)
    catalog.close()


def test_a_catalog_that_is_not_in_its_place_is_read_but_not_written_nor_made_anew(tmp_path: Path) -> None:
    root, away = tmp_path / "store", tmp_path / "away"
    root.mkdir()
    content = records(3)
    catalog = Catalog(root / "c")
    catalog.add_turn(turn_of(content), [], content, vectors(content))
    root.rename(away)
    root.mkdir()

    with pytest.raises(StorageError, match="mounted"):
        catalog.forget([TurnId("turn-1")])
    with ThreadPoolExecutor(1) as pool, pytest.raises(StorageError, match="mounted"):
        pool.submit(catalog.stats).result()
    assert found(catalog) == {("turn-1", content[0].key)}
    assert list(root.iterdir()) == []

    root.rmdir()
    away.rename(root)
    catalog.forget([TurnId("turn-1")])
    assert found(catalog) == set()
    catalog.close()


def test_another_catalog_in_its_place_is_the_one_that_is_used(tmp_path: Path) -> None:
    path, content = tmp_path / "c", records(3)
    catalog = Catalog(path)
    for name in ("c", "c-wal", "c-shm"):
        (tmp_path / name).rename(tmp_path / f"old {name}")
    other = Catalog(path)

    catalog.add_turn(turn_of(content), [], content, vectors(content))

    assert found(other) == {("turn-1", content[0].key)}
    catalog.close()
    other.close()


def test_what_is_wrong_with_a_turn_is_told_from_what_is_wrong_with_the_disk(catalog: Catalog) -> None:
    (chunk,) = records(3)

    for turn in (
        dataclasses.replace(turn_of([chunk]), text="\ud800"),
        dataclasses.replace(turn_of([chunk]), created=None),
        turn_of([chunk], "turn\0"),
    ):
        with pytest.raises(UnstorableError):
            catalog.add_turn(turn, [], [chunk], {})
    with pytest.raises(UnstorableError):
        catalog.add_turn(turn_of([chunk]), [], [], {})
    catalog.close()
    with pytest.raises(StorageError) as caught:
        catalog.add_turn(turn_of([chunk]), [], [chunk], {})
    assert not isinstance(caught.value, UnstorableError)


def test_threads_add_and_read_side_by_side(catalog: Catalog) -> None:
    def work(seed: int) -> None:
        for number in range(8):
            content = records(2, 3, seed=seed * 100 + number)
            catalog.add_turn(turn_of(content, f"turn-{seed}-{number}"), [], content, vectors(content))
            assert catalog.turns([TurnId(f"turn-{seed}-{number}")])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised

    assert catalog.stats()["turns"] == 32
    assert len(found(catalog)) == 64
    assert len(catalog._connections) <= 1  # those of ended threads are gone


FORK_SCRIPT = """
import os, sys
from pathlib import Path
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import chain, record_of, turn_of

def add(catalog, seed):
    content = [record_of(chunk) for chunk in chain(3, seed=seed)]
    catalog.add_turn(turn_of(content, f"turn-{seed}"), [], content, {})

path = Path(sys.argv[1])
catalog = Catalog(path)
add(catalog, 0)
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    try:
        own = Catalog(path)  # as an engine forked from a user's process opens its own
        add(own, 1)
        add(catalog, 2)
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)  # the parent has closed everything meanwhile
        assert own.stats()["turns"] == 4, own.stats()
        add(own, 4)
        assert catalog.stats()["turns"] == 5
    except BaseException as err:
        print(repr(err), flush=True)
        os._exit(1)
    os._exit(0)
os.read(to_parent[0], 1)
add(catalog, 3)
catalog.close()
# Were the child's locks an illusion, this one would take itself for the last user and delete the log.
wal = path.with_name(path.name + "-wal")
assert wal.exists(), "the write-ahead log was deleted under the child"
os.write(to_child[1], b"x")
assert os.waitpid(child, 0)[1] == 0
again = Catalog(path)
assert again.stats()["turns"] == 5, again.stats()
with again._connection() as db:
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"""


def test_a_forked_child_and_its_parent_do_not_share_locks(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]

    done = subprocess.run(
        [sys.executable, "-c", FORK_SCRIPT, str(tmp_path / "c")],
        cwd=root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
