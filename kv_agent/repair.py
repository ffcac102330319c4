"""How far a plan trusts moved KV: not at all, or with links.

A link is the first tokens of a moved memory, computed where the memory now stands: the chunk never saw what
stands before it now. The link is kept, and put back with the rest of the chunk behind it. vLLM computes only
the end of a prompt, so a plan with several moved memories is climbed rung by rung: each rung puts back what
is below it and computes one link. A link is named by its context, as any chunk is, so a plan that was met
before needs no rung.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnRecord, adapted_key, chain_key
from kv_agent.planning import MemoryPrompt, Placed

_SHARE = 10  # one of so many tokens of a memory is computed anew ...
_MOST_TOKENS = 16  # ... but no more than these


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The request that computes link ``key`` of ``turn``: its prompt ends with the link."""

    key: ChunkKey
    turn: TurnRecord
    prompt: MemoryPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """A prompt with links, and the rungs that make them, lowest first."""

    prompt: MemoryPrompt
    rungs: tuple[Rung, ...]


def ladder_of(prompt: MemoryPrompt, chunks: Mapping[ChunkKey, ChunkRecord], root: ChunkKey) -> Ladder:
    """Give every moved memory of ``prompt`` its link; ``root`` is the chain key of the user's empty context.

    ``chunks`` has all that is placed. A prompt with a gap stays as it is: what is behind it is computed.
    """
    first_of = {turn.chunk_keys[0]: turn for turn in prompt.turns}
    placed: list[Placed] = []
    rungs: list[Rung] = []
    context, end = root, 0
    for one in prompt.placements:
        if one.start != end:
            return Ladder(prompt=prompt, rungs=())
        record, skip = chunks[one.key], 0
        is_exact = record.parent == context and record.start == one.start
        turn = first_of.get(one.key)
        if turn is not None and not is_exact and record.num_tokens > (size := link_tokens(turn)) > 0:
            context, skip = chain_key(context, record.token_ids[:size]), size
            below = replace(
                prompt,
                token_ids=prompt.token_ids[: one.start + size],
                fresh_start=one.start,
                placements=tuple(placed),
            )
            rungs.append(Rung(key=context, turn=turn, prompt=below))
            placed.append(Placed(context, one.start))
        context = record.key if is_exact else adapted_key(context, record.key, skip)
        placed.append(Placed(record.key, one.start + skip, skip))
        end = one.start + record.num_tokens
    return Ladder(prompt=replace(prompt, placements=tuple(placed)), rungs=tuple(rungs))


def exact_only(prompt: MemoryPrompt, chunks: Mapping[ChunkKey, ChunkRecord], root: ChunkKey) -> MemoryPrompt:
    """The prompt with its chunks up to the first that does not stand where it was computed."""
    placed: list[Placed] = []
    context, end = root, 0
    for one in prompt.placements:
        record = chunks[one.key]
        if one.start != end or record.parent != context or record.start != one.start:
            break
        placed.append(one)
        context, end = record.key, one.start + record.num_tokens
    return replace(prompt, placements=tuple(placed))


def link_tokens(turn: TurnRecord) -> int:
    return min(_MOST_TOKENS, turn.num_tokens // _SHARE)
