"""Moved KV straight into the blocks of a waiting request, from any thread."""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Iterable, Sequence

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import BlockCopier, Copying, PlainPiece
from kv_agent.kv.rope import RotaryScheme, rotate_keys, turn_of
from kv_agent.vllm_plugin.staging import Piece


class DirectWriter:
    """Writes chunks into the paged cache while the engine computes other requests. Thread-safe."""

    def __init__(self, copier: BlockCopier, scheme: RotaryScheme | None) -> None:
        self._copier = copier
        self._scheme = scheme

    def prepared(self, pieces: Iterable[Piece], block_ids: Sequence[int]) -> Copying:
        """What puts the pieces into a sequence's blocks, where nobody else may use their slots meanwhile."""
        return self._copier.scatter([self._placed(piece) for piece in pieces], block_ids)

    def _placed(self, piece: Piece) -> PlainPiece:
        key_LTHD, value_LTHD = piece.kv_L2THD.unbind(1)
        turn = None
        if piece.delta:
            if self._scheme is None:
                raise UnsupportedModelError("keys cannot be moved, yet a chunk was to be")
            if (turn := turn_of(key_LTHD, piece.delta, self._scheme)) is None:
                key_LTHD = rotate_keys(key_LTHD, piece.delta, self._scheme)
        return PlainPiece(key_LTHD=key_LTHD, value_LTHD=value_LTHD, start=piece.start, turn=turn)
