"""Which of a finished request's tokens become chunks of which turn. Holds no tensors."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

from kv_agent.chunks import ChunkKey, Fingerprint, TurnId
from kv_agent.vllm_plugin.chains import ChainIndex, cut_segments, walk
from kv_agent.vllm_plugin.jobs import CaptureJob
from kv_agent.vllm_plugin.request_state import EngineRequest, RequestState


class Capturing:
    """Makes capture jobs; remembers what was captured here and is not durable yet."""

    def __init__(self, fingerprint: Fingerprint, chunk_tokens: int, clock: Callable[[], float]) -> None:
        self._fingerprint = fingerprint
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._pending = ChainIndex()
        self._pending_keys: dict[TurnId, tuple[ChunkKey, ...]] = {}

    def settled(self, turn_id: TurnId) -> None:
        """The turn is durable, or lost."""
        self._pending.discard(self._pending_keys.pop(turn_id, ()))

    def lost(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks turned out to be no good: what is computed now is stored again."""
        self._pending.discard(tuple(keys))

    def job(self, state: RequestState, request: EngineRequest, block_ids: Sequence[int]) -> CaptureJob | None:
        """What to store of a request that ended, if anything; its prompt can be named by its tokens."""
        options = state.options
        if options.scope is None or not options.store:
            return None
        base = state.plan.base(state.cached_end) if state.trusted else None
        if base is None:
            return None
        context, start = base
        base_end = start
        tokens = request.all_token_ids
        end = min(request.num_computed_tokens, len(tokens) - 1)  # the last sampled token has no KV
        known = walk(context, tokens[:end], start, self._lengths_of(state), self._exists(state))
        if known:
            context, start = known[-1].key, known[-1].end
        # Where the turn's own content begins: as told, else behind the plan, else with the new tokens.
        first = options.content_start
        if first is None:
            first = options.plan.fresh_start if options.plan is not None else start
        split = min(max(start, first), end)
        cut = self._chunk_tokens
        if options.part_of:
            split = end
        before = cut_segments(context, tokens, start, split, cut, self._fingerprint)
        context = before[-1].key if before else context
        content = cut_segments(context, tokens, split, end, cut, self._fingerprint)
        stored = tuple(chunk for chunk in known if chunk.start >= first and not options.part_of)
        held = self._held(state, tokens, first, base_end)
        if not content and not stored and not before:
            return None  # all of it is stored already
        created = self._clock()
        job = CaptureJob(
            request_id=request.request_id,
            block_ids=tuple(block_ids),
            turn_id=TurnId(uuid.uuid4().hex),
            scope=state.scope,
            fingerprint=self._fingerprint,
            context=before,
            content=content,
            content_keys=tuple(map(ChunkKey, options.part_of))
            or (*held, *(c.key for c in stored), *(s.key for s in content)),
            content_tokens=tuple(tokens[first if held else min([c.start for c in stored] + [split]) : end]),
            created=created,
            metadata=options.metadata,
            expires=None if options.ttl_s is None else created + options.ttl_s,
            is_part=bool(options.part_of),
        )
        for segment in job.segments:
            self._pending.add(segment.parent, segment.key, len(segment.token_ids))
        self._pending_keys[job.turn_id] = tuple(segment.key for segment in job.segments)
        return job

    def _held(self, state: RequestState, tokens: Sequence[int], first: int, end: int) -> tuple[ChunkKey, ...]:
        """Placed chunks that are the turn's own content ``[first, end)``, if they are all of it."""
        if state.options.part_of or first >= end:
            return ()
        held = state.plan.holding(first, end)
        said = tuple(token for chunk in held for token in chunk.record.token_ids)
        return tuple(chunk.record.key for chunk in held) if said == tuple(tokens[first:end]) else ()

    def _lengths_of(self, state: RequestState) -> Callable[[ChunkKey], list[int]]:
        return lambda parent: [*state.known.lengths(parent), *self._pending.lengths(parent)]

    def _exists(self, state: RequestState) -> Callable[[Sequence[ChunkKey]], set[ChunkKey]]:
        return lambda keys: {k for k in keys if k in state.known or k in self._pending}
