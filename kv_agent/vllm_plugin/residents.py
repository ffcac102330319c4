"""Which chunks are in memory, told to the scheduler, and held until it has heard that they no longer are.

So what the scheduler lets vLLM compute on at once is there when the worker comes to it, whatever was pushed
out of the tiers meanwhile: there is no second place to look and nothing that can fail.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kv_agent.chunks import ChunkKey
from kv_agent.storage.tiers import StoredChunk
from kv_agent.vllm_plugin.jobs import ResidentChanges


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Resident:
    checksum: str
    kv_L2THD: Tensor


class Residents:
    """Told by the tiers what comes and goes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[ChunkKey, _Resident] = {}
        self._changed: dict[ChunkKey, str | None] = {}
        self._told: set[ChunkKey] = set()
        self._leaving: list[tuple[ChunkKey, _Resident]] = []  # the scheduler is still to be told
        self._gone: dict[int, list[tuple[ChunkKey, _Resident]]] = {}  # it may not have heard yet, by report
        self._number = 0

    def entered(self, key: ChunkKey, checksum: str, kv_L2THD: Tensor) -> None:
        """A tier has a copy of the chunk now."""
        with self._lock:
            self._held[key] = _Resident(checksum=checksum, kv_L2THD=kv_L2THD)
            self._changed[key] = checksum

    def left(self, key: ChunkKey) -> None:
        """No tier has one any more, unless it tells so next."""
        with self._lock:
            resident = self._held.pop(key, None)
            if resident is None:  # it came before anybody listened
                return
            if key in self._told:
                self._leaving.append((key, resident))
                self._changed[key] = None
            else:
                del self._changed[key]

    def get(self, chunks: Sequence[StoredChunk]) -> list[Tensor]:
        """The chunks that the scheduler was told of; raises :class:`LookupError` if it never was."""
        with self._lock:
            return [self._get(chunk.key, chunk.checksum) for chunk in chunks]

    def take_changes(self) -> ResidentChanges | None:
        """What the scheduler is to be told."""
        with self._lock:
            if not self._changed:
                return None
            self._number += 1
            changes = ResidentChanges(number=self._number, checksums=self._changed)
            for key, checksum in self._changed.items():
                if checksum is None:
                    self._told.discard(key)
                else:
                    self._told.add(key)
            self._gone[self._number] = self._leaving
            self._changed, self._leaving = {}, []
            return changes

    def heard(self, number: int) -> None:
        """The scheduler has heard all reports up to this one."""
        with self._lock:
            for known in [one for one in self._gone if one <= number]:
                del self._gone[known]

    def _get(self, key: ChunkKey, checksum: str) -> Tensor:
        resident = self._held.get(key)
        if resident is not None and resident.checksum == checksum:
            return resident.kv_L2THD
        for pairs in (self._leaving, *self._gone.values()):
            for known, resident in pairs:
                if known == key and resident.checksum == checksum:
                    return resident.kv_L2THD
        raise LookupError(f"chunk {key[:8]} is not in memory")
