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

from kv_agent.kv.block_kernels import Layout, Strided, compiled
from kv_agent.kv.vector_code import VECTOR_BYTES

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
        keys = [self._plain(piece.key_LTHD) for piece in pieces]
        values = [self._plain(piece.value_LTHD) for piece in pieces]
        starts = np.array([piece.start for piece in pieces], dtype=np.int64)
        counts = np.array([one.num_tokens for one in keys], dtype=np.int64)
        if any(key.num_tokens != value.num_tokens for key, value in zip(keys, values, strict=True)):
            raise ValueError("keys and values must be of as many tokens")
        self._require_room(starts, starts + counts, blocks)
        # One code for pieces that are turned and others: it is made when an engine starts, not later.
        turns = to_blocks and self.caches_L[0].dtype == torch.bfloat16
        is_wide = all(one.is_wide for one in (*keys, *values))
        is_wide = is_wide and not (self._addresses_L % VECTOR_BYTES).any()
        arguments = (
            *(np.array([one.address for one in half], dtype=np.uint64) for half in (keys, values)),
            *(np.array([one.layer_bytes for one in half], dtype=np.uint64) for half in (keys, values)),
            starts.astype(np.uint64),
            counts.astype(np.uint64),
            *self._turns(pieces),
            self._addresses_L,
            blocks.astype(np.uint64),
        )
        return Copying(
            num_layers=len(self.caches_L),
            arguments=arguments,
            kept=(tuple(pieces), self.caches_L),
            code=compiled(self._layout(is_wide), to_blocks=to_blocks, turns=turns),
        )

    def _plain(self, x_LTHD: Tensor) -> _Plain:
        L, (_, H, D), dtype = len(self.caches_L), self.shape_PHD, self.caches_L[0].dtype
        shape, strides = x_LTHD.shape, x_LTHD.stride()
        if len(shape) != 4 or shape[0] != L or shape[1] == 0 or shape[2:] != (H, D):
            raise ValueError(f"KV {tuple(shape)} does not fit: {L} layers of {H} heads of {D} are wanted")
        if x_LTHD.dtype != dtype:
            raise ValueError(f"KV must be {dtype} as the cache is, got {x_LTHD.dtype}")
        if strides[1:] != (H * D, D, 1) and not x_LTHD[0].is_contiguous():
            raise ValueError(f"a layer of KV must be contiguous, got strides {strides}")
        return _Plain(address=x_LTHD.data_ptr(), layer_bytes=strides[0] * dtype.itemsize, num_tokens=shape[1])

    def _require_room(self, starts: Any, ends: Any, blocks: Any) -> None:
        P, num_blocks = self.shape_PHD[0], self.caches_L[0].shape[0]
        if starts.min() < 0 or ends.max() > len(blocks) * P:
            raise ValueError(
                f"tokens {starts.min()} to {ends.max()} are not within {len(blocks)} blocks of {P}"
            )
        used = blocks[starts.min() // P : (ends.max() - 1) // P + 1]
        if used.min() < 0 or used.max() >= num_blocks:
            raise ValueError(f"blocks {used.tolist()} of a cache of {num_blocks}")

    def _turns(self, pieces: Sequence[PlainPiece]) -> tuple[Any, Any, Any]:
        """Which pieces are turned, and all cosines and sines ``[N, F]``."""
        found = {id(piece.turn): piece.turn for piece in pieces if piece.turn is not None}
        numbers = {turn: number for number, turn in enumerate(found)}
        num_planes = max((len(cos_F) for cos_F, _ in found.values()), default=0)
        D, dtype = self.shape_PHD[2], self.caches_L[0].dtype
        if found and (dtype != torch.bfloat16 or 2 * num_planes > D):
            raise ValueError(f"{dtype} keys of {D} dims are not turned in {num_planes} planes here")
        turned_N = np.array([piece.turn is not None for piece in pieces])
        table = np.zeros((2, max(1, len(found)), num_planes), dtype=np.float32)
        for number, (cos_F, sin_F) in enumerate(found.values()):
            table[0, number], table[1, number] = cos_F.numpy(), sin_F.numpy()
        kinds_N = [numbers.get(id(piece.turn), 0) for piece in pieces]
        return turned_N, table[0, kinds_N], table[1, kinds_N]

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


class _Plain(NamedTuple):
    """Where layers of something begin."""

    address: int
    layer_bytes: int
    num_tokens: int

    @property
    def is_wide(self) -> bool:
        """Whether all of them begin where a word may."""
        return self.address % _WORD_BYTES == 0 and self.layer_bytes % _WORD_BYTES == 0
