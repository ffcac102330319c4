"""Tokens of the chunks that were compared last, so that the next search need not make them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kv_agent.chunks import ChunkKey
from kv_agent.retrieval.token_space import Tokens


class TokenCache:
    """Tokens by chunk, the latest used kept within ``max_bytes``. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[ChunkKey, Tokens] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, Tokens]:
        """What is kept of these chunks."""
        found = {key: self._kept[key] for key in keys if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        return found

    def put(self, key: ChunkKey, tokens: Tokens) -> None:
        """Keep arrays that are nobody else's part: a view would hold on to the whole of it."""
        self._num_bytes += tokens.nbytes - (self._kept[key].nbytes if key in self._kept else 0)
        self._kept[key] = tokens
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._kept.clear()
        self._num_bytes = 0
