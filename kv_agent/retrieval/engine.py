"""Retrieval over a catalog that others write: one index per namespace, brought up to date at each search."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.chunks import ChunkKey, ContentKey, Fingerprint, IndexChange, Scope, TurnId
from kv_agent.retrieval.index import IndexHit, NamespaceIndex

logger = logging.getLogger(__name__)

_CHANGES_PER_STEP = 1000
_CANDIDATES_PER_TURN = 4  # a turn of 1,000 tokens has four chunks of 256
_MIN_CANDIDATES = 16


class ChangeFeed(Protocol):
    """What an index needs of the catalog; it must never drop the last change of a namespace."""

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = ...
    ) -> list[IndexChange]: ...  # those with a higher seq, lowest first, at most limit


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHit:
    """A turn that a search found: ``score`` of its best chunk, ``chunk_keys`` of those found, best first."""

    turn_id: TurnId
    score: float
    chunk_keys: tuple[ChunkKey, ...]


class RetrievalEngine:
    """Searches the memories of one model; thread-safe.

    ``snapshot_dir`` is where indexes are kept between processes; ``None`` reads the whole catalog anew.
    """

    def __init__(self, feed: ChangeFeed, fingerprint: Fingerprint, snapshot_dir: Path | None) -> None:
        self._feed = feed
        self._fingerprint = fingerprint
        self._snapshot_dir = snapshot_dir
        self._lock = threading.Lock()
        self._indexes: dict[str, NamespaceIndex] = {}
        self._saved_seq: dict[str, int] = {}

    def search(self, vector: Tensor | npt.NDArray[np.float32], scope: Scope, top_k: int) -> list[MemoryHit]:
        """The ``top_k`` turns in ``scope`` most like ``vector``, best first.

        A text stored more than once counts once, as its newest copy, with the score of its best.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        with self._lock:
            index = self._refreshed(scope.namespace)
            wanted = max(_CANDIDATES_PER_TURN * top_k, _MIN_CANDIDATES)
            while True:
                hits = index.search(vector, scope, wanted)
                turns = _group_by_turn(_newest_copies(hits))
                if len(turns) >= top_k or len(hits) < wanted:
                    return turns[:top_k]
                wanted *= 4

    def save_snapshots(self) -> None:
        """Write the indexes that changed since they were last written; trouble is a warning."""
        if self._snapshot_dir is None:
            return
        with self._lock:
            for namespace, index in self._indexes.items():
                if index.seq == self._saved_seq.get(namespace, 0):
                    continue
                try:
                    index.save(self._snapshot_path(self._snapshot_dir, namespace))
                except OSError as err:
                    logger.warning(
                        "index of namespace %r not saved, it will be built anew: %s", namespace, err
                    )
                else:
                    self._saved_seq[namespace] = index.seq

    def close(self) -> None:
        """Save, and let go of the indexes."""
        self.save_snapshots()
        with self._lock:
            self._indexes.clear()
            self._saved_seq.clear()

    def _refreshed(self, namespace: str) -> NamespaceIndex:
        index = self._indexes.get(namespace) or self._opened(namespace)
        while True:
            # From the last known change on: that it is still there shows that it is still the same catalog.
            since = max(index.seq - 1, 0)
            changes = self._feed.changes_since(self._fingerprint, namespace, since, limit=_CHANGES_PER_STEP)
            if index.seq and not (changes and index.ends_with(changes[0])):
                logger.warning(
                    "the catalog was started again: index of namespace %r is built anew", namespace
                )
                index = NamespaceIndex(self._fingerprint, namespace)
                self._saved_seq.pop(namespace, None)
                continue
            self._indexes[namespace] = index
            if not changes or changes[-1].seq == index.seq:
                return index
            index.apply(changes)

    def _opened(self, namespace: str) -> NamespaceIndex:
        index = None
        if self._snapshot_dir is not None:
            path = self._snapshot_path(self._snapshot_dir, namespace)
            index = NamespaceIndex.load(path, self._fingerprint, namespace)
        if index is None:
            return NamespaceIndex(self._fingerprint, namespace)
        self._saved_seq[namespace] = index.seq
        return index

    def _snapshot_path(self, folder: Path, namespace: str) -> Path:
        """A namespace may hold any characters, so its file is named by a digest."""
        digest = hashlib.blake2b(f"{self._fingerprint}\0{namespace}".encode(), digest_size=16).hexdigest()
        return folder / f"{digest}.safetensors"


def _newest_copies(hits: Iterable[IndexHit]) -> list[tuple[IndexHit, float]]:
    """One hit per text: the newest, with the score of the first, which is the best; best first."""
    newest: dict[ContentKey, IndexHit] = {}
    best: dict[ContentKey, float] = {}
    for hit in hits:
        best.setdefault(hit.content_key, hit.score)
        kept = newest.setdefault(hit.content_key, hit)
        if hit.entry_id > kept.entry_id:
            newest[hit.content_key] = hit
    return [(newest[content_key], score) for content_key, score in best.items()]


def _group_by_turn(scored: Iterable[tuple[IndexHit, float]]) -> list[MemoryHit]:
    """Turns in the order of their best chunk; ``scored`` comes best first."""
    chunks: dict[TurnId, list[ChunkKey]] = {}
    best: dict[TurnId, float] = {}
    for hit, score in scored:
        best.setdefault(hit.turn_id, score)
        chunks.setdefault(hit.turn_id, []).append(hit.chunk_key)
    return [
        MemoryHit(turn_id=turn_id, score=best[turn_id], chunk_keys=tuple(chunks[turn_id])) for turn_id in best
    ]
