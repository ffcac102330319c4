"""KV of neighbouring chunks side by side, so that the attention backend's writer is called once for many.

A backend takes as long to be called as to write some thirty tokens, and it is called for every layer. The
buffer stays, too: memory that is new costs more than what is done with it here.
"""

# L layers, l of them, 2 = (key, value), T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into
from kv_agent.vllm_plugin.paged_cache import PagedCache

STAGING_BYTES = 8 << 20


class Staging:
    """Rotates pieces into one buffer and writes that to the cache, the layers given. Not thread-safe.

    All layers by default. Raises :class:`UnsupportedModelError` for a move without a ``scheme``.
    """

    def __init__(
        self,
        cache: PagedCache,
        scheme: RotaryScheme | None,
        limit_bytes: int = STAGING_BYTES,
        *,
        layers: slice = slice(None),
    ) -> None:
        self._cache = cache
        self._scheme = scheme
        self._layers = layers
        num_layers = len(range(cache.num_layers)[layers])
        self._capacity = max(1, limit_bytes * cache.num_layers // (cache.token_bytes * num_layers))  # tokens
        self._buffer_l2THD: Tensor | None = None
        self._start = self._filled = 0

    def write(self, pieces: Iterable[Piece], block_ids: Sequence[int]) -> None:
        """Put all of them into the cache; they may be modified afterwards."""
        self._filled = 0
        for piece in pieces:
            done, num_tokens = 0, piece.kv_L2THD.shape[2]
            while done < num_tokens:
                position = piece.start + done
                if self._filled == self._capacity or position != self._start + self._filled:
                    self._flush(block_ids)
                    self._start = position
                count = min(num_tokens - done, self._capacity - self._filled)
                self._add(piece.kv_L2THD[self._layers, :, done : done + count], piece.delta)
                done += count
        self._flush(block_ids)

    def _add(self, kv_l2THD: Tensor, delta: int) -> None:
        kv_l2THD = kv_l2THD.to(self._cache.device, non_blocking=True)
        out_l2THD = self._buffer(kv_l2THD)[:, :, self._filled : self._filled + kv_l2THD.shape[2]]
        out_l2THD[:, 1] = kv_l2THD[:, 1]
        if delta == 0:
            out_l2THD[:, 0] = kv_l2THD[:, 0]
        elif self._scheme is None:
            raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
        else:
            copy_rotated_into(out_l2THD[:, 0], kv_l2THD[:, 0], delta, self._scheme)
        self._filled += kv_l2THD.shape[2]

    def _flush(self, block_ids: Sequence[int]) -> None:
        if self._filled and self._buffer_l2THD is not None:
            kv_l2THD = self._buffer_l2THD[:, :, : self._filled]
            self._cache.write(kv_l2THD, block_ids, self._start, self._layers)
        self._filled = 0

    def _buffer(self, kv_l2THD: Tensor) -> Tensor:
        if self._buffer_l2THD is None:
            layers, two, _, H, D = kv_l2THD.shape
            shape = (layers, two, self._capacity, H, D)
            self._buffer_l2THD = torch.empty(shape, dtype=kv_l2THD.dtype, device=kv_l2THD.device)
        return self._buffer_l2THD
