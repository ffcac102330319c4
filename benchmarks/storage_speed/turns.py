"""Turns of a model's shape with made-up KV; their keys are real ones."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    Fingerprint,
    Scope,
    TurnId,
    TurnRecord,
    chain_key,
    content_key,
    root_key,
)
from kv_agent.storage.store import NewChunk

FINGERPRINT = Fingerprint("f" * 32)
SCOPE = Scope(session_id="session")
ROOT = root_key(FINGERPRINT, SCOPE.namespace, SCOPE.user_id)
VOCABULARY = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """KV of one token is ``[layers, 2, heads, head_dim]`` of bfloat16."""

    name: str
    layers: int
    heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.heads * self.head_dim * 2


QWEN = Shape(name="Qwen2.5-0.5B", layers=24, heads=2, head_dim=64)


class Turns:
    """New turns, one after the other; the same for the same seed."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self._shape = shape
        self._rng = np.random.default_rng(seed)
        self._count = 0
        self._kv: dict[int, Tensor] = {}

    def kv(self, num_tokens: int) -> Tensor:
        """Random numbers -> [L, 2, T, H, D]; the same tensor for the same length."""
        if num_tokens not in self._kv:
            size = (self._shape.layers, 2, num_tokens, self._shape.heads, self._shape.head_dim)
            generator = torch.Generator().manual_seed(num_tokens)
            self._kv[num_tokens] = torch.randn(size, generator=generator).bfloat16()
        return self._kv[num_tokens]

    def turn(self, chunk_tokens: list[int]) -> tuple[TurnRecord, list[NewChunk]]:
        """A turn with chunks of these lengths at the start of a sequence."""
        chunks: list[NewChunk] = []
        parent, start = ROOT, 0
        for num_tokens in chunk_tokens:
            tokens = tuple(self._rng.integers(VOCABULARY, size=num_tokens).tolist())
            chunk = NewChunk(
                key=chain_key(parent, tokens),
                content_key=content_key(FINGERPRINT, tokens),
                parent=parent,
                start=start,
                token_ids=tokens,
                kv=self.kv(num_tokens),
                vector=self._bytes(4 * self._key_size),
                sketch=self._bytes(8 + num_tokens * (4 + self._key_size)),
            )
            chunks.append(chunk)
            parent, start = chunk.key, start + num_tokens
        return self._record(chunks), chunks

    @property
    def _key_size(self) -> int:
        return self._shape.heads * self._shape.head_dim  # keys of one layer are what is compared

    def _bytes(self, count: int) -> bytes:
        return self._rng.bytes(count)

    def _record(self, chunks: list[NewChunk]) -> TurnRecord:
        self._count += 1
        words = self._rng.integers(VOCABULARY, size=24).tolist()
        return TurnRecord(
            turn_id=TurnId(f"turn-{self._count}-{self._rng.integers(1 << 60):x}"),
            scope=SCOPE,
            fingerprint=FINGERPRINT,
            chunk_keys=tuple(chunk.key for chunk in chunks),
            num_tokens=sum(len(chunk.token_ids) for chunk in chunks),
            text=" ".join(f"w{word}" for word in words),
            created=time.time(),
        )


def rows_of(
    turn: TurnRecord, chunks: list[NewChunk]
) -> tuple[list[ChunkRecord], dict[ChunkKey, bytes], dict[ChunkKey, bytes]]:
    """What the catalog gets of a turn, as if a blob of its name had been written: rows, vectors, sketches."""
    records = [
        ChunkRecord(
            key=chunk.key,
            content_key=chunk.content_key,
            parent=chunk.parent,
            fingerprint=turn.fingerprint,
            namespace=turn.scope.namespace,
            user_id=turn.scope.user_id,
            start=chunk.start,
            token_ids=chunk.token_ids,
            blob=f"blobs/{turn.turn_id[:2]}/{turn.turn_id}.safetensors",
            tensor=chunk.key,
            checksum=f"{chunk.key}{chunk.key}",
            num_bytes=chunk.kv.nbytes,
        )
        for chunk in chunks
    ]
    vectors = {chunk.key: chunk.vector for chunk in chunks if chunk.vector is not None}
    sketches = {chunk.key: chunk.sketch for chunk in chunks if chunk.sketch is not None}
    return records, vectors, sketches
