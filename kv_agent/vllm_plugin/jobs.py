"""What scheduler and worker tell each other: plain values, no tensors, safe to send between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kv_agent.chunks import ChunkKey, ChunkRecord, ContentKey, Fingerprint, Scope, TurnId


class ChunkLoad(NamedTuple):
    """Write chunk tokens ``[skip, num_tokens)`` to positions from ``start`` on, keys rotated by ``delta``.

    A tuple, for there may be hundreds in a step, and a model waits while they are sent.
    """

    key: ChunkKey
    checksum: str
    num_tokens: int
    skip: int
    start: int
    delta: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens - self.skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Fill a request's blocks with these chunks, in order of position.

    It waits while they are read from where their ``records`` say, unless ``at_once``: then all are in memory,
    and this step computes on them.
    """

    request_id: str
    block_ids: tuple[int, ...]
    chunks: tuple[ChunkLoad, ...]
    records: Mapping[ChunkKey, ChunkRecord] = field(default_factory=dict)
    at_once: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of a finished request that become one new chunk."""

    key: ChunkKey
    content_key: ContentKey
    parent: ChunkKey
    start: int
    token_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureJob:
    """Copy a finished request's new tokens off the paged cache and store them as one turn.

    ``content_keys`` are all chunks of the turn in order, the already stored ones included. With ``is_part``
    the turn is there already, and only context is added to it.
    """

    request_id: str
    block_ids: tuple[int, ...]
    turn_id: TurnId
    scope: Scope
    fingerprint: Fingerprint
    context: tuple[Segment, ...]
    content: tuple[Segment, ...]
    content_keys: tuple[ChunkKey, ...]
    content_tokens: tuple[int, ...]
    created: float
    metadata: Mapping[str, str | int | float | bool]
    expires: float | None = None
    is_part: bool = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.context + self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeJob:
    """Read the keys of prompt tokens ``[start, end)``, which are in the cache after this step."""

    request_id: str
    block_ids: tuple[int, ...]
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class StepJobs:
    """Scheduler to worker, once per engine step. With ``num_tokens`` the worker tells how long it took.

    ``heard`` is the number of the last report of what is in memory.
    """

    loads: list[LoadJob] = field(default_factory=list)
    captures: list[CaptureJob] = field(default_factory=list)
    probes: list[ProbeJob] = field(default_factory=list)
    num_tokens: int = 0
    heard: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentChanges:
    """Chunks that came into memory, with their checksum, or went (``None``), since the report before."""

    number: int
    checksums: Mapping[ChunkKey, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """Chunk ``key`` could not be loaded to position ``start``; from there on tokens are computed."""

    key: ChunkKey
    start: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A step computed ``num_tokens``; ``num_put_back`` more were put back while it did."""

    num_tokens: int
    seconds: float
    num_put_back: int = 0


@dataclass(slots=True, kw_only=True)
class WorkerReport:
    """Worker to scheduler: what became of the jobs since the last report."""

    loaded: dict[str, LoadFailure | None] = field(default_factory=dict)
    probes: dict[str, bytes] = field(default_factory=dict)
    settled: dict[TurnId, str | None] = field(default_factory=dict)  # None: durable; else why not
    steps: list[StepTime] = field(default_factory=list)
    residents: ResidentChanges | None = None

    def merge(self, other: WorkerReport) -> None:
        """Take in a later report, but for what is in memory: that is for one to tell."""
        self.loaded.update(other.loaded)
        self.probes.update(other.probes)
        self.settled.update(other.settled)
        self.steps += other.steps

    def __bool__(self) -> bool:
        return bool(self.loaded or self.probes or self.settled or self.steps or self.residents)
