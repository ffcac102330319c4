"""Getting a prompt's KV ready: what is known of its text, how far it is trusted, what is computed first.

vLLM computes only the end of a prompt. Where computed tokens stand before placed ones (new text between two
known documents, a link) the prompt is climbed rung by rung: a rung is a short request that puts back what is
below it, computes up to where the next placed chunk begins, and keeps that. What a rung computed is named by
its context, as any chunk is, so a prompt that was met before needs no rung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    ContentKey,
    Fingerprint,
    Scope,
    TurnId,
    TurnRecord,
    adapted_key,
    root_key,
)
from kv_agent.engines.base import Call
from kv_agent.planning import MemoryPrompt, Placed
from kv_agent.prompting import ChatPrompts
from kv_agent.recognition import SHORTEST_STRETCH, pieces_of, with_known_text
from kv_agent.repair import Stretch, exact_only, stretches_of
from kv_agent.storage.catalog import Catalog
from kv_agent.vllm_plugin.chains import walk

Quality = Literal["fast", "balanced", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placer:
    """``run`` computes a request and keeps what it computed before it returns.

    A turn that began a sequence gets another opening where it is moved: the same tokens, computed behind a
    neutral turn, if these are stored.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    chunk_tokens: int
    prompts: ChatPrompts
    run: Callable[[Call], object]

    def placed(self, prompt: MemoryPrompt, scope: Scope, reading: Scope, quality: Quality) -> MemoryPrompt:
        """The prompt as ``quality`` wants it, with the text of its fresh turn that ``reading`` knows."""
        root = root_key(self.fingerprint, scope.namespace, scope.user_id)
        owners: dict[ChunkKey, TurnRecord] = {key: turn for turn in prompt.turns for key in turn.chunk_keys}
        if quality != "exact":
            prompt = self._recognised(prompt, reading, owners)
        chunks = self.catalog.chunks({one.key for one in prompt.placements})
        if len(chunks) < len({one.key for one in prompt.placements}):
            return prompt  # forgotten meanwhile: the engine refuses what is missing
        if quality == "exact":
            return exact_only(prompt, chunks, root)
        return self._climbed(prompt, stretches_of(prompt, chunks), owners, root, quality == "balanced")

    def chain(self, context: ChunkKey, token_ids: Sequence[int], start: int) -> list[ChunkRecord]:
        """The stored chunks that hold all of ``token_ids[start:]``, computed in ``context``; else none."""
        records: dict[ChunkKey, ChunkRecord] = {}

        def usable(keys: Sequence[ChunkKey]) -> set[ChunkKey]:
            found = {k: record for k, record in self.catalog.chunks(keys).items() if not record.quarantined}
            records.update(found)
            return set(found)

        found = walk(context, token_ids, start, self.catalog.child_lengths, usable)
        whole = bool(found) and found[-1].end == len(token_ids)
        return [records[chunk.key] for chunk in found] if whole else []

    def _recognised(
        self, prompt: MemoryPrompt, reading: Scope, owners: dict[ChunkKey, TurnRecord]
    ) -> MemoryPrompt:
        """Place known text, and add its turns to ``owners``."""
        if len(prompt.token_ids) - prompt.fresh_start <= SHORTEST_STRETCH:
            return prompt
        pieces = pieces_of(prompt, self.chunk_tokens, self.fingerprint)
        found = self.catalog.same_text([one.content_key for one in pieces], reading, self.fingerprint)
        if not found:
            return prompt
        copies: dict[ContentKey, list[ChunkRecord]] = {}
        turn_of: dict[ChunkKey, TurnId] = {}
        for record, turn_id in found:
            copies.setdefault(record.content_key, []).append(record)
            turn_of[record.key] = turn_id
        turns = self.catalog.turns(set(turn_of.values()))
        owners |= {key: turns[turn_id] for key, turn_id in turn_of.items() if turn_id in turns}
        return with_known_text(prompt, pieces, copies)

    def _climbed(
        self,
        prompt: MemoryPrompt,
        stretches: Sequence[Stretch],
        owners: Mapping[ChunkKey, TurnRecord],
        root: ChunkKey,
        with_links: bool,
    ) -> MemoryPrompt:
        """The prompt with all that is computed between placed chunks in place, up to where that failed."""
        placed: list[Placed] = []
        context, end = root, 0
        for stretch in stretches:
            owner = owners.get(stretch.placed[0].key)
            if stretch.start > end:
                below = replace(prompt, placements=tuple(placed), known_end=end)
                gap = self._computed(below, context, end, stretch.start, owner)
                if not gap:
                    break
                placed += (Placed(one.key, one.start) for one in gap)
                context = gap[-1].key
            skip = 0
            if with_links and not stretch.stands(context):
                below = replace(prompt, placements=tuple(placed), known_end=stretch.start)
                until = stretch.start + stretch.link_tokens
                link = self._computed(below, context, stretch.start, until, owner)
                placed += (Placed(one.key, one.start) for one in link)
                if link:
                    context, skip = link[-1].key, stretch.link_tokens
            if not skip and not stretch.stands(context) and (opening := self._opening(stretch, root)):
                placed.append(Placed(opening.key, stretch.start))
                context, skip = adapted_key(context, opening.key), opening.num_tokens
            for one, record in zip(stretch.placed, stretch.records, strict=True):
                is_exact = not skip and record.is_exact(context, one.start)
                placed.append(Placed(one.key, one.start + skip, skip))
                context = record.key if is_exact else adapted_key(context, record.key, skip)
                skip = 0
            end = stretch.end
        return replace(prompt, placements=tuple(placed))

    def _opening(self, stretch: Stretch, root: ChunkKey) -> ChunkRecord | None:
        """What replaces the opening of a stretch that began a sequence, where it must not draw attention."""
        opening, first = self.prompts.opening, stretch.records[0]
        size = len(opening)
        if first.start > 0 or not 0 < size < first.num_tokens or first.token_ids[:size] != opening:
            return None
        found = self.chain(root, self.prompts.neutral + opening, 0)
        return found[-1] if found and found[-1].token_ids == opening else None

    def _computed(
        self, below: MemoryPrompt, context: ChunkKey, start: int, end: int, owner: TurnRecord | None
    ) -> list[ChunkRecord]:
        """Tokens ``[start, end)`` as chunks in ``context``, computed now where they are not stored; none if
        that fails. They are kept with ``owner``.
        """
        if start == end:
            return []
        token_ids = below.token_ids[:end]
        known = self.chain(context, token_ids, start)
        if known or owner is None:
            return known
        rung = replace(below, token_ids=token_ids)
        self.run(
            Call(
                token_ids=token_ids,
                max_tokens=1,
                cache_salt=rung.salt(owner.scope),
                options={
                    "scope": owner.scope.to_dict(),
                    "part_of": list(owner.chunk_keys),
                    "plan": rung.options(),
                },
            )
        )
        return self.chain(context, token_ids, start)
