"""What a stack of tiers is made of in tests: a disk, chunks that compress, and what holds things up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.codecs import Payload
from kv_agent.storage.compression import compress
from kv_agent.storage.store import NewChunk
from kv_agent.storage.tier_stack import TierStack
from kv_agent.storage.tiers import DiskTier, Loaded
from tests.unit.storage.builders import chain, kv_of, record_of

WAIT_S = 30.0


class AtOnce(Executor):
    """Does in the foreground what would be done in the background."""

    def submit(self, job: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(job(*args, **kwargs))
        return done


class Disk:
    """Chunks by key, some of which may be lost."""

    def __init__(self, chunks: Sequence[NewChunk]) -> None:
        self.chunks = {chunk.key: chunk for chunk in chunks}
        self.lost: set[ChunkKey] = set()
        self.tier = DiskTier(self._read, self.totals)

    def _read(self, record: ChunkRecord, delta: int) -> Loaded:
        if record.key in self.lost:
            raise MissingBlobError(record.key)
        return Loaded(kv_of(self.chunks[record.key]).clone(), delta)

    def totals(self) -> dict[str, int]:
        return {"bytes": sum(chunk.kv.nbytes for chunk in self.chunks.values()), "chunks": len(self.chunks)}


class SlowForm:
    """Holds KV once a test allows it."""

    shrinks: ClassVar[bool] = False

    def __init__(self) -> None:
        self.begun, self.may_hold = threading.Event(), threading.Event()

    def hold(self, kv_L2THD: Tensor) -> Payload:
        self.begun.set()
        assert self.may_hold.wait(WAIT_S)
        return kv_L2THD

    def give(self, payload: Payload) -> Tensor:
        assert isinstance(payload, Tensor)
        return payload


def put(stack: TierStack, chunk: NewChunk) -> None:
    with stack.entering([chunk.key]) as moves:
        stack.put(record_of(chunk), kv_of(chunk), moves[chunk.key])


def compressible(num_tokens: int, number: int) -> NewChunk:
    """A chunk whose compressed bytes are fewer, the more of its numbers are alike."""
    (chunk,) = chain(num_tokens, seed=number)
    kv_L2THD = kv_of(chunk).clone()
    kv_L2THD[:, :, : num_tokens // 2] = number
    return replace(chunk, kv=kv_L2THD)


def packed_bytes(chunk: NewChunk) -> int:
    kv_L2THD = kv_of(chunk)
    return compress(kv_L2THD.flatten().view(torch.uint8), kv_L2THD.element_size()).nbytes
