"""Packed dialogues are the plain ones, side by side: what is seen, predicted and computed is the same."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.world import Session, Split, Turn, TurnId, World
from examples.models.recall_training.batches import Batch, Encoder, Row, collate, shuffled, visible
from examples.models.recall_training.evaluation import token_logits
from tests.unit.recall_training.plain import (
    Dialogue,
    Prefix,
    draw_dialogue,
    packed,
    plain_ids,
    prefix,
    rendered,
    seen_by,
    sequels,
)


def expected_prefixes(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> list[Prefix]:
    """What every token of the dialogue sees in plain encodings, facts once."""
    facts = plain_ids(tokenizer, rendered(dialogue.world.messages))
    found = [prefix(facts, index) for index in range(len(facts))]
    for sequel in sequels(tokenizer, dialogue):
        found += [prefix(sequel.ids, index) for index in range(sequel.shared, len(sequel.ids))]
    return found


def real_tokens(batch: Batch, pad_id: int) -> list[int]:
    return (batch.ids_BT.flatten() != pad_id).nonzero().flatten().tolist()


def test_packing_puts_several_dialogues_in_a_row_and_uses_several_rows(
    batch: Batch, encoder: Encoder, dialogues: list[Dialogue]
) -> None:
    assert 1 < batch.ids_BT.shape[0] < len(dialogues)
    assert (batch.ids_BT == encoder.pad_id).any()


def test_every_packed_token_sees_what_it_would_see_in_a_plain_encoding(
    batch: Batch, encoder: Encoder, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast
) -> None:
    mask_BTT = visible(batch.segments_BT)[:, 0]
    seen = Counter(seen_by(batch, mask_BTT, index) for index in real_tokens(batch, encoder.pad_id))
    expected = Counter(p for dialogue in dialogues for p in expected_prefixes(tokenizer, dialogue))
    assert seen == expected


def test_every_packed_token_sees_itself_at_its_own_position(batch: Batch, encoder: Encoder) -> None:
    mask_BTT = visible(batch.segments_BT)[:, 0]
    for index in real_tokens(batch, encoder.pad_id):
        own = (int(batch.ids_BT.flatten()[index]), int(batch.positions_BT.flatten()[index]))
        assert seen_by(batch, mask_BTT, index)[-1] == own


def test_padding_sees_something_but_no_dialogue(batch: Batch, encoder: Encoder) -> None:
    # A row of the mask without any token to see would make NaN.
    mask_BTT = visible(batch.segments_BT)[:, 0]
    is_padding_BT = batch.ids_BT == encoder.pad_id
    for b, t in is_padding_BT.nonzero().tolist():
        assert mask_BTT[b, t].any()
        assert not (mask_BTT[b, t] & ~is_padding_BT[b]).any()


def test_logits_of_packed_dialogues_are_those_of_each_dialogue_alone(
    random_model: PreTrainedModel,
    batch: Batch,
    dialogues: list[Dialogue],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with torch.inference_mode():
        packed_WV = token_logits(random_model, batch, batch.predicted_W)
        alone = []
        for dialogue in dialogues:
            for sequel in sequels(tokenizer, dialogue):
                logits_TV = random_model(input_ids=torch.tensor([sequel.ids])).logits[0]
                alone.append(logits_TV[sequel.answer - 1 : -1])
    torch.testing.assert_close(packed_WV, torch.cat(alone), atol=2e-4, rtol=1e-4)


def test_logits_of_packed_facts_are_those_of_the_facts_alone(
    random_model: PreTrainedModel, encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue = draw_dialogue(2, num_facts=7, num_questions=2)
    facts = plain_ids(tokenizer, rendered(dialogue.world.messages))
    batch = packed(encoder, [dialogue])
    with torch.inference_mode():
        packed_TV = token_logits(random_model, batch, torch.arange(1, len(facts)))
        alone_TV = random_model(input_ids=torch.tensor([facts])).logits[0, :-1]
    torch.testing.assert_close(packed_TV, alone_TV, atol=2e-4, rtol=1e-4)


def distances(batch: Batch, index: int) -> list[tuple[int, int]]:
    """The tokens seen by the one at ``index`` of B*T, with how far before it they stand."""
    seen = seen_by(batch, visible(batch.segments_BT)[:, 0], index)
    own = int(batch.positions_BT.flatten()[index])
    return [(token, own - position) for token, position in seen]


@pytest.mark.parametrize("damage", ["segments", "positions"])
def test_logits_tell_a_wrong_mask_and_wrong_positions_apart(
    random_model: PreTrainedModel, batch: Batch, damage: str
) -> None:
    # Without this the comparison of logits could pass on a model that hardly attends.
    T = batch.ids_BT.shape[1]
    damaged = (
        replace(batch, segments_BT=torch.zeros_like(batch.segments_BT))
        if damage == "segments"
        else replace(batch, positions_BT=torch.arange(T).expand_as(batch.positions_BT))
    )
    with torch.inference_mode():
        right_WV = token_logits(random_model, batch, batch.predicted_W)
        wrong_WV = token_logits(random_model, damaged, batch.predicted_W)
    before_W = batch.predicted_W - 1  # what the logits were computed at
    is_hit_W = torch.tensor([distances(batch, at) != distances(damaged, at) for at in before_W.tolist()])
    is_off_W = (right_WV - wrong_WV).abs().amax(dim=-1) > 0.01
    assert is_hit_W.sum() > 20
    assert is_off_W[is_hit_W].all()


def test_predicted_tokens_are_exactly_the_answers_with_their_ends(
    batch: Batch, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast
) -> None:
    mask_BTT = visible(batch.segments_BT)[:, 0]
    found: list[list[Prefix]] = [[] for _ in batch.questions]
    for index, answer_id in zip(batch.predicted_W.tolist(), batch.answer_ids_W.tolist(), strict=True):
        found[answer_id].append(seen_by(batch, mask_BTT, index))
    expected = [sequel for dialogue in dialogues for sequel in sequels(tokenizer, dialogue)]
    assert batch.questions == [sequel.question for sequel in expected]
    assert found == [
        [prefix(sequel.ids, index) for index in range(sequel.answer, len(sequel.ids))] for sequel in expected
    ]


def test_predicted_tokens_decode_to_the_answers(batch: Batch, tokenizer: PreTrainedTokenizerFast) -> None:
    ids_W = batch.ids_BT.flatten()[batch.predicted_W]
    texts = [
        tokenizer.decode(ids_W[batch.answer_ids_W == number].tolist())
        for number in range(len(batch.questions))
    ]
    assert texts == [f"{question.answer}<|end|>" for question in batch.questions]


def copied_in(row: Row, dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Indices of tokens of question texts that follow their predecessor as in some message."""
    told = {
        pair
        for message in dialogue.world.messages
        for pair in pairwise(plain_ids(tokenizer, message["content"]))
    }
    found = []
    for question, (start, _) in zip(dialogue.questions, row.answers, strict=True):
        ids = plain_ids(tokenizer, question.text)
        first = start - 2 - len(ids)  # the markers that end the question and begin the answer
        assert row.ids[first : first + len(ids)] == ids
        found += [first + at for at in range(1, len(ids)) if (ids[at - 1], ids[at]) in told]
    return found


def test_echoes_within_question_texts_are_exactly_the_copied_tokens(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    markers = set(tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"]))
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        within = [index for index in row.echoes if row.ids[index] not in markers]
        expected = copied_in(row, dialogue, tokenizer)
        assert expected
        assert within == expected


def test_markers_that_end_a_question_are_no_echoes(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    # To predict them copies nothing from a fact, yet they would weaken the loss on names.
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        echoed = tokenizer.convert_ids_to_tokens([row.ids[index] for index in row.echoes])
        assert not {"<|end|>", "<|assistant|>"} & set(echoed)


def test_second_part_of_a_told_name_is_an_echo(
    dialogues: list[Dialogue], encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        told = " ".join(message["content"] for message in dialogue.world.messages)
        is_copied = {row.ids[index] for index in row.echoes}
        for question in dialogue.questions:
            capitals = question.text.rstrip("?").split()[1:]
            for first, second in pairwise(capitals):
                if first.istitle() and second.istitle() and f"{first} {second}" in told:
                    assert plain_ids(tokenizer, second)[0] in is_copied


def test_echoes_of_one_question_are_the_copied_tokens_from_its_second_on(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    turn = Turn(id=TurnId("t"), user="Who teaches Ada Bauer. Oslo is far.", assistant="Noted.")
    question = replace(
        draw_dialogue(1, num_facts=1, num_questions=1).questions[0], text="Who teaches Ada Oslo?"
    )
    world = World(
        split=Split.TRAIN, seed=0, sessions=(Session(id="s", turns=(turn,)),), questions=(question,)
    )
    row = encoder.row(world, world.questions)
    words = [tokenizer.decode([row.ids[index]]) for index in row.echoes]
    assert [word for word in words if not word.startswith("<|")] == ["teaches", "Ada"]


def test_echoes_of_a_batch_are_those_of_its_rows(
    batch: Batch, dialogues: list[Dialogue], encoder: Encoder
) -> None:
    mask_BTT = visible(batch.segments_BT)[:, 0]
    expected: list[tuple[int, int, int]] = []  # token, its predecessor, its position
    for dialogue in dialogues:
        row = dialogue.row(encoder)
        expected += [(row.ids[at], row.ids[at - 1], row.positions[at]) for at in row.echoes]
    found = []
    for index in batch.echoes_E.tolist():
        *_, (before, _), (token, position) = seen_by(batch, mask_BTT, index)
        found.append((token, before, position))
    assert found == expected


def test_chained_dialogue_is_one_plain_sequence_of_questions_and_answers(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue = draw_dialogue(5, num_facts=5, num_questions=6, is_chain=True)
    row = dialogue.row(encoder)
    *_, last = sequels(tokenizer, dialogue)
    assert row.ids == last.ids
    assert row.positions == list(range(len(last.ids)))
    seen_TT = visible(torch.tensor([row.segments]))[0, 0]
    assert torch.equal(seen_TT, torch.ones_like(seen_TT).tril())


def test_chained_and_separate_questions_have_the_same_tokens_and_answers(encoder: Encoder) -> None:
    separate = draw_dialogue(6, num_facts=4, num_questions=5)
    chained = replace(separate, is_chain=True)
    one, other = separate.row(encoder), chained.row(encoder)
    assert one.ids == other.ids
    assert one.answers == other.answers
    assert one.questions == other.questions


def test_first_question_of_a_chain_sees_what_a_separate_one_sees(encoder: Encoder) -> None:
    separate = draw_dialogue(6, num_facts=4, num_questions=5)
    one, other = separate.row(encoder), replace(separate, is_chain=True).row(encoder)
    end = one.answers[0][1]
    assert one.positions[:end] == other.positions[:end]
    masks = [visible(torch.tensor([row.segments]))[0, 0, :end] for row in (one, other)]
    assert torch.equal(masks[0][:, :end], masks[1][:, :end])
    assert not any(mask[:, end:].any() for mask in masks)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(min_value=4, max_value=400), min_size=1, max_size=12))
def test_rows_of_any_lengths_are_packed_whole_without_overlap(lengths: list[int]) -> None:
    # Every token of every row is distinct, so a lost or overwritten one shows.
    starts = [1 + sum(lengths[:number]) for number in range(len(lengths))]
    rows = [
        Row(
            ids=list(range(start, start + length)),
            segments=[0] * length,
            positions=list(range(length)),
            answers=[],
            echoes=[],
            questions=[],
        )
        for start, length in zip(starts, lengths, strict=True)
    ]
    batch = collate(rows, 0)
    ids = batch.ids_BT.flatten().tolist()
    for row in rows:
        at = ids.index(row.ids[0])
        assert ids[at : at + len(row.ids)] == row.ids
        assert at // batch.ids_BT.shape[1] == (at + len(row.ids) - 1) // batch.ids_BT.shape[1]
        assert batch.positions_BT.flatten()[at : at + len(row.ids)].tolist() == row.positions
    assert sum(token != 0 for token in ids) == sum(lengths)


def test_batch_moved_to_a_device_keeps_every_field(batch: Batch) -> None:
    moved = batch.to(torch.device("meta"))
    for name in ("ids_BT", "positions_BT", "segments_BT", "predicted_W", "answer_ids_W", "echoes_E"):
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).is_meta
    stayed = batch.to(torch.device("cpu"))
    assert all(getattr(stayed, name) is getattr(batch, name) for name in batch.__slots__)


def test_shuffled_draws_without_repeats_and_at_most_as_many_as_there_are() -> None:
    questions = draw_dialogue(2, num_facts=7, num_questions=9).questions
    some = shuffled(questions, 4, random.Random(0))
    every = shuffled(questions, 100, random.Random(0))
    assert len({question.id for question in some}) == 4
    assert sorted(q.id for q in every) == sorted(q.id for q in questions)
    assert shuffled(questions, 4, random.Random(0)) == some
