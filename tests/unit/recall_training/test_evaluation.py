"""Teacher forcing gives the verdicts of real greedy decoding, and scores count what they are named for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.world import Ask, Question, Split, ValueKind, World, WorldConfig, exam, generate_world
from benchmarks.world.exam import Score, by_group
from examples.models.recall_training import curriculum, evaluation
from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.curriculum import Batches, Source
from examples.models.recall_training.evaluation import evaluate, exact_matches, token_logits
from tests.unit.recall_training.plain import Dialogue, packed, stock

NUM_FACTS = 2
NUM_WORLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A question, the world it is about, and what evaluation said of the answer."""

    world: World
    question: Question
    is_right: bool


Recorder = Callable[..., World]


def recorder(worlds: list[World]) -> Recorder:
    def record(config: WorldConfig, **options: Any) -> World:
        worlds.append(generate_world(config, **options))
        return worlds[-1]

    return record


def verdicts(model: PreTrainedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """What ``evaluate`` says, with the worlds that it asked about."""
    worlds: list[World] = []
    with monkeypatch.context() as patch:
        patch.setattr(exam, "generate_world", recorder(worlds))
        outcome = evaluate(model, encoder, split=Split.VALIDATION, num_facts=NUM_FACTS, num_worlds=NUM_WORLDS)
    assert len(worlds) == NUM_WORLDS
    found = []
    for question, is_right in outcome:
        (world,) = (world for world in worlds if any(question is one for one in world.questions))
        found.append(Verdict(world=world, question=question, is_right=is_right))
    return found


def greedy_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, question: Question
) -> str:
    messages = [*world.messages, {"role": "user", "content": question.text}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt_length = inputs["input_ids"].shape[1]
    output_BT = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12
    )
    text: str = tokenizer.decode(output_BT[0, prompt_length:])
    return text


def agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, found: list[Verdict]) -> list[bool]:
    plain = stock(model)
    answers = [greedy_answer(plain, tokenizer, one.world, one.question) for one in found]
    return [
        one.is_right == (answer == f"{one.question.answer}<|end|>")
        for one, answer in zip(found, answers, strict=True)
    ]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def overfitted(
    request: pytest.FixtureRequest, encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Knows by heart the answers about some of the evaluation's worlds."""
    torch.manual_seed(1)
    model = build_model(request.param, tokenizer, layers=1, width=128, mlp=64)
    worlds: list[World] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "generate_world", recorder(worlds))
        evaluate(model, encoder, split=Split.VALIDATION, num_facts=NUM_FACTS, num_worlds=NUM_WORLDS)
    known = [Dialogue(world=world, questions=world.questions) for world in worlds[:2]]
    batch = packed(encoder, known)
    wanted_W = batch.ids_BT.flatten()[batch.predicted_W]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(token_logits(model, batch, batch.predicted_W), wanted_W)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_verdicts_are_those_of_greedy_decoding_on_a_random_model(
    random_model: PreTrainedModel,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = verdicts(random_model, encoder, monkeypatch)
    assert all(agree(random_model, tokenizer, found))


def test_verdicts_are_those_of_greedy_decoding_on_an_overfitted_model(
    overfitted: PreTrainedModel,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = verdicts(overfitted, encoder, monkeypatch)
    assert {one.is_right for one in found} == {True, False}
    assert all(agree(overfitted, tokenizer, found))


def test_evaluation_leaves_the_weights_as_they_were(
    random_model: PreTrainedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in random_model.state_dict().items()}
    one, other = (verdicts(random_model, encoder, monkeypatch) for _ in range(2))
    assert [v.is_right for v in one] == [v.is_right for v in other]
    assert [v.question for v in one] == [v.question for v in other]
    assert all(torch.equal(before[name], tensor) for name, tensor in random_model.state_dict().items())


def test_small_batches_give_the_verdicts_of_one_large_batch(
    overfitted: PreTrainedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = verdicts(overfitted, encoder, monkeypatch)
    monkeypatch.setattr(evaluation, "_TOKENS_PER_BATCH", 1)
    assert verdicts(overfitted, encoder, monkeypatch) == together


def test_one_wrong_token_anywhere_makes_an_answer_wrong_and_no_other(batch: Batch, encoder: Encoder) -> None:
    wanted_W = batch.ids_BT.flatten()[batch.predicted_W]
    perfect_WV = torch.nn.functional.one_hot(wanted_W).float()
    assert all(exact_matches(perfect_WV, batch))
    for index, answer_id in enumerate(batch.answer_ids_W.tolist()):
        logits_WV = perfect_WV.clone()
        logits_WV[index, encoder.pad_id] = 2.0
        expected = [number != answer_id for number in range(len(batch.questions))]
        assert exact_matches(logits_WV, batch) == expected


def test_exact_matches_agree_with_a_loop_over_random_logits(batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted_W = batch.ids_BT.flatten()[batch.predicted_W]
    logits_WV = torch.rand(len(wanted_W), int(wanted_W.max()) + 1, generator=generator)
    hits_W = torch.rand(len(wanted_W), generator=generator) < 0.7
    logits_WV[torch.arange(len(wanted_W)), wanted_W] += hits_W * 1.0
    expected = [True] * len(batch.questions)
    for index, answer_id in enumerate(batch.answer_ids_W.tolist()):
        expected[answer_id] &= int(logits_WV[index].argmax()) == int(wanted_W[index])
    assert len(set(expected)) == 2
    assert exact_matches(logits_WV, batch) == expected


def test_no_training_seed_reaches_those_of_evaluation(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[World] = []
    monkeypatch.setattr(curriculum, "generate_world", recorder(trained))
    list(Batches(encoder, Source(seed=0, level=0, tokens_per_step=1000), range(3)))
    assert max(world.seed for world in trained) < exam._SEED_BASE


def test_scores_by_group_count_right_answers_like_a_loop(encoder: Encoder) -> None:
    config = WorldConfig(
        num_facts=40, facts_per_subject=3, hop_share=0.4, two_hop_share=0.5, unknown_share=0.5
    )
    world = generate_world(config, split=Split.TEST, seed=0)
    rng = random.Random(0)
    outcome = [(question, rng.random() < 0.5) for question in world.questions]

    def counted(wanted: Callable[[Question], bool]) -> Score:
        matches = [is_right for question, is_right in outcome if wanted(question)]
        return Score(right=matches.count(True), asked=len(matches))

    groups = by_group(outcome)
    assert groups.pop("all") == counted(lambda _: True)
    for ask in Ask:
        if (found := groups.pop(f"ask:{ask.value}", None)) is not None:
            assert found == counted(lambda q, ask=ask: q.ask is ask)
    one_hop = [q for q in world.questions if q.kind is not None and q.ask is not Ask.TWO_HOP]
    for kind in ValueKind:
        if any(q.kind is kind for q in one_hop):
            expected = counted(lambda q, kind=kind: q.kind is kind and q.ask is not Ask.TWO_HOP)
            assert groups.pop(f"kind:{kind.value}") == expected
    for name in {q.relations[0] for q in one_hop}:
        expected = counted(
            lambda q, name=name: (
                q.relations == (name,) and q.ask is not Ask.UNKNOWN and q.ask is not Ask.TWO_HOP
            )
        )
        assert groups.pop(f"relation:{name}") == expected
    assert not groups


def test_share_is_of_the_asked_and_no_number_without_any() -> None:
    assert Score(right=3, asked=4).share == 0.75
    empty = Score(right=0, asked=0)
    assert empty.share != empty.share
