"""Moved KV straight into the blocks of a waiting request, from any thread."""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import BlockCopier, PlainPiece
from kv_agent.kv.rope import RotaryScheme, rotate_keys, turn_of
from kv_agent.vllm_plugin.layer_by_layer import LayerWork
from kv_agent.vllm_plugin.staging import Piece

# Checks pieces -> what puts them into a sequence's blocks, and has done so when it returns.
Prepare = Callable[[Iterable[Piece]], LayerWork]


class ChunkWriter(Protocol):
    """Writes chunks into the paged cache while the engine computes other requests. Thread-safe."""

    def into(self, block_ids: Sequence[int]) -> Prepare:
        """For the blocks of one sequence, whose slots nobody else may use meanwhile.

        To be called on the engine's step thread; what it returns is for any.
        """


class DirectWriter:
    """By the machine code of a cache in host memory."""

    def __init__(self, copier: BlockCopier, scheme: RotaryScheme | None) -> None:
        self._copier = copier
        self._scheme = scheme

    def into(self, block_ids: Sequence[int]) -> Prepare:
        """See :class:`ChunkWriter`."""
        return partial(self._prepared, block_ids)

    def _prepared(self, block_ids: Sequence[int], pieces: Iterable[Piece]) -> LayerWork:
        return self._copier.scatter([self._placed(piece) for piece in pieces], block_ids).run

    def _placed(self, piece: Piece) -> PlainPiece:
        key_LTHD, value_LTHD = piece.kv_L2THD.unbind(1)
        turn = None
        if piece.delta:
            if self._scheme is None:
                raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
            if (turn := turn_of(key_LTHD, piece.delta, self._scheme)) is None:
                key_LTHD = rotate_keys(key_LTHD, piece.delta, self._scheme)
        return PlainPiece(key_LTHD=key_LTHD, value_LTHD=value_LTHD, start=piece.start, turn=turn)
