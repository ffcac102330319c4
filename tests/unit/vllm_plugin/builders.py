"""Small chunks with real keys, a catalog in a dict and plans in a few words, for the plugin's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    Fingerprint,
    Scope,
    chain_key,
    content_key,
    root_key,
)
from kv_agent.config import Placement, PlanOptions
from kv_agent.errors import StorageError
from kv_agent.vllm_plugin.plan import Limits

FINGERPRINT = Fingerprint("fp-1")
SCOPE = Scope(namespace="team", user_id="ann")
ROOT = root_key(FINGERPRINT, SCOPE.namespace, SCOPE.user_id)
LIMITS = Limits(window=100_000, shortest_mean_run=1)  # the chunks of these tests are tiny


def record(
    token_ids: Iterable[int],
    *,
    parent: ChunkKey = ROOT,
    start: int = 0,
    scope: Scope = SCOPE,
    fingerprint: Fingerprint = FINGERPRINT,
    quarantined: bool = False,
) -> ChunkRecord:
    """A chunk that was computed at ``start`` behind ``parent``."""
    ids = tuple(token_ids)
    key = chain_key(parent, ids)
    return ChunkRecord(
        key=key,
        content_key=content_key(fingerprint, ids),
        parent=parent,
        fingerprint=fingerprint,
        namespace=scope.namespace,
        user_id=scope.user_id,
        start=start,
        token_ids=ids,
        blob="blobs/ab/ab.safetensors",
        tensor=key,
        checksum="",
        num_bytes=0,
        quarantined=quarantined,
    )


def chain(*parts: Iterable[int], parent: ChunkKey = ROOT, start: int = 0) -> list[ChunkRecord]:
    """Chunks computed one right behind the other."""
    records = []
    for part in parts:
        records.append(record(part, parent=parent, start=start))
        parent, start = records[-1].key, start + records[-1].num_tokens
    return records


def tokens_of(records: Iterable[ChunkRecord]) -> tuple[int, ...]:
    return tuple(token for one in records for token in one.token_ids)


Placed = tuple[ChunkRecord, int] | tuple[ChunkRecord, int, int]  # a chunk, its position, tokens left out


def plan_options(*placements: Placed, fresh_start: int) -> PlanOptions:
    return PlanOptions(
        placements=tuple(
            Placement(chunk_id=one.key, start=start, skip=skip[0] if skip else 0)
            for one, start, *skip in placements
        ),
        fresh_start=fresh_start,
    )


class FakeCatalog:
    """Records in a dict. ``broken`` makes every call raise; calls wait until ``gate`` is set."""

    def __init__(self, records: Iterable[ChunkRecord] = ()) -> None:
        self.records = {one.key: one for one in records}
        self.broken: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def add(self, *records: ChunkRecord) -> None:
        self.records.update((one.key, one) for one in records)

    def quarantine(self, key: ChunkKey) -> None:
        self.records[key] = replace(self.records[key], quarantined=True)

    def break_down(self) -> None:
        self.broken = StorageError("database is locked")

    def chunks(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkRecord]:
        self._wait()
        return {key: self.records[key] for key in keys if key in self.records}

    def child_lengths(self, parent: ChunkKey) -> tuple[int, ...]:
        """Quarantined chunks count, too: whoever asks must not rely on being told usable ones only."""
        self._wait()
        return tuple(sorted({one.num_tokens for one in self.records.values() if one.parent == parent}))

    def _wait(self) -> None:
        assert self.gate.wait(timeout=30)
        if self.broken is not None:
            raise self.broken
