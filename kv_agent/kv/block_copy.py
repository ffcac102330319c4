"""Between plain KV and the blocks of an engine's paged cache: all layers in one call, by the block's layout.

For caches on the CPU whose keys and values stand at regular strides within a block. An attention backend's
own writer is called for every layer, wants keys and values gathered first, and runs on the engine's thread;
this runs on any, beside others, and without the GIL.
"""

# L layers, T tokens, H kv heads, D head dim, P tokens per block, F rotary planes, N pieces
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kv_agent.kv import rotation_kernel
from kv_agent.kv.block_kernels import Layout, Strided, compiled
from kv_agent.kv.rope import RotaryScheme, turns_by
from kv_agent.kv.vector_code import VECTOR_BYTES

_WORD_BYTES = 8


class Piece(NamedTuple):
    """KV ``[L, 2, T, H, D]`` that is, or is to be, at positions ``[start, start + T)`` of a sequence.

    That is ``delta`` higher than where it was computed. A tuple, for there may be hundreds in a step.
    """

    kv_L2THD: Tensor
    start: int
    delta: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copying:
    """A copy that is ready to be made, layer by layer if need be; ``kept`` are what it copies from and to."""

    num_layers: int
    arguments: tuple[Any, ...]
    kept: tuple[Any, ...]
    code: Any

    def run(self, first_layer: int = 0, end_layer: int | None = None) -> None:
        """Copy these layers, by default all. Any thread may, as far as nobody else uses the same slots."""
        self.code(*self.arguments, first_layer, self.num_layers if end_layer is None else end_layer)


@dataclass(frozen=True, kw_only=True)
class BlockCopier:
    """Copies between plain KV and the blocks of ``caches_L``, one tensor a layer, alike in layout.

    There are ``block_items`` from block to block. The first call of either way compiles for a second or two.
    Thread-safe as far as nobody else uses the same slots.
    """

    caches_L: Sequence[Tensor]
    block_items: int
    shape_PHD: tuple[int, int, int]
    key: Strided
    value: Strided

    def turns(self, scheme: RotaryScheme) -> bool:
        """Whether :meth:`scatter` moves keys that are so rotated."""
        return scheme.neox and rotation_kernel.serves(self.caches_L[0].dtype, self.caches_L[0].device)

    def scatter(
        self, pieces: Sequence[Piece], block_ids: Sequence[int], scheme: RotaryScheme | None = None
    ) -> Copying:
        """What writes the pieces into the sequence whose blocks these are, their keys moved.

        Each layer of keys or values must be contiguous. Raises :class:`ValueError` for what does not fit.
        """
        return self._prepared(pieces, block_ids, scheme, to_blocks=True)

    def gather(self, piece: Piece, block_ids: Sequence[int]) -> Copying:
        """What fills the piece from the sequence's blocks; raises as :meth:`scatter` does."""
        if piece.delta:
            raise ValueError("keys are moved on their way into blocks only")
        return self._prepared([piece], block_ids, None, to_blocks=False)

    def _prepared(
        self,
        pieces: Sequence[Piece],
        block_ids: Sequence[int],
        scheme: RotaryScheme | None,
        *,
        to_blocks: bool,
    ) -> Copying:
        blocks = np.array(block_ids, dtype=np.int64)
        places = np.array([self._place(piece) for piece in pieces], dtype=np.int64).reshape(-1, 5)
        self._require_room(places[:, 0], places[:, 0] + places[:, 1], blocks)
        # One code for pieces that are turned and others: it is made when an engine starts, not later.
        turns = to_blocks and self.caches_L[0].dtype == torch.bfloat16
        is_wide = not (places[:, 2:] % _WORD_BYTES).any() and not (self._addresses_L % VECTOR_BYTES).any()
        starts, counts, keys, values, layer_bytes = np.ascontiguousarray(places.T, dtype=np.uint64)
        arguments = (
            keys,
            values,
            layer_bytes,
            layer_bytes,
            starts,
            counts,
            *self._turns([piece.delta for piece in pieces], scheme),
            self._addresses_L,
            blocks.astype(np.uint64),
        )
        return Copying(
            num_layers=len(self.caches_L),
            arguments=arguments,
            kept=(tuple(pieces), self.caches_L),
            code=compiled(self._layout(is_wide), to_blocks=to_blocks, turns=turns),
        )

    def _place(self, piece: Piece) -> tuple[int, int, int, int, int]:
        """Start, tokens, where keys and values begin, and the bytes from layer to layer."""
        L, (_, H, D), dtype = len(self.caches_L), self.shape_PHD, self.caches_L[0].dtype
        x_L2THD = piece.kv_L2THD
        shape, strides = x_L2THD.shape, x_L2THD.stride()
        num_tokens = shape[2] if len(shape) == 5 else 0
        if num_tokens == 0 or shape != (L, 2, num_tokens, H, D):
            raise ValueError(f"KV {tuple(shape)} does not fit: {L} layers of {H} heads of {D} are wanted")
        if x_L2THD.dtype != dtype:
            raise ValueError(f"KV must be {dtype} as the cache is, got {x_L2THD.dtype}")
        if strides[2:] != (H * D, D, 1) and not x_L2THD[0, 0].is_contiguous():
            raise ValueError(f"a layer of keys or values must be contiguous, got strides {strides}")
        address = x_L2THD.data_ptr()
        return (
            piece.start,
            num_tokens,
            address,
            address + strides[1] * dtype.itemsize,
            strides[0] * dtype.itemsize,
        )

    def _require_room(self, starts: Any, ends: Any, blocks: Any) -> None:
        P, num_blocks = self.shape_PHD[0], self.caches_L[0].shape[0]
        if starts.min() < 0 or ends.max() > len(blocks) * P:
            raise ValueError(
                f"tokens {starts.min()} to {ends.max()} are not within {len(blocks)} blocks of {P}"
            )
        used = blocks[starts.min() // P : (ends.max() - 1) // P + 1]
        if used.min() < 0 or used.max() >= num_blocks:
            raise ValueError(f"blocks {used.tolist()} of a cache of {num_blocks}")

    def _turns(self, deltas: Sequence[int], scheme: RotaryScheme | None) -> tuple[Any, Any, Any]:
        """Which pieces are turned, and cosines and sines of all of them, ``[N, F]``."""
        turned_N = np.array(deltas, dtype=np.int64) != 0
        if not turned_N.any():
            nothing = np.zeros((len(deltas), 0), dtype=np.float32)
            return turned_N, nothing, nothing
        if scheme is None or not self.turns(scheme) or scheme.rotary_dim > self.shape_PHD[2]:
            raise ValueError(f"{self.caches_L[0].dtype} keys are not moved by {scheme} here")
        cos_NF, sin_NF = turns_by(deltas, scheme)
        return turned_N, cos_NF.numpy(), sin_NF.numpy()

    @cached_property
    def _addresses_L(self) -> Any:
        return np.array([cache.data_ptr() for cache in self.caches_L], dtype=np.uint64)

    def _layout(self, is_wide: bool) -> Layout:
        return Layout(
            shape_PHD=self.shape_PHD,
            item_bytes=self.caches_L[0].element_size(),
            block_items=self.block_items,
            key=self.key,
            value=self.value,
            is_wide=is_wide,
        )
