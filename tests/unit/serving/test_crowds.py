"""Sixteen threads that store, search, list and forget at once, against what each of them knows of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kv_agent import AgentMemory, CacheManager
from kv_agent.chunks import TurnFilter, TurnId
from kv_agent.storage.store import LocalStore
from tests.unit.serving.conftest import ServedStandIn

NUM_THREADS = 16
NUM_TURNS = 12


def test_every_thread_finds_its_own_memories_at_once_and_nobody_elses(tmp_path: Path) -> None:
    wrong: list[str] = []
    with CacheManager(ServedStandIn(LocalStore(tmp_path, host_bytes=0)), store=tmp_path) as manager:

        def live(thread: int) -> None:
            # Four threads share a user: what the others of it do must not disturb.
            memory = AgentMemory(
                manager,
                user_id=f"user {thread % 4}",
                agent_id=f"agent {thread}",
                share="agent",
                system_prompt="Be kind.",
            )
            mine: dict[TurnId, int] = {}
            for number in range(NUM_TURNS):
                turn_id = memory.store(f"Number {number} of thread {thread}.", metadata={"n": number})
                assert turn_id is not None
                mine[turn_id] = number
                only = TurnFilter(metadata={"n": number})
                found = [one.id for one in memory.retrieve("number thread", mode="lexical", only=only)]
                if found != [turn_id]:
                    wrong.append(f"{thread} {number}: found {found}")
                if number % 4 == 3:
                    oldest = next(iter(mine))
                    memory.forget([oldest])
                    del mine[oldest]
                if [one.id for one in memory.list()] != sorted(mine, key=lambda one: -mine[one]):
                    wrong.append(f"{thread} {number}: listed")

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(live, range(NUM_THREADS)))
        assert wrong == []
        assert manager.store.check() == []
        memories = manager.store.catalog.ledger.held("default").num_memories
        assert memories == NUM_THREADS * (NUM_TURNS - NUM_TURNS // 4)
