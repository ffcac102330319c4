"""What the harness asks: memories apart, questions with an answer, nothing that training has seen."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks.reuse.cases import Case, recall_cases, story_cases
from kv_agent.manager import BUNDLED_MODEL
from kv_agent.prompting import ChatPrompts


@pytest.fixture(scope="module")
def prompts() -> ChatPrompts:
    return ChatPrompts(AutoTokenizer.from_pretrained(BUNDLED_MODEL))


def test_a_case_is_the_conversation_it_stands_for(prompts: ChatPrompts) -> None:
    cases = list(recall_cases(prompts, 5, 10, system_prompt="Be brief."))
    assert len(cases) == 10
    assert len({case.name for case in cases}) == 10
    for case in cases:
        assert case.prefix == prompts.prefix("Be brief.")
        assert len(case.memories) == len(case.contexts) >= 5
        assert case.prompt == (*case.prefix, *(t for one in case.memories for t in one), *case.fresh)
        assert case.answer is not None
        assert case.contexts == ((),) * len(case.memories)


def test_memories_may_have_stood_in_a_session_and_come_in_any_order(prompts: ChatPrompts) -> None:
    plain = list(recall_cases(prompts, 20, 4))
    moved = list(recall_cases(prompts, 20, 4, num_before=30, shuffled=True))
    for one, other in zip(plain, moved, strict=True):
        assert sorted(one.memories) == sorted(other.memories)
        assert one.memories != other.memories
        assert len(set(other.contexts)) == 1
        assert len(other.contexts[0]) > 300
        assert not set(other.memories) & {other.contexts[0]}


def test_the_fresh_turn_goes_on_with_the_last_story() -> None:
    stories = [tuple(range(100 * number, 100 * number + 50)) for number in range(8)]
    cases = list(story_cases(stories, 3, 5, memory_tokens=20, fresh_tokens=6))
    assert len(cases) == 5
    for case in cases:
        assert all(len(memory) == 20 for memory in case.memories)
        last = case.memories[-1]
        assert case.fresh == tuple(range(last[-1] + 1, last[-1] + 7))
        assert isinstance(case, Case)
        assert case.answer is None
