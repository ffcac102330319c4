"""Worlds to examine a reader with, and how its answers are counted."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.world.facts import WorldConfig
from benchmarks.world.generator import generate_world
from benchmarks.world.records import Question, Split, World

_SEED_BASE = 1 << 48  # training seeds have 48 bits
_QUESTIONS_PER_WORLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many of some questions were answered exactly."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else float("nan")


def exam_papers(
    split: Split, *, num_facts: int, num_worlds: int, wording: Split | None = None
) -> Iterator[tuple[World, Sequence[Question]]]:
    """Worlds with some questions about each, always the same ones; see ``generate_world``."""
    config = WorldConfig(
        num_facts=num_facts, facts_per_subject=2, two_hop_share=0.3, correction_share=0.15, unknown_share=0.15
    )
    for number in range(num_worlds):
        world = generate_world(config, split=split, seed=_SEED_BASE + number, wording=wording)
        size = min(_QUESTIONS_PER_WORLD, len(world.questions))
        yield world, random.Random(number).sample(world.questions, size)


def by_group(outcome: Iterable[tuple[Question, bool]]) -> dict[str, Score]:
    """Scores of all, by way of asking, by kind of value and by relation.

    Kinds and relations leave out two-hop questions, which stand for themselves.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in outcome:
        right["all"].append(is_right)
        right[f"ask:{question.ask.value}"].append(is_right)
        if question.kind is not None and len(question.relations) == 1:
            right[f"kind:{question.kind.value}"].append(is_right)
            right[f"relation:{question.relations[0]}"].append(is_right)
    return {name: Score(right=sum(values), asked=len(values)) for name, values in sorted(right.items())}
