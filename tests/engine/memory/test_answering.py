"""Answers with memories in the prompt: right ones, from reused KV, behind a system prompt, as many as fit."""

from __future__ import annotations

import pytest

from kv_agent import AgentMemory, CacheManager
from kv_agent.engines.base import Call
from tests.engine.memory.shared import REPLY

pytestmark = pytest.mark.engine


def test_memory_turns_a_wrong_answer_into_the_right_one(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="bob")
    question = "What pet does Rosa Bishop have?"
    before = memory.generate(question, max_tokens=8, store=False)
    memory.store("Hugo Thomsen works as a pilot.", REPLY)
    memory.store("Rosa Bishop has a parrot at home.", REPLY)

    after = memory.generate(question, max_tokens=8, store=False)

    assert "parrot" not in before.text
    assert before.reuse.exact == before.reuse.adapted == 0
    assert after.text == "parrot."
    assert {m.text.split("\n")[0] for m in after.memories} == {
        "Hugo Thomsen works as a pilot.",
        "Rosa Bishop has a parrot at home.",
    }
    assert after.reuse.exact + after.reuse.adapted == sum(m.tokens for m in after.memories)
    assert after.reuse.computed == len(manager.prompts.fresh(question).token_ids)
    assert after.reuse.chunk_ids == tuple(key for m in after.memories for key in m.chunk_ids)
    assert not after.reuse.refused


def test_moved_memories_answer_like_the_same_text_computed(
    manager: CacheManager, record_property: pytest.RecordProperty
) -> None:
    memory = AgentMemory(manager, user_id="trent")
    people = [
        "Mara Dubois",
        "Kofi Atwood",
        "Tamar Vogel",
        "Emil Fenwick",
        "Yusuf Khan",
        "Nils Roth",
        "Dorian Adler",
        "Gustav Weber",
        "Hugo Thomsen",
        "Vera Khan",
        "Carla Porter",
        "Otto Flores",
    ]
    cities = [
        "Oslo",
        "Kyoto",
        "Lima",
        "Quito",
        "Rome",
        "Delhi",
        "Dakar",
        "Leeds",
        "Paris",
        "Seoul",
        "Hanoi",
        "Riga",
    ]
    for person, city in zip(people, cities, strict=True):
        memory.store(f"{person} lives in {city}.", REPLY)

    same = 0
    for person in people:
        question = f"Where does {person} live?"
        answer = memory.generate(question, top_k=3, max_tokens=8, store=False)
        records = manager.chunk_records([key for m in answer.memories for key in m.chunk_ids])
        text = [token for m in answer.memories for key in m.chunk_ids for token in records[key].token_ids]
        fresh = manager.prompts.fresh(question).token_ids
        computed = manager.run(Call(token_ids=(*text, *fresh), max_tokens=8, cache_salt=question))
        assert answer.reuse.adapted > 0
        assert computed.reuse.computed == len(text) + len(fresh)
        same += answer.text == computed.text.strip()

    record_property("same_answers_of_12", same)
    assert same >= 10


def test_a_question_and_its_answer_become_a_memory_by_default(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="ivan")
    memory.store("Emil Fenwick lives in Quito.", REPLY)

    answer = memory.generate("Where does Emil Fenwick live?", max_tokens=8)

    assert answer.text == "Quito."
    assert answer.turn_id is not None
    newest = memory.list()[0]
    assert newest.id == answer.turn_id
    assert newest.text == "Where does Emil Fenwick live?\nQuito."


def test_a_system_prompt_is_stored_once_placed_exactly_and_never_found(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="judy", system_prompt="Be brief.")
    memory.store("Omar Reyes works as a chemist.", REPLY)
    memory.store("Tamar Vogel works as a judge.", REPLY)

    answer = memory.generate("What does Omar Reyes do for work?", top_k=2, max_tokens=8, store=False)

    prefix = len(manager.prompts.prefix("Be brief."))
    assert prefix > 0
    # The first memory was computed right behind the prefix, the second one has to move.
    assert answer.reuse.exact == prefix + answer.memories[0].tokens
    assert answer.reuse.adapted == answer.memories[1].tokens
    assert len(answer.reuse.chunk_ids) == 3
    assert [m.text for m in memory.list() if "Be brief" in m.text] == []


def test_a_system_prompt_longer_than_a_chunk_is_placed_chunk_by_chunk(manager: CacheManager) -> None:
    system_prompt = "Be brief. " * 60
    memory = AgentMemory(manager, user_id="sybil", system_prompt=system_prompt)
    memory.store("Yara Lopez has a duck at home.", REPLY)

    answer = memory.generate("What pet does Yara Lopez have?", max_tokens=8, store=False)

    prefix = len(manager.prompts.prefix(system_prompt))
    assert prefix > 256
    assert not answer.reuse.refused
    assert answer.reuse.exact == prefix + answer.memories[0].tokens
    assert len(answer.reuse.chunk_ids) == -(-prefix // 256) + 1


def test_memories_that_do_not_fit_are_left_out_worst_first(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="peggy")
    for index in range(12):
        memory.store("Rafi likes the number " + " ".join(["nine"] * 40) + f" {index}.", REPLY)

    answer = memory.generate("What does Rafi like?", top_k=12, max_tokens=300, store=False)

    assert 0 < len(answer.memories) < 12
    assert answer.reuse.exact + answer.reuse.adapted == sum(m.tokens for m in answer.memories)
