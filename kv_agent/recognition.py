"""Text of a new prompt that was computed before, behind another beginning.

The prompt is cut as stored turns were, so a document that stands in both has the same pieces, but for its
first and its last. What lies between recognised pieces is new text and must be computed in its place, which
takes a request for each gap, so only longer stretches are worth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from kv_agent.chunking import cut_lengths
from kv_agent.chunks import ChunkRecord, ContentKey, Fingerprint, content_key
from kv_agent.planning import MemoryPrompt, Placed

SHORTEST_STRETCH = 64  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens ``[start, end)`` of a prompt, named by their content."""

    content_key: ContentKey
    start: int
    end: int


def pieces_of(prompt: MemoryPrompt, most_tokens: int, fingerprint: Fingerprint) -> list[Piece]:
    """The fresh turn cut into pieces of at most ``most_tokens``; the last token is always computed."""
    fresh = prompt.token_ids[prompt.fresh_start : -1]
    ends = accumulate(cut_lengths(fresh, most_tokens), initial=0)
    return [
        Piece(
            content_key=content_key(fingerprint, fresh[start:end]),
            start=prompt.fresh_start + start,
            end=prompt.fresh_start + end,
        )
        for start, end in pairwise(ends)
    ]


def with_known_text(
    prompt: MemoryPrompt,
    pieces: Sequence[Piece],
    copies: Mapping[ContentKey, Sequence[ChunkRecord]],
) -> MemoryPrompt:
    """The prompt with the stretches of its fresh turn placed of which ``copies`` are stored.

    Of several copies the one that goes on from the piece before is taken, else the first.
    """
    stretches: list[list[tuple[Piece, ChunkRecord]]] = [[]]
    for piece in pieces:
        records = copies.get(piece.content_key, ())
        if not records:
            stretches.append([])
            continue
        before = stretches[-1][-1][1].key if stretches[-1] else None
        chosen = next((one for one in records if one.parent == before), records[0])
        stretches[-1].append((piece, chosen))
    long = [one for one in stretches if one and one[-1][0].end - one[0][0].start >= SHORTEST_STRETCH]
    if not long:
        return prompt
    placed = tuple(Placed(record.key, piece.start) for stretch in long for piece, record in stretch)
    return replace(prompt, placements=prompt.placements + placed, known_end=long[-1][-1][0].end)
