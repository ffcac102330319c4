"""A store at its limits: who goes, who stays, who is refused, and what is counted."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent.chunks import TurnId
from kv_agent.errors import ConfigError
from kv_agent.storage.policy import Policy, Usage, policy_named
from kv_agent.storage.retention import Retention
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.numbered_turns import SCOPE, TOKEN_BYTES, put, stored
from tests.unit.storage.stores import blob_files


def test_limits_of_a_namespace_come_before_those_of_all_others(store: LocalStore) -> None:
    others, own = Retention(max_bytes=5, policy="fifo"), Retention(max_memories=7, ttl_s=2.5)
    store.set_retention(None, others)
    store.set_retention("acme", own)

    again = LocalStore(store._root, host_bytes=0)
    assert (again.retention("acme"), again.retention("x")) == (own, others)
    assert again.catalog.ledger.retentions() == {None: others, "acme": own}
    again.set_retention("acme", None)
    assert store.retention("acme") == others
    store.set_retention(None, None)
    assert store.retention("acme") == Retention()
    with pytest.raises(ConfigError, match="non-empty"):
        store.set_retention("", own)
    again.close()


def test_a_store_at_its_limit_makes_room_for_some_turns_at_once(store: LocalStore) -> None:
    store.set_retention("default", Retention(max_bytes=100 * 10 * TOKEN_BYTES))
    for number in range(101):
        put(store, number)
        if number == 99:
            assert stored(store) == [*range(100)]

    assert stored(store) == [*range(6, 101)]  # 95 of 100
    assert store.stats()["evicted_turns"] == 6
    assert store.stats()["evicted_bytes"] == 6 * 10 * TOKEN_BYTES
    assert len(blob_files(store)) == 95
    assert store.check() == []
    seen = {
        change.turn_id for change in store.catalog.changes_since("fp-1", "default", 0) if not change.vector
    }
    assert seen == {f"turn-{number}" for number in range(6)}  # the index lets go of them, too


def test_chunks_that_others_use_free_nothing_so_that_more_turns_go(store: LocalStore) -> None:
    shared = chain(90, seed=1000, scope=SCOPE)
    for number in range(9):  # all of the first chunk's bytes stay until the last of these goes
        own = chain(1, seed=number, scope=SCOPE, parent=shared[0].key)
        turn = turn_of([*shared, *own], f"turn-{number}", SCOPE, float(number))
        store.put_turn(turn, [], [*shared, *own])
    store.set_retention("default", Retention(max_bytes=105 * TOKEN_BYTES))

    put(store, 20, 10)

    assert stored(store) == [20]
    assert store.catalog.ledger.held("default").num_bytes == 10 * TOKEN_BYTES
    assert store.check() == []


def test_a_file_counts_for_the_disk_until_its_last_chunk_goes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, host_bytes=0, disk_bytes=100 * TOKEN_BYTES)
    first, rest = chain(2, 80, scope=SCOPE)
    store.put_turn(turn_of([first, rest], "turn-0", SCOPE, 0.0), [], [first, rest])
    store.put_turn(turn_of([first], "turn-1", SCOPE, 1.0), [], [])
    store.forget([TurnId("turn-0")])
    assert store.catalog.ledger.held("default").num_bytes == 2 * TOKEN_BYTES
    assert store.catalog.ledger.held(None).num_bytes == 82 * TOKEN_BYTES

    put(store, 2, 30)

    assert stored(store) == [2]
    store.close()


def test_a_turn_that_is_larger_than_the_limit_takes_nobody_elses_place(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.set_retention("default", Retention(max_tokens=40))
    for number in range(3):
        put(store, number)

    large = put(store, 3, 41)
    put(store, 4, 50)

    assert stored(store) == [0, 1, 2]
    assert (store.stats()["refused_turns"], store.stats()["evicted_turns"]) == (2, 0)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("turn turn-3 is not kept: ")
    assert "max_tokens 40" in warning
    assert store.catalog.known_turns([large]) == frozenset()
    assert store.catalog.ledger.settled([large, TurnId("never")]) == {large}  # nobody waits for it
    assert store.check() == []


def test_a_memory_that_outgrows_the_limit_by_its_parts_is_not_refused(store: LocalStore) -> None:
    """What is computed to put it back must not cost the memory itself."""
    store.set_retention("default", Retention(max_tokens=12))
    whole = put(store, 0)
    (link,) = chain(4, seed=7, scope=SCOPE)
    owner = store.catalog.turns([whole])[whole]

    store.put_turn(replace(owner, turn_id=TurnId("rung")), [link], [], is_part=True)
    assert stored(store) == [0]
    assert store.stats()["refused_turns"] == 0
    put(store, 1, 5)
    assert stored(store) == [1]


def test_pinned_turns_stay_and_what_does_not_fit_beside_them_is_refused(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        put(store, number, pinned=number < 3)
    store.set_retention("default", Retention(max_tokens=35, window_tokens=1, ttl_s=1.0))

    put(store, 4)  # 30 pinned tokens and these 10 are too many
    assert stored(store) == [0, 1, 2]
    put(store, 5, 5)
    assert stored(store) == [0, 1, 2, 5]
    store.set_retention("default", Retention(max_tokens=25))
    put(store, 6, 1)
    put(store, 7, 1)
    assert stored(store) == [0, 1, 2]
    store.catalog.ledger.pin([TurnId("turn-0")], False)
    put(store, 8, 3)
    assert stored(store) == [1, 2, 8]

    warnings = [record.getMessage() for record in caplog.records]
    assert sum("pinned memories alone exceed" in warning for warning in warnings) == 1
    assert sum("is not kept" in warning for warning in warnings) == 1


def test_a_pinned_turn_outlives_its_time_and_not_an_order_to_forget(store: LocalStore) -> None:
    put(store, 0, expires=5.0, pinned=True)
    store.forget_expired(6.0)
    assert stored(store) == [0]
    assert store.collect_garbage(0).num_turns == 0

    store.catalog.ledger.pin([TurnId("turn-0")], False)
    store.forget_expired(6.0)
    assert stored(store) == []

    put(store, 1, pinned=True)
    store.forget([TurnId("turn-1")])
    assert stored(store) == []


def test_a_namespace_gives_a_time_to_live_to_whoever_has_none(store: LocalStore) -> None:
    store.set_retention("default", Retention(ttl_s=100.0))
    put(store, 0)
    put(store, 1, expires=7.0)

    turns = store.catalog.turns([TurnId("turn-0"), TurnId("turn-1")])
    assert {turn.turn_id: turn.expires for turn in turns.values()} == {"turn-0": 100.0, "turn-1": 7.0}


def test_whose_time_is_over_goes_before_anybody_else(store: LocalStore) -> None:
    put(store, 0)
    put(store, 1, expires=time.time() + 1e6)
    put(store, 2, expires=3.0)
    store.set_retention("default", Retention(max_memories=3))

    put(store, 3)

    assert stored(store) == [0, 1, 3]


class Shortest:
    """Whoever has the fewest tokens goes first."""

    def rank(self, usage: Usage) -> float:
        return usage.num_tokens


class Broken:
    def rank(self, usage: Usage) -> float:
        raise RuntimeError("a bug of somebody else's")


@pytest.mark.parametrize(
    ("policy", "named", "gone"),
    [
        (policy_named("fifo"), None, {0, 1}),
        (policy_named("lru"), None, {1, 2}),
        (Shortest(), None, {7, 8}),
        (Shortest(), "fifo", {0, 1}),  # a name in the namespace's limits comes first
        (Broken(), None, {1, 2}),
    ],
)
def test_a_policy_by_name_or_of_ones_own_says_who_goes(
    tmp_path: Path, policy: Policy, named: str | None, gone: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path, host_bytes=0, policy=policy)
    store.set_retention("default", Retention(policy=named, max_memories=20))
    for number in range(20):
        put(store, number, {7: 1, 8: 2}.get(number, 5))
    store.catalog.ledger.touch([TurnId("turn-0")], 50.0)

    put(store, 20, 1)

    assert set(range(21)) - set(stored(store)) == gone
    failures = [record for record in caplog.records if "failed; least recently used" in record.getMessage()]
    assert len(failures) == isinstance(policy, Broken)
    store.close()
