"""The exam is the same for every reader and counts what it says it counts."""

from __future__ import annotations

import pytest

from benchmarks.world import Ask, Question, Split, ValueKind
from benchmarks.world.exam import by_group, exam_papers


def question(ask: Ask, kind: ValueKind | None, *relations: str) -> Question:
    return Question(id="", text="", answer="", ask=ask, relations=relations, kind=kind, evidence=())


def test_papers_are_the_same_every_time_and_differ_by_split() -> None:
    def papers(split: Split) -> list[tuple[str, tuple[str, ...]]]:
        drawn = exam_papers(split, num_facts=8, num_worlds=3)
        return [(world.digest(), tuple(one.text for one in questions)) for world, questions in drawn]

    assert papers(Split.TEST) == papers(Split.TEST)
    assert papers(Split.TEST) != papers(Split.VALIDATION)


@pytest.mark.parametrize("num_facts", [1, 8, 40])
def test_papers_ask_what_their_world_holds_and_at_most_twenty_questions(num_facts: int) -> None:
    for world, questions in exam_papers(Split.TEST, num_facts=num_facts, num_worlds=4):
        assert set(questions) <= set(world.questions)
        assert 1 <= len(questions) == min(20, len(world.questions)) == len(set(questions))


def test_scores_count_every_group_a_question_belongs_to() -> None:
    outcome = [
        (question(Ask.DIRECT, ValueKind.WORD, "home"), True),
        (question(Ask.CORRECTED, ValueKind.WORD, "home"), False),
        (question(Ask.TWO_HOP, ValueKind.WORD, "lead", "home"), True),
        (question(Ask.UNKNOWN, None, "pet"), False),
    ]
    scores = {name: (score.right, score.asked) for name, score in by_group(outcome).items()}
    assert scores == {
        "all": (2, 4),
        "ask:direct": (1, 1),
        "ask:corrected": (0, 1),
        "ask:two_hop": (1, 1),
        "ask:unknown": (0, 1),
        "kind:word": (1, 2),
        "relation:home": (1, 2),
    }
