"""What a search asks of the catalog besides words and vectors: keys of tokens, filters, neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kv_agent.chunks import Fingerprint, Scope, TurnFilter, TurnId
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.schema import MIGRATIONS
from tests.unit.storage.builders import chain, record_of, turn_of


def add(catalog: Catalog, turn_id: str, created: float = 1.0, scope: Scope | None = None) -> None:
    seed = catalog.stats()["turns"]
    content = [record_of(chunk, scope) for chunk in chain(2, seed=seed, scope=scope)]
    catalog.add_turn(turn_of(content, turn_id, scope, created), [], content, {})


def test_sketches_come_with_their_chunks_and_go_with_them(catalog: Catalog) -> None:
    content = [record_of(chunk) for chunk in chain(2, 3)]
    first, second = (record.key for record in content)
    stray = record_of(chain(1, seed=9)[0]).key
    catalog.add_turn(turn_of(content), [], content, {}, {first: b"one", stray: b"not of this turn"})
    assert catalog.sketches([first, second, stray]) == {first: b"one"}

    catalog.add_turn(turn_of(content, "again"), [], content, {}, {first: b"other", second: b"late"})
    assert catalog.sketches([first, second]) == {first: b"one", second: b"late"}

    catalog.quarantine(first, "checksum")
    catalog.add_turn(turn_of(content, "revived"), [], content, {})
    assert catalog.sketches([first]) == {first: b"one"}

    catalog.forget([TurnId("turn-1")])
    assert catalog.sketches([first, second]) == {}


def test_a_catalog_without_sketches_gets_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as old:
        old.setattr("kv_agent.storage.schema.MIGRATIONS", MIGRATIONS[:2])
        Catalog(tmp_path / "c").close()
    catalog = Catalog(tmp_path / "c")
    add(catalog, "a")
    assert catalog.sketches(["0" * 32]) == {}  # type: ignore[list-item]
    catalog.close()


def test_neighbours_are_the_turns_around_in_the_same_session(catalog: Catalog) -> None:
    here, there = Scope(session_id="here"), Scope(session_id="there")
    for number in range(5):
        add(catalog, f"here-{number}", float(number), here)
        add(catalog, f"there-{number}", float(number), there)
    prefix = [record_of(chunk, here) for chunk in chain(2, seed=99, scope=here)]
    catalog.add_turn(turn_of([], "prefix", here, 2.5), prefix, [], {})
    middle = catalog.turns([TurnId("here-2")])[TurnId("here-2")]

    def around(num_turns: int) -> list[str]:
        return [turn.turn_id for turn in catalog.neighbours(middle, num_turns)]

    assert around(0) == []
    assert around(1) == ["here-1", "here-3"]
    assert around(9) == ["here-0", "here-1", "here-3", "here-4"]


def test_turns_of_one_moment_are_neighbours_by_their_names(catalog: Catalog) -> None:
    scope = Scope(session_id="s")
    for name in "bac":
        add(catalog, name, 1.0, scope)
    one = catalog.turns([TurnId("b")])[TurnId("b")]
    assert [turn.turn_id for turn in catalog.neighbours(one, 5)] == ["a", "c"]


def test_without_a_session_there_are_no_neighbours(catalog: Catalog) -> None:
    for name in "abc":
        add(catalog, name)
    one = catalog.turns([TurnId("b")])[TurnId("b")]
    assert catalog.neighbours(one, 5) == []
    with pytest.raises(ValueError, match="limit"):
        catalog.neighbours(one, -1)


def test_filtered_turns_lie_in_scope(catalog: Catalog) -> None:
    mine = Scope(user_id="me", agent_id="a", session_id="s")
    for number, scope in enumerate([mine, dataclasses.replace(mine, session_id="t"), Scope(user_id="you")]):
        add(catalog, f"turn {number}", float(number), scope)

    assert catalog.turn_ids(Scope(user_id="me"), TurnFilter()) == {"turn 0", "turn 1"}
    assert catalog.turn_ids(Scope(user_id="me"), TurnFilter(since=1.0)) == {"turn 1"}
    assert catalog.turn_ids(mine, TurnFilter(metadata={"source": "test", "ok": True})) == {"turn 0"}
    assert catalog.turn_ids(mine, TurnFilter(metadata={'quote"d': 1, "$.x": "'"})) == frozenset()


def test_the_same_text_is_found_in_turns_of_the_scope_newest_first(catalog: Catalog) -> None:
    here, there = Scope(session_id="here"), Scope(session_id="there")
    one = record_of(chain(3)[0])
    catalog.add_turn(turn_of([one], "old", here, 1.0), [], [one], {})
    before = record_of(chain(2, seed=5)[0])
    same = dataclasses.replace(
        record_of(chain(3, parent=before.key)[0]), content_key=one.content_key, start=before.num_tokens
    )
    catalog.add_turn(turn_of([before, same], "new", there, 2.0), [], [before, same], {})
    stranger = Scope(user_id="stranger")
    keys = [one.content_key]

    def found(scope: Scope) -> list[tuple[str, str]]:
        return [(record.key, turn_id) for record, turn_id in catalog.same_text(keys, scope, one.fingerprint)]

    assert sorted(found(Scope())) == sorted([(same.key, "new"), (one.key, "old")])
    assert found(here) == [(one.key, "old")]
    assert found(stranger) == []
    assert catalog.same_text([], Scope(), one.fingerprint) == []
    assert catalog.same_text(keys, Scope(), Fingerprint("other")) == []

    catalog.quarantine(one.key, "checksum")
    assert found(Scope()) == [(same.key, "new")]
    catalog.forget([TurnId("new")])
    assert found(Scope()) == []


def test_text_that_only_precedes_a_turn_is_not_found(catalog: Catalog) -> None:
    context, content = (record_of(chunk) for chunk in chain(3, 2))
    catalog.add_turn(turn_of([content]), [context], [content], {})
    assert catalog.same_text([context.content_key], Scope(), context.fingerprint) == []
