"""Checking a plan: which of the chunks a request asks for may really go where it says. Pure decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    Fingerprint,
    Scope,
    adapted_key,
    chain_key,
    root_key,
)
from kv_agent.config import Placement, PlanOptions
from kv_agent.vllm_plugin.jobs import ChunkLoad
from kv_agent.vllm_plugin.salts import Moves, cut_moves


class Refusal(StrEnum):
    """Why a chunk was computed instead of loaded."""

    UNKNOWN = "unknown chunk"
    NAMESPACE = "chunk belongs to another namespace"
    USER = "chunk belongs to another user"
    FINGERPRINT = "chunk was computed by another model"
    TOKENS = "prompt tokens differ from the chunk's"
    QUARANTINED = "chunk is quarantined"
    NO_SCOPE = "request carries no scope"
    NO_SALT = "request has no cache_salt while prefix caching is on"
    LORA = "request uses a LoRA adapter"
    MULTIMODAL = "request has multimodal or embedded input"
    ROTARY = "keys cannot be moved: the model's rotary embedding is not known"
    WINDOW = "a moved chunk would stand, or was computed, beyond the positions the model was trained on"
    CRUMBS = "what would be moved is many tiny chunks"
    FRESH_TURN = "chunk reaches into the fresh turn"
    OVERLAP = "chunk overlaps the one before"
    SKIPPED = "nothing of the chunk is left"
    GAP = "tokens before the chunk are computed"
    FASTER = "computing is faster"
    LOOKUP = "catalog could not be read"
    LATE = "catalog look-up took too long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Within what chunks may be moved.

    ``window``: positions that the model was trained on. ``shortest_mean_run``: several runs of fewer tokens
    on average are computed, for they save next to nothing and change answers (docs/reuse.md).
    """

    window: int
    shortest_mean_run: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One chunk of a plan that was not used, and why."""

    chunk_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedChunk:
    """A checked placement: tokens from ``skip`` on of a chunk, the first of them at position ``start``.

    ``context`` and ``after`` are the chain keys before and behind it.
    """

    record: ChunkRecord
    start: int
    skip: int = 0
    exact: bool
    context: ChunkKey
    after: ChunkKey

    @property
    def end(self) -> int:
        return self.start + self.record.num_tokens - self.skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPlan:
    """Placements that may be used, in order of position, and those that may not."""

    root: ChunkKey
    placed: tuple[PlacedChunk, ...] = ()
    refused: tuple[Refused, ...] = ()

    def reach(self, start: int) -> int:
        """End of the tokens that can follow ``start`` computed ones without a gap."""
        end = start
        for chunk in self.placed:
            if chunk.start <= end < chunk.end:
                end = chunk.end
        return end

    def loads(self, start: int, end: int) -> tuple[ChunkLoad, ...]:
        """What to load so that tokens ``[start, end)`` are in the cache."""
        return tuple(
            ChunkLoad(
                key=chunk.record.key,
                checksum=chunk.record.checksum,
                num_tokens=chunk.record.num_tokens,
                skip=chunk.skip + max(0, start - chunk.start),
                start=max(start, chunk.start),
                delta=chunk.start - chunk.skip - chunk.record.start,
            )
            for chunk in self.placed
            if max(chunk.start, start) < min(chunk.end, end)
        )

    def records(self, loads: Iterable[ChunkLoad]) -> dict[ChunkKey, ChunkRecord]:
        """The records of what is to be loaded, by key."""
        keys = {load.key for load in loads}
        return {chunk.record.key: chunk.record for chunk in self.placed if chunk.record.key in keys}

    def moves(self, end: int) -> Moves:
        """The adapted chunks among tokens ``[0, end)``."""
        moved = (chunk for chunk in self.placed if not chunk.exact)
        return cut_moves(tuple((c.start, c.end, c.record.key, c.skip) for c in moved), end)

    def base(self, cached_end: int) -> tuple[ChunkKey, int] | None:
        """Chain key and end of the last placed chunk within the first ``cached_end`` tokens.

        What is computed from there on is ordinary text in that context. ``None`` if a moved chunk is only
        partly cached: no chain key names such a context.
        """
        context, end = self.root, 0
        for chunk in self.placed:
            if chunk.end <= cached_end:
                context, end = chunk.after, chunk.end
            elif chunk.start < cached_end and not chunk.exact:
                return None
        return context, end

    def holding(self, start: int, end: int) -> tuple[PlacedChunk, ...]:
        """The chunks that together hold tokens ``[start, end)``, each of them whole; none if they do not.

        Where tokens of a chunk were left out, those before it must hold them: it replaces them.
        """
        held: list[PlacedChunk] = []
        reached = start
        for chunk in self.placed:
            if chunk.start < start or chunk.end > end:
                continue
            missing = chunk.skip
            while held and missing > 0:
                missing -= held.pop().record.num_tokens
            if chunk.start != reached or missing:
                return ()
            held.append(chunk)
            reached = chunk.end
        return tuple(held) if reached == end else ()

    def without(self, key: ChunkKey, start: int, reason: str) -> CheckedPlan:
        """The plan cut before the chunk that failed at ``start``: what follows is computed."""
        gone = [chunk for chunk in self.placed if chunk.end > start]
        refused = tuple(
            Refused(
                chunk_id=chunk.record.key,
                reason=reason if chunk.record.key == key and chunk.start <= start else Refusal.GAP,
            )
            for chunk in gone
        )
        kept = tuple(chunk for chunk in self.placed if chunk.end <= start)
        return replace(self, placed=kept, refused=self.refused + refused)


def refuse_all(options: PlanOptions, root: ChunkKey, reason: str) -> CheckedPlan:
    """A plan of which nothing is used."""
    return CheckedPlan(
        root=root,
        refused=tuple(Refused(chunk_id=p.chunk_id, reason=reason) for p in options.placements),
    )


def check_plan(
    options: PlanOptions,
    records: Mapping[ChunkKey, ChunkRecord],
    prompt_token_ids: Sequence[int],
    scope: Scope,
    fingerprint: Fingerprint,
    limits: Limits | None,
) -> CheckedPlan:
    """Keep the placements whose scope, fingerprint, tokens and position hold; label exact ones.

    A chunk is *exact* when it stands at its own position behind its own context, all of it computed
    or exact, and was stored without loss: then its KV is bit-identical to computing it. Everything else is
    *adapted* and must keep within ``limits`` (``None``: keys cannot be moved). Text between placements counts
    as computed in the context before it.
    """
    root = root_key(fingerprint, scope.namespace, scope.user_id)
    last = min(options.fresh_start, len(prompt_token_ids) - 1)  # at least one token is computed
    placed: list[PlacedChunk] = []
    refused: list[Refused] = []
    context, end = root, 0
    for placement in sorted(options.placements, key=lambda p: p.start):
        record = records.get(ChunkKey(placement.chunk_id))
        reason = _objection(record, placement, end, last, prompt_token_ids, scope, fingerprint)
        if record is None or reason is not None:
            refused.append(Refused(chunk_id=placement.chunk_id, reason=reason or Refusal.UNKNOWN))
            continue
        before = context
        if placement.start > end:
            before = chain_key(context, prompt_token_ids[end : placement.start])
        exact = placement.skip == 0 and record.is_exact(before, placement.start)
        if not exact and (reason := _immovable(record, placement, limits)):
            refused.append(Refused(chunk_id=placement.chunk_id, reason=reason))
            continue
        context = before
        after = record.key if exact else adapted_key(context, record.key, placement.skip)
        placed.append(
            PlacedChunk(
                record=record,
                start=placement.start,
                skip=placement.skip,
                exact=exact,
                context=context,
                after=after,
            )
        )
        context, end = after, placed[-1].end
    if limits is not None and _are_crumbs([chunk for chunk in placed if not chunk.exact], limits):
        first = next(number for number, chunk in enumerate(placed) if not chunk.exact)
        refused += (Refused(chunk_id=chunk.record.key, reason=Refusal.CRUMBS) for chunk in placed[first:])
        del placed[first:]
    return CheckedPlan(root=root, placed=tuple(placed), refused=tuple(refused))


def _are_crumbs(moved: Sequence[PlacedChunk], limits: Limits) -> bool:
    """Whether these are several runs of next to nothing; chunks that were computed in a row are one run.

    Tokens that a placement leaves out count: a chunk does not get worse where its beginning is computed.
    """
    num_runs = 0
    end, last = -1, None
    for chunk in moved:
        goes_on = chunk.record.parent == last or chunk.skip > 0  # behind what replaces its beginning
        num_runs += chunk.start != end or not goes_on
        end, last = chunk.end, chunk.record.key
    num_tokens = sum(chunk.record.num_tokens for chunk in moved)
    return num_runs > 1 and num_tokens < num_runs * limits.shortest_mean_run


def _immovable(record: ChunkRecord, placement: Placement, limits: Limits | None) -> Refusal | None:
    """Why a chunk may not stand elsewhere than where it was computed."""
    if limits is None:
        return Refusal.ROTARY
    last_start = max(placement.start - placement.skip, record.start)
    return Refusal.WINDOW if last_start + record.num_tokens > limits.window else None


def _objection(
    record: ChunkRecord | None,
    placement: Placement,
    end_before: int,
    last: int,
    prompt_token_ids: Sequence[int],
    scope: Scope,
    fingerprint: Fingerprint,
) -> Refusal | None:
    if record is None:
        return Refusal.UNKNOWN
    if record.namespace != scope.namespace:
        return Refusal.NAMESPACE
    if record.user_id != scope.user_id:
        return Refusal.USER
    if record.fingerprint != fingerprint:
        return Refusal.FINGERPRINT
    if record.quarantined:
        return Refusal.QUARANTINED
    if placement.start < end_before:
        return Refusal.OVERLAP
    if placement.skip >= record.num_tokens:
        return Refusal.SKIPPED
    end = placement.start + record.num_tokens - placement.skip
    if end > last:
        return Refusal.FRESH_TURN
    if tuple(prompt_token_ids[placement.start : end]) != record.token_ids[placement.skip :]:
        return Refusal.TOKENS
    return None
