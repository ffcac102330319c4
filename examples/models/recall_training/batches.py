"""Dialogues as tensors: facts once, then every question about them as if it were the only one.

B packed rows, T tokens, W answer tokens, E echoes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.world import Message, Question, World
from examples.models.recall_training.tokens import ASSISTANT, END, PAD, USER

_PADDING = -1
_SEGMENTS_PER_ROW = 1 << 16  # told apart when rows are packed side by side
_SHORTEST = 256  # tokens of a packed row
_ROUND_TO = 16  # attention kernels like even sizes
_SHARED = 0  # facts; a question's own tokens carry its number, from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dialogue: token ids, the segment and position of each, and what is to be predicted.

    ``echoes`` are the tokens of questions that follow their predecessor as they did in a fact: the second
    part of a name, above all. To predict them is to copy, which answers need as well.
    """

    ids: list[int]
    segments: list[int]
    positions: list[int]
    answers: list[tuple[int, int]]  # [start, end) of the tokens to predict
    echoes: list[int]
    questions: list[Question]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded rows. ``answer_ids`` numbers the answer that each of the W predicted tokens belongs to."""

    ids_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    predicted_W: Tensor  # index into B*T of the token to predict
    answer_ids_W: Tensor
    echoes_E: Tensor  # likewise
    questions: list[Question]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            positions_BT=self.positions_BT.to(device, non_blocking=True),
            segments_BT=self.segments_BT.to(device, non_blocking=True),
            predicted_W=self.predicted_W.to(device, non_blocking=True),
            answer_ids_W=self.answer_ids_W.to(device, non_blocking=True),
            echoes_E=self.echoes_E.to(device, non_blocking=True),
            questions=self.questions,
        )


class Encoder:
    """Worlds to rows. Every message is encoded on its own: special tokens separate them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._bpe = tokenizer.backend_tokenizer
        self._special = {
            token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, USER, ASSISTANT, END)
        }

    @property
    def pad_id(self) -> int:
        pad_id: int = self._special[PAD]
        return pad_id

    def row(self, world: World, questions: Sequence[Question], *, is_chain: bool = False) -> Row:
        """``is_chain`` asks the questions one after the other, each seeing those before it."""
        texts = [message["content"] for message in world.messages]
        texts += [text for question in questions for text in (question.text, question.answer)]
        encoded = [encoding.ids for encoding in self._bpe.encode_batch(texts, add_special_tokens=False)]
        ids: list[int] = []
        for message, content in zip(world.messages, encoded, strict=False):
            ids += self._wrap(message, content)
        segments = [_SHARED] * len(ids)
        positions = list(range(len(ids)))
        num_shared = len(ids)
        told = set(pairwise(ids))
        answers = []
        echoes: list[int] = []
        pairs = encoded[len(world.messages) :]
        for number in range(len(questions)):
            asked = [self._special[USER], *pairs[2 * number], self._special[END], self._special[ASSISTANT]]
            answer = [*pairs[2 * number + 1], self._special[END]]
            first = len(ids) if is_chain else num_shared
            answers.append((len(ids) + len(asked), len(ids) + len(asked) + len(answer)))
            echoes += [len(ids) + at for at in range(2, len(asked) - 2) if (asked[at - 1], asked[at]) in told]
            ids += asked + answer
            segments += [_SHARED if is_chain else number + 1] * (len(asked) + len(answer))
            positions += range(first, first + len(asked) + len(answer))
        return Row(
            ids=ids,
            segments=segments,
            positions=positions,
            answers=answers,
            echoes=echoes,
            questions=list(questions),
        )

    def _wrap(self, message: Message, content: list[int]) -> list[int]:
        return [self._special[USER if message["role"] == "user" else ASSISTANT], *content, self._special[END]]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows packed side by side, the longest first, and padded on the right."""
    capacity = -(-max(_SHORTEST, *(len(row.ids) for row in rows)) // _ROUND_TO) * _ROUND_TO
    places, num_bins = _pack([len(row.ids) for row in rows], capacity)
    ids_BT = torch.full((num_bins, capacity), pad_id)
    positions_BT = torch.zeros_like(ids_BT)
    segments_BT = torch.full_like(ids_BT, _PADDING)
    predicted: list[int] = []
    answer_ids: list[int] = []
    echoes: list[int] = []
    questions: list[Question] = []
    for number, (row, (b, offset)) in enumerate(zip(rows, places, strict=True)):
        own = slice(offset, offset + len(row.ids))
        ids_BT[b, own] = torch.tensor(row.ids)
        positions_BT[b, own] = torch.tensor(row.positions)
        segments_BT[b, own] = torch.tensor(row.segments) + number * _SEGMENTS_PER_ROW
        echoes += [b * capacity + offset + at for at in row.echoes]
        for (start, end), question in zip(row.answers, row.questions, strict=True):
            predicted += range(b * capacity + offset + start, b * capacity + offset + end)
            answer_ids += [len(questions)] * (end - start)
            questions.append(question)
    return Batch(
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        predicted_W=torch.tensor(predicted),
        answer_ids_W=torch.tensor(answer_ids),
        echoes_E=torch.tensor(echoes, dtype=torch.long),
        questions=questions,
    )


def _pack(sizes: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Bin and offset of each size, first fit, and the number of bins."""
    places = [(0, 0)] * len(sizes)
    used: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = (b for b, size in enumerate(used) if size + sizes[index] <= capacity)
        b = next(fitting, len(used))
        if b == len(used):
            used.append(0)
        places[index] = (b, used[b])
        used[b] += sizes[index]
    return places, len(used)


def visible(segments_BT: Tensor) -> Tensor:
    """Which token sees which -> [B, 1, T, T]: earlier ones of its dialogue, shared or of its own question."""
    T = segments_BT.shape[1]
    is_earlier_TT = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    own_BT1, seen_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    shared_B1T = seen_B1T % _SEGMENTS_PER_ROW == _SHARED
    same_dialogue_BTT = own_BT1 // _SEGMENTS_PER_ROW == seen_B1T // _SEGMENTS_PER_ROW
    return (same_dialogue_BTT & (shared_B1T | (own_BT1 == seen_B1T)) & is_earlier_TT).unsqueeze(1)


def shuffled(questions: Sequence[Question], most: int, rng: random.Random) -> list[Question]:
    """At most ``most`` of them, in random order."""
    return rng.sample(list(questions), min(most, len(questions)))
