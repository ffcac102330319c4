"""``AgentMemory(base_url=...)`` and ``AsyncAgentMemory`` on a real server with the bundled model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kv_agent import AgentMemory, AsyncAgentMemory, ConfigError, TurnFilter
from kv_agent.chunks import TurnId
from kv_agent.storage.catalog import Catalog
from tests.engine.memory.shared import REPLY
from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

FACTS = ("Hugo Thomsen works as a pilot.", "Rosa Bishop has a parrot at home.")
QUESTION = "What pet does Rosa Bishop have?"


@pytest.fixture
def connect(memory_server: MemoryServerProcess) -> Iterator[Callable[..., AgentMemory]]:
    opened: list[AgentMemory] = []

    def connected(user_id: str, key: str = "acme", **options: Any) -> AgentMemory:
        options = {"base_url": memory_server.base_url, "api_key": memory_server.keys[key], **options}
        opened.append(AgentMemory(user_id=user_id, **options))
        return opened[-1]

    yield connected
    for memory in opened:
        memory.close()


@pytest.fixture
def catalog(memory_server: MemoryServerProcess) -> Iterator[Catalog]:
    """The server's store, seen from here."""
    catalog = Catalog(memory_server.store / "catalog.sqlite3")
    yield catalog
    catalog.close()


def test_what_was_stored_is_in_the_store_when_store_returns(
    connect: Callable[..., AgentMemory], catalog: Catalog
) -> None:
    memory = connect("client-store", agent_id="planner", session_id="monday")

    memory_id = memory.store(FACTS[1], REPLY, metadata={"topic": "pets", "page": 3}, ttl_s=3600)

    assert memory_id is not None
    turn = catalog.turns([memory_id])[memory_id]
    found = memory.get(memory_id)
    assert found is not None
    assert (found.id, found.text, found.tokens) == (turn.turn_id, turn.text, turn.num_tokens)
    assert (found.scope, found.created, found.expires) == (turn.scope, turn.created, turn.expires)
    assert (found.metadata, found.chunk_ids) == (turn.metadata, turn.chunk_keys)
    assert (turn.scope.namespace, turn.scope.agent_id, turn.scope.session_id) == ("acme", "planner", "monday")
    assert memory.pin(memory_id)
    assert catalog.turns([memory_id])[memory_id].pinned
    assert connect("client-store", "other").get(memory_id) is None
    assert memory.forget([memory_id]) == 1
    assert catalog.turns([memory_id]) == {}


@pytest.mark.parametrize("mode", ["hybrid", "latent", "lexical"])
def test_finds_by_words_and_by_the_models_own_keys(connect: Callable[..., AgentMemory], mode: Any) -> None:
    memory = connect(f"client-{mode}")
    ids = [memory.store(fact, REPLY, metadata={"number": number}) for number, fact in enumerate(FACTS)]

    found = memory.search(QUESTION, mode=mode, explain=True)

    best = found.memories[0]
    assert (best.id, FACTS[1] in best.text) == (ids[1], True)
    assert best.score is not None
    assert best.voices
    assert (found.probe_s > 0) == (mode != "lexical")
    assert memory.retrieve(QUESTION, 1, mode) == [memory.retrieve(QUESTION, mode=mode)[0]]
    only = TurnFilter(metadata={"number": 0})
    assert {one.id for one in memory.retrieve("Hugo Thomsen", mode=mode, only=only)} == {ids[0]}
    assert memory.retrieve(QUESTION, mode=mode, only=TurnFilter(until=1.0)) == []


def test_generates_from_memories_that_come_back_as_kv(connect: Callable[..., AgentMemory]) -> None:
    memory = connect("client-generate")
    before = memory.generate(QUESTION, max_tokens=8, store=False)
    ids = [memory.store(fact, REPLY) for fact in FACTS]

    after = memory.generate(QUESTION, max_tokens=8, store=False)

    assert "parrot" not in before.text
    assert (before.memories, before.reuse.exact + before.reuse.adapted) == ((), 0)
    assert after.text == "parrot."
    assert [one.id for one in after.memories] == ids  # oldest first
    assert all(one.score is not None and one.text for one in after.memories)
    assert after.reuse.exact + after.reuse.adapted >= sum(one.tokens for one in after.memories)
    assert {key for one in after.memories for key in one.chunk_ids} <= set(after.reuse.chunk_ids)
    assert (after.turn_id, after.reuse.refused) == (None, ())
    assert memory.generate(QUESTION, 0, max_tokens=8, store=False).memories == ()
    assert memory.generate(QUESTION, 1, max_tokens=8, store=False, quality="exact").text == "parrot."
    only = TurnFilter(until=1.0)
    assert memory.generate(QUESTION, max_tokens=8, store=False, only=only).memories == ()


def test_an_answer_becomes_a_memory_unless_told_otherwise(connect: Callable[..., AgentMemory]) -> None:
    memory = connect("client-answers", system_prompt="Answer in one word.")

    kept = memory.generate("Who is there?", max_tokens=4)

    assert kept.turn_id is not None
    found = memory.retrieve("Who is there?", mode="lexical")
    assert [one.id for one in found] == [kept.turn_id]
    assert "Answer in one word." not in found[0].text


def test_a_refused_chat_says_why(connect: Callable[..., AgentMemory]) -> None:
    memory = connect("client-refused")
    for call, sentence in [
        (lambda: memory.generate("x", top_k=1000), "memory.top_k: "),
        (lambda: memory.generate("x", quality="perfect"), "memory.quality: "),
        (lambda: memory.generate("x", max_tokens=-1), "max_tokens"),
        (lambda: memory.retrieve("x " * 9000), "query"),
        (lambda: connect("u", api_key="kva-wrong").generate("x"), "does not accept this API key"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            call()
    assert memory.generate("Who?", max_tokens=2, store=False).reuse.computed > 0


def test_many_coroutines_share_one_client(memory_server: MemoryServerProcess) -> None:
    async def talk() -> None:
        async with AsyncAgentMemory(
            base_url=memory_server.base_url, api_key=memory_server.keys["acme"], user_id="client-async"
        ) as memory:
            stored = await asyncio.gather(*(memory.store(f"Room {n} is blue.", REPLY) for n in range(20)))
            listed = await memory.list()
            assert {one.id for one in listed} == set(stored)
            found = await asyncio.gather(*(memory.retrieve(f"Room {n}", mode="lexical") for n in range(20)))
            assert [any(one.id == id for one in some) for id, some in zip(stored, found, strict=True)] == [
                True
            ] * 20
            answers = await asyncio.gather(
                *(memory.generate(f"Room {n}?", 2, max_tokens=4, store=False) for n in range(10))
            )
            assert all(len(answer.memories) == 2 for answer in answers)
            assert await memory.forget([TurnId(str(id)) for id in stored]) == 20

    asyncio.run(talk())
