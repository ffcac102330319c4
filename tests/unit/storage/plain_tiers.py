"""Tiers in plain Python, written as plainly as can be: every eviction looks at everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kv_agent.chunks import ChunkKey
from kv_agent.storage.policy import Policy, Usage
from kv_agent.storage.store import NewChunk
from tests.unit.storage.builders import kv_of
from tests.unit.storage.tier_parts import packed_bytes

NAMES = ("device", "host", "warm")


@dataclass(slots=True)
class Copy:
    size: int
    usage: Usage
    step: int


@dataclass(slots=True)
class Room:
    """One tier in plain Python."""

    limit: int
    is_packed: bool
    copies: dict[ChunkKey, Copy] = field(default_factory=dict)
    hits: int = 0
    promotions: int = 0
    demotions: int = 0

    @property
    def used(self) -> int:
        return sum(copy.size for copy in self.copies.values())

    def counts(self) -> dict[str, int]:
        return {
            "bytes": self.used,
            "chunks": len(self.copies),
            "limit": self.limit,
            "hits": self.hits,
            "promotions": self.promotions,
            "demotions": self.demotions,
        }


class PlainTiers:
    """What tiers in memory above a disk with all ``chunks`` must do."""

    def __init__(
        self,
        limits: Sequence[int],
        policy: Policy,
        promote_after: int,
        window: int,
        chunks: Mapping[ChunkKey, NewChunk],
    ) -> None:
        self.rooms = [Room(limit, name == "warm") for limit, name in zip(limits, NAMES, strict=True)]
        self.policy = policy
        self.promote_after, self.window = promote_after, window
        self.chunks = chunks
        self.asked: list[ChunkKey] = []
        self.disk_hits = self.step = 0

    def load(self, chunk: NewChunk, now: float) -> None:
        self.asked.append(chunk.key)
        climbs = self.asked[-self.window :].count(chunk.key) >= self.promote_after
        here = next((i for i, room in enumerate(self.rooms) if chunk.key in room.copies), len(self.rooms))
        if here < len(self.rooms):
            self.rooms[here].hits += 1
            copy = self.rooms[here].copies[chunk.key]
            copy.usage = replace(copy.usage, last_used=now, num_hits=copy.usage.num_hits + 1)
            copy.step = self._next_step()
            usage = copy.usage
        else:
            self.disk_hits += 1
            usage = self._usage(chunk, now, 1)
        if climbs:
            self._place(chunk, usage, range(here), is_promotion=True)

    def note_uses(self, chunks: Sequence[NewChunk], now: float) -> None:
        """Those that are as far up as they can be come first."""
        up = [chunk for chunk in chunks if chunk.key in self.rooms[0].copies]
        for chunk in (*up, *(one for one in chunks if one not in up)):
            if any(chunk.key in room.copies for room in self.rooms):
                self.load(chunk, now)
            else:
                self.asked.append(chunk.key)

    def put(self, chunk: NewChunk, now: float) -> None:
        self._place(chunk, self._usage(chunk, now, 0), range(1, len(self.rooms)), is_promotion=False)

    def discard(self, key: ChunkKey) -> None:
        for room in self.rooms:
            room.copies.pop(key, None)

    def counts(self) -> dict[str, int]:
        return {
            **{
                f"tier_{name}_{what}": count
                for name, room in zip(NAMES, self.rooms, strict=True)
                if room.limit
                for what, count in room.counts().items()
            },
            "tiers_moving_bytes": 0,
            "tier_disk_bytes": sum(kv_of(chunk).nbytes for chunk in self.chunks.values()),
            "tier_disk_chunks": len(self.chunks),
            "tier_disk_hits": self.disk_hits,
        }

    def _place(self, chunk: NewChunk, usage: Usage, rooms: range, *, is_promotion: bool) -> None:
        for i in rooms:
            room = self.rooms[i]
            size = packed_bytes(chunk) if room.is_packed else kv_of(chunk).nbytes
            if size <= room.limit and room.limit:
                break
        else:
            return
        for other in self.rooms:
            if (old := other.copies.pop(chunk.key, None)) is not None:
                usage = old.usage
        room.copies[chunk.key] = Copy(size, usage, self._next_step())
        room.promotions += is_promotion
        gone = []
        while room.used > room.limit:
            lowest = min(
                room.copies,
                key=lambda key: (self.policy.rank(room.copies[key].usage), room.copies[key].step),
            )
            gone.append((lowest, room.copies.pop(lowest)))
        room.demotions += len(gone)
        for key, copy in gone:
            below = range(i + 1, len(self.rooms))
            self._place(self.chunks[key], copy.usage, below, is_promotion=False)

    def _usage(self, chunk: NewChunk, now: float, num_hits: int) -> Usage:
        return Usage(
            num_bytes=kv_of(chunk).nbytes,
            num_tokens=len(chunk.token_ids),
            created=now,
            last_used=now,
            num_hits=num_hits,
        )

    def _next_step(self) -> int:
        self.step += 1
        return self.step
