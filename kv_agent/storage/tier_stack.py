"""The order of the tiers: a look-up moves a chunk up, pressure moves others down.

Tiers in memory are exclusive: at most one of them has a copy of a chunk. What a tier can no longer hold
goes to the next one that can, and from the last to the disk alone, where it is anyway. Copies move down in
the background, because compressing one takes longer than reading it; a look-up reads the disk meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.errors import ConfigError, CorruptChunkError
from kv_agent.machine import give_back_freed_memory
from kv_agent.storage.policy import Policy, Usage
from kv_agent.storage.ranking import AccessWindow
from kv_agent.storage.tiers import (
    Compressed,
    DiskTier,
    Form,
    Held,
    Loaded,
    MemoryTier,
    OnDevice,
    OnHost,
    StoredChunk,
    Tier,
    TierWatcher,
)

logger = logging.getLogger(__name__)

DEVICE = "device"
# Bytes on their way down at most. What is pushed out faster than it can be compressed is on disk alone.
MAX_MOVING_BYTES = 64 << 20
_GIVEN_BACK_BYTES = 64 << 20  # that left the tiers: their memory goes back to the system at once


class Move:
    """A chunk on its way into a tier; ``is_off`` once it was discarded or another copy came first."""

    def __init__(self) -> None:
        self.is_off = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    """What is on its way; ``usage`` counts from now unless a tier has a copy that was used before."""

    key: ChunkKey
    checksum: str
    kv_L2THD: Tensor
    usage: Usage


def memory_tiers(
    *,
    device_bytes: int,
    host_bytes: int,
    warm_bytes: int,
    device: torch.device | None,
    policy: Policy,
    clock: Callable[[], float] = time.monotonic,
) -> list[MemoryTier]:
    """The tiers that have bytes, fastest first; ``device`` is where KV is needed, if not on the CPU."""
    gpu = device if device is not None and device.type != "cpu" else None
    forms: list[tuple[str, int, Form]] = [
        ("host", host_bytes, OnHost(pinned=gpu is not None)),
        ("warm", warm_bytes, Compressed()),
    ]
    if gpu is not None:
        forms.insert(0, (DEVICE, device_bytes, OnDevice(device=gpu)))
    elif device_bytes:
        raise ConfigError("device_bytes needs a GPU, this engine runs on CPU; set host_bytes instead")
    return [MemoryTier(name, limit, form, policy, clock) for name, limit, form in forms if limit]


class TierStack:
    """Tiers in memory, fastest first, above the disk. Thread-safe.

    What is stored enters the first that can hold it on the host: a GPU's memory is for what is asked for.
    """

    def __init__(
        self,
        memory: Sequence[MemoryTier],
        disk: DiskTier,
        accesses: AccessWindow,
        background: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_moving_bytes: int = MAX_MOVING_BYTES,
    ) -> None:
        self._memory = tuple(memory)
        self._disk = disk
        self._accesses = accesses
        self._entry = int(bool(memory) and memory[0].name == DEVICE)
        self._background = background
        self._clock = clock
        self._max_moving_bytes = max_moving_bytes
        self._moving_bytes = 0
        self._left_bytes = 0  # since memory was given back
        self._moves: dict[ChunkKey, set[Move]] = {}
        self._lock = threading.Lock()

    def load(self, record: ChunkRecord, delta: int = 0) -> Loaded:
        """The chunk from the fastest tier that has it or, by this look-up, gets it; never modify it.

        What is read for this look-up alone is moved by ``delta`` where that takes no pass of its own; a tier
        keeps chunks where they were computed. Raises what the disk raises.
        """
        with self._look_up(record) as (move, moves_up):
            moves_up = moves_up and bool(self._memory)
            if (found := self._found(record)) is None:
                if not moves_up:
                    return self._disk.get(record, delta)
                found = len(self._memory), self._disk.get(record, 0).kv_L2THD
            return Loaded(self._moved_up(move, record, *found) if moves_up else found[1], delta)

    def note_uses(self, chunks: Sequence[StoredChunk]) -> None:
        """Look-ups of chunks that somebody has in hand: they count where a tier in memory has a copy."""
        elsewhere = self._memory[0].note_uses(chunks) if self._memory else []
        missed = {chunk.key for chunk in elsewhere}
        with self._lock:
            for chunk in chunks:
                if chunk.key not in missed:  # it is as far up as it can be
                    self._accesses.note(chunk.key)
        for chunk in elsewhere:
            with self._look_up(chunk) as (move, moves_up):
                if (found := self._found(chunk)) is not None and moves_up:
                    self._moved_up(move, chunk, *found)

    def watch(self, watcher: TierWatcher) -> None:
        """Tell ``watcher`` which chunks are in memory as they are, of all that come from now on."""
        for tier in self._memory:
            tier.watch(watcher)

    @contextmanager
    def entering(self, keys: Iterable[ChunkKey]) -> Iterator[Mapping[ChunkKey, Move]]:
        """Moves of chunks that are about to be stored: who forgets one at once keeps its copy out, too."""
        with ExitStack() as stack:
            yield {key: stack.enter_context(self._moving(key)) for key in keys}

    def put(self, record: ChunkRecord, kv_L2THD: Tensor, move: Move) -> None:
        """Keep a copy of a chunk that is on the disk now; ``kv_L2THD`` is never modified afterwards."""
        chunk = self._chunk(record, kv_L2THD, num_hits=0)
        self._place(move, chunk, range(self._entry, len(self._memory)), is_promotion=False)

    def discard(self, key: ChunkKey) -> None:
        """Drop the copy of a chunk, one that is on its way, too; an absent one is fine."""
        with self._lock:
            self._call_off(key)
            for tier in self._memory:
                tier.take(key)

    def chunk_keys(self) -> set[ChunkKey]:
        """All chunks that a tier in memory has a copy of."""
        return {key for tier in self._memory for key in tier.chunk_keys()}

    def counts(self) -> dict[str, int]:
        """What every tier counts, as ``tier_NAME_WHAT``, and ``tiers_moving_bytes``: between two of them."""
        tiers: list[Tier] = [*self._memory, self._disk]
        counts = {
            f"tier_{tier.name}_{what}": count for tier in tiers for what, count in tier.counts().items()
        }
        with self._lock:
            return counts | {"tiers_moving_bytes": self._moving_bytes}

    def memory_counts(self) -> dict[str, dict[str, int]]:
        """What every tier in memory counts; asks neither disk nor catalog."""
        return {tier.name: tier.counts() for tier in self._memory}

    def close(self) -> None:
        """Wait for the copy that moves down now; others on their way are dropped. Twice is harmless."""
        self._background.shutdown(cancel_futures=True)

    def _chunk(self, stored: StoredChunk, kv_L2THD: Tensor, num_hits: int) -> _Chunk:
        now = self._clock()
        usage = Usage(
            num_bytes=kv_L2THD.nbytes,
            num_tokens=stored.num_tokens,
            created=now,
            last_used=now,
            num_hits=num_hits,
        )
        return _Chunk(key=stored.key, checksum=stored.checksum, kv_L2THD=kv_L2THD, usage=usage)

    @contextmanager
    def _look_up(self, chunk: StoredChunk) -> Iterator[tuple[Move, bool]]:
        """A move that may be made of it, and whether it is asked for often enough to be made."""
        with self._lock:
            moves_up = self._accesses.note(chunk.key)
        with self._moving(chunk.key) as move:
            yield move, moves_up

    def _moved_up(self, move: Move, stored: StoredChunk, tier_idx: int, kv_L2THD: Tensor) -> Tensor:
        """What that tier gave, put into a faster one if there is one."""
        chunk = self._chunk(stored, kv_L2THD, num_hits=1)
        return self._place(move, chunk, range(tier_idx), is_promotion=True)

    def _found(self, chunk: StoredChunk) -> tuple[int, Tensor] | None:
        """The chunk, and the index of the tier in memory that gave it."""
        for tier_idx, tier in enumerate(self._memory):
            try:
                kv_L2THD = tier.get(chunk)
            except CorruptChunkError as err:  # bad memory, which says nothing about the disk
                about = {"event": "chunk_damaged", "tier": tier.name, "chunk": chunk.key[:8]}
                logger.warning("tier %s loses chunk %s: %s", tier.name, chunk.key[:8], err, extra=about)
                self.discard(chunk.key)
                continue
            if kv_L2THD is not None:
                return tier_idx, kv_L2THD
        return None

    def _place(self, move: Move, chunk: _Chunk, tiers: range, *, is_promotion: bool) -> Tensor:
        """Put a chunk into the first of these tiers that can hold it -> as it is there, or still on a GPU.

        What it pushes out goes further down later. Nothing happens if the move is called off.
        """
        for tier_idx in tiers:
            tier = self._memory[tier_idx]
            if (payload := tier.hold(chunk.kv_L2THD)) is not None:
                break
        else:
            return chunk.kv_L2THD
        below = range(tier_idx + 1, len(self._memory))
        with self._lock:
            if move.is_off:
                return chunk.kv_L2THD
            older = [held for one in self._memory if (held := one.take(chunk.key)) is not None]
            self._call_off(chunk.key)
            usage = older[0].usage if older else chunk.usage
            held = Held(key=chunk.key, checksum=chunk.checksum, payload=payload, usage=usage)
            gone = tier.put(held, is_promotion=is_promotion)
            moves = [(one, self._begin(one.key)) for one in gone if below and self._may_move(one)]
            self._left_bytes += sum(one.payload.nbytes for one in gone)
            if gives_back := self._left_bytes >= _GIVEN_BACK_BYTES:
                self._left_bytes = 0
        for one, move_down in moves:
            try:
                self._background.submit(self._push_down, one, move_down, tier, below)
            except RuntimeError:  # closed meanwhile
                self._arrived(one, move_down)
        if gives_back:
            with suppress(RuntimeError):
                self._background.submit(give_back_freed_memory)
        if isinstance(payload, Tensor) and chunk.kv_L2THD.device.type == "cpu":
            return payload
        return chunk.kv_L2THD

    def _push_down(self, held: Held, move: Move, tier: MemoryTier, below: range) -> None:
        try:
            kv_L2THD = tier.give(held)
            chunk = _Chunk(key=held.key, checksum=held.checksum, kv_L2THD=kv_L2THD, usage=held.usage)
            self._place(move, chunk, below, is_promotion=False)
        except Exception:  # nobody waits for it, and the chunk is on disk
            logger.exception(
                "chunk %s could not be moved down from tier %s",
                held.key[:8],
                tier.name,
                extra={"event": "error", "tier": tier.name, "chunk": held.key[:8]},
            )
        finally:
            self._arrived(held, move)

    def _may_move(self, held: Held) -> bool:
        num_bytes = held.payload.nbytes
        if self._moving_bytes and self._moving_bytes + num_bytes > self._max_moving_bytes:
            return False
        self._moving_bytes += num_bytes
        return True

    def _arrived(self, held: Held, move: Move) -> None:
        self._end(held.key, move)
        with self._lock:
            self._moving_bytes -= held.payload.nbytes

    @contextmanager
    def _moving(self, key: ChunkKey) -> Iterator[Move]:
        with self._lock:
            move = self._begin(key)
        try:
            yield move
        finally:
            self._end(key, move)

    def _begin(self, key: ChunkKey) -> Move:
        move = Move()
        self._moves.setdefault(key, set()).add(move)
        return move

    def _end(self, key: ChunkKey, move: Move) -> None:
        with self._lock:
            moves = self._moves.get(key, set())
            moves.discard(move)
            if not moves:
                self._moves.pop(key, None)

    def _call_off(self, key: ChunkKey) -> None:
        for move in self._moves.pop(key, ()):
            move.is_off = True
