"""A row is the dialogue in its plain encoding; echoes are the tokens that its questions copy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.world import Session, Split, Turn, TurnId, World
from examples.models.recall_training.batches import Asked, Batch, Encoder
from tests.unit.recall_training.plain import (
    Dialogue,
    draw_dialogue,
    plain_ids,
    rendered,
    seen_by,
    sequels,
    visible,
)


def echoed(one: Asked) -> list[int]:
    return [one.ids[at] for at in one.echoes]


def test_shared_and_asked_tokens_are_those_of_the_plain_dialogue(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        assert row.shared == plain_ids(tokenizer, rendered(dialogue.messages))
        expected = list(sequels(tokenizer, dialogue))
        assert [row.shared + one.ids for one in row.asked] == [sequel.ids for sequel in expected]
        assert [len(row.shared) + one.answer_start for one in row.asked] == [s.answer for s in expected]
        assert [one.question for one in row.asked] == list(dialogue.questions)
        assert row.longest == max(len(sequel.ids) for sequel in expected)


def test_earlier_questions_are_told_with_their_answers_and_not_asked(encoder: Encoder) -> None:
    whole = draw_dialogue(6, num_facts=4, num_questions=5)
    later = replace(whole, questions=whole.questions[2:], earlier=whole.questions[:2])
    one, other = whole.row(encoder), later.row(encoder)
    assert other.shared == [*one.shared, *one.asked[0].ids, *one.asked[1].ids]
    assert [asked.ids for asked in other.asked] == [asked.ids for asked in one.asked[2:]]


def test_system_message_comes_first_and_moves_the_rest(encoder: Encoder) -> None:
    without = draw_dialogue(6, num_facts=4, num_questions=5, num_earlier=1)
    one, other = without.row(encoder), replace(without, system="Be brief.").row(encoder)
    num_more = len(other.shared) - len(one.shared)
    assert other.shared[num_more:] == one.shared
    assert num_more > 2
    assert [asked.ids for asked in other.asked] == [asked.ids for asked in one.asked]


def test_echoes_within_question_texts_are_exactly_the_copied_tokens(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        told = {
            pair
            for message in dialogue.messages
            for pair in pairwise(plain_ids(tokenizer, message["content"]))
        }
        for one in row.asked:
            ids = plain_ids(tokenizer, one.question.text)
            assert one.ids[1 : 1 + len(ids)] == ids
            assert one.echoes == [1 + at for at in range(1, len(ids)) if (ids[at - 1], ids[at]) in told]
        assert any(one.echoes for one in row.asked)


def test_markers_that_end_a_question_are_no_echoes(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    # To predict them copies nothing from a fact, yet they would weaken the loss on names.
    for dialogue in dialogues:
        tokens = {token for one in dialogue.row(encoder).asked for token in echoed(one)}
        assert not {"<|end|>", "<|assistant|>"} & set(tokenizer.convert_ids_to_tokens(list(tokens)))


def test_second_part_of_a_told_name_is_an_echo(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_names = 0
    for dialogue in dialogues:
        told = " ".join(message["content"] for message in dialogue.messages)
        for one in dialogue.row(encoder).asked:
            capitals = one.question.text.rstrip("?").split()[1:]
            for first, second in pairwise(capitals):
                if first.istitle() and second.istitle() and f"{first} {second}" in told:
                    assert plain_ids(tokenizer, second)[0] in echoed(one)
                    num_names += 1
    assert num_names > 5


@pytest.mark.parametrize("is_earlier", [False, True])
def test_echoes_of_one_question_are_the_copied_tokens_from_its_second_on(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, is_earlier: bool
) -> None:
    first, second = "Who teaches Ada Bauer.", "Oslo is far."
    (drawn,) = draw_dialogue(1, num_facts=1, num_questions=1).questions
    question = replace(drawn, text="Who teaches Ada Oslo?")
    turn = Turn(id=TurnId("t"), user=second if is_earlier else f"{first} {second}", assistant="Noted.")
    world = World(
        split=Split.TRAIN, seed=0, sessions=(Session(id="s", turns=(turn,)),), questions=(question,)
    )
    # What an earlier question said is told as well.
    earlier = [replace(drawn, text=first, answer="Nobody.")] if is_earlier else []
    (one,) = encoder.row(world, world.questions, earlier=earlier).asked
    assert [tokenizer.decode([token]) for token in echoed(one)] == ["teaches", "Ada"]


def test_echoes_of_a_batch_are_those_of_its_rows(
    batch: Batch, dialogues: list[Dialogue], encoder: Encoder
) -> None:
    expected: list[tuple[int, int, int]] = []  # token, its predecessor, its position
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        for one in row.asked:
            expected += [(one.ids[at], one.ids[at - 1], len(row.shared) + at) for at in one.echoes]
    mask_BTT = visible(batch.layout)
    found = []
    for index in batch.echoes_E.tolist():
        *_, (before, _), (token, position) = seen_by(batch, mask_BTT, index)
        found.append((token, before, position))
    assert found == expected
