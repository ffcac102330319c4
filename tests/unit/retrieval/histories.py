"""Made-up catalog histories and a brute-force search over them, for the index tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kv_agent.chunks import ChunkKey, ContentKey, Fingerprint, IndexChange, Scope, TurnId
from kv_agent.retrieval.pooling import to_bytes
from kv_agent.retrieval.sketches import to_sketch

FINGERPRINT = Fingerprint("f" * 32)
DIM = 12

Vector = npt.NDArray[np.float32]


def change(
    seq: int,
    vector: Vector | None,
    *,
    entry_id: int | None = None,
    scope: Scope | None = None,
    turn: str | None = None,
    content: str | None = None,
) -> IndexChange:
    entry = seq if entry_id is None else entry_id
    return IndexChange(
        seq=seq,
        entry_id=entry,
        chunk_key=ChunkKey(f"chunk{entry}"),
        content_key=ContentKey(content or f"content{entry}"),
        turn_id=TurnId(turn or f"turn{entry}"),
        scope=scope or Scope(),
        vector=None if vector is None else to_bytes(vector),
    )


def random_scope(rng: np.random.Generator) -> Scope:
    agent, session = rng.integers(0, 3), rng.integers(0, 4)
    return Scope(
        user_id=f"user{rng.integers(0, 3)}",
        agent_id=None if agent == 0 else f"agent{agent}",
        session_id=None if session == 0 else f"session{session}",
    )


def random_history(rng: np.random.Generator, length: int, *, removals: float = 0.3) -> list[IndexChange]:
    """Adds and removals with gaps in ``seq``, as when other namespaces write in between."""
    changes: list[IndexChange] = []
    live: list[IndexChange] = []
    common = rng.normal(size=DIM) * 3
    for step in range(length):
        seq = 3 * step + 1
        if live and rng.random() < removals:
            gone = live.pop(int(rng.integers(len(live))))
            changes.append(change(seq, None, entry_id=gone.entry_id, scope=gone.scope))
        else:
            vector = (common + rng.normal(size=DIM)).astype(np.float32)
            changes.append(change(seq, vector, entry_id=1000 + step, scope=random_scope(rng)))
            live.append(changes[-1])
    return changes


def halves(data: bytes) -> npt.NDArray[np.float64]:
    """A vector as an index keeps it."""
    return np.frombuffer(data, dtype="<f4").astype(np.float16).astype(np.float64)


@dataclass
class Oracle:
    """The same search, by the book: one Python loop, everything in float64."""

    live: dict[int, tuple[IndexChange, npt.NDArray[np.float64]]] = field(default_factory=dict)
    mean: npt.NDArray[np.float64] | None = None
    fitted: int = 0
    since_fit: int = 0

    def apply(self, changes: list[IndexChange]) -> None:
        for step in changes:
            self.live.pop(step.entry_id, None)
            if step.vector is not None:
                self.live[step.entry_id] = (step, halves(step.vector))
            self.since_fit += 1
            if self.since_fit >= self.fitted:
                vectors = [vector for _, vector in self.live.values()]
                self.mean = np.mean(vectors, axis=0) if len(vectors) > 1 else None
                self.fitted, self.since_fit = len(vectors), 0

    def _unit(self, vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        centred = vector if self.mean is None else vector - self.mean
        return centred / np.linalg.norm(centred)

    def search(self, query: Vector, scope: Scope, top_n: int) -> list[tuple[int, float]]:
        unit = self._unit(query.astype(np.float64))
        scored = [
            (float(self._unit(vector) @ unit), entry_id)
            for entry_id, (step, vector) in self.live.items()
            if scope.admits(step.scope)
        ]
        return [(entry_id, score) for score, entry_id in sorted(scored, reverse=True)[:top_n]]


@dataclass
class FakeFeed:
    """A catalog's history in a list."""

    changes: list[IndexChange] = field(default_factory=list)
    tokens: dict[str, Vector] = field(default_factory=dict)  # [T, V] by chunk key
    num_calls: int = 0

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = 1000
    ) -> list[IndexChange]:
        assert fingerprint == FINGERPRINT
        self.num_calls += 1
        return [c for c in self.changes if c.seq > seq and c.scope.namespace == namespace][:limit]

    def sketches(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, bytes]:
        return {key: to_sketch(self.tokens[key]) for key in keys if key in self.tokens}
