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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kv_agent.kv.block_kernels import Layout, Strided, compiled
from kv_agent.kv.vector_words import VECTOR_BYTES

_WORD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlainPiece:
    """KV ``[L, T, H, D]`` that is, or is to be, at positions ``[start, start + T)`` of a sequence.

    Each layer of either must be contiguous. ``turn`` is the cosine and sine, float32 ``[F]`` each, by which
    bfloat16 keys are turned in the planes ``(i, i + F)`` on their way into blocks.
    """

    key_LTHD: Tensor
    value_LTHD: Tensor
    start: int
    turn: tuple[Tensor, Tensor] | None = None


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

    def scatter(self, pieces: Sequence[PlainPiece], block_ids: Sequence[int]) -> Copying:
        """What writes the pieces into the sequence whose blocks these are.

        Raises :class:`ValueError` for what does not fit.
        """
        return self._prepared(pieces, block_ids, to_blocks=True)

    def gather(self, piece: PlainPiece, block_ids: Sequence[int]) -> Copying:
        """What fills the piece from the sequence's blocks; raises as :meth:`scatter` does."""
        if piece.turn is not None:
            raise ValueError("keys are turned on their way into blocks only")
        return self._prepared([piece], block_ids, to_blocks=False)

    def _prepared(
        self, pieces: Sequence[PlainPiece], block_ids: Sequence[int], *, to_blocks: bool
    ) -> Copying:
        blocks = np.array(block_ids, dtype=np.int64)
        for piece in pieces:
            self._require_fit(piece, blocks)
        # One code for pieces that are turned and others: it is made when an engine starts, not later.
        turns = to_blocks and self.caches_L[0].dtype == torch.bfloat16
        keys = [_Plain.of(piece.key_LTHD) for piece in pieces]
        values = [_Plain.of(piece.value_LTHD) for piece in pieces]
        is_wide = all(one.is_wide for one in (*keys, *values))
        is_wide = is_wide and not (self._addresses_L % VECTOR_BYTES).any()
        arguments = (
            *(np.array([one.address for one in half], dtype=np.uint64) for half in (keys, values)),
            *(np.array([one.layer_bytes for one in half], dtype=np.uint64) for half in (keys, values)),
            np.array([piece.start for piece in pieces], dtype=np.uint64),
            np.array([piece.key_LTHD.shape[1] for piece in pieces], dtype=np.uint64),
            *_turns(pieces),
            self._addresses_L,
            blocks.astype(np.uint64),
        )
        return Copying(
            num_layers=len(self.caches_L),
            arguments=arguments,
            kept=(tuple(pieces), self.caches_L),
            code=compiled(self._layout(is_wide), to_blocks=to_blocks, turns=turns),
        )

    def _require_fit(self, piece: PlainPiece, blocks: Any) -> None:
        T = piece.key_LTHD.shape[1]
        P, H, D = self.shape_PHD
        fits = piece.key_LTHD.shape == piece.value_LTHD.shape == (len(self.caches_L), T, H, D)
        used = blocks[piece.start // P : (piece.start + T - 1) // P + 1] if piece.start >= 0 else blocks[:0]
        if not fits or T == 0 or len(used) != (piece.start + T - 1) // P + 1 - piece.start // P:
            raise ValueError(
                f"KV {tuple(piece.key_LTHD.shape)} does not fit {len(blocks)} blocks from {piece.start} on"
            )
        if used.min() < 0 or used.max() >= self.caches_L[0].shape[0]:
            raise ValueError(f"blocks {used.tolist()} of a cache of {self.caches_L[0].shape[0]}")
        dtype = self.caches_L[0].dtype
        if not piece.key_LTHD.dtype == piece.value_LTHD.dtype == dtype:
            raise ValueError(f"KV must be {dtype} as the cache is, got {piece.key_LTHD.dtype}")
        for x_LTHD in (piece.key_LTHD, piece.value_LTHD):
            if not x_LTHD[0].is_contiguous():
                raise ValueError(f"a layer of KV must be contiguous, got strides {x_LTHD.stride()}")
        if piece.turn is not None and (dtype != torch.bfloat16 or 2 * len(piece.turn[0]) > D):
            raise ValueError(f"{dtype} keys of {D} dims are not turned in {len(piece.turn[0])} planes here")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """Where layers of something begin; ``is_wide`` if all of them do where a word may."""

    address: int
    layer_bytes: int
    is_wide: bool

    @classmethod
    def of(cls, x: Tensor) -> _Plain:
        address, layer_bytes = x.data_ptr(), x.stride(0) * x.element_size()
        is_wide = address % _WORD_BYTES == 0 and layer_bytes % _WORD_BYTES == 0
        return cls(address=address, layer_bytes=layer_bytes, is_wide=is_wide)


def _turns(pieces: Sequence[PlainPiece]) -> tuple[Any, Any, Any]:
    """Which pieces are turned, and all cosines and sines ``[N, F]``."""
    turned_N = np.array([piece.turn is not None for piece in pieces])
    num_planes = max((len(piece.turn[0]) for piece in pieces if piece.turn is not None), default=0)
    cos_NF, sin_NF = (np.zeros((len(pieces), num_planes), dtype=np.float32) for _ in range(2))
    for n, piece in enumerate(pieces):
        if piece.turn is not None:
            cos_NF[n], sin_NF[n] = piece.turn[0].numpy(), piece.turn[1].numpy()
    return turned_N, cos_NF, sin_NF
