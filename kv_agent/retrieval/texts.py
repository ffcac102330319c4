"""Turns by what a text embedder makes of their words: a further voice for those who bring one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kv_agent.chunks import ChunkKey, Fingerprint, IndexChange, TurnId, TurnRecord
from kv_agent.errors import ConfigError
from kv_agent.retrieval.engine import ChangeFeed
from kv_agent.retrieval.pooling import to_bytes

_KEPT_VECTORS = 1024  # every search reads the latest change again


class TextEmbedder(Protocol):
    """What ``sentence_transformers.SentenceTransformer`` offers: one vector a text, of like length."""

    def encode(self, sentences: list[str], /) -> Any: ...


class TextFeed:
    """A catalog's changes with the embedding of the turn's text in place of its keys."""

    def __init__(self, feed: TurnFeed, embedder: TextEmbedder) -> None:
        self._feed = feed
        self._embedder = embedder
        self._kept: OrderedDict[TurnId, bytes] = OrderedDict()

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = 1000
    ) -> list[IndexChange]:
        """As the catalog's; a turn forgotten since it was added has no vector."""
        changes = self._feed.changes_since(fingerprint, namespace, seq, limit=limit)
        vectors = self._vectors({change.turn_id for change in changes if change.vector is not None})
        return [replace(change, vector=change.vector and vectors.get(change.turn_id)) for change in changes]

    def sketches(self, keys: Iterable[ChunkKey]) -> Mapping[ChunkKey, bytes]:
        """None: a text is one vector."""
        return {}

    def _vectors(self, turn_ids: Iterable[TurnId]) -> dict[TurnId, bytes]:
        found = {turn_id: self._kept[turn_id] for turn_id in turn_ids if turn_id in self._kept}
        turns = self._feed.turns([turn_id for turn_id in turn_ids if turn_id not in found])
        if turns:
            rows = embedded(self._embedder, [turn.text for turn in turns.values()])
            found |= {turn_id: to_bytes(row) for turn_id, row in zip(turns, rows, strict=True)}
        for turn_id, vector in found.items():
            self._kept[turn_id] = vector
            self._kept.move_to_end(turn_id)
        while len(self._kept) > _KEPT_VECTORS:
            self._kept.popitem(last=False)
        return found


class TurnFeed(ChangeFeed, Protocol):
    """What a :class:`TextFeed` needs of the catalog."""

    def turns(self, ids: Iterable[TurnId]) -> Mapping[TurnId, TurnRecord]: ...


def embedded(embedder: TextEmbedder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """One vector a text -> [N, V]."""
    rows = np.asarray(embedder.encode(list(texts)), dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ConfigError(
            f"the embedder returned an array of shape {rows.shape} for {len(texts)} texts; encode(texts) must"
            " return one vector each"
        )
    return rows
