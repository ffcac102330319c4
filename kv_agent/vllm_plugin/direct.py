"""Moved KV straight into the blocks of a waiting request, from any thread."""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import BlockCopier, Piece
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into
from kv_agent.vllm_plugin.layer_by_layer import LayerWork

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
        self._turns = scheme is not None and copier.turns(scheme)

    def into(self, block_ids: Sequence[int]) -> Prepare:
        """See :class:`ChunkWriter`."""
        return partial(self._prepared, block_ids)

    def _prepared(self, block_ids: Sequence[int], pieces: Iterable[Piece]) -> LayerWork:
        placed = [piece if self._turns or not piece.delta else self._moved(piece) for piece in pieces]
        return self._copier.scatter(placed, block_ids, self._scheme).run

    def _moved(self, piece: Piece) -> Piece:
        """The same where it is to be, by torch."""
        if self._scheme is None:
            raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
        kv_L2THD = torch.empty_like(piece.kv_L2THD)
        copy_rotated_into(kv_L2THD[:, 0], piece.kv_L2THD[:, 0], piece.delta, self._scheme)
        kv_L2THD[:, 1] = piece.kv_L2THD[:, 1]
        return Piece(kv_L2THD, piece.start)
