"""Small turns and chunks for the storage tests: real keys, tensors that depend on the key."""

from __future__ import annotations

import array
import multiprocessing
from collections.abc import Sequence

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
from kv_agent.storage import blob_content
from kv_agent.storage.store import NewChunk

FINGERPRINT = Fingerprint("fp-1")

# Python processes that share nothing with the test but the directory.
SPAWN = multiprocessing.get_context("spawn")


def kv_for(key: ChunkKey, num_tokens: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Random bits, the same for the same key: NaNs and infinities included. [L, 2, T, H, D]"""
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    shape = (2, 2, num_tokens, 2, 4)
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    bits = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def whole(data: bytes) -> list[blob_content.Part]:
    """A blob file as it is written, with this content, whatever it is."""
    return [blob_content.Part(0, data)]


def vector_for(key: ChunkKey) -> bytes:
    return array.array("f", [float(int(key[i : i + 2], 16)) for i in range(0, 8, 2)]).tobytes()


def chain(
    *lengths: int,
    seed: int = 0,
    scope: Scope | None = None,
    vectors: bool = True,
    parent: ChunkKey | None = None,
    dtype: torch.dtype = torch.float16,
    fingerprint: Fingerprint = FINGERPRINT,
) -> list[NewChunk]:
    """Chunks of these token counts, one after the other; the same arguments give the same keys."""
    scope = scope or Scope()
    parent = parent or root_key(fingerprint, scope.namespace, scope.user_id)
    start, chunks = 0, []
    for length in lengths:
        token_ids = tuple(range(seed * 1000 + start, seed * 1000 + start + length))
        key = chain_key(parent, token_ids)
        chunks.append(
            NewChunk(
                key=key,
                content_key=content_key(fingerprint, token_ids),
                parent=parent,
                start=start,
                token_ids=token_ids,
                kv=kv_for(key, length, dtype),
                vector=vector_for(key) if vectors else None,
            )
        )
        parent, start = key, start + length
    return chunks


def turn_of(
    chunks: Sequence[NewChunk] | Sequence[ChunkRecord],
    turn_id: str = "turn-1",
    scope: Scope | None = None,
    created: float = 1.0,
) -> TurnRecord:
    return TurnRecord(
        turn_id=TurnId(turn_id),
        scope=scope or Scope(),
        fingerprint=FINGERPRINT,
        chunk_keys=tuple(chunk.key for chunk in chunks),
        num_tokens=sum(len(chunk.token_ids) for chunk in chunks),
        text=f"text of {turn_id} – ünïcödé",
        created=created,
        metadata={"source": "test", "n": 3, "x": 0.5, "ok": True},
    )


def record_of(
    chunk: NewChunk, scope: Scope | None = None, blob: str = "blobs/ab/ab.safetensors"
) -> ChunkRecord:
    scope = scope or Scope()
    return ChunkRecord(
        key=chunk.key,
        content_key=chunk.content_key,
        parent=chunk.parent,
        fingerprint=FINGERPRINT,
        namespace=scope.namespace,
        user_id=scope.user_id,
        start=chunk.start,
        token_ids=chunk.token_ids,
        blob=blob,
        tensor=chunk.key,
        checksum=blob_content.checksum(chunk.kv),
        num_bytes=chunk.kv.nbytes,
    )


def kv_of(chunk: NewChunk) -> Tensor:
    assert isinstance(chunk.kv, Tensor)
    return chunk.kv


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )
