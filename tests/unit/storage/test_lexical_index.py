"""The index of a text search in its file: other connections, failed transactions, older schemas, no FTS5."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.storage import documents, schema, statements
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import chain, record_of, turn_of
from tests.unit.storage.text_turns import add, find


def test_a_failed_transaction_leaves_the_index_as_it_was(catalog: Catalog) -> None:
    content = add(catalog, "turn", "Oslo")
    stray = dataclasses.replace(turn_of(content, "bad", Scope(user_id="eve")), text="Oslo")

    with pytest.raises(StorageError):
        catalog.add_turn(stray, [], [], {})

    assert find(catalog, "Oslo") == ["turn"]
    assert find(catalog, "Oslo", Scope(user_id="eve")) == []


def test_another_connection_finds_a_turn_at_once_and_after_vacuum(tmp_path: Path) -> None:
    first, second = Catalog(tmp_path / "c"), Catalog(tmp_path / "c")
    for number in range(6):
        add(first, f"turn-{number}", f"Oslo unique{number}")
        assert find(second, f"unique{number}") == [f"turn-{number}"]
    first.forget([TurnId("turn-0"), TurnId("turn-3")])

    with first._connection() as db:
        db.execute("VACUUM")

    assert find(second, "unique4") == ["turn-4"]
    assert find(second, "Oslo") == ["turn-5", "turn-4", "turn-2", "turn-1"]
    add(second, "turn-6", "unique6")
    assert find(first, "unique6") == ["turn-6"]
    first.close()
    second.close()


def document_rows(catalog: Catalog) -> list[tuple[object, ...]]:
    with catalog._connection() as db:
        return db.execute(
            "SELECT d.turn_id, d.copy_key, w.scope, w.words FROM turn_docs d"
            " JOIN turn_words w ON w.rowid = d.doc_id ORDER BY d.doc_id"
        ).fetchall()


def fill(catalog: Catalog) -> None:
    scope = Scope(namespace="n", user_id="ü", agent_id="a", session_id="s")
    for number, owner in enumerate([Scope(), scope, Scope(session_id="t")]):
        content = [record_of(chunk, owner) for chunk in chain(2, 3, seed=number % 2, scope=owner)]
        text = f"José {number} 東京"
        add(catalog, f"turn-{number}", text, owner, content, created=float(number))
    hidden = [record_of(chunk) for chunk in chain(2, seed=7)]
    add(catalog, "quarantined", "José", content=hidden, created=9.0)
    catalog.quarantine(hidden[0].key, "checksum")
    catalog.add_turn(turn_of([], "no content"), hidden, [], {})
    catalog.quarantine(hidden[0].key, "checksum")


def without(statement: str, columns: list[str]) -> str:
    for column in columns:
        for part in (f" {column} = :{column},", f", {column}", f", :{column}"):
            statement = statement.replace(part, "")
    return statement


def test_a_catalog_of_the_first_schema_gets_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first_release:
        first_release.setattr(schema, "MIGRATIONS", (schema.m001_initial,))
        first_release.setattr(documents, "add_missing", lambda db, keys: None)
        first_release.setattr(documents, "remove_dead", lambda db, key: None)
        for name, *later in (
            ("INSERT_TURN", "expires", "pinned"),
            ("INSERT_CHUNK", "codec"),
            ("REVIVE_CHUNK", "codec"),
        ):
            statement = without(getattr(statements, name), later).replace(" checksum", " sha256")
            first_release.setattr(statements, name, statement)
        first_release.setattr(statements, "INSERT_SKETCH", statements.INSERT_ALIAS)  # a table that is there
        old = Catalog(tmp_path / "old")
        fill(old)
        old.close()
    new = Catalog(tmp_path / "new")
    fill(new)

    migrated = Catalog(tmp_path / "old")

    assert len(document_rows(new)) == 3
    assert document_rows(migrated) == document_rows(new)
    assert find(migrated, "jose") == find(new, "jose") == ["turn-2"]  # of two copies
    (added,) = add(migrated, "later", "José")
    assert find(migrated, "jose") == ["later", "turn-2"]
    migrated.forget([TurnId("turn-2")])
    migrated.quarantine(added.key, "checksum")
    assert find(migrated, "jose") == ["turn-0"]
    migrated.close()
    new.close()


def test_a_sqlite_without_full_text_search_is_refused_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Catalog(tmp_path / "c").close()
    monkeypatch.setattr(schema, "_USES_FTS5", "SELECT fts5_function_that_is_not_there()")

    for path in (tmp_path / "c", tmp_path / "new"):
        with pytest.raises(StorageError, match="built without FTS5"):
            Catalog(path)
