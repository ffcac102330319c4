"""Dialogues as tensors: facts once, then every question about them as if it were the only one.

B sequences of T tokens, W answer tokens, E echoes.
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
from examples.models.recall_training.attention import Layout
from examples.models.recall_training.tokens import ASSISTANT, END, PAD, SYSTEM, USER

_ROUND_TO = 8  # matrix kernels like even sizes
_SLOT = 40  # tokens that hold several questions, unless one is longer or all are shorter
_PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question with its answer: token ids, and which of them are to be predicted.

    ``echoes`` are the tokens that follow their predecessor as they did before: the second part of a
    name, above all. To predict them is to copy, which answers need as well.
    """

    ids: list[int]
    answer_start: int
    echoes: list[int]
    question: Question | None  # None: nothing is answered, all is echo


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dialogue: what every question sees, and the questions that do not see each other."""

    shared: list[int]
    asked: list[Asked]

    @property
    def longest(self) -> int:
        """Tokens that the last token of the longest question sees, itself included."""
        return len(self.shared) + max((len(one.ids) for one in self.asked), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded sequences. ``answer_ids`` numbers the answer that each of the W predicted tokens belongs to."""

    ids_BT: Tensor
    positions_BT: Tensor
    layout: Layout
    predicted_W: Tensor  # index into B*T of the token to predict
    answer_ids_W: Tensor
    echoes_E: Tensor  # likewise
    questions: list[Question]

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            ids_BT=moved(self.ids_BT),
            positions_BT=moved(self.positions_BT),
            layout=self.layout.to(device),
            predicted_W=moved(self.predicted_W),
            answer_ids_W=moved(self.answer_ids_W),
            echoes_E=moved(self.echoes_E),
            questions=self.questions,
        )


class Encoder:
    """Worlds to rows. Every message is encoded on its own: special tokens separate them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._bpe = tokenizer.backend_tokenizer
        self._special = {
            token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, USER, ASSISTANT, END, SYSTEM)
        }

    @property
    def pad_id(self) -> int:
        pad_id: int = self._special[PAD]
        return pad_id

    def row(
        self,
        world: World,
        questions: Sequence[Question],
        *,
        earlier: Sequence[Question] = (),
        system: str | None = None,
    ) -> Row:
        """``earlier`` questions and their answers stand before the others, which see them."""
        messages = [] if system is None else [Message(role="system", content=system)]
        messages += world.messages
        for question in earlier:
            messages.append(Message(role="user", content=question.text))
            messages.append(Message(role="assistant", content=question.answer))
        texts = [message["content"] for message in messages]
        texts += [text for question in questions for text in (question.text, question.answer)]
        encoded = [encoding.ids for encoding in self._bpe.encode_batch(texts, add_special_tokens=False)]
        shared: list[int] = []
        for message, content in zip(messages, encoded, strict=False):
            shared += self._wrap(message["role"], content)
        told = set(pairwise(shared))
        pairs = encoded[len(messages) :]
        asked = [
            self._asked(question, pairs[2 * number], pairs[2 * number + 1], told)
            for number, question in enumerate(questions)
        ]
        return Row(shared=shared, asked=asked)

    def recitation(self, num_shared: int, spans: Sequence[int], rng: random.Random) -> Row:
        """Tokens in random order, and spans of them, as long as given, to be said again.

        Where all is random only copying helps, and it helps everywhere: names and numbers need it.
        """
        shared = rng.sample(range(len(self._special), self._bpe.get_vocab_size()), num_shared)
        asked = []
        for size in spans:
            start = rng.randrange(max(1, num_shared - size))
            ids = shared[start : start + size]
            asked.append(Asked(ids=ids, answer_start=size, echoes=list(range(1, len(ids))), question=None))
        return Row(shared=shared, asked=asked)

    def _asked(
        self, question: Question, text: list[int], answer: list[int], told: set[tuple[int, int]]
    ) -> Asked:
        ids = [*self._wrap("user", text), self._special[ASSISTANT]]
        echoes = [at for at in range(2, len(ids) - 2) if (ids[at - 1], ids[at]) in told]
        return Asked(
            ids=[*ids, *answer, self._special[END]],
            answer_start=len(ids),
            echoes=echoes,
            question=question,
        )

    def _wrap(self, role: str, content: list[int]) -> list[int]:
        return [self._special[f"<|{role}|>"], *content, self._special[END]]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """One row a sequence: shared tokens padded on the right, then its questions packed into slots."""
    F = _rounded(max(len(row.shared) for row in rows))
    L = _slot_length(rows)
    packed = [_pack([len(one.ids) for one in row.asked], L) for row in rows]
    N = max(num_slots for _, num_slots in packed)
    ids_BT = torch.full((len(rows), F + N * L), pad_id)
    positions_BT = torch.zeros_like(ids_BT)
    positions_BT[:, :F] = torch.arange(F)
    owners_BX = torch.full((len(rows), N * L), _PADDING)
    predicted: list[int] = []
    answer_ids: list[int] = []
    echoes: list[int] = []
    questions: list[Question] = []
    for b, (row, (places, _)) in enumerate(zip(rows, packed, strict=True)):
        num_shared = len(row.shared)
        ids_BT[b, :num_shared] = torch.tensor(row.shared)
        for number, (one, place) in enumerate(zip(row.asked, places, strict=True)):
            start, size = F + place, len(one.ids)
            ids_BT[b, start : start + size] = torch.tensor(one.ids)
            positions_BT[b, start : start + size] = torch.arange(num_shared, num_shared + size)
            owners_BX[b, place : place + size] = number
            first = b * (F + N * L) + start
            echoes += [first + at for at in one.echoes]
            if one.question is not None:
                predicted += range(first + one.answer_start, first + size)
                answer_ids += [len(questions)] * (size - one.answer_start)
                questions.append(one.question)
    return Batch(
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        layout=Layout(
            num_shared=F,
            lengths_B=torch.tensor([len(row.shared) for row in rows]),
            owners_BNL=owners_BX.view(len(rows), N, L),
        ),
        predicted_W=torch.tensor(predicted, dtype=torch.long),
        answer_ids_W=torch.tensor(answer_ids, dtype=torch.long),
        echoes_E=torch.tensor(echoes, dtype=torch.long),
        questions=questions,
    )


def _slot_length(rows: Sequence[Row]) -> int:
    longest = max((len(one.ids) for row in rows for one in row.asked), default=0)
    most = max(sum(len(one.ids) for one in row.asked) for row in rows)
    return _rounded(max(longest, min(_SLOT, most)))


def _pack(sizes: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Start of each size, none across a multiple of ``capacity``, first fit; and how many of those in all."""
    places = [0] * len(sizes)
    used: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = (slot for slot, size in enumerate(used) if size + sizes[index] <= capacity)
        slot = next(fitting, len(used))
        if slot == len(used):
            used.append(0)
        places[index] = slot * capacity + used[slot]
        used[slot] += sizes[index]
    return places, len(used)


def _rounded(size: int) -> int:
    return -(-size // _ROUND_TO) * _ROUND_TO


def shuffled(questions: Sequence[Question], most: int, rng: random.Random) -> list[Question]:
    """At most ``most`` of them, in random order."""
    return rng.sample(list(questions), min(most, len(questions)))
