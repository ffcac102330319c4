"""How far a plan trusts moved KV: not at all, or with links.

A link is the first tokens of a moved stretch, computed where it now stands: the stretch never saw what stands
before it now. The link is kept, and put back with the rest of the stretch behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.planning import MemoryPrompt, Placed

_SHARE = 10  # one of so many tokens of a stretch is computed anew ...
_MOST_TOKENS = 16  # ... but no more than these


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Placed chunks that went on from each other when they were computed: they stay as they were."""

    placed: tuple[Placed, ...]
    records: tuple[ChunkRecord, ...]

    @property
    def start(self) -> int:
        return self.placed[0].start

    @property
    def end(self) -> int:
        return self.placed[-1].start + self.records[-1].num_tokens

    def stands(self, context: ChunkKey) -> bool:
        """Whether it stands behind ``context`` as it did when it was computed."""
        return self.records[0].stands(context, self.start)

    @property
    def link_tokens(self) -> int:
        """How many of its first tokens are computed, when it is moved; all are of its first chunk."""
        wanted = min(_MOST_TOKENS, (self.end - self.start) // _SHARE)
        return wanted if wanted < self.records[0].num_tokens else 0


def stretches_of(prompt: MemoryPrompt, chunks: Mapping[ChunkKey, ChunkRecord]) -> list[Stretch]:
    """The prompt's placements, none of which leaves out tokens; ``chunks`` has all that is placed."""
    found: list[Stretch] = []
    for one in prompt.placements:
        record = chunks[one.key]
        if found and found[-1].end == one.start and record.parent == found[-1].records[-1].key:
            before = found.pop()
            found.append(Stretch(placed=(*before.placed, one), records=(*before.records, record)))
        else:
            found.append(Stretch(placed=(one,), records=(record,)))
    return found


def exact_only(prompt: MemoryPrompt, chunks: Mapping[ChunkKey, ChunkRecord], root: ChunkKey) -> MemoryPrompt:
    """The prompt with its chunks up to the first that is not what computing it there gives.

    ``root`` is the chain key of the user's empty context.
    """
    placed: list[Placed] = []
    context, end = root, 0
    for one in prompt.placements:
        record = chunks[one.key]
        if one.start != end or not record.is_exact(context, end):
            break
        placed.append(one)
        context, end = record.key, end + record.num_tokens
    return replace(prompt, placements=tuple(placed), known_end=0)
