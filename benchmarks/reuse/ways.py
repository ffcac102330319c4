"""Ways to get the KV of a prompt's memories: computed, put back as they are, or put back and repaired.

A way is a generator: it asks for one capture after the other, and returns where their chunks go.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

from benchmarks.reuse.cases import Case, Tokens
from benchmarks.reuse.lab import Capture, Plan, Steps
from kv_agent.chunks import ChunkKey, ChunkRecord

Way = Callable[[Case], Steps]


def computed(case: Case, *, again: bool = False) -> Steps:
    """Everything is computed; ``again`` under another salt, for the noise floor."""
    yield from ()
    return Plan(salt=f"{case.name}/{'again' if again else 'full'}/{len(case.memories)}")


def forgotten(case: Case) -> Steps:
    """The question alone."""
    yield from ()
    return Plan(salt=f"{case.name}/alone/{len(case.memories)}", memories=False)


def exact(case: Case) -> Steps:
    """The memories were computed as one conversation, and all of it is put back."""
    behind = case.prompt[len(case.prefix) : len(case.prompt) - len(case.fresh)]
    first = yield from _stored((), case.prefix)
    rest = yield from _stored(case.prefix, behind)
    position, placed = 0, []
    for record in (*first, *rest):
        placed.append((record.key, position, 0))
        position += record.num_tokens
    return _plan("exact", placed)


def adapted(case: Case, *, link_tokens: int = 0, neutral: Tokens = (), opening_behind: Tokens = ()) -> Steps:
    """Each memory was computed apart.

    ``link_tokens`` first tokens of every moved memory are computed in their place. ``neutral`` stood before
    the memories when they were computed, so that none of them began a sequence. Behind ``opening_behind`` the
    first token of a moved memory was computed once more, and replaces its own.
    """
    name = f"adapted/{link_tokens}/{len(neutral)}/{len(opening_behind)}"
    placed: list[tuple[ChunkKey, int, int]] = []
    position = repaired = 0
    first = yield from _stored((), case.prefix)
    filler = yield from _stored(case.prefix, case.filler)
    for record in (*first, *filler):
        placed.append((record.key, position, 0))
        position += record.num_tokens
    for context, memory in zip(case.contexts, case.memories, strict=True):
        is_moved = position > len(case.prefix) or bool(context or neutral)
        records = yield from _stored((*case.prefix, *neutral, *context), memory)
        left_out = min(link_tokens, len(memory)) if is_moved else 0
        repaired += left_out
        if left_out:
            until = (*case.prompt[:position], *memory[:left_out])
            link = yield Capture(tokens=until, content_start=position, plan=_plan(name, placed))
            for record in link:
                placed.append((record.key, position, 0))
                position += record.num_tokens
        elif is_moved and opening_behind:
            left_out = 1
            for record in (yield from _stored((*case.prefix, *opening_behind), memory[:1])):
                placed.append((record.key, position, 0))
                position += 1
        for record in records:
            skip = min(left_out, record.num_tokens)
            left_out -= skip
            if skip < record.num_tokens:
                placed.append((record.key, position, skip))
                position += record.num_tokens - skip
    return _plan(name, placed, repaired)


def _stored(context: Tokens, tokens: Tokens) -> Generator[Capture, list[ChunkRecord], list[ChunkRecord]]:
    """The chunks of ``tokens``, computed behind ``context``."""
    if not tokens:
        return []
    return (yield Capture(tokens=(*context, *tokens), content_start=len(context), plan=Plan(salt="")))


def _plan(name: str, placed: list[tuple[ChunkKey, int, int]], repaired: int = 0) -> Plan:
    return Plan(placed=tuple(placed), salt=f"{name}:{placed}", repaired=repaired)


def ways(neutral: Tokens) -> dict[str, Way]:
    """By name, the yardstick first."""
    found: dict[str, Way] = {
        "computed": computed,
        "computed again": partial(computed, again=True),
        "no memory": forgotten,
        "exact": exact,
        "adapted": adapted,
    }
    for link_tokens in (1, 2, 4, 8, 16):
        found[f"adapted, {link_tokens} link tokens"] = partial(adapted, link_tokens=link_tokens)
    if neutral:
        found["adapted, another opening"] = partial(adapted, opening_behind=neutral)
        found["adapted, behind a neutral turn"] = partial(adapted, neutral=neutral)
        for link_tokens in (1, 4, 8):
            found[f"adapted, behind a neutral turn, {link_tokens} link tokens"] = partial(
                adapted, neutral=neutral, link_tokens=link_tokens
            )
    return found
