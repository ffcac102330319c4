"""Where chunks are had from, fastest first: ``device``, ``host``, ``warm`` and ``disk``.

The disk has every chunk; the tiers in memory hold copies of some, each of its own number of bytes at most.
What is pushed out of one is therefore never lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.storage.codecs import Codec, Payload
from kv_agent.storage.policy import Policy, Usage
from kv_agent.storage.ranking import Ranking

_LOSSLESS = Codec(name="raw+zstd")


class StoredChunk(Protocol):
    """What a tier in memory has to know of a chunk that is looked up in it."""

    @property
    def key(self) -> ChunkKey: ...
    @property
    def checksum(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...


class Loaded(NamedTuple):
    """A chunk for another place than its own: its keys are still to be moved by ``delta`` positions."""

    kv_L2THD: Tensor
    delta: int


class Tier(Protocol):
    """One place that chunks are had from. Thread-safe."""

    @property
    def name(self) -> str: ...

    def counts(self) -> dict[str, int]:
        """``bytes`` and ``chunks`` that are here, the ``limit`` in bytes, ``hits`` so far and, in memory,
        ``promotions`` into this tier and ``demotions`` out of it.
        """


class DiskTier:
    """The blobs: ``read`` gives a chunk, moved or not, or raises; ``counts`` tells what is on disk."""

    name = "disk"

    def __init__(
        self, read: Callable[[ChunkRecord, int], Loaded], counts: Callable[[], Mapping[str, int]]
    ) -> None:
        self._read = read
        self._counts = counts
        self._hits = 0
        self._lock = threading.Lock()

    def get(self, record: ChunkRecord, delta: int) -> Loaded:
        """See :meth:`kv_agent.storage.store.LocalStore.load`."""
        loaded = self._read(record, delta)
        with self._lock:
            self._hits += 1
        return loaded

    def counts(self) -> dict[str, int]:
        return {**self._counts(), "hits": self._hits}


class Form(Protocol):
    """How a tier in memory holds KV."""

    shrinks: ClassVar[bool]  # so that only trying tells how many bytes it takes

    def hold(self, kv_L2THD: Tensor) -> Payload:
        """The KV in memory that nothing larger shares."""

    def give(self, payload: Payload) -> Tensor:
        """What was held, bit for bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """In the memory of a GPU. Not run on a GPU yet."""

    shrinks: ClassVar[bool] = False
    device: torch.device

    def hold(self, kv_L2THD: Tensor) -> Tensor:
        if kv_L2THD.device == self.device and _is_alone(kv_L2THD):
            return kv_L2THD
        held = torch.empty(kv_L2THD.shape, dtype=kv_L2THD.dtype, device=self.device)
        held.copy_(kv_L2THD, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()  # others use it on streams of their own
        return held

    def give(self, payload: Payload) -> Tensor:
        assert isinstance(payload, Tensor)
        return payload


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHost:
    """In host memory as it is; ``pinned``, so that a GPU reads it without a detour, not run on a GPU yet."""

    shrinks: ClassVar[bool] = False
    pinned: bool

    def hold(self, kv_L2THD: Tensor) -> Tensor:
        is_here = kv_L2THD.device.type == "cpu" and (not self.pinned or kv_L2THD.is_pinned())
        if is_here and _is_alone(kv_L2THD):
            return kv_L2THD
        held = torch.empty(kv_L2THD.shape, dtype=kv_L2THD.dtype, pin_memory=self.pinned)
        held.copy_(kv_L2THD, non_blocking=True)
        if kv_L2THD.is_cuda:
            torch.cuda.current_stream(kv_L2THD.device).synchronize()  # it is read as soon as it is held
        return held

    def give(self, payload: Payload) -> Tensor:
        assert isinstance(payload, Tensor)
        return payload


def _is_alone(kv_L2THD: Tensor) -> bool:
    """Whether it is no view of a larger buffer."""
    return kv_L2THD.untyped_storage().nbytes() == kv_L2THD.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """In host memory, without loss in fewer bytes."""

    shrinks: ClassVar[bool] = True

    def hold(self, kv_L2THD: Tensor) -> Payload:
        return _LOSSLESS.encode(kv_L2THD.cpu(), start=0)

    def give(self, payload: Payload) -> Tensor:
        return _LOSSLESS.decode(payload, start=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """A chunk in a tier; ``checksum`` tells its bytes from others that are stored under its key."""

    key: ChunkKey
    checksum: str
    payload: Payload
    usage: Usage


class TierWatcher(Protocol):
    """Is told what comes into a tier and goes, at once and in that order; must not ask the tier anything."""

    def entered(self, key: ChunkKey, checksum: str, kv_L2THD: Tensor) -> None: ...
    def left(self, key: ChunkKey) -> None: ...


class MemoryTier:
    """Copies of chunks in one form and ``limit_bytes`` at most; beyond, those of the lowest rank go.

    Thread-safe. A chunk of the same rank as another goes if it was put or got before that.
    """

    def __init__(
        self, name: str, limit_bytes: int, form: Form, policy: Policy, clock: Callable[[], float]
    ) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes of tier {name} must be >= 0, got {limit_bytes}")
        self.name = name
        self.limit_bytes = limit_bytes
        self._form = form
        self._policy = policy
        self._clock = clock
        self._used_bytes = 0
        self._held: dict[ChunkKey, Held] = {}
        self._ranking = Ranking()
        self._hits = self._promotions = self._demotions = 0
        self._watcher: TierWatcher | None = None
        self._lock = threading.Lock()

    def watch(self, watcher: TierWatcher) -> None:
        """Tell ``watcher`` of all that comes from now on, if it is here as a tensor."""
        with self._lock:
            self._watcher = None if self._form.shrinks else watcher

    def get(self, chunk: StoredChunk) -> Tensor | None:
        """The chunk as it was stored, never to be modified, or ``None`` if it is not here."""
        with self._lock:
            held = self._note_use(chunk)
        return None if held is None else self._form.give(held.payload)

    def note_uses(self, chunks: Iterable[StoredChunk]) -> list[StoredChunk]:
        """Count look-ups of chunks that somebody has in hand -> those that are not here."""
        with self._lock:
            return [chunk for chunk in chunks if self._note_use(chunk) is None]

    def hold(self, kv_L2THD: Tensor) -> Payload | None:
        """The KV in this tier's form, not yet in it; ``None`` if there is no room, whatever goes."""
        if kv_L2THD.nbytes > self.limit_bytes and not self._form.shrinks:
            return None
        try:
            payload = self._form.hold(kv_L2THD)
        except torch.OutOfMemoryError:  # the engine needs the GPU's memory more
            return None
        return payload if payload.nbytes <= self.limit_bytes else None

    def give(self, held: Held) -> Tensor:
        """The KV of a chunk that was in this tier."""
        return self._form.give(held.payload)

    def put(self, held: Held, *, is_promotion: bool = False) -> list[Held]:
        """Keep what :meth:`hold` made, in place of an older copy -> what had to go, perhaps itself."""
        gone: list[Held] = []
        with self._lock:
            self._take(held.key)
            self._held[held.key] = held
            self._used_bytes += held.payload.nbytes
            self._ranking.put(held.key, self._policy.rank(held.usage))
            if self._watcher is not None and isinstance(held.payload, Tensor):
                self._watcher.entered(held.key, held.checksum, held.payload)
            self._promotions += is_promotion
            while self._used_bytes > self.limit_bytes:
                lowest = self._take(self._ranking.lowest())
                assert lowest is not None
                gone.append(lowest)
            self._demotions += len(gone)
        return gone

    def take(self, key: ChunkKey) -> Held | None:
        """Remove a chunk and return it, if it is here."""
        with self._lock:
            return self._take(key)

    def chunk_keys(self) -> set[ChunkKey]:
        """All chunks that are here."""
        with self._lock:
            return set(self._held)

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {
                "bytes": self._used_bytes,
                "chunks": len(self._held),
                "limit": self.limit_bytes,
                "hits": self._hits,
                "promotions": self._promotions,
                "demotions": self._demotions,
            }

    def _note_use(self, chunk: StoredChunk) -> Held | None:
        held = self._held.get(chunk.key)
        if held is None or held.checksum != chunk.checksum:
            return None
        usage = replace(held.usage, last_used=self._clock(), num_hits=held.usage.num_hits + 1)
        self._held[chunk.key] = replace(held, usage=usage)
        self._ranking.put(chunk.key, self._policy.rank(usage))
        self._hits += 1
        return held

    def _take(self, key: ChunkKey) -> Held | None:
        held = self._held.pop(key, None)
        if held is not None:
            self._ranking.remove(key)
            self._used_bytes -= held.payload.nbytes
            if self._watcher is not None:
                self._watcher.left(key)
        return held
