"""What keeps a memory and what lets it go, as users of ``AgentMemory`` and ``CacheManager`` see it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_agent import AgentMemory, CacheManager, Retention, Usage
from kv_agent.chunks import TurnId
from kv_agent.storage import connection
from kv_agent.storage.store import LocalStore
from tests.unit.stand_in import StandIn

NAMES = ["Mara", "Hugo", "Rosa", "Kofi", "Vera", "Nils", "Emil", "Lena"]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CacheManager]:
    with CacheManager(StandIn(LocalStore(tmp_path, host_bytes=0)), store=tmp_path) as manager:
        yield manager


def remember(memory: AgentMemory, name: str, **options: float) -> TurnId:
    turn_id = memory.store(f"{name} lives in Oslo.", "I will remember that.", **options)
    assert turn_id is not None
    return turn_id


def names(memory: AgentMemory) -> list[str]:
    return sorted(one.text.split()[0] for one in memory.list())


def uses(manager: CacheManager) -> dict[TurnId, int]:
    """Hits so far, those that are still to be counted included."""
    manager._uses.submit(int).result()
    usages = manager.store.catalog.ledger.usages(None)
    return {turn_id: usage.num_hits for turn_id, usage in usages.items() if usage.num_tokens}


def test_only_a_memory_that_is_read_here_can_be_pinned(manager: CacheManager) -> None:
    alice = AgentMemory(manager, user_id="alice", agent_id="one")
    turn_id = remember(alice, "Mara")
    others = [
        AgentMemory(manager, user_id="bob"),
        AgentMemory(manager, user_id="alice", namespace="elsewhere"),
        AgentMemory(manager, user_id="alice", agent_id="two", share="agent"),
    ]

    for other in others:
        assert not other.pin(turn_id)
        assert not other.unpin(turn_id)
    assert not alice.pin(TurnId("unknown"))
    assert [one.pinned for one in alice.list()] == [False]
    assert alice.pin(turn_id)
    assert [one.pinned for one in alice.list()] == [True]
    assert alice.retrieve("Mara", mode="lexical")[0].pinned
    assert alice.unpin(turn_id)
    got = alice.get(turn_id)
    assert got is not None
    assert not got.pinned


def test_a_pinned_memory_outlives_its_time_until_it_is_forgotten(manager: CacheManager) -> None:
    memory = AgentMemory(manager)
    manager.store.set_retention(None, Retention(ttl_s=1e12))
    pinned, other = (remember(memory, name) for name in NAMES[:2])
    memory.pin(pinned)

    with manager.store.catalog._transaction() as db:
        db.execute("UPDATE turns SET expires = 5.0")

    assert names(memory) == [NAMES[0]]
    assert memory.get(other) is None
    assert memory.forget([pinned]) == 1
    assert names(memory) == []


def test_what_is_found_or_put_back_counts_as_used(manager: CacheManager) -> None:
    memory = AgentMemory(manager)
    mara, hugo, rosa = (remember(memory, name) for name in NAMES[:3])
    assert uses(manager) == {mara: 0, hugo: 0, rosa: 0}

    memory.retrieve("Mara", top_k=1, mode="lexical")
    assert uses(manager) == {mara: 1, hugo: 0, rosa: 0}
    answer = memory.generate("Rosa", top_k=1, mode="lexical", store=False)
    assert [one.id for one in answer.memories] == [rosa]
    assert uses(manager) == {mara: 1, hugo: 0, rosa: 1}  # found and put back is one use
    memory.retrieve("nobody at all", top_k=1, mode="lexical")
    memory.generate("Hugo", top_k=0, store=False)
    assert uses(manager) == {mara: 1, hugo: 0, rosa: 1}


def test_a_use_that_cannot_be_counted_fails_nothing(
    manager: CacheManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", 0.05)
    memory = AgentMemory(manager)
    mara = remember(memory, "Mara")
    holder = sqlite3.connect(tmp_path / "catalog.sqlite3", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    for _ in range(3):
        assert [one.id for one in memory.retrieve("Mara", mode="lexical")] == [mara]
    assert uses(manager) == {mara: 0}
    (warning,) = caplog.records
    assert "are not counted" in warning.getMessage()

    holder.execute("ROLLBACK")
    holder.close()
    memory.retrieve("Mara", mode="lexical")
    assert uses(manager) == {mara: 1}


class ByName:
    """Somebody's own policy: it only sees how memories were used, not what they say."""

    def __init__(self) -> None:
        self.asked = 0

    def rank(self, usage: Usage) -> float:
        self.asked += 1
        return -usage.created  # the newest first


def test_a_policy_object_decides_in_the_process_that_was_given_it(tmp_path: Path) -> None:
    policy = ByName()
    engine = StandIn(LocalStore(tmp_path, host_bytes=0, makes_room=False))
    with CacheManager(engine, store=tmp_path, policy=policy) as manager:
        manager.store.set_retention("default", Retention(max_memories=3))
        memory = AgentMemory(manager)
        for name in NAMES[:5]:
            remember(memory, name)

        assert names(memory) == sorted([*NAMES[:2], NAMES[4]])
        assert policy.asked > 0
        assert manager.stats()["evicted_turns"] == 2
        assert manager.stats()["refused_turns"] == 0


def test_nobody_waits_for_a_turn_that_was_refused_or_went_at_once(tmp_path: Path) -> None:
    """Once this took until the time-out of waiting."""
    engine = StandIn(LocalStore(tmp_path, host_bytes=0))
    with CacheManager(engine, store=tmp_path) as manager:
        manager.store.set_retention("default", Retention(max_tokens=60))
        memory = AgentMemory(manager)
        remember(memory, "Mara")
        large = memory.store(" ".join(NAMES * 30))
        expired = remember(memory, "Hugo", ttl_s=1.0)  # long ago by the stand-in's clock

        assert manager.wait_durable(timeout_s=5.0)
        assert large is not None
        assert memory.get(large) is None
        assert memory.get(expired) is None
        assert names(memory) == ["Mara"]
        assert manager.stats()["refused_turns"] == 1
