"""What is trained on when: few facts first, more once those are answered."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import IterableDataset

from benchmarks.world import Split, WorldConfig, generate_world
from examples.models.recall_training.batches import Batch, Encoder, Row, collate, shuffled

LEVELS = (2, 4, 6, 9, 14, 20, 30, 50, 80)  # most facts in a dialogue; 80 with their turns are 2,000 tokens
PASS_SHARE = 0.75  # right answers in training that open the next level
WINDOW = 30  # steps over which they are counted
_MAX_CONTEXT = 2048
_MAX_ROW = 3072  # with all questions, which do not see each other
_MAX_QUESTIONS = 48
_CHAIN_SHARE = 0.15  # dialogues whose questions see those before them


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
        passed = len(self.recent) == WINDOW and self.right >= PASS_SHARE and self.level + 1 < len(LEVELS)
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
        rows: list[Row] = []
        size = 0
        while not rows or size + len(rows[-1].ids) <= self._source.tokens_per_step:
            num_facts = most if rng.random() < 0.3 else rng.randint(1, most)
            rows.append(self._row(num_facts, rng.random() < _CHAIN_SHARE, rng))
            size += len(rows[-1].ids)
        return collate(rows, self._encoder.pad_id)

    def _row(self, num_facts: int, is_chain: bool, rng: random.Random) -> Row:
        config = WorldConfig(
            num_facts=num_facts,
            facts_per_subject=rng.choice((1, 2, 3)),
            facts_per_turn=rng.choice((1, 1, 2)),
            hop_share=rng.choice((0.15, 0.4)),
            correction_share=0.2,
            similar_share=0.2,
            small_talk_share=rng.choice((0.0, 0.1, 0.5)),
            two_hop_share=0.4,
            unknown_share=0.15,
            questions_per_fact=self._source.questions_per_fact,
        )
        world = generate_world(config, split=Split.TRAIN, seed=rng.getrandbits(48))
        row = self._encoder.row(world, shuffled(world.questions, _MAX_QUESTIONS, rng), is_chain=is_chain)
        is_short = len(row.ids) <= _MAX_ROW and max(row.positions) < _MAX_CONTEXT
        return row if is_short else self._row(num_facts * 3 // 4, is_chain, rng)
