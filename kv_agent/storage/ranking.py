"""Which chunks were asked for lately, and which goes first: bookkeeping without I/O. Not thread-safe."""

from __future__ import annotations

import heapq
from collections import Counter, deque

from kv_agent.chunks import ChunkKey
from kv_agent.errors import ConfigError

WINDOW = 1024  # look-ups


class AccessWindow:
    """Which chunks were asked for at least ``promote_after`` times within the last ``window`` look-ups.

    With 1 every look-up moves a chunk up; with 2 one scan over many cold chunks leaves the hot ones alone.
    """

    def __init__(self, promote_after: int, window: int = WINDOW) -> None:
        if not 1 <= promote_after <= window:
            raise ConfigError(f"promote_after must be 1 to {window}, got {promote_after}")
        self._promote_after = promote_after
        self._size = window
        self._recent: deque[ChunkKey] = deque()
        self._counts: Counter[ChunkKey] = Counter()

    def note(self, key: ChunkKey) -> bool:
        """Count a look-up -> whether the chunk may move up."""
        self._recent.append(key)
        self._counts[key] += 1
        if len(self._recent) > self._size:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        return self._counts[key] >= self._promote_after


class Ranking:
    """Which key has the lowest rank, and of several the one that has had it for longest."""

    def __init__(self) -> None:
        self._entries: dict[ChunkKey, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, ChunkKey]] = []
        self._count = 0

    def put(self, key: ChunkKey, rank: float) -> None:
        """Give a key a rank, in place of an older one."""
        self._count += 1
        self._entries[key] = (rank, self._count)
        heapq.heappush(self._heap, (rank, self._count, key))
        if len(self._heap) > 2 * len(self._entries) + 64:  # most of them are out of date
            self._heap = [(rank, count, key) for key, (rank, count) in self._entries.items()]
            heapq.heapify(self._heap)

    def remove(self, key: ChunkKey) -> None:
        del self._entries[key]

    def lowest(self) -> ChunkKey:
        """Raises :class:`IndexError` when there is none."""
        while True:
            rank, count, key = self._heap[0]
            if self._entries.get(key) == (rank, count):
                return key
            heapq.heappop(self._heap)
