"""A store with limits as plain dictionaries: every sum is made anew, every turn goes by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_agent.chunks import Scope
from kv_agent.storage.policy import Usage
from kv_agent.storage.retention import Retention
from kv_agent.storage.store import NewChunk

NOTHING = Retention()


@dataclass(slots=True, kw_only=True)
class PlainTurn:
    scope: Scope
    content: tuple[str, ...]
    context: set[str]
    num_tokens: int
    created: float
    last_used: float
    expires: float | None
    pinned: bool = False
    hits: int = 0


@dataclass(slots=True, kw_only=True)
class PlainChunk:
    namespace: str
    num_bytes: int
    num_tokens: int
    blob: str


@dataclass(slots=True, kw_only=True)
class PlainStore:
    """``ranks`` are the policies by name, ``policy`` the name of the one for who names none."""

    ranks: dict[str, Callable[[Usage], float]]
    policy: str
    disk_bytes: int
    limits: dict[str | None, Retention] = field(default_factory=dict)
    turns: dict[str, PlainTurn] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    chunks: dict[str, PlainChunk] = field(default_factory=dict)
    blobs: dict[str, int] = field(default_factory=dict)
    evicted: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def put(
        self, turn_id: str, turn: PlainTurn, context: Sequence[NewChunk], content: Sequence[NewChunk]
    ) -> None:
        limits, scope = self.limits_of(turn.scope.namespace), turn.scope
        if turn.expires is None and limits.ttl_s is not None:
            turn.expires = turn.created + limits.ttl_s
        for chunk in (*context, *content):
            if chunk.key not in self.chunks:
                self.chunks[chunk.key] = PlainChunk(
                    namespace=scope.namespace,
                    num_bytes=chunk.kv.nbytes,
                    num_tokens=len(chunk.token_ids),
                    blob=turn_id,
                )
                self.blobs[turn_id] = self.blobs.get(turn_id, 0) + chunk.kv.nbytes
        same = [k for k, old in self.turns.items() if (old.scope, old.content) == (scope, turn.content)]
        stored = same[0] if same else turn_id
        if same:
            old = self.turns[stored]
            self.aliases[turn_id] = stored
            old.context |= turn.context
            old.pinned |= turn.pinned
            old.last_used = max(old.last_used, turn.created)
            if old.expires is not None:
                old.expires = None if turn.expires is None else max(old.expires, turn.expires)
        else:
            self.turns[turn_id] = turn
        if limits.window_tokens is not None and scope.session_id is not None:
            self.slide(scope, limits.window_tokens)
        self.shrink(scope.namespace, limits, stored, not same)
        disk = Retention(max_bytes=self.disk_bytes, policy=self.limits.get(None, NOTHING).policy)
        self.shrink(None, disk, stored, not same)

    def limits_of(self, namespace: str) -> Retention:
        return self.limits.get(namespace, self.limits.get(None, NOTHING))

    def slide(self, scope: Scope, window_tokens: int) -> None:
        session = [turn_id for turn_id, turn in self.turns.items() if turn.scope == scope and turn.num_tokens]
        session.sort(key=lambda turn_id: (self.turns[turn_id].created, turn_id), reverse=True)
        for place in range(1, len(session)):
            newer_and_it = sum(self.turns[turn_id].num_tokens for turn_id in session[: place + 1])
            if newer_and_it > window_tokens and not self.turns[session[place]].pinned:
                self.evicted.append(session[place])
        self.forget([turn_id for turn_id in session if turn_id in self.evicted])

    def shrink(self, namespace: str | None, limits: Retention, stored: str, is_new: bool) -> None:
        def over(part: float, held: tuple[int, int, int], which: Sequence[bool] = (True,) * 3) -> list[bool]:
            bounds = (limits.max_bytes, limits.max_tokens, limits.max_memories)
            return [
                one and bound is not None and amount > math.ceil(bound * part)
                for amount, bound, one in zip(held, bounds, which, strict=True)
            ]

        if not any(over(1, self.held(namespace))):
            return
        pinned = {k for k, turn in self.turns.items() if turn.pinned and self.within(turn, namespace)}
        can_go = is_new and stored in self.turns and stored not in pinned
        if can_go and any(over(1, self.sums({*pinned, stored}))):
            self.refused.append(stored)
            self.forget([stored])
        which = over(1, self.held(namespace))
        while any(over(0.95, self.held(namespace), which)):
            going = [
                turn_id
                for turn_id, turn in self.turns.items()
                if self.within(turn, namespace)
                and not turn.pinned
                and turn_id != stored
                and (which[0] or which[1] or turn.num_tokens)
            ]
            if not going:
                break
            rank = self.ranks[limits.policy or self.policy]
            first = min(
                going, key=lambda k: (not self.is_over(k), rank(self.usage(k)), self.turns[k].created, k)
            )
            self.evicted.append(first)
            self.forget([first])

    def within(self, turn: PlainTurn, namespace: str | None) -> bool:
        return namespace in (None, turn.scope.namespace)

    def is_over(self, turn_id: str) -> bool:
        """Whether its time is; everything here is either long ago or far in the future."""
        return (self.turns[turn_id].expires or 1e12) < 1e9

    def usage(self, turn_id: str) -> Usage:
        turn = self.turns[turn_id]
        return Usage(
            num_bytes=sum(self.chunks[key].num_bytes for key in turn.content),
            num_tokens=turn.num_tokens,
            created=turn.created,
            last_used=turn.last_used,
            num_hits=turn.hits,
        )

    def held(self, namespace: str | None) -> tuple[int, int, int]:
        if namespace is None:
            return (sum(self.blobs.values()), 0, 0)
        mine = [chunk for chunk in self.chunks.values() if chunk.namespace == namespace]
        memories = [t for t in self.turns.values() if t.num_tokens and t.scope.namespace == namespace]
        return (sum(c.num_bytes for c in mine), sum(c.num_tokens for c in mine), len(memories))

    def sums(self, turn_ids: set[str]) -> tuple[int, int, int]:
        """What these turns hold by themselves."""
        keys = {key for turn_id in turn_ids for key in self.keys_of(self.turns[turn_id])}
        memories = [turn_id for turn_id in turn_ids if self.turns[turn_id].num_tokens]
        chunks = [self.chunks[key] for key in keys]
        return (sum(c.num_bytes for c in chunks), sum(c.num_tokens for c in chunks), len(memories))

    def keys_of(self, turn: PlainTurn) -> set[str]:
        return {*turn.content, *turn.context}

    def forget(self, turn_ids: Sequence[str]) -> None:
        for turn_id in turn_ids:
            self.turns.pop(self.aliases.get(turn_id, turn_id), None)
        self.aliases = {alias: turn_id for alias, turn_id in self.aliases.items() if turn_id in self.turns}
        used = {key for turn in self.turns.values() for key in self.keys_of(turn)}
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if key in used}
        named = {chunk.blob for chunk in self.chunks.values()}
        self.blobs = {blob: num_bytes for blob, num_bytes in self.blobs.items() if blob in named}
