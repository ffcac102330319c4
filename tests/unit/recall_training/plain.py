"""Dialogues written out the plain way: one text in the documented chat format, encoded as a whole.

It shares the tokenizer with the encoder under test but none of its bookkeeping, and reads a layout as one
mask instead of in parts.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.world import Message, Question, Split, World, WorldConfig, generate_world
from examples.models.recall_training.attention import Layout
from examples.models.recall_training.batches import Batch, Encoder, Row, collate

Prefix = tuple[tuple[int, int], ...]  # (token, position) of everything a token sees, itself last


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A world and the questions to ask about it, each as if none but the ``earlier`` ones had been asked."""

    world: World
    questions: tuple[Question, ...]
    earlier: tuple[Question, ...] = ()
    system: str | None = None

    def row(self, encoder: Encoder) -> Row:
        return encoder.row(self.world, self.questions, earlier=self.earlier, system=self.system)

    @property
    def messages(self) -> list[Message]:
        """Everything said before the questions."""
        told = [] if self.system is None else [Message(role="system", content=self.system)]
        told += self.world.messages
        for question in self.earlier:
            told += [
                Message(role="user", content=question.text),
                Message(role="assistant", content=question.answer),
            ]
        return told


def draw_dialogue(
    seed: int,
    num_facts: int,
    num_questions: int,
    *,
    num_earlier: int = 0,
    system: str | None = None,
    split: Split = Split.TRAIN,
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
    count = min(num_earlier + num_questions, len(world.questions))
    questions = tuple(random.Random(seed).sample(world.questions, count))
    return Dialogue(
        world=world, questions=questions[num_earlier:], earlier=questions[:num_earlier], system=system
    )


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
    before = rendered(dialogue.messages)
    for question in dialogue.questions:
        prompt = before + asked(question)
        yield Sequel(
            ids=plain_ids(tokenizer, prompt + answered(question)),
            shared=len(plain_ids(tokenizer, before)),
            answer=len(plain_ids(tokenizer, prompt)),
            question=question,
        )


def prefix(ids: Sequence[int], index: int) -> Prefix:
    """What the token at ``index`` of a plain sequence sees."""
    return tuple((ids[at], at) for at in range(index + 1))


def visible(layout: Layout) -> Tensor:
    """Which token sees which, none a later one -> [B, T, T]: the facts, and of its slot its question."""
    B, N, L = layout.owners_BNL.shape
    at_T = torch.arange(layout.num_shared + N * L)
    is_shared_T = at_T < layout.num_shared
    slot_T = torch.where(is_shared_T, -1, (at_T - layout.num_shared) // max(1, L))
    owners_BT = torch.cat([torch.full((B, layout.num_shared), -1), layout.owners_BNL.flatten(1)], dim=1)
    is_own_BTT = (slot_T[:, None] == slot_T) & (owners_BT[:, :, None] == owners_BT[:, None, :])
    is_fact_BT = is_shared_T & (at_T < layout.lengths_B[:, None])
    is_asked_T1 = ~is_shared_T[:, None]
    return (is_own_BTT | (is_asked_T1 & is_fact_BT[:, None, :])) & (at_T[:, None] >= at_T)


def seen_by(batch: Batch, mask_BTT: Tensor, index: int) -> Prefix:
    """What the token at ``index`` of B*T sees, by position."""
    b, t = divmod(index, batch.ids_BT.shape[1])
    columns = mask_BTT[b, t].nonzero().flatten().tolist()
    pairs = [(int(batch.ids_BT[b, c]), int(batch.positions_BT[b, c])) for c in columns]
    return tuple(sorted(pairs, key=lambda pair: pair[1]))


def packed(encoder: Encoder, dialogues: Sequence[Dialogue]) -> Batch:
    return collate([dialogue.row(encoder) for dialogue in dialogues], encoder.pad_id)


def stock(model: PreTrainedModel, attention: str = "sdpa") -> PreTrainedModel:
    """The same weights in a model as transformers has it, which reads one plain sequence."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=attention)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    assert plain.config._attn_implementation == attention
    return plain.eval()
