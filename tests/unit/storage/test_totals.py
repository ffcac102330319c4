"""The totals of a store are what counting everything gives, whatever happened and whoever did it."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage import retention_statements as sql
from kv_agent.storage import schema
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.ledger import Totals
from kv_agent.storage.retention import Holding, Retention
from kv_agent.storage.totals_tables import M009
from tests.unit.storage.builders import turn_of
from tests.unit.storage.catalogs import records

NAMESPACES = ("acme", "other", "third")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


def add(catalog: Catalog, turn_id: str, seed: int, scope: Scope, expires: float | None = None) -> None:
    chunks = records(3, 2, seed=seed, scope=scope, blob=turn_id)
    catalog.add_turn(replace(turn_of(chunks, turn_id, scope), expires=expires), [], chunks, {})


def counted(catalog: Catalog) -> tuple[Holding, int, int]:
    """The oracle: all rows, one by one."""
    with catalog._transaction("BEGIN") as db:
        chunks = db.execute("SELECT num_bytes, num_tokens FROM chunks").fetchall()
        turns = db.execute("SELECT num_tokens FROM turns").fetchall()
        documents = db.execute("SELECT doc_id FROM turn_docs").fetchall()
    held = Holding(
        num_bytes=sum(num_bytes for num_bytes, _ in chunks),
        num_tokens=sum(num_tokens for _, num_tokens in chunks),
        num_memories=sum(num_tokens > 0 for (num_tokens,) in turns),
    )
    return held, len(chunks), len(documents)


def gone(totals: Totals) -> dict[str, int]:
    return {
        "evicted": totals.evicted_turns,
        "refused": totals.refused_turns,
        "forgotten": totals.forgotten_turns,
        "expired": totals.expired_turns,
    }


@pytest.mark.parametrize("seed", range(4))
def test_totals_are_what_counting_gives_after_any_history(catalog: Catalog, seed: int) -> None:
    rng = random.Random(seed)
    ledger = catalog.ledger
    went = Counter(dict.fromkeys(("evicted", "refused", "forgotten", "expired"), 0))
    for step in range(120):
        scope = Scope(namespace=rng.choice(NAMESPACES))
        live = [turn.turn_id for turn in catalog.list_turns(scope)]
        action = rng.random()
        if action < 0.5 or not live:
            add(catalog, str(step), rng.randrange(40), scope, expires=rng.choice((None, float(step))))
        elif action < 0.6:
            went["evicted"] += len(ledger.evict(iter(live), scope.namespace, None, 1).turn_ids)
        elif action < 0.7:
            went["refused"] += ledger.refuse(live[0], scope.namespace, Retention(max_tokens=1)) is not None
        elif action < 0.8:
            catalog.forget(live[:2])
            went["forgotten"] += len(live[:2])
        elif action < 0.9:
            went["expired"] += len(ledger.expire(float(step), 2).turn_ids)
        elif action < 0.95:
            went["expired"] += catalog.drop_overdue(float(step)).num_turns
        else:
            keys = sorted(catalog.chunk_keys_of_turns(live))
            catalog.quarantine(rng.choice(keys), "damaged")

        totals = ledger.totals()
        assert (totals.held, totals.num_chunks, totals.num_documents) == counted(catalog)
        assert gone(totals) == went
        held = {name: account.held for name, account in ledger.accounts().items()}
        largest = ledger.largest(2)
        assert [one.num_bytes for one in largest.values()] == sorted(
            (one.num_bytes for one in held.values()), reverse=True
        )[:2]
        assert all(held[name] == one for name, one in largest.items())
    assert min(went.values()) > 0


def test_a_prefix_whose_time_is_over_is_no_memory_that_expired(catalog: Catalog) -> None:
    chunks = records(3)
    catalog.add_turn(replace(turn_of([], "prefix"), expires=1.0), chunks, [], {})

    assert catalog.ledger.expire(2.0, 10).turn_ids == ("prefix",)
    assert set(gone(catalog.ledger.totals()).values()) == {0}


def test_an_older_catalog_is_counted_when_it_is_opened(catalog: Catalog) -> None:
    """As if its turns had been stored before it had the table."""
    with catalog._transaction() as db:
        for statement in M009:
            for kind, name in re.findall(r"CREATE (TABLE|INDEX|TRIGGER) (\w+)", statement):
                db.execute(f"DROP {kind} IF EXISTS {name}")
    for number in range(5):
        add(catalog, str(number), number, Scope(namespace=NAMESPACES[number % 3]))
    catalog.ledger.evict(iter([TurnId("0")]), "acme", None, 10)

    with catalog._transaction() as db:
        schema.m009_totals(db)
    totals = catalog.ledger.totals()
    assert (totals.held, totals.num_chunks, totals.num_documents) == counted(catalog)
    assert totals.held.num_memories == 4
    assert gone(totals) == {"evicted": 1, "refused": 0, "forgotten": 0, "expired": 0}


def test_of_several_who_let_go_each_turn_goes_once(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    catalogs = [Catalog(path) for _ in range(4)]
    for number in range(60):
        add(catalogs[0], str(number), number, Scope(), expires=1.0 if number % 3 else None)
    went: list[TurnId] = []

    def expire(catalog: Catalog) -> None:
        while ids := catalog.ledger.expire(2.0, 3).turn_ids:
            went.extend(ids)

    threads = [threading.Thread(target=expire, args=(catalog,)) for catalog in catalogs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(went) == sorted(str(number) for number in range(60) if number % 3)
    assert catalogs[0].ledger.totals().expired_turns == 40
    for catalog in catalogs:
        catalog.close()


def test_totals_and_the_largest_are_read_without_looking_at_every_row(catalog: Catalog) -> None:
    with catalog._transaction("BEGIN") as db:
        plans = {
            text: [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}", parameters)]
            for text, parameters in (
                (sql.TOTALS, ()),
                (sql.DISK_BYTES, ()),
                (sql.LARGEST, (50,)),
                (sql.OVERDUE_TURNS, (1.0, 100)),
            )
        }

    # Of one row each; no "USE TEMP B-TREE" anywhere.
    assert plans[sql.TOTALS] == ["SCAN totals"]
    assert plans[sql.DISK_BYTES] == ["SCAN disk"]
    assert plans[sql.LARGEST] == ["SCAN holdings USING INDEX holdings_by_bytes"]
    assert plans[sql.OVERDUE_TURNS] == ["SEARCH turns USING INDEX turns_by_expiry (expires<?)"]
