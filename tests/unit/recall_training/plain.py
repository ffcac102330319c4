"""Dialogues written out the plain way: one text in the documented chat format, encoded as a whole.

It shares the tokenizer with the encoder under test but none of its bookkeeping.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.world import Message, Question, Split, World, WorldConfig, generate_world
from examples.models.recall_training.batches import Batch, Encoder, Row, collate

Prefix = tuple[tuple[int, int], ...]  # (token, position) of everything a token sees, itself last


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A world and the questions to ask about it, one after the other or each as if it were the only one."""

    world: World
    questions: tuple[Question, ...]
    is_chain: bool = False

    def row(self, encoder: Encoder) -> Row:
        return encoder.row(self.world, self.questions, is_chain=self.is_chain)


def draw_dialogue(
    seed: int, num_facts: int, num_questions: int, *, is_chain: bool = False, split: Split = Split.TRAIN
) -> Dialogue:
    config = WorldConfig(
        num_facts=num_facts,
        facts_per_subject=2,
        facts_per_turn=2,
        correction_share=0.3,
        small_talk_share=0.3,
        two_hop_share=0.5,
        unknown_share=0.5,
        questions_per_fact=2,
    )
    world = generate_world(config, split=split, seed=seed)
    count = min(num_questions, len(world.questions))
    questions = tuple(random.Random(seed).sample(world.questions, count))
    return Dialogue(world=world, questions=questions, is_chain=is_chain)


def rendered(messages: Sequence[Message]) -> str:
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def asked(question: Question) -> str:
    return f"<|user|>{question.text}<|end|><|assistant|>"


def answered(question: Question) -> str:
    return f"{question.answer}<|end|>"


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequel:
    """A plain encoding of a dialogue with one more answer; what came before it stands in ``ids``, too."""

    ids: list[int]
    shared: int  # tokens that were there before this question
    answer: int  # where the answer starts
    question: Question


def sequels(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> Iterator[Sequel]:
    """For every question the plain dialogue up to the end of its answer."""
    facts = rendered(dialogue.world.messages)
    before = facts
    for question in dialogue.questions:
        prompt = before + asked(question)
        text = prompt + answered(question)
        yield Sequel(
            ids=plain_ids(tokenizer, text),
            shared=len(plain_ids(tokenizer, before)),
            answer=len(plain_ids(tokenizer, prompt)),
            question=question,
        )
        before = text if dialogue.is_chain else facts


def prefix(ids: Sequence[int], index: int) -> Prefix:
    """What the token at ``index`` of a plain sequence sees."""
    return tuple((ids[at], at) for at in range(index + 1))


def seen_by(batch: Batch, mask_BTT: Tensor, index: int) -> Prefix:
    """What the token at ``index`` of B*T sees, by position."""
    b, t = divmod(index, batch.ids_BT.shape[1])
    columns = mask_BTT[b, t].nonzero().flatten().tolist()
    pairs = [(int(batch.ids_BT[b, c]), int(batch.positions_BT[b, c])) for c in columns]
    return tuple(sorted(pairs, key=lambda pair: pair[1]))


def packed(encoder: Encoder, dialogues: Sequence[Dialogue]) -> Batch:
    return collate([dialogue.row(encoder) for dialogue in dialogues], encoder.pad_id)
