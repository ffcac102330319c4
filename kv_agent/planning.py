"""From retrieved memories to a prompt that really contains their tokens, and the plan to inject them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kv_agent.chunks import ChunkKey, ChunkRecord, Scope, TurnRecord


class Placed(NamedTuple):
    """A chunk, but for its first ``skip`` tokens, from position ``start`` on."""

    key: ChunkKey
    start: int
    skip: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrompt:
    """Token ids ``[prefix][memories in time order][fresh turn]`` and where each chunk stands.

    Chunks may stand within the fresh turn, too, up to ``known_end``.
    """

    token_ids: tuple[int, ...]
    fresh_start: int
    placements: tuple[Placed, ...]
    turns: tuple[TurnRecord, ...]
    known_end: int = 0

    def options(self) -> dict[str, Any]:
        """The plugin's ``plan`` field."""
        return {
            "placements": [
                {"chunk_id": one.key, "start": one.start, "skip": one.skip} for one in self.placements
            ],
            "fresh_start": max(self.fresh_start, self.known_end),
        }

    def salt(self, scope: Scope) -> str:
        """One salt per user and plan: adapted KV is shared with nobody but the same plan."""
        placed = (f"{one.key}@{one.start}+{one.skip}" for one in self.placements)
        parts = [scope.namespace, scope.user_id, *placed]
        framed = "".join(f"{len(part)}:{part}" for part in parts)
        return "kv_agent:" + hashlib.blake2b(framed.encode(), digest_size=16).hexdigest()


def build_prompt(
    prefix: Sequence[ChunkRecord],
    ranked_turns: Sequence[TurnRecord],
    chunks: Mapping[ChunkKey, ChunkRecord],
    fresh: Sequence[int],
    *,
    max_prompt_tokens: int,
    bare_prefix: Sequence[int] = (),
) -> MemoryPrompt:
    """Place the best turns that fit into ``max_prompt_tokens``, oldest first, in front of ``fresh``.

    ``ranked_turns`` come best first; those whose chunks are not all at hand are left out. ``prefix`` are
    the chunks of the prompt's prefix, or ``bare_prefix`` its tokens if their KV is not stored: then they
    are computed, and so is what stands behind them.
    """
    prefix_ids = [token for chunk in prefix for token in chunk.token_ids] or list(bare_prefix)
    room = max_prompt_tokens - len(prefix_ids) - len(fresh)
    chosen: list[TurnRecord] = []
    for turn in ranked_turns:
        if any(key not in chunks or chunks[key].quarantined for key in turn.chunk_keys):
            continue
        size = sum(chunks[key].num_tokens for key in turn.chunk_keys)
        if size <= room:
            chosen.append(turn)
            room -= size
    chosen.sort(key=lambda turn: (turn.created, turn.turn_id))
    placements: list[Placed] = []
    position = 0
    for chunk in prefix:
        placements.append(Placed(chunk.key, position))
        position += chunk.num_tokens
    token_ids = list(prefix_ids)
    for turn in chosen:
        for key in turn.chunk_keys:
            placements.append(Placed(key, len(token_ids)))
            token_ids += chunks[key].token_ids
    return MemoryPrompt(
        token_ids=(*token_ids, *fresh),
        fresh_start=len(token_ids),
        placements=tuple(placements),
        turns=tuple(chosen),
    )
