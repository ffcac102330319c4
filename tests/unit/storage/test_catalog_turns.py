"""Turns in the catalog: stored once under all their ids, refused when they do not fit, listed by scope."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kv_agent.chunks import ChunkKey, Fingerprint, Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.turn_writes import UnknownChunkError
from tests.unit.storage.builders import FINGERPRINT, turn_of
from tests.unit.storage.catalogs import found, records, vectors


def test_a_turn_and_its_chunks_come_back_as_they_went_in(catalog: Catalog) -> None:
    scope = Scope(namespace="n", user_id="u", agent_id="a", session_id="s")
    system, *content = records(3, 4, 2, scope=scope)
    turn = turn_of(content, scope=scope)

    result = catalog.add_turn(turn, [system], content, vectors(content))

    assert result.new_turn
    assert result.turn_id == turn.turn_id
    assert result.new_chunks == {system.key, *turn.chunk_keys}
    assert catalog.turns([turn.turn_id, TurnId("no")]) == {turn.turn_id: turn}
    everything = {chunk.key: chunk for chunk in [system, *content]}
    assert catalog.chunks([*everything, ChunkKey("no")]) == everything
    assert list(catalog.all_chunks(page=2)) == [everything[key] for key in sorted(everything)]
    assert catalog.chunk_keys_of_turns([turn.turn_id]) == everything.keys()


def test_it_is_all_there_after_reopening(tmp_path: Path) -> None:
    content = records(3, 4)
    first = Catalog(tmp_path / "c")
    first.add_turn(turn_of(content), [], content, vectors(content))
    before = found(first)
    first.close()

    second = Catalog(tmp_path / "c")

    assert second.turns([TurnId("turn-1")]) == {TurnId("turn-1"): turn_of(content)}
    assert found(second) == before
    second.close()


def test_the_same_turn_again_is_the_same_turn_under_another_id(catalog: Catalog) -> None:
    content = records(3, 4)
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    again = catalog.add_turn(turn_of(content, "turn-2", created=2.0), [], content, vectors(content))
    third = catalog.add_turn(turn_of(content, "turn-2", created=3.0), [], [], {})

    assert (again.turn_id, again.new_turn, again.new_chunks) == ("turn-1", False, frozenset())
    assert third == again
    assert catalog.stats()["turns"] == 1
    assert found(catalog) == {("turn-1", chunk.key) for chunk in content}
    assert catalog.known_turns(map(TurnId, ["turn-1", "turn-2", "turn-3"])) == {"turn-1", "turn-2"}
    assert catalog.turns([TurnId("turn-2")]) == {TurnId("turn-2"): turn_of(content)}


def test_forgetting_an_alias_forgets_the_turn_and_all_its_ids(catalog: Catalog) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, {})
    catalog.add_turn(turn_of(content, "turn-2"), [], [], {})

    assert catalog.forget([TurnId("turn-2")]) == ("b0",)
    assert catalog.known_turns([TurnId("turn-1"), TurnId("turn-2")]) == frozenset()


@pytest.mark.parametrize("field", ["agent_id", "session_id"])
def test_another_agent_or_session_is_another_turn_of_the_same_chunks(catalog: Catalog, field: str) -> None:
    content = records(3)
    other = dataclasses.replace(Scope(), **{field: "x"})
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    result = catalog.add_turn(turn_of(content, "turn-2", scope=other), [], [], {})

    assert result.new_turn
    assert result.new_chunks == frozenset()
    assert found(catalog) == {("turn-1", content[0].key), ("turn-2", content[0].key)}


def test_an_id_that_names_a_different_turn_is_refused(catalog: Catalog) -> None:
    one, two = records(3), records(3, seed=1)
    catalog.add_turn(turn_of(one), [], one, {})

    with pytest.raises(StorageError, match="different turn"):
        catalog.add_turn(turn_of(two), [], two, {})
    assert catalog.stats()["chunks"] == 1


def test_a_turn_with_an_unknown_chunk_changes_nothing(catalog: Catalog) -> None:
    content = records(3, 4)

    with pytest.raises(UnknownChunkError, match=content[1].key) as caught:
        catalog.add_turn(turn_of(content), [], content[:1], vectors(content))
    assert caught.value.keys == {content[1].key}
    with pytest.raises(UnknownChunkError):
        catalog.add_turn(turn_of(content[1:]), [content[0].key], content[1:], {})
    assert set(catalog.stats().values()) == {0}


def test_another_users_chunk_is_an_unknown_chunk(catalog: Catalog) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, {})

    with pytest.raises(UnknownChunkError):
        catalog.add_turn(turn_of(content, "turn-2", scope=Scope(user_id="eve")), [], [], {})


def test_chunks_that_do_not_belong_to_the_turn_are_refused(catalog: Catalog) -> None:
    content = records(3, 4)

    with pytest.raises(ValueError, match="owner"):
        catalog.add_turn(turn_of(content, scope=Scope(namespace="other")), [], content, {})
    with pytest.raises(ValueError, match="not among"):
        catalog.add_turn(turn_of(content[:1]), [], content, {})


def test_context_that_comes_with_a_known_turn_is_forgotten_with_it(catalog: Catalog) -> None:
    first, second, content = records(3, 2, 4)
    catalog.add_turn(turn_of([content]), [], [content], {})

    catalog.add_turn(turn_of([content], "turn-2"), [first], [], {})
    catalog.add_turn(turn_of([content], "turn-3"), [first.key, second], [], {})
    assert catalog.chunk_keys_of_turns([TurnId("turn-1")]) == {first.key, second.key, content.key}

    catalog.forget([TurnId("turn-1")])
    assert catalog.stats()["chunks"] == 0


SCOPES = [
    Scope(user_id=user, agent_id=agent, session_id=session)
    for user in ("u", "v") for agent in (None, "a", "b") for session in (None, "s")
]  # fmt: skip


def test_listing_agrees_with_scope_admits_newest_first(catalog: Catalog) -> None:
    turns = []
    for number, scope in enumerate(SCOPES):
        content = records(3, seed=number, scope=scope)
        turns.append(turn_of(content, f"turn-{number}", scope=scope, created=float(number * 7 % 12)))
        catalog.add_turn(turns[-1], [], content, {})
    turns.sort(key=lambda turn: -turn.created)

    for scope in [*SCOPES, Scope(namespace="other", user_id="u")]:
        visible = [turn for turn in turns if scope.admits(turn.scope)]
        assert catalog.list_turns(scope) == visible
        assert catalog.list_turns(scope, limit=2) == visible[:2]
        assert catalog.list_turns(scope, before_created=5.0) == [t for t in visible if t.created < 5.0]


def test_more_keys_than_sqlite_has_variables(catalog: Catalog) -> None:
    content = records(*[1] * 300)
    catalog.add_turn(turn_of(content), [], content, {})

    padding = [f"no-{number}" for number in range(300_000)]

    assert len(catalog.chunks([*map(ChunkKey, padding), *(chunk.key for chunk in content)])) == 300
    assert catalog.known_turns([*map(TurnId, padding), TurnId("turn-1")]) == {"turn-1"}


def test_a_fingerprint_keeps_its_first_details(catalog: Catalog) -> None:
    catalog.register_fingerprint(FINGERPRINT, {"model": "m", "layers": 2, "rope": {"theta": 1e4}})
    catalog.register_fingerprint(FINGERPRINT, {"model": "other"})

    assert catalog.fingerprint_details(FINGERPRINT) == {"model": "m", "layers": 2, "rope": {"theta": 1e4}}
    assert catalog.fingerprint_details(Fingerprint("unknown")) is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_zero_gives_nothing_and_a_negative_one_is_refused(catalog: Catalog, limit: int) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    if limit == 0:
        assert catalog.list_turns(Scope(), limit=0) == []
        assert catalog.changes_since(FINGERPRINT, "default", 0, limit=0) == []
    else:
        with pytest.raises(ValueError, match="limit"):
            catalog.list_turns(Scope(), limit=limit)
        with pytest.raises(ValueError, match="limit"):
            catalog.changes_since(FINGERPRINT, "default", 0, limit=limit)
