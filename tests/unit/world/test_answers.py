"""Every answer follows from the text alone, as an independent reader shows."""

from __future__ import annotations

import pytest

from benchmarks.world import Ask, Split, World, WorldConfig, generate_world
from tests.unit.world.reading import UNKNOWN, Reader, told_by

SPLITS = list(Split)
RICH = WorldConfig(
    num_facts=400,
    facts_per_subject=3,
    facts_per_turn=3,
    hop_share=0.3,
    correction_share=0.4,
    paraphrase_share=0.5,
    two_hop_share=0.3,
    unknown_share=0.3,
    questions_per_fact=2,
)


@pytest.fixture(scope="module", params=SPLITS, ids=lambda split: split.value)
def world(request: pytest.FixtureRequest) -> World:
    return generate_world(RICH, split=request.param, seed=11)


def users(world: World) -> list[str]:
    return [turn.user for turn in world.turns.values()]


def test_answer_follows_from_evidence_turns_alone(world: World) -> None:
    turns = world.turns
    for question in world.questions:
        if question.ask is not Ask.UNKNOWN:
            reader = Reader(world.split).read(turns[turn].user for turn in sorted(set(question.evidence)))
            assert reader.answer(question.text) == question.answer, question


def test_newest_fact_of_whole_history_wins(world: World) -> None:
    reader = Reader(world.split).read(users(world))
    for question in world.questions:
        assert reader.answer(question.text) == question.answer, question


def test_no_evidence_turn_can_be_left_out(world: World) -> None:
    turns = world.turns
    for question in world.questions:
        for missing in set(question.evidence):
            kept = [turns[turn].user for turn in sorted(set(question.evidence) - {missing})]
            assert Reader(world.split).read(kept).answer(question.text) == UNKNOWN, question


def test_corrected_questions_had_another_answer_before(world: World) -> None:
    corrected = [question for question in world.questions if question.ask is Ask.CORRECTED]
    assert len(corrected) > 100
    readings_of = {turn.id: list(told_by(turn.user, world.split)) for turn in world.turns.values()}
    for question in corrected:
        (newest,) = question.evidence
        (relation,) = question.relations
        answers = set()
        for turn_id, readings in readings_of.items():
            for facts in readings:
                if told := {(s, r): v for s, r, v in facts if r == relation}:
                    answers.add(Reader(world.split, told).answer(question.text))
            if turn_id == newest:
                break
        assert len(answers - {UNKNOWN, question.answer}) == 1, question


def test_two_hop_questions_need_a_person_named_in_another_fact(world: World) -> None:
    two_hop = [question for question in world.questions if question.ask is Ask.TWO_HOP]
    assert len(two_hop) > 50
    for question in two_hop:
        assert len(question.relations) == len(question.evidence) == 2
        assert question.relations[0] in ("lead", "mentor")


def test_unanswerable_questions_say_so(world: World) -> None:
    unknown = [question for question in world.questions if question.ask is Ask.UNKNOWN]
    assert len(unknown) > 50
    assert {(question.answer, question.evidence, question.kind) for question in unknown} == {
        (UNKNOWN, (), None)
    }


def test_every_kind_of_value_and_every_relation_is_asked_for(world: World) -> None:
    asked = {relation for question in world.questions for relation in question.relations}
    assert len(asked) == 15
    assert {question.kind.value for question in world.questions if question.kind} == {
        "word", "number", "phrase", "name",
    }  # fmt: skip


def test_small_talk_tells_nothing(world: World) -> None:
    silent = [text for text in users(world) if not any(told_by(text, world.split))]
    assert len(silent) > 10


def test_turn_ids_are_unique_and_in_order_of_time(world: World) -> None:
    ids = [turn.id for session in world.sessions for turn in session.turns]
    assert ids == sorted(set(ids))


def test_messages_alternate_between_user_and_assistant(world: World) -> None:
    roles = [message["role"] for message in world.messages]
    assert roles == ["user", "assistant"] * len(world.turns)
