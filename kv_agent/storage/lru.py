"""Chunks kept in memory, bounded in bytes, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from kv_agent.chunks import ChunkKey


class ChunkCache:
    """Thread-safe LRU of chunk tensors; ``limit_bytes`` 0 keeps nothing. Nobody modifies a cached tensor."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes must be >= 0, got {limit_bytes}")
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._tensors: OrderedDict[ChunkKey, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: ChunkKey) -> Tensor | None:
        """The tensor, which becomes the most recently used, or ``None``."""
        with self._lock:
            tensor = self._tensors.get(key)
            if tensor is not None:
                self._tensors.move_to_end(key)
            return tensor

    def put(self, key: ChunkKey, tensor: Tensor) -> None:
        """Keep ``tensor`` in place of an older one; one larger than the limit is not kept."""
        fits = tensor.nbytes <= self.limit_bytes and self.limit_bytes > 0
        if fits and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view would keep its whole buffer alive, uncounted
        with self._lock:
            self._remove(key)
            if not fits:
                return
            self._tensors[key] = tensor
            self._used_bytes += tensor.nbytes
            while self._used_bytes > self.limit_bytes:
                self._remove(next(iter(self._tensors)))

    def discard(self, key: ChunkKey) -> None:
        """Drop a tensor; an absent one is fine."""
        with self._lock:
            self._remove(key)

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._used_bytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._tensors)

    def _remove(self, key: ChunkKey) -> None:
        tensor = self._tensors.pop(key, None)
        if tensor is not None:
            self._used_bytes -= tensor.nbytes
