"""Counts of users, sessions and namespaces are those of going through all turns."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId, TurnRecord
from kv_agent.storage import overview
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.overview import Contents
from tests.unit.storage.builders import chain, record_of, turn_of
from tests.unit.storage.catalogs import records

NAMES = ["a", "B", "b", "é", "z" * 256, "0", " "]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "catalog.sqlite3")


def add_turns(catalog: Catalog, seed: int, count: int) -> list[TurnRecord]:
    """Turns of users, agents and sessions by chance, those of a prompt's prefix alone, too -> those left."""
    rng = random.Random(seed)
    turns = []
    for number in range(count):
        scope = Scope(
            namespace=rng.choice(["acme", "other"]),
            user_id=rng.choice(NAMES),
            agent_id=rng.choice([None, *NAMES[:3]]),
            session_id=rng.choice([None, *NAMES[:3]]),
        )
        own = [record_of(chunk, scope) for chunk in chain(rng.randint(1, 9), seed=number, scope=scope)]
        is_prefix = rng.random() < 0.2
        turn = turn_of([] if is_prefix else own, f"t{number}", scope, created=rng.uniform(0, 100))
        catalog.add_turn(turn, own if is_prefix else [], [] if is_prefix else own, {})
        turns.append(turn)
    gone = rng.sample(turns, count // 4)
    catalog.forget([turn.turn_id for turn in gone])
    return [turn for turn in turns if turn not in gone]


def counted(turns: list[TurnRecord], scope: Scope) -> Contents:
    memories = [turn for turn in turns if turn.num_tokens]
    return Contents(
        scope=scope,
        num_memories=len(memories),
        num_tokens=sum(turn.num_tokens for turn in memories),
        newest=max((turn.created for turn in memories), default=None),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_users_page_by_page_are_those_of_all_turns(catalog: Catalog, seed: int, limit: int) -> None:
    turns = add_turns(catalog, seed, 120)

    for namespace in ("acme", "other", "nobody"):
        mine = [turn for turn in turns if turn.scope.namespace == namespace]
        users = sorted({turn.scope.user_id for turn in mine}, key=str.encode)
        expected = [
            counted(
                [turn for turn in mine if turn.scope.user_id == user],
                Scope(namespace=namespace, user_id=user),
            )
            for user in users
        ]
        found: list[Contents] = []
        while page := catalog.overview.users(namespace, limit, found[-1].scope.user_id if found else ""):
            assert len(page) <= limit
            found += page
        assert found == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_sessions_page_by_page_are_those_of_all_turns(catalog: Catalog, seed: int, limit: int) -> None:
    turns = add_turns(catalog, seed, 150)

    for owner in (Scope(namespace="acme", user_id="b"), Scope(namespace="other", user_id="nobody")):
        mine = [turn for turn in turns if owner.admits(turn.scope) and turn.num_tokens]
        scopes = sorted(
            {turn.scope for turn in mine},
            key=lambda scope: ((scope.agent_id or "").encode(), (scope.session_id or "").encode()),
        )
        expected = [counted([turn for turn in mine if turn.scope == scope], scope) for scope in scopes]
        found: list[Contents] = []
        while page := catalog.overview.sessions(owner, limit, found[-1].scope if found else None):
            assert len(page) <= limit
            found += page
        assert found == expected


def test_namespaces_hold_what_the_ledger_says(catalog: Catalog) -> None:
    add_turns(catalog, 0, 60)
    accounts = catalog.ledger.accounts()

    assert catalog.overview.namespaces(10) == {name: account.held for name, account in accounts.items()}
    assert list(catalog.overview.namespaces(1)) == ["acme"]
    assert list(catalog.overview.namespaces(1, "acme")) == ["other"]
    assert catalog.overview.namespaces(1, "other") == {}


def test_a_chunk_is_shared_by_the_other_turns_that_have_it_as_content(catalog: Catalog) -> None:
    first, second, third = records(3, 4, 5)
    contents = {"one": [first], "two": [first, second], "three": [first, second, third]}
    for turn_id, content in contents.items():
        catalog.add_turn(turn_of(content, turn_id), [], content, {})
    prefix = dataclasses.replace(turn_of([], "prefix"), num_tokens=0)
    catalog.add_turn(prefix, [first], [], {})

    for turn_id, content in contents.items():
        others = [chunk for other, has in contents.items() if other != turn_id for chunk in has]
        expected = Counter(chunk.key for chunk in others if chunk in content)
        assert catalog.overview.sharing(TurnId(turn_id), [chunk.key for chunk in content]) == expected


def test_every_count_goes_through_an_index(catalog: Catalog) -> None:
    scope = {"namespace": "n", "user_id": "u", "agent_id": "", "session_id": "", "after": "", "limit": 5}
    statements = {
        overview._NAMESPACES: ("", 5),
        overview._USERS: scope,
        overview._SESSIONS: scope,
        overview._OTHER_TURNS: {"keys": "[]", "turn_id": "t"},
    }
    for statement, parameters in statements.items():
        with catalog._transaction("BEGIN") as db:
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        assert any("USING" in step and "INDEX" in step for step in plan)
        for table in ("turns", "turn_chunks", "holdings", "t"):
            assert f"SCAN {table}" not in plan, plan
