"""Turns with a time to live: gone with their bytes when it is over, kept as long as anyone wanted them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage import schema
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, record_of, turn_of
from tests.unit.storage.stores import blob_files


def put(store: LocalStore, turn_id: str, expires: float | None, *, seed: int = 0) -> None:
    chunks = chain(3, seed=seed)
    store.put_turn(replace(turn_of(chunks, turn_id), expires=expires), [], chunks)


def test_a_turn_goes_with_everything_at_its_time_and_not_before(store: LocalStore) -> None:
    put(store, "short", 10.0)
    put(store, "long", 20.0, seed=1)
    put(store, "forever", None, seed=2)
    assert store.catalog.turns([TurnId("short")])[TurnId("short")].expires == 10.0

    store.forget_expired(9.99)
    assert len(blob_files(store)) == 3
    store.forget_expired(10.0)

    assert store.catalog.known_turns(map(TurnId, ("short", "long", "forever"))) == {"long", "forever"}
    assert len(blob_files(store)) == 2
    assert store.check() == []
    (*_, last) = store.catalog.changes_since(turn_of([]).fingerprint, "default", 0)
    assert (last.turn_id, last.vector) == ("short", None)
    store.forget_expired(1e12)
    assert [turn.turn_id for turn in store.catalog.list_turns(Scope())] == ["forever"]


@pytest.mark.parametrize(
    ("first", "again", "kept"),
    [(10.0, 20.0, 20.0), (20.0, 10.0, 20.0), (10.0, None, None), (None, 10.0, None)],
)
def test_storing_it_again_never_shortens_its_time(
    store: LocalStore, first: float | None, again: float | None, kept: float | None
) -> None:
    put(store, "one", first)
    put(store, "other", again)
    assert store.catalog.turns([TurnId("other")])[TurnId("other")].expires == kept
    put(store, "other", again)  # a retry under the id of an alias
    assert store.catalog.turns([TurnId("one")])[TurnId("one")].expires == kept


def test_chunks_that_others_use_stay(store: LocalStore) -> None:
    chunks = chain(3, 3)
    store.put_turn(replace(turn_of(chunks[:1], "short"), expires=10.0), [], chunks[:1])
    store.put_turn(turn_of(chunks, "long"), [], chunks)
    store.forget_expired(10.0)
    assert set(store.catalog.chunks(chunk.key for chunk in chunks)) == {chunk.key for chunk in chunks}
    assert store.check() == []


def test_turns_of_an_older_catalog_never_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "catalog.sqlite3"
    chunk = record_of(chain(3)[0])
    with monkeypatch.context() as old:
        old.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:3])
        before = Catalog(path)
        with before._transaction() as db:
            db.execute(
                "INSERT INTO turns (turn_id, digest, namespace, user_id, fingerprint, num_tokens, text,"
                " created, metadata) VALUES ('old', 'd', 'default', 'default', ?, 3, 'text', 1.0, '{}')",
                (chunk.fingerprint,),
            )
        before.close()
    catalog = Catalog(path)
    assert catalog.turns([TurnId("old")])[TurnId("old")].expires is None
    assert catalog.expired(1e12) == frozenset()
    catalog.close()
