"""What is asked: memories that were computed apart, a fresh turn behind them, and its right answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from benchmarks.world import Question, Split, World, WorldConfig, generate_world
from kv_agent.prompting import ChatPrompts

Tokens = tuple[int, ...]

_SEED_BASE = 1 << 49  # neither training nor the exam has these worlds
_QUESTIONS_PER_WORLD = 4
_FEWEST_TURN_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Memories in the order of the prompt, each with what stood before it when it was computed.

    ``prefix`` begins the prompt, and began every sequence in which a memory was computed. ``filler`` stands
    between it and the memories in the prompt only.
    """

    name: str
    prefix: Tokens = ()
    filler: Tokens = ()
    contexts: tuple[Tokens, ...]
    memories: tuple[Tokens, ...]
    fresh: Tokens
    answer: str | None = None

    @property
    def prompt(self) -> Tokens:
        memories = (token for memory in self.memories for token in memory)
        return (*self.prefix, *self.filler, *memories, *self.fresh)

    @property
    def memory_tokens(self) -> int:
        return sum(map(len, self.memories))

    @property
    def distance(self) -> float:
        """By how many positions a memory is moved, the mean of all."""
        starts = accumulate(map(len, self.memories), initial=len(self.filler))
        return fmean(abs(start - len(context)) for start, context in zip(starts, self.contexts, strict=False))


class Exam(NamedTuple):
    """A world, and what is asked of it."""

    number: int
    world: World
    questions: list[Question]


def exams(num_facts: int, num_questions: int) -> Iterator[Exam]:
    """Worlds of the test split with some questions each, ``num_questions`` together."""
    left = num_questions
    for number in range(num_questions):
        world = generate_world(_config(num_facts), split=Split.TEST, seed=_SEED_BASE + number)
        most = min(_QUESTIONS_PER_WORLD, len(world.questions))
        asked = random.Random(number).sample(world.questions, most)[:left]
        yield Exam(number, world, asked)
        left -= len(asked)
        if not left:
            return


def recall_cases(
    prompts: ChatPrompts,
    num_memories: int,
    num_cases: int,
    *,
    system_prompt: str | None = None,
    before_tokens: int = 0,
    filler_tokens: int = 0,
    shuffled: bool = False,
    facts_per_memory: int = 1,
) -> Iterator[Case]:
    """Questions on worlds of the test split whose facts are the memories, one turn a fact.

    ``before_tokens`` of another conversation stood before each memory when it was computed: 0 is the start of
    a session. ``filler_tokens`` of a third one stand in front of the memories now.
    """
    for exam in exams(num_memories * facts_per_memory, num_cases):
        turns = [prompts.turn(turn.user, turn.assistant) for turn in exam.world.turns.values()]
        memories = [
            _joined(turns[at : at + facts_per_memory]) for at in range(0, len(turns), facts_per_memory)
        ]
        if shuffled:
            random.Random(exam.number).shuffle(memories)
        before = _other_talk(prompts, 2 * exam.number, before_tokens)
        filler = _other_talk(prompts, 2 * exam.number + 1, filler_tokens)
        for question in exam.questions:
            yield Case(
                name=f"{exam.number}.{question.id}",
                prefix=prompts.prefix(system_prompt),
                filler=filler,
                contexts=(before,) * len(memories),
                memories=tuple(memories),
                fresh=prompts.fresh(question.text).token_ids,
                answer=question.answer,
            )


def _config(num_facts: int) -> WorldConfig:
    return WorldConfig(
        num_facts=num_facts, facts_per_subject=2, two_hop_share=0.1, small_talk_share=0.0, unknown_share=0.1
    )


def _other_talk(prompts: ChatPrompts, number: int, num_tokens: int) -> Tokens:
    """The last tokens of a conversation of the validation split."""
    if num_tokens == 0:
        return ()
    config = _config(num_tokens // _FEWEST_TURN_TOKENS + 1)
    world = generate_world(config, split=Split.VALIDATION, seed=_SEED_BASE + number)
    tokens = _joined([prompts.turn(turn.user, turn.assistant) for turn in world.turns.values()])
    assert len(tokens) >= num_tokens, (len(tokens), num_tokens)
    return tokens[-num_tokens:]


def _joined(turns: Sequence[Tokens]) -> Tokens:
    return tuple(token for turn in turns for token in turn)


def story_cases(
    stories: Sequence[Tokens], num_memories: int, num_cases: int, *, memory_tokens: int, fresh_tokens: int
) -> Iterator[Case]:
    """Beginnings of stories, each computed at a sequence start; the fresh turn goes on with the last."""
    for number in range(num_cases):
        chosen = random.Random(number).sample(stories, num_memories)
        yield Case(
            name=str(number),
            contexts=((),) * num_memories,
            memories=tuple(story[:memory_tokens] for story in chosen),
            fresh=chosen[-1][memory_tokens : memory_tokens + fresh_tokens],
        )
