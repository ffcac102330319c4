"""What is trained on when: few facts first, more once those are answered."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import IterableDataset

from benchmarks.world import Split, WorldConfig, generate_world
from examples.models.recall_training.batches import Batch, Encoder, Row, collate, shuffled
from examples.models.recall_training.tokens import SYSTEM_PROMPTS

LEVELS = (2, 4, 6, 9, 14, 20, 30, 50, 80)  # most facts in a dialogue; 80 with their turns are 2,000 tokens
PASS_SHARE = 0.6  # right answers in training that open the next level ...
LARGE_PASS_SHARE = 0.75  # ... and one from _LARGE on, where every token costs more
WINDOW = 30  # steps over which they are counted
_LARGE = 14  # levels from here on have twice the tokens in a step: their dialogues are longer
_MAX_CONTEXT = 2048
_MAX_QUESTIONS = 48
_MOST_SHARE = 0.4  # batches of as many facts as the level allows; the others' numbers are log-uniform
_LAST_MOST_SHARE = 0.1  # at the last level: nothing more is to be opened, and long dialogues cost most
_FEW = range(4, 15)  # facts in a dialogue of most batches at the last level: more questions for the tokens
_FEW_SHARE = 0.6  # of those batches
_RECITED_SHARE = 0.2  # rows of a batch, the first left out, that are recited instead
_SYSTEM_SHARE = 0.15
_EARLIER_SHARE = 0.15  # dialogues in which some questions were answered before
_MAX_EARLIER = 6
_SLIP_SHARE = 0.2


@dataclass(slots=True, kw_only=True)
class Progress:
    """The current level, and how the latest steps at it went."""

    level: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def right(self) -> float:
        return sum(self.recent) / len(self.recent) if self.recent else 0.0

    def record(self, matches: list[bool]) -> bool:
        """Takes in one step's answers; true when they open the next level."""
        self.recent.append(sum(matches) / len(matches))
        wanted = PASS_SHARE if LEVELS[self.level] < _LARGE else LARGE_PASS_SHARE
        passed = len(self.recent) == WINDOW and self.right >= wanted and self.level + 1 < len(LEVELS)
        if passed:
            self.level += 1
            self.recent.clear()
        return passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where batches come from: with the step these settings determine every batch."""

    seed: int
    level: int
    tokens_per_step: int
    questions_per_fact: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the dialogues of one batch have in common."""

    config: WorldConfig
    system: str | None
    num_earlier: int
    num_questions: int


class Batches(IterableDataset[Batch]):
    """The batches of some steps, the same however many workers make them."""

    def __init__(self, encoder: Encoder, source: Source, steps: range) -> None:
        self._encoder, self._source, self._steps = encoder, source, steps

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        steps = self._steps if worker is None else self._steps[worker.id :: worker.num_workers]
        for step in steps:
            yield self._batch(step)

    def _batch(self, step: int) -> Batch:
        rng = random.Random(f"{self._source.seed}/{step}")
        most = LEVELS[self._source.level]
        shape = self._shape(self._num_facts(most, rng), rng)  # one for all dialogues: less is padding
        rows: list[Row] = []
        size = 0
        wanted = self._source.tokens_per_step * (2 if most >= _LARGE else 1)
        while not rows or size + size // len(rows) <= wanted:
            row = self._row(shape, rng)
            if rows and rng.random() < _RECITED_SHARE:
                row = self._encoder.recitation(len(row.shared), [len(one.ids) for one in row.asked], rng)
            rows.append(row)
            size += len(rows[-1].shared) + sum(len(one.ids) for one in rows[-1].asked)
        return collate(rows, self._encoder.pad_id)

    def _num_facts(self, most: int, rng: random.Random) -> int:
        is_last = self._source.level + 1 == len(LEVELS)
        draw = rng.random()
        if draw < (_LAST_MOST_SHARE if is_last else _MOST_SHARE):
            return most
        if is_last and draw > 1 - _FEW_SHARE:
            return rng.choice(_FEW)
        return round(most ** rng.random())

    def _shape(self, num_facts: int, rng: random.Random) -> Shape:
        config = WorldConfig(
            num_facts=num_facts,
            facts_per_subject=rng.choice((1, 2, 3)),
            facts_per_turn=rng.choice((1, 1, 2)),
            hop_share=rng.choice((0.15, 0.5)),
            correction_share=0.2,
            similar_share=0.2,
            small_talk_share=rng.choice((0.0, 0.1, 0.5)),
            two_hop_share=1.0,
            unknown_share=0.2,
            slip_share=_SLIP_SHARE,
            questions_per_fact=self._source.questions_per_fact,
        )
        most_earlier = min(num_facts, _MAX_EARLIER)
        num_earlier = rng.randint(1, most_earlier) if rng.random() < _EARLIER_SHARE else 0
        num_questions = min(_MAX_QUESTIONS, self._source.questions_per_fact * num_facts)
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
        return Shape(config=config, system=system, num_earlier=num_earlier, num_questions=num_questions)

    def _row(self, shape: Shape, rng: random.Random) -> Row:
        world = generate_world(shape.config, split=Split.TRAIN, seed=rng.getrandbits(48))
        questions = shuffled(world.questions, shape.num_earlier + shape.num_questions, rng)
        num_earlier = min(shape.num_earlier, len(questions) - 1)
        row = self._encoder.row(
            world, questions[num_earlier:], earlier=questions[:num_earlier], system=shape.system
        )
        if row.longest <= _MAX_CONTEXT:
            return row
        fewer = replace(shape.config, num_facts=shape.config.num_facts * 3 // 4)
        return self._row(replace(shape, config=fewer), rng)
