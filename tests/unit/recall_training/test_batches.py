"""Batches are plain dialogues side by side: what is seen, predicted and computed is the same."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.world import Question
from examples.models.recall_training.batches import Asked, Batch, Encoder, Row, collate, shuffled
from examples.models.recall_training.evaluation import token_logits
from tests.unit.recall_training.plain import (
    Dialogue,
    Prefix,
    draw_dialogue,
    plain_ids,
    prefix,
    rendered,
    seen_by,
    sequels,
    stock,
    visible,
)

TENSORS = ("ids_BT", "positions_BT", "predicted_W", "answer_ids_W", "echoes_E")


def expected_prefixes(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> list[Prefix]:
    """What every token of the dialogue sees in plain encodings, facts once."""
    facts = plain_ids(tokenizer, rendered(dialogue.messages))
    found = [prefix(facts, index) for index in range(len(facts))]
    for sequel in sequels(tokenizer, dialogue):
        found += [prefix(sequel.ids, index) for index in range(sequel.shared, len(sequel.ids))]
    return found


def real_tokens(batch: Batch, pad_id: int) -> list[int]:
    return (batch.ids_BT.flatten() != pad_id).nonzero().flatten().tolist()


def seen_in(batch: Batch, indices: list[int]) -> list[Prefix]:
    mask_BTT = visible(batch.layout)
    return [seen_by(batch, mask_BTT, index) for index in indices]


def test_facts_of_several_lengths_stand_in_one_batch_and_some_questions_share_a_slot(
    batch: Batch, encoder: Encoder, dialogues: list[Dialogue]
) -> None:
    # What the comparisons below need in order to show anything.
    assert len(set(batch.layout.lengths_B.tolist())) == len(dialogues) == batch.ids_BT.shape[0]
    owners = batch.layout.owners_BNL.flatten(0, 1).tolist()
    num_held = [len(set(slot) - {-1}) for slot in owners]
    assert {0, 1, 2} <= set(num_held)
    assert (batch.ids_BT == encoder.pad_id).any()


def test_every_token_sees_what_it_would_see_in_a_plain_encoding(
    batch: Batch, encoder: Encoder, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = Counter(seen_in(batch, real_tokens(batch, encoder.pad_id)))
    expected = Counter(p for dialogue in dialogues for p in expected_prefixes(tokenizer, dialogue))
    assert seen == expected


def test_every_token_sees_itself_at_its_own_position(batch: Batch, encoder: Encoder) -> None:
    indices = real_tokens(batch, encoder.pad_id)
    for index, seen in zip(indices, seen_in(batch, indices), strict=True):
        assert seen[-1] == (int(batch.ids_BT.flatten()[index]), int(batch.positions_BT.flatten()[index]))


def test_layout_counts_as_padding_exactly_the_padding(batch: Batch, encoder: Encoder) -> None:
    is_fact_BF = torch.arange(batch.layout.num_shared) < batch.layout.lengths_B[:, None]
    is_real_BT = torch.cat([is_fact_BF, batch.layout.owners_BNL.flatten(1) >= 0], dim=1)
    assert torch.equal(is_real_BT, batch.ids_BT != encoder.pad_id)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_a_batch_are_those_of_each_dialogue_alone_in_a_stock_model(
    random_model: PreTrainedModel,
    batch: Batch,
    dialogues: list[Dialogue],
    tokenizer: PreTrainedTokenizerFast,
    attention: str,
) -> None:
    plain = stock(random_model, attention)
    with torch.inference_mode():
        batch_WV = token_logits(random_model, batch, batch.predicted_W)
        alone = []
        for dialogue in dialogues:
            for sequel in sequels(tokenizer, dialogue):
                logits_TV = plain(input_ids=torch.tensor([sequel.ids])).logits[0]
                alone.append(logits_TV[sequel.answer - 1 : -1])
    torch.testing.assert_close(batch_WV, torch.cat(alone), atol=2e-4, rtol=1e-4)


def test_logits_of_facts_are_those_of_the_facts_alone(
    random_model: PreTrainedModel,
    batch: Batch,
    dialogues: list[Dialogue],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = stock(random_model)
    for b, dialogue in enumerate(dialogues):
        facts = plain_ids(tokenizer, rendered(dialogue.messages))
        first = b * batch.ids_BT.shape[1]
        with torch.inference_mode():
            batch_TV = token_logits(random_model, batch, torch.arange(first + 1, first + len(facts)))
            alone_TV = plain(input_ids=torch.tensor([facts])).logits[0, :-1]
        torch.testing.assert_close(batch_TV, alone_TV, atol=2e-4, rtol=1e-4)


def test_padding_yields_finite_logits_and_changes_no_others(
    random_model: PreTrainedModel, batch: Batch, encoder: Encoder
) -> None:
    is_padding_BT = batch.ids_BT == encoder.pad_id
    drawn_BT = torch.randint(100, 3000, batch.ids_BT.shape, generator=torch.Generator().manual_seed(0))
    other = replace(batch, ids_BT=torch.where(is_padding_BT, drawn_BT, batch.ids_BT))
    every = torch.arange(1, is_padding_BT.numel() + 1)
    with torch.inference_mode():
        one_XV, other_XV = (token_logits(random_model, each, every) for each in (batch, other))
    assert one_XV.isfinite().all()
    is_real_X = ~is_padding_BT.flatten()
    torch.testing.assert_close(other_XV[is_real_X], one_XV[is_real_X], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other_XV[~is_real_X], one_XV[~is_real_X], atol=0.01)


def distances(batch: Batch, indices: list[int]) -> list[list[tuple[int, int]]]:
    """The tokens that each one sees, with how far before it they stand."""
    own = batch.positions_BT.flatten()[indices].tolist()
    return [
        [(token, at - position) for token, position in seen]
        for at, seen in zip(own, seen_in(batch, indices), strict=True)
    ]


def damaged(batch: Batch, what: str) -> Batch:
    layout = batch.layout
    match what:
        case "owners":
            one = torch.where(layout.owners_BNL >= 0, 0, -1)
            return replace(batch, layout=replace(layout, owners_BNL=one))
        case "lengths":
            full = torch.full_like(layout.lengths_B, layout.num_shared)
            return replace(batch, layout=replace(layout, lengths_B=full))
        case _:
            T = batch.ids_BT.shape[1]
            return replace(batch, positions_BT=torch.arange(T).expand_as(batch.positions_BT))


@pytest.mark.parametrize("what", ["owners", "lengths", "positions"])
def test_logits_tell_a_wrong_layout_and_wrong_positions_apart(
    random_model: PreTrainedModel, batch: Batch, what: str
) -> None:
    # Without this the comparison of logits could pass on a model that hardly attends.
    wrong = damaged(batch, what)
    with torch.inference_mode():
        right_WV = token_logits(random_model, batch, batch.predicted_W)
        wrong_WV = token_logits(random_model, wrong, batch.predicted_W)
    before = (batch.predicted_W - 1).tolist()  # what the logits were computed at
    pairs = zip(distances(batch, before), distances(wrong, before), strict=True)
    is_hit_W = torch.tensor([one != other for one, other in pairs])
    is_off_W = (right_WV - wrong_WV).abs().amax(dim=-1) > 0.01
    assert is_hit_W.sum() > 20
    assert is_off_W[is_hit_W].all()


def test_predicted_tokens_are_exactly_the_answers_with_their_ends(
    batch: Batch, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast
) -> None:
    found: list[list[Prefix]] = [[] for _ in batch.questions]
    seen = seen_in(batch, batch.predicted_W.tolist())
    for one, answer_id in zip(seen, batch.answer_ids_W.tolist(), strict=True):
        found[answer_id].append(one)
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


ROWS = st.lists(
    st.tuples(
        st.integers(min_value=1, max_value=400),
        st.lists(st.integers(min_value=4, max_value=60), max_size=9),
    ),
    min_size=1,
    max_size=6,
)


def numbered(sizes: list[tuple[int, list[int]]], question: Question) -> list[Row]:
    """Rows of the given lengths in which every token is distinct, so a lost or overwritten one shows."""
    rows = []
    at = 1
    for num_shared, lengths in sizes:
        shared = list(range(at, at + num_shared))
        at += num_shared
        asked = []
        for length in lengths:
            asked.append(
                Asked(ids=list(range(at, at + length)), answer_start=2, echoes=[1], question=question)
            )
            at += length
        rows.append(Row(shared=shared, asked=asked))
    return rows


@settings(max_examples=40, deadline=None)
@given(sizes=ROWS)
def test_rows_of_any_lengths_are_laid_out_whole_without_overlap(sizes: list[tuple[int, list[int]]]) -> None:
    rows = numbered(sizes, draw_dialogue(1, num_facts=1, num_questions=1).questions[0])
    batch = collate(rows, 0)
    F, (_, N, L) = batch.layout.num_shared, batch.layout.owners_BNL.shape
    assert batch.ids_BT.shape == (len(rows), F + N * L)
    predicted, echoes = [], []
    for b, row in enumerate(rows):
        ids, positions = batch.ids_BT[b].tolist(), batch.positions_BT[b].tolist()
        num_shared = len(row.shared)
        assert ids[:num_shared] == row.shared
        assert positions[:num_shared] == list(range(num_shared))
        for one in row.asked:
            at, size = ids.index(one.ids[0]), len(one.ids)
            assert ids[at : at + size] == one.ids
            assert (at - F) // L == (at - F + size - 1) // L  # within one slot
            assert positions[at : at + size] == list(range(num_shared, num_shared + size))
            predicted += one.ids[2:]
            echoes.append(one.ids[1])
    flat = batch.ids_BT.flatten()
    assert int((flat != 0).sum()) == sum(num_shared + sum(lengths) for num_shared, lengths in sizes)
    assert flat[batch.predicted_W].tolist() == predicted
    assert flat[batch.echoes_E].tolist() == echoes


def test_questions_fill_the_slots_that_have_room() -> None:
    # Sorted by size: 40, then 30 + 10, then 20 + 20.
    (question,) = draw_dialogue(1, num_facts=1, num_questions=1).questions
    batch = collate(numbered([(5, [10, 20, 30, 40, 20])], question), 0)
    assert batch.layout.owners_BNL.shape == (1, 3, 40)
    assert [sorted(set(slot)) for slot in batch.layout.owners_BNL[0].tolist()] == [[3], [0, 2], [1, 4]]


def test_batch_moved_to_a_device_keeps_every_field(batch: Batch) -> None:
    moved = batch.to(torch.device("meta"))
    for name in TENSORS:
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).is_meta
    assert moved.layout.owners_BNL.is_meta
    stayed = batch.to(torch.device("cpu"))
    assert stayed.questions is batch.questions
    assert all(getattr(stayed, name) is getattr(batch, name) for name in TENSORS)
    assert {*TENSORS, "layout", "questions"} == set(batch.__slots__)


def test_shuffled_draws_without_repeats_and_at_most_as_many_as_there_are() -> None:
    questions = draw_dialogue(2, num_facts=7, num_questions=9).questions
    some = shuffled(questions, 4, random.Random(0))
    every = shuffled(questions, 100, random.Random(0))
    assert len({question.id for question in some}) == 4
    assert sorted(q.id for q in every) == sorted(q.id for q in questions)
    assert shuffled(questions, 4, random.Random(0)) == some
