"""The store's history: what came and went, in order, whoever did it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage import schema
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.retention import Retention
from tests.unit.storage.builders import turn_of
from tests.unit.storage.catalogs import records

SCOPE = Scope(namespace="acme", user_id="u", agent_id="a", session_id="s")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


def add(catalog: Catalog, turn_id: str, seed: int, scope: Scope = SCOPE, created: float = 1.0) -> None:
    chunks = records(3, seed=seed, scope=scope, blob=turn_id)
    catalog.add_turn(turn_of(chunks, turn_id, scope, created=created), [], chunks, {})


def since(catalog: Catalog, seq: int = 0) -> list[tuple[str, str, Scope]]:
    events = catalog.history.since(seq)
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    return [(event.kind, event.turn_id, event.scope) for event in events]


def test_comings_and_goings_are_told_in_order_with_whose_they_are(catalog: Catalog) -> None:
    other = Scope(namespace="other")
    add(catalog, "one", 1)
    add(catalog, "two", 2, other)
    add(catalog, "same as one", 1)  # an alias, no other memory
    catalog.forget([TurnId("same as one"), TurnId("unknown")])

    assert since(catalog) == [
        ("stored", "one", SCOPE), ("stored", "two", other), ("forgotten", "one", SCOPE)
    ]  # fmt: skip
    seqs = [event.seq for event in catalog.history.since(0)]
    assert catalog.history.last_seq() == seqs[-1]
    for seq, left in zip(seqs, (2, 1, 0), strict=True):
        assert len(catalog.history.since(seq)) == left
    assert [event.seq for event in catalog.history.since(0, limit=2)] == seqs[:2]


def test_who_makes_room_is_evicted_and_whose_time_is_over_forgotten(catalog: Catalog) -> None:
    for number in range(3):
        add(catalog, str(number), number)
    catalog.ledger.evict(iter([TurnId("1")]), "acme", None, 10)
    with catalog._transaction() as db:
        db.execute("UPDATE turns SET expires = 5 WHERE turn_id = '0'")
    catalog.drop_overdue(6.0)

    assert [(kind, turn_id) for kind, turn_id, _ in since(catalog)][3:] == [
        ("evicted", "1"),
        ("forgotten", "0"),
    ]


def test_a_turn_that_is_refused_came_and_was_evicted(catalog: Catalog) -> None:
    add(catalog, "large", 1)
    limits = Retention(max_tokens=1)

    assert catalog.ledger.refuse(TurnId("large"), "acme", limits) is not None
    assert [kind for kind, *_ in since(catalog)] == ["stored", "evicted"]


def test_a_prefix_is_no_memory(catalog: Catalog) -> None:
    chunks = records(3, scope=SCOPE)
    catalog.add_turn(turn_of([], "prefix", SCOPE), chunks, [], {})
    catalog.forget([TurnId("prefix")])

    assert since(catalog) == []


def test_what_is_undone_never_happened(catalog: Catalog) -> None:
    chunks = records(3, scope=SCOPE)

    def fail() -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        catalog.add_turn(turn_of(chunks, "one", SCOPE), [], chunks, {}, before_commit=fail)
    assert (since(catalog), catalog.history.last_seq()) == ([], 0)


def test_only_the_last_ten_thousand_are_kept_and_numbers_never_come_again(catalog: Catalog) -> None:
    insert = "INSERT INTO turn_events (kind, turn_id, namespace, user_id) VALUES ('stored', ?, 'acme', 'u')"
    with catalog._transaction() as db:
        db.executemany(insert, [(str(number),) for number in range(10_500)])

    assert catalog.history.last_seq() == 10_500
    kept = catalog.history.since(0, limit=20_000)
    assert [event.turn_id for event in kept] == [str(number) for number in range(500, 10_500)]
    with catalog._transaction() as db:
        db.execute("DELETE FROM turn_events")
    assert catalog.history.last_seq() == 10_500


def test_an_older_catalog_begins_its_history_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.sqlite3"
    with monkeypatch.context() as before:
        before.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:7])
        Catalog(path).close()

    catalog = Catalog(path)
    add(catalog, "one", 1)
    assert since(catalog) == [("stored", "one", SCOPE)]
    catalog.close()


def test_pages_by_time_and_id_are_the_whole_list(catalog: Catalog) -> None:
    for number in range(9):
        add(catalog, f"t{number}", number, created=float(number // 4))

    whole = [turn.turn_id for turn in catalog.list_turns(SCOPE)]
    for limit in (1, 2, 5):
        pages: list[TurnId] = []
        place: tuple[float | None, TurnId | None] = (None, None)
        while page := catalog.list_turns(SCOPE, limit, *place):
            pages += [turn.turn_id for turn in page]
            place = (page[-1].created, page[-1].turn_id)
        assert pages == whole
    assert len(whole) == 9
