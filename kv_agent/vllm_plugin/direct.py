"""Moved KV straight into the blocks of a waiting request, from any thread."""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import BlockCopier
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into


class DirectWriter:
    """Writes chunks into the paged cache while the engine computes other requests. Thread-safe."""

    def __init__(self, copier: BlockCopier, scheme: RotaryScheme | None) -> None:
        self._copier = copier
        self._scheme = scheme
        self._mine = threading.local()

    def write(self, kv_L2THD: Tensor, block_ids: Sequence[int], start: int, delta: int) -> None:
        """Put KV at positions ``[start, start + T)``, ``delta`` higher than where it was computed.

        Nobody else may use these tokens' slots meanwhile.
        """
        key_LTHD = kv_L2THD[:, 0]
        if delta:
            if self._scheme is None:
                raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
            rotated_LTHD = self._buffer(key_LTHD)
            copy_rotated_into(rotated_LTHD, key_LTHD, delta, self._scheme)
            key_LTHD = rotated_LTHD
        self._copier.scatter(key_LTHD, kv_L2THD[:, 1], block_ids, start)

    def _buffer(self, key_LTHD: Tensor) -> Tensor:
        """Memory of this thread: what is new costs more than what is done with it here."""
        held: Tensor | None = getattr(self._mine, "buffer", None)
        if held is None or held.numel() < key_LTHD.numel():
            held = self._mine.buffer = torch.empty(key_LTHD.numel(), dtype=key_LTHD.dtype)
        return held[: key_LTHD.numel()].view(key_LTHD.shape)
