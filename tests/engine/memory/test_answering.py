"""Answers with memories in the prompt: right ones, from reused KV, behind a system prompt, as many as fit."""

from __future__ import annotations

import pytest

from kv_agent import AgentMemory, CacheManager, ConfigError
from kv_agent.chunking import cut_lengths
from kv_agent.config import PluginConfig
from kv_agent.engines.base import Call
from kv_agent.manager import Quality
from kv_agent.memory import Answer
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
    remembered = tuple(key for m in after.memories for key in m.chunk_ids)
    assert tuple(key for key in after.reuse.chunk_ids if key in remembered) == remembered
    assert not after.reuse.refused


def test_a_memory_that_began_a_sequence_is_moved_with_another_opening(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="opening")
    memory.store("Dana Rossi has a camel at home.", REPLY)
    memory.store("Milo Petrov has a llama at home.", REPLY)
    question = "What pet does Milo Petrov have?"

    answer = memory.generate(question, max_tokens=8, store=False)
    kept = manager.stats()
    again = memory.generate(question, max_tokens=8, store=False)
    one = memory.generate(question, 1, max_tokens=8, store=False)

    first, second = answer.memories
    size = len(manager.prompts.opening)
    assert size > 0
    assert manager.stats() == kept  # the opening is computed once
    assert (answer.reuse.exact, answer.reuse.adapted) == (first.tokens, second.tokens)
    (opening,) = set(answer.reuse.chunk_ids) - {*first.chunk_ids, *second.chunk_ids}
    record = manager.chunk_records([opening])[opening]
    assert record.token_ids == manager.prompts.opening
    assert record.start == len(manager.prompts.neutral)
    assert again.reuse.chunk_ids == answer.reuse.chunk_ids
    assert one.reuse.exact == second.tokens  # alone it stands where it was computed
    assert {m.id for m in memory.list()} == {first.id, second.id}
    assert memory.generate(question, max_tokens=8, store=False, quality="exact").reuse.adapted == 0


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


def test_quality_says_what_is_put_back(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="quality", system_prompt="Be brief.")
    for fact in ("Omar Reyes works as a chemist in a big and old laboratory by the sea, he says.",
                 "Tamar Vogel works as a judge in a big and old house by the sea, she says."):  # fmt: skip
        memory.store(fact, REPLY)
    question = "What does Omar Reyes do for work?"
    prefix = len(manager.prompts.prefix("Be brief."))

    def ask(quality: Quality) -> Answer:
        return memory.generate(question, top_k=2, max_tokens=8, store=False, quality=quality)

    fast, exact = ask("fast"), ask("exact")
    first, second = (one.tokens for one in fast.memories)
    assert (fast.reuse.exact, fast.reuse.adapted) == (prefix + first, second)
    assert (exact.reuse.exact, exact.reuse.adapted) == (prefix + first, 0)
    assert exact.reuse.computed == fast.reuse.computed + second
    assert exact.reuse.refused == ()

    stored = manager.stats()
    balanced = ask("balanced")
    assert (balanced.reuse.exact, balanced.reuse.adapted) == (
        prefix + first + second // 10,
        second - second // 10,
    )
    assert balanced.reuse.refused == ()
    linked = manager.stats()
    assert (linked["chunks"], linked["turns"]) == (stored["chunks"] + 1, stored["turns"])
    assert ask("balanced").text == balanced.text
    assert manager.stats() == linked  # the link is found, not made again

    assert memory.forget([fast.memories[1].id]) == 1  # and goes with its memory
    assert manager.stats()["chunks"] == stored["chunks"] - len(fast.memories[1].chunk_ids)
    with pytest.raises(ConfigError, match='quality must be "fast", "balanced" or "exact"'):
        memory.generate(question, quality="best")  # type: ignore[arg-type]


def test_a_system_prompt_longer_than_a_chunk_is_placed_chunk_by_chunk(manager: CacheManager) -> None:
    system_prompt = "Be brief. " * 60
    memory = AgentMemory(manager, user_id="sybil", system_prompt=system_prompt)
    memory.store("Yara Lopez has a duck at home.", REPLY)

    answer = memory.generate("What pet does Yara Lopez have?", max_tokens=8, store=False)

    prefix = len(manager.prompts.prefix(system_prompt))
    chunks = cut_lengths(manager.prompts.prefix(system_prompt), PluginConfig().chunk_tokens)
    assert len(chunks) > 1
    assert not answer.reuse.refused
    assert answer.reuse.exact == prefix + answer.memories[0].tokens
    assert len(answer.reuse.chunk_ids) == len(chunks) + 1


def test_memories_that_do_not_fit_are_left_out_worst_first(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="peggy")
    for index in range(12):
        memory.store("Rafi likes the number " + " ".join(["nine"] * 40) + f" {index}.", REPLY)

    answer = memory.generate("What does Rafi like?", top_k=12, max_tokens=300, store=False)

    assert 0 < len(answer.memories) < 12
    assert answer.reuse.exact + answer.reuse.adapted == sum(m.tokens for m in answer.memories)
