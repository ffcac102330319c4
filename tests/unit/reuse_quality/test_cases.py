"""What the harness asks: memories apart, questions with an answer, nothing that training has seen."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks.reuse.cases import Case, exams, recall_cases, story_cases
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
    moved = list(recall_cases(prompts, 20, 4, before_tokens=300, shuffled=True))
    for one, other in zip(plain, moved, strict=True):
        assert (one.fresh, one.answer) == (other.fresh, other.answer)
        assert sorted(one.memories) == sorted(other.memories)
        assert one.memories != other.memories
        assert len(set(other.contexts)) == 1
        assert len(other.contexts[0]) == 300
        assert not set(other.memories) & {other.contexts[0]}


@pytest.mark.parametrize(("before_tokens", "filler_tokens"), [(0, 10), (0, 4000), (4000, 0), (100, 30)])
def test_distance_is_how_far_memories_were_moved(
    prompts: ChatPrompts, before_tokens: int, filler_tokens: int
) -> None:
    for case in recall_cases(
        prompts, 3, 2, before_tokens=before_tokens, filler_tokens=filler_tokens, system_prompt="Be brief."
    ):
        moved, position = [], len(case.prefix) + filler_tokens
        for context, memory in zip(case.contexts, case.memories, strict=True):
            assert case.prompt[position : position + len(memory)] == memory
            moved.append(abs(position - len(case.prefix) - len(context)))
            position += len(memory)
        assert case.distance == pytest.approx(sum(moved) / len(moved))
        assert case.prompt[:position] + case.fresh == case.prompt
        assert len(case.contexts[0]) == before_tokens
        assert not case.filler or case.filler != case.contexts[0]


def test_a_memory_may_have_several_facts(prompts: ChatPrompts) -> None:
    single = list(recall_cases(prompts, 12, 4))
    several = list(recall_cases(prompts, 4, 4, facts_per_memory=3))
    for one, other in zip(single, several, strict=True):
        assert one.prompt == other.prompt
        assert len(other.memories) == -(-len(one.memories) // 3)


def test_every_exam_has_its_own_world_and_the_last_only_what_is_left() -> None:
    found = list(exams(5, 10))
    assert [len(exam.questions) for exam in found] == [4, 4, 2]
    assert len({exam.world.seed for exam in found}) == 3


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
