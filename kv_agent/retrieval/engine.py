"""Retrieval over a catalog that others write: one index per namespace, brought up to date at each search."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.chunks import ChunkKey, ContentKey, Fingerprint, IndexChange, Scope, TurnId
from kv_agent.errors import KVAgentError
from kv_agent.retrieval import maxsim_kernel
from kv_agent.retrieval.index import IndexHit, NamespaceIndex
from kv_agent.retrieval.interaction import shares
from kv_agent.retrieval.pooling import as_rows
from kv_agent.retrieval.sketches import Sketch, read_sketch, rounded
from kv_agent.retrieval.token_space import Tokens

logger = logging.getLogger(__name__)

_CHANGES_PER_STEP = 1000
_CANDIDATES_PER_TURN = 4  # a turn of 1,000 tokens has four chunks of 256
_MIN_CANDIDATES = 800  # chunks found by their pooled keys ...
_CANDIDATE_TOKENS = 16_384  # ... of which the first with so many tokens are compared token by token
_CHUNKS_PER_STEP = 100


class ChangeFeed(Protocol):
    """What an index needs of the catalog; it must never drop the last change of a namespace."""

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = ...
    ) -> list[IndexChange]: ...  # those with a higher seq, lowest first, at most limit

    def sketches(self, keys: Iterable[ChunkKey]) -> Mapping[ChunkKey, bytes]: ...  # see retrieval.sketches


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHit:
    """A turn that a search found: ``score`` of its best chunk, ``chunk_keys`` of those found, best first.

    The score is the part of the query that the chunk won, see :mod:`kv_agent.retrieval.interaction`.
    """

    turn_id: TurnId
    score: float
    chunk_keys: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSize:
    """Entries and bytes of indexes in memory."""

    num_entries: int
    num_bytes: int


class _Copies(NamedTuple):
    """A text that was found: its newest copy, and the one most like the query."""

    newest: IndexHit
    best: IndexHit


class RetrievalEngine:
    """Searches the memories of one model; thread-safe.

    ``snapshot_dir`` is where indexes are kept between processes; ``None`` reads the whole catalog anew. The
    index of a namespace is loaded when it is searched. It is dropped after ``idle_s`` seconds without a
    search, the least recently used one also when all have more than ``max_bytes`` of vectors.
    """

    def __init__(
        self,
        feed: ChangeFeed,
        fingerprint: Fingerprint,
        snapshot_dir: Path | None,
        *,
        idle_s: float = 600.0,
        max_bytes: int = 8 << 30,
    ) -> None:
        self._feed = feed
        self._fingerprint = fingerprint
        self._snapshot_dir = snapshot_dir
        self._idle_s, self._max_bytes = idle_s, max_bytes
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kv-agent-fit")
        self._threads.submit(maxsim_kernel.compiled)  # so that no search need wait for it
        self._indexes: OrderedDict[str, NamespaceIndex] = OrderedDict()  # the latest used last
        self._used_at: dict[str, float] = {}
        self._saved_seq: dict[str, int] = {}
        self._warned = False
        self._is_closed = False

    def search(
        self,
        query: Tensor | npt.NDArray[np.float32],
        scope: Scope,
        top_k: int,
        *,
        also: Sequence[TurnId] = (),
        only: Iterable[TurnId] | None = None,
    ) -> list[MemoryHit]:
        """The ``top_k`` turns in ``scope`` most like ``query``, best first.

        ``query`` holds the keys of its tokens, [t, V], or one vector. FAISS compares their means; what it
        finds, and the turns in ``also``, is then compared token by token. ``only`` narrows the search to
        these turns. A text stored more than once counts once, as its newest copy, with the score of its best.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        query_tV = as_rows(query)
        narrowed = None if only is None else frozenset(only)
        with self._lock:
            if self._is_closed:
                raise KVAgentError("this index is closed; open a new CacheManager")
            index = self._refreshed(scope.namespace)
            self._drop_idle()
            wanted = max(_CANDIDATES_PER_TURN * top_k, _MIN_CANDIDATES)
            pooled_V = query_tV.mean(axis=0)
            while True:
                hits = index.search(pooled_V, scope, wanted, only=narrowed)
                copies = _newest_copies(hits)
                if len(hits) < wanted or len({copy.newest.turn_id for copy in copies}) >= top_k:
                    break
                wanted *= 4
            if also:
                named = frozenset(also) if narrowed is None else narrowed & frozenset(also)
                copies = _newest_copies([*index.search(pooled_V, scope, wanted, only=named), *hits])
            return _group_by_turn(self._compared(index, query_tV, copies))[:top_k]

    @property
    def num_loaded(self) -> int:
        """Namespaces whose index is in memory."""
        return len(self._indexes)

    @property
    def size(self) -> IndexSize:
        """Of all indexes in memory together."""
        with self._lock:
            indexes = self._indexes.values()
            return IndexSize(
                num_entries=sum(index.num_entries for index in indexes),
                num_bytes=sum(index.num_bytes for index in indexes),
            )

    @property
    def followed(self) -> dict[str, int]:
        """Number of the last change that each index in memory has followed, by namespace."""
        with self._lock:
            return {namespace: index.seq for namespace, index in self._indexes.items()}

    def save_snapshots(self) -> None:
        """Write the indexes that changed since they were last written; trouble is a warning."""
        with self._lock:
            for namespace, index in self._indexes.items():
                self._save(namespace, index)

    def close(self) -> None:
        """Save, and let go of the indexes; what is searched afterwards is a :class:`KVAgentError`."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.save_snapshots()
        with self._lock:
            self._indexes.clear()
            self._used_at.clear()
            self._saved_seq.clear()

    def _compared(
        self, index: NamespaceIndex, query_tV: npt.NDArray[np.float32], copies: Sequence[_Copies]
    ) -> list[tuple[IndexHit, float]]:
        """Candidates with the part of the query that each wins, best first; newer first among equals."""
        tokens = self._tokens_of(index, [copy.best for copy in copies])
        if not tokens:
            return []
        query = index.token_space.query(query_tV)
        num_others = index.num_entries - len(tokens)
        won = shares(query, tokens, index.background, num_others).tolist()
        scored = [(copy.newest, score) for copy, score in zip(copies, won, strict=False)]
        return sorted(scored, key=lambda pair: (-pair[1], -pair[0].entry_id))

    def _tokens_of(self, index: NamespaceIndex, hits: Sequence[IndexHit]) -> list[Tokens]:
        """Tokens of the first chunks, as many as are compared; the mean of unknown ones."""
        found: list[Tokens] = []
        num_tokens = 0
        for start in range(0, len(hits), _CHUNKS_PER_STEP):
            step = hits[start : start + _CHUNKS_PER_STEP]
            known = index.tokens([hit.chunk_key for hit in step])
            for hit in step:
                tokens = known.get(hit.chunk_key)
                if tokens is None:
                    (tokens,) = index.token_space.place([rounded(index.vector(hit.entry_id)[None])])
                found.append(tokens)
                num_tokens += len(tokens.scales_T)
                if num_tokens >= _CANDIDATE_TOKENS:
                    return found
        return found

    def _token_keys(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Sketch]:
        """What is known of the tokens of these chunks; a damaged sketch is none, which is said once."""
        known: dict[ChunkKey, Sketch] = {}
        for key, data in self._feed.sketches(keys).items():
            try:
                known[key] = read_sketch(data)
            except ValueError as err:
                if not self._warned:
                    self._warned = True
                    about = {"event": "chunk_damaged", "chunk": key[:8]}
                    logger.warning("chunk %s is found by its mean only: %s", key, err, extra=about)
        return known

    def _refreshed(self, namespace: str) -> NamespaceIndex:
        index = self._indexes.get(namespace) or self._opened(namespace)
        while True:
            # From the last known change on: that it is still there shows that it is still the same catalog.
            since = max(index.seq - 1, 0)
            changes = self._feed.changes_since(self._fingerprint, namespace, since, limit=_CHANGES_PER_STEP)
            if index.seq and not (changes and index.ends_with(changes[0])):
                logger.warning(
                    "the catalog was started again: index of namespace %r is built anew",
                    namespace,
                    extra={"event": "index_rebuilt", "namespace": namespace},
                )
                index = self._new_index(namespace)
                self._saved_seq.pop(namespace, None)
                continue
            self._indexes[namespace] = index
            self._indexes.move_to_end(namespace)
            self._used_at[namespace] = time.monotonic()
            if not changes or changes[-1].seq == index.seq:
                return index
            index.apply(changes)

    def _save(self, namespace: str, index: NamespaceIndex) -> None:
        if self._snapshot_dir is None or index.seq == self._saved_seq.get(namespace, 0):
            return
        try:
            index.save(self._snapshot_path(self._snapshot_dir, namespace))
        except OSError as err:
            logger.warning(
                "index of namespace %r not saved, it will be built anew: %s",
                namespace,
                err,
                extra={"event": "index_not_saved", "namespace": namespace},
            )
        else:
            self._saved_seq[namespace] = index.seq

    def _drop_idle(self) -> None:
        """Save and let go of indexes that nobody searched for a while, and of the oldest beyond the limit."""
        now = time.monotonic()
        num_bytes = sum(index.num_bytes for index in self._indexes.values())
        for namespace in list(self._indexes)[:-1]:  # the last is in use
            is_idle = now - self._used_at[namespace] > self._idle_s
            if not is_idle and num_bytes <= self._max_bytes:
                break
            index = self._indexes.pop(namespace)
            num_bytes -= index.num_bytes
            self._save(namespace, index)
            del self._used_at[namespace]
            self._saved_seq.pop(namespace, None)

    def _new_index(self, namespace: str) -> NamespaceIndex:
        return NamespaceIndex(self._fingerprint, namespace, self._token_keys, self._threads)

    def _opened(self, namespace: str) -> NamespaceIndex:
        index = None
        if self._snapshot_dir is not None:
            path = self._snapshot_path(self._snapshot_dir, namespace)
            index = NamespaceIndex.load(path, self._fingerprint, namespace, self._token_keys, self._threads)
        if index is None:
            return self._new_index(namespace)
        self._saved_seq[namespace] = index.seq
        return index

    def _snapshot_path(self, folder: Path, namespace: str) -> Path:
        """A namespace may hold any characters, so its file is named by a digest."""
        digest = hashlib.blake2b(f"{self._fingerprint}\0{namespace}".encode(), digest_size=16).hexdigest()
        return folder / f"{digest}.safetensors"


def _newest_copies(hits: Iterable[IndexHit]) -> list[_Copies]:
    """One item per text, in the order in which ``hits`` has them first."""
    found: dict[ContentKey, _Copies] = {}
    for hit in hits:
        copies = found.setdefault(hit.content_key, _Copies(newest=hit, best=hit))
        if hit.entry_id > copies.newest.entry_id:
            found[hit.content_key] = copies._replace(newest=hit)
    return list(found.values())


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
