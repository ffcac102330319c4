"""An older catalog gets exact totals, whatever its rows are, and keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kv_agent.chunks import ChunkRecord, Scope, TurnId
from kv_agent.storage import rows, schema
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.ledger import NO_ACCOUNT
from kv_agent.storage.policy import Usage
from kv_agent.storage.retention import Holding, Retention
from tests.unit.storage.builders import turn_of
from tests.unit.storage.catalogs import records

ACME = Scope(namespace="acme", user_id="u", session_id="s")
INSERT_CHUNK = """
    INSERT INTO chunks (key, content_key, parent, fingerprint, namespace, user_id, start, num_tokens,
                        token_ids, blob, tensor, sha256, num_bytes, vector, created)
    VALUES (:key, :content_key, :parent, :fingerprint, :namespace, :user_id, :start, :num_tokens,
            :token_ids, :blob, :tensor, :checksum, :num_bytes, :vector, :created)
"""
INSERT_TURN = """
    INSERT INTO turns (turn_id, digest, namespace, user_id, agent_id, session_id, fingerprint, num_tokens,
                       text, created, metadata, expires)
    VALUES (:turn_id, :digest, :namespace, :user_id, :agent_id, :session_id, :fingerprint, :num_tokens,
            :text, :created, :metadata, :expires)
"""


def add_as_version_5_did(
    db: schema.Database, turn_id: str, scope: Scope, chunks: Sequence[ChunkRecord], is_prefix: bool = False
) -> None:
    turn = turn_of([] if is_prefix else chunks, turn_id, scope, created=3.0)
    db.execute(INSERT_TURN, rows.turn_to_row(turn))
    for idx, chunk in enumerate(chunks):
        if not db.execute("SELECT 1 FROM chunks WHERE key = ?", (chunk.key,)).fetchone():
            db.execute(INSERT_CHUNK, rows.chunk_to_row(chunk, None, 3.0))
        role = "context" if is_prefix else "content"
        db.execute("INSERT INTO turn_chunks VALUES (?, ?, ?, ?)", (turn_id, role, idx, chunk.key))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two turns that share a chunk, a prefix without content, and a turn of another namespace."""
    path = tmp_path / "catalog.sqlite3"
    first, second = records(3, 5, scope=ACME, blob="b1")
    (third,) = records(4, seed=1, scope=ACME, blob="b1")
    (other,) = records(7, seed=2, blob="b2")
    with monkeypatch.context() as before:
        before.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:5])
        catalog = Catalog(path)
        with catalog._transaction() as db:
            add_as_version_5_did(db, "short", ACME, [first])
            add_as_version_5_did(db, "long", ACME, [first, second])
            add_as_version_5_did(db, "prefix", ACME, [third], is_prefix=True)
            add_as_version_5_did(db, "other", Scope(), [other])
            db.execute("UPDATE chunks SET quarantine_reason = 'bad' WHERE key = ?", (other.key,))
        catalog.close()
    return path


def test_an_older_catalog_gets_its_totals_and_limits_nobody(old: Path) -> None:
    catalog = Catalog(old)
    ledger = catalog.ledger

    assert {name: account.held for name, account in ledger.accounts().items()} == {
        "acme": Holding(num_bytes=12 * 64, num_tokens=12, num_memories=2),
        "default": Holding(num_bytes=7 * 64, num_tokens=7, num_memories=1),
    }
    assert ledger.held(None) == Holding(num_bytes=19 * 64)
    assert ledger.held("nobody") == NO_ACCOUNT.held
    assert (ledger.retentions(), ledger.retention("acme")) == ({}, Retention())
    turn = catalog.turns([TurnId("long")])[TurnId("long")]
    assert not turn.pinned
    assert ledger.usages("acme")[TurnId("long")] == Usage(
        num_bytes=8 * 64, num_tokens=8, created=3.0, last_used=3.0
    )
    catalog.close()


def test_what_an_older_catalog_held_leaves_the_totals_as_it_goes(old: Path) -> None:
    catalog = Catalog(old)
    ledger = catalog.ledger

    catalog.forget([TurnId("long")])  # its first chunk stays with the other
    assert ledger.held("acme") == Holding(num_bytes=7 * 64, num_tokens=7, num_memories=1)
    assert ledger.held(None).num_bytes == 19 * 64  # and so does all of the file
    catalog.forget([TurnId("short"), TurnId("prefix"), TurnId("other")])
    assert {account.held for account in ledger.accounts().values()} == {Holding()}
    assert ledger.held(None).num_bytes == 0
    catalog.close()


def test_a_chunk_that_is_written_anew_counts_as_it_is_now(old: Path) -> None:
    catalog = Catalog(old)
    ledger = catalog.ledger

    with catalog._transaction() as db:
        db.execute("UPDATE chunks SET blob = 'b3', num_bytes = 10 WHERE blob = 'b2'")
    assert ledger.held("default").num_bytes == 10
    assert ledger.held(None).num_bytes == 12 * 64 + 10
    with catalog._transaction() as db:
        db.execute("UPDATE chunks SET num_bytes = 30 WHERE blob = 'b3'")
        db.execute("UPDATE chunks SET blob = 'b4' WHERE num_tokens = 5")
    assert ledger.held("default").num_bytes == 30
    assert ledger.held(None).num_bytes == 12 * 64 + 5 * 64 + 30  # b1 has its chunks' bytes still
    catalog.close()


def test_only_the_last_departures_are_known(catalog: Catalog) -> None:
    with catalog._transaction() as db:
        db.executemany("INSERT INTO departures (turn_id) VALUES (?)", [(f"t{n}",) for n in range(12_000)])
    (chunk,) = records(3)
    catalog.add_turn(turn_of([chunk], "one"), [], [chunk], {})
    catalog.add_turn(turn_of([chunk], "two"), [], [], {})
    catalog.forget([TurnId("two")])

    asked = [TurnId(name) for name in ("one", "two", "t0", "t1999", "t2001", "t2002", "t11999", "unknown")]
    assert catalog.ledger.settled(asked) == {"one", "two", "t2002", "t11999"}


def test_a_use_is_counted_for_all_turns_with_a_chunk_and_never_goes_back_in_time(catalog: Catalog) -> None:
    first, second = records(3, 5, scope=ACME)
    (alone,) = records(2, seed=1, scope=ACME)
    catalog.add_turn(turn_of([first], "short", ACME, 1.0), [], [first], {})
    catalog.add_turn(turn_of([first, second], "long", ACME, 2.0), [], [second], {})
    catalog.add_turn(
        turn_of([alone], "alone", ACME, 3.0), [second.key], [alone], {}
    )  # behind it, not its own
    ledger = catalog.ledger

    assert ledger.turns_with([first.key, "unknown"]) == {"short", "long"}  # type: ignore[list-item]
    assert ledger.turns_with([second.key]) == {"long"}
    ledger.touch([TurnId("long")], 9.0)
    ledger.touch([TurnId("long"), TurnId("short")], 1.5)

    assert {k: (u.num_hits, u.last_used) for k, u in ledger.usages("acme").items()} == {
        "short": (1, 1.5), "long": (2, 9.0), "alone": (0, 3.0),
    }  # fmt: skip
