"""Recognising stored text: walking from chain key to chain key along a token sequence."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kv_agent.chunking import cut_lengths
from kv_agent.chunks import ChunkKey, Fingerprint, chain_key, content_key
from kv_agent.vllm_plugin.jobs import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownChunk:
    """A stored chunk found on a token sequence at ``[start, end)``."""

    key: ChunkKey
    start: int
    end: int


class ChainIndex:
    """Chunks by their context: which lengths follow a chain key, and which keys exist."""

    def __init__(self) -> None:
        self._lengths: dict[ChunkKey, dict[int, int]] = {}  # parent -> length -> number of chunks
        self._parents: dict[ChunkKey, tuple[ChunkKey, int]] = {}

    def add(self, parent: ChunkKey, key: ChunkKey, num_tokens: int) -> None:
        if key not in self._parents:
            self._parents[key] = (parent, num_tokens)
            lengths = self._lengths.setdefault(parent, {})
            lengths[num_tokens] = lengths.get(num_tokens, 0) + 1

    def discard(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            if (found := self._parents.pop(key, None)) is None:
                continue
            parent, num_tokens = found
            lengths = self._lengths[parent]
            lengths[num_tokens] -= 1
            if not lengths[num_tokens]:
                del lengths[num_tokens]
            if not lengths:
                del self._lengths[parent]

    def lengths(self, parent: ChunkKey) -> Iterable[int]:
        return self._lengths.get(parent, ())

    def __contains__(self, key: object) -> bool:
        return key in self._parents

    def __len__(self) -> int:
        return len(self._parents)


def walk(
    context: ChunkKey,
    token_ids: Sequence[int],
    start: int,
    lengths_of: Callable[[ChunkKey], Iterable[int]],
    exists: Callable[[Sequence[ChunkKey]], set[ChunkKey]],
) -> list[KnownChunk]:
    """Follow stored chunks from ``context`` at ``start``; of several that fit, the longest."""
    found: list[KnownChunk] = []
    while True:
        lengths = sorted({n for n in lengths_of(context) if start + n <= len(token_ids)}, reverse=True)
        keys = [chain_key(context, token_ids[start : start + n]) for n in lengths]
        stored = exists(keys) if keys else set()
        for key, num_tokens in zip(keys, lengths, strict=True):
            if key in stored:
                found.append(KnownChunk(key=key, start=start, end=start + num_tokens))
                context, start = key, start + num_tokens
                break
        else:
            return found


def cut_segments(
    context: ChunkKey,
    token_ids: Sequence[int],
    start: int,
    end: int,
    chunk_tokens: int,
    fingerprint: Fingerprint,
) -> tuple[Segment, ...]:
    """Cut tokens ``[start, end)`` behind ``context`` into chunks of at most ``chunk_tokens``."""
    segments = []
    first = start
    packed = array("i", token_ids[start:end])  # taken apart once, for all that hashes it
    for length in cut_lengths(packed, chunk_tokens):
        ids = packed[first - start : first - start + length]
        key = chain_key(context, ids)
        segments.append(
            Segment(
                key=key,
                content_key=content_key(fingerprint, ids),
                parent=context,
                start=first,
                token_ids=tuple(ids),
            )
        )
        context, first = key, first + length
    return tuple(segments)
