"""Documents that were computed before, in a new question behind another beginning, on the real engine."""

from __future__ import annotations

import pytest

from benchmarks.world import Split, WorldConfig, generate_world
from kv_agent import AgentMemory, CacheManager
from kv_agent.memory import Answer

pytestmark = pytest.mark.engine

GREETING = "Hello again, here is what I know so far."


def document(seed: int, num_facts: int) -> tuple[str, list[tuple[str, str]]]:
    """Facts as one text, with questions about them and their answers."""
    config = WorldConfig(num_facts=num_facts, small_talk_share=0.0, unknown_share=0.0, two_hop_share=0.0)
    world = generate_world(config, split=Split.TEST, seed=seed)
    text = " ".join(turn.user for turn in world.turns.values())
    return text, [(question.text, question.answer) for question in world.questions]


def test_a_document_of_another_agent_is_put_back_behind_another_beginning(manager: CacheManager) -> None:
    text, questions = document(1, 40)
    AgentMemory(manager, user_id="library", agent_id="reader").store(text)
    writer = AgentMemory(manager, user_id="library", agent_id="writer")
    same = 0
    for question, _ in questions[:6]:
        asked = f"{GREETING} {text} {question}"
        computed = writer.generate(asked, 0, max_tokens=8, store=False, quality="exact")
        answer = writer.generate(asked, 0, max_tokens=8, store=False)
        assert computed.reuse.exact == computed.reuse.adapted == 0
        assert not answer.reuse.refused
        assert answer.reuse.adapted >= len(manager.prompts.turn(text)) / 2
        assert num_tokens(answer) == num_tokens(computed)
        same += answer.text == computed.text
    assert same >= 5


def test_text_between_two_documents_is_computed_and_kept_for_the_next_time(manager: CacheManager) -> None:
    (one, questions), (other, _) = document(2, 20), document(3, 20)
    memory = AgentMemory(manager, user_id="archive")
    manager.wait_durable()  # captures of tests before this one
    empty = manager.stats()["chunks"]
    memory.store(one)
    memory.store(other)
    manager.wait_durable()
    asked = f"{GREETING} {other} That was the first list. Now comes the second. {one} {questions[0][0]}"
    chunks = manager.stats()["chunks"]

    first = memory.generate(asked, 0, max_tokens=8, store=False)
    stored = manager.stats()["chunks"]
    again = memory.generate(asked, 0, max_tokens=8, store=False)

    assert stored > chunks  # what was computed between the documents
    assert manager.stats()["chunks"] == stored
    assert not first.reuse.refused
    assert again.text == first.text
    assert first.reuse.adapted >= 0.3 * num_tokens(first)
    assert first.reuse.exact > 0
    memory.forget([one.id for one in memory.list()])
    assert manager.stats()["chunks"] == empty + 2  # what takes the place of a moved text's opening


def test_a_question_with_a_known_document_becomes_a_memory_of_its_own(manager: CacheManager) -> None:
    text, questions = document(4, 40)
    memory = AgentMemory(manager, user_id="desk")
    source = memory.store(text)
    assert source is not None
    asked = f"{GREETING} {text} {questions[0][0]}"
    answer = memory.generate(asked, 0, max_tokens=8)
    assert answer.reuse.adapted > 0
    assert answer.turn_id is not None

    kept = memory.get(answer.turn_id)
    assert kept is not None
    assert kept.text.startswith(asked)
    assert kept.tokens > len(manager.prompts.turn(text))
    assert set(kept.chunk_ids) & set(answer.reuse.chunk_ids)

    memory.forget([source])
    later = memory.generate("What did we speak about?", 1, max_tokens=8, store=False)
    assert [one.id for one in later.memories] == [kept.id]
    assert not later.reuse.refused
    assert later.reuse.exact + later.reuse.adapted == kept.tokens


def test_another_session_s_document_is_computed(manager: CacheManager) -> None:
    text, questions = document(5, 40)
    AgentMemory(manager, user_id="clerk", session_id="monday").store(text)
    asked = f"{GREETING} {text} {questions[0][0]}"
    tuesday = AgentMemory(manager, user_id="clerk", session_id="tuesday", share="session")
    stranger = AgentMemory(manager, user_id="visitor")
    for memory in (tuesday, stranger):
        answer = memory.generate(asked, 0, max_tokens=8, store=False)
        assert answer.reuse.exact == answer.reuse.adapted == 0
    free = AgentMemory(manager, user_id="clerk", session_id="tuesday")
    assert free.generate(asked, 0, max_tokens=8, store=False).reuse.adapted > 0


def num_tokens(answer: Answer) -> int:
    reuse = answer.reuse
    return reuse.exact + reuse.adapted + reuse.local + reuse.computed
