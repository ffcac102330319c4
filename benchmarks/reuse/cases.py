"""What is asked: memories that were computed apart, a fresh turn behind them, and its right answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.world import Question, Split, WorldConfig, generate_world
from kv_agent.prompting import ChatPrompts

Tokens = tuple[int, ...]

_SEED_BASE = 1 << 49  # neither training nor the exam has these worlds


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Memories in the order of the prompt, each with what stood before it when it was computed.

    ``prefix`` begins the prompt, and began every sequence in which a memory was computed.
    """

    name: str
    prefix: Tokens = ()
    contexts: tuple[Tokens, ...]
    memories: tuple[Tokens, ...]
    fresh: Tokens
    answer: str | None = None

    @property
    def prompt(self) -> Tokens:
        return (*self.prefix, *(token for memory in self.memories for token in memory), *self.fresh)


def recall_cases(
    prompts: ChatPrompts,
    num_memories: int,
    num_cases: int,
    *,
    system_prompt: str | None = None,
    num_before: int = 0,
    shuffled: bool = False,
) -> Iterator[Case]:
    """Questions on worlds of the test split whose facts are the memories, one turn each.

    ``num_before`` turns stood before each memory when it was computed: 0 is the start of a session.
    """
    config = WorldConfig(
        num_facts=num_memories,
        facts_per_subject=2,
        two_hop_share=0.1,
        small_talk_share=0.0,
        unknown_share=0.1,
    )
    made = 0
    for number in range(num_cases):
        world = generate_world(config, split=Split.TEST, seed=_SEED_BASE + number)
        rng = random.Random(number)
        turns = [prompts.turn(turn.user, turn.assistant) for turn in world.turns.values()]
        before = _other_turns(prompts, config, number, num_before)
        if shuffled:
            rng.shuffle(turns)
        for question in _asked(world.questions, rng):
            yield Case(
                name=f"{number}.{question.id}",
                prefix=prompts.prefix(system_prompt),
                contexts=tuple(before for _ in turns),
                memories=tuple(turns),
                fresh=prompts.fresh(question.text).token_ids,
                answer=question.answer,
            )
            made += 1
            if made == num_cases:
                return


def _asked(questions: tuple[Question, ...], rng: random.Random) -> list[Question]:
    return rng.sample(questions, min(4, len(questions)))


def _other_turns(prompts: ChatPrompts, config: WorldConfig, number: int, num_turns: int) -> Tokens:
    world = generate_world(config, split=Split.VALIDATION, seed=_SEED_BASE + number)
    turns = [prompts.turn(turn.user, turn.assistant) for turn in world.turns.values()]
    while turns and len(turns) < num_turns:
        turns += turns
    return tuple(token for turn in turns[:num_turns] for token in turn)


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
