"""Stored memories: found at once, kept once, read only by those who may, and gone when forgotten."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kv_agent import AgentMemory, CacheManager, ConfigError, Scope
from tests.engine.memory.shared import REPLY

pytestmark = pytest.mark.engine


def test_a_stored_turn_is_found_at_once_with_everything_about_it(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="alice", agent_id="helper", session_id="monday")
    turn_id = memory.store("Mara Dubois lives in Oslo.", REPLY, metadata={"source": "chat"})

    (hit,) = memory.retrieve("Where does Mara Dubois live?", top_k=5)

    assert hit.id == turn_id
    assert hit.text == f"Mara Dubois lives in Oslo.\n{REPLY}"
    assert hit.scope == Scope(user_id="alice", agent_id="helper", session_id="monday")
    assert hit.metadata == {"source": "chat"}
    assert hit.tokens == len(manager.prompts.turn("Mara Dubois lives in Oslo.", REPLY))
    assert len(hit.chunk_ids) == 1
    assert memory.get(hit.id) is not None
    assert [m.id for m in memory.list()] == [hit.id]


def test_users_and_namespaces_never_see_each_other(manager: CacheManager) -> None:
    AgentMemory(manager, user_id="carol").store("Project Silent Titan takes place in Lake Eden.", REPLY)
    question = "Where does project Silent Titan take place?"

    for other in (
        AgentMemory(manager, user_id="dave"),
        AgentMemory(manager, user_id="carol", namespace="elsewhere"),
    ):
        assert other.retrieve(question) == []
        assert other.list() == []
        assert "Eden" not in other.generate(question, max_tokens=8, store=False).text


def test_share_says_how_far_a_memory_reads(manager: CacheManager) -> None:
    scope = {"user_id": "erin"}
    AgentMemory(manager, agent_id="one", session_id="a", **scope).store("Vera Khan lives in Boston.", REPLY)
    AgentMemory(manager, agent_id="two", session_id="b", **scope).store("Kofi Atwood lives in Riga.", REPLY)

    def seen(**options: str) -> set[str]:
        memory = AgentMemory(manager, **scope, **options)
        return {m.text.split("\n")[0] for m in memory.retrieve("Who lives where?")}

    both = {"Vera Khan lives in Boston.", "Kofi Atwood lives in Riga."}
    assert seen(agent_id="three") == both
    assert seen(agent_id="one", share="agent") == {"Vera Khan lives in Boston."}
    assert seen(agent_id="two", session_id="b", share="session") == {"Kofi Atwood lives in Riga."}
    assert seen(agent_id="two", session_id="c", share="session") == set()
    with pytest.raises(ConfigError, match="needs agent_id"):
        AgentMemory(manager, share="agent")


def test_storing_the_same_turn_twice_is_one_memory(manager: CacheManager, store: Path) -> None:
    memory = AgentMemory(manager, user_id="frank")
    memory.store("Zoe Nagy has a goat at home.", REPLY)
    manager.wait_durable()
    blobs = set(store.glob("blobs/*/*"))

    memory.store("Zoe Nagy has a goat at home.", REPLY)

    assert len(memory.list()) == 1
    assert set(store.glob("blobs/*/*")) == blobs


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_stored_memory_stands_behind_the_system_prompt(
    manager: CacheManager, system_prompt: str | None
) -> None:
    memory = AgentMemory(manager, user_id=f"behind {system_prompt}", system_prompt=system_prompt)
    memory.store("Ida Bergman has a hen at home.", REPLY)

    (found,) = memory.list()
    (chunk,) = manager.chunk_records(found.chunk_ids).values()

    assert chunk.token_ids == manager.prompts.turn("Ida Bergman has a hen at home.", REPLY)
    assert chunk.start == len(manager.prompts.prefix(system_prompt))
    assert [hit.id for hit in memory.retrieve("Hello.")] == [found.id]  # what stood before is no memory


def test_what_is_forgotten_is_gone_from_answers_and_disk(manager: CacheManager, store: Path) -> None:
    memory = AgentMemory(manager, user_id="grace")
    memory.store("Lena Holm loves to eat mango.", REPLY)
    question = "What does Lena Holm love to eat?"
    assert memory.generate(question, max_tokens=8, store=False).text == "mango."
    (found,) = memory.list()
    blob = store / manager.chunk_records(found.chunk_ids)[found.chunk_ids[0]].blob
    assert blob.exists()

    assert AgentMemory(manager, user_id="heidi").forget([found.id]) == 0
    assert memory.forget([found.id]) == 1

    assert not blob.exists()
    assert memory.list() == memory.retrieve(question) == []
    assert "mango" not in memory.generate(question, max_tokens=8, store=False).text


def test_a_memory_goes_when_its_time_is_over(
    manager: CacheManager, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = AgentMemory(manager, user_id="ephemera")
    question = "What does Nora Banerjee love to eat?"
    memory.store("Nora Banerjee loves to eat honey.", REPLY, ttl_s=3600)
    kept = memory.store("Omar Quist lives in Lima.", REPLY)
    (found,) = memory.retrieve(question, top_k=1)
    assert found.expires is not None
    assert 3500 < found.expires - time.time() <= 3600
    blob = store / manager.chunk_records(found.chunk_ids)[found.chunk_ids[0]].blob
    assert blob.exists()

    monkeypatch.setattr(time, "time", lambda now=found.expires: now)

    assert [one.id for one in memory.retrieve(question)] == [kept]
    assert memory.get(found.id) is None
    assert not blob.exists()
    with pytest.raises(ConfigError, match="ttl_s must be a positive number of seconds"):
        memory.store("Never stored.", ttl_s=0)


def test_texts_that_do_not_fit_the_model_are_refused_with_the_numbers(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="olivia")
    long = "word " * 2000

    with pytest.raises(ConfigError, match=r"the turn needs \d+ tokens, the model takes 1024"):
        memory.store(long)
    with pytest.raises(ConfigError, match="the query needs"):
        memory.retrieve(long)
    with pytest.raises(ConfigError, match="the query with its answer needs"):
        memory.generate("Short?", max_tokens=2000)
    with pytest.raises(ConfigError, match="top_k must be >= 1"):
        memory.retrieve("Short?", top_k=0)
