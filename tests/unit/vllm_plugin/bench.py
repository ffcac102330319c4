"""A worker's half on a bench: a dense cache, a store that fails or waits, and jobs in a few words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId, TurnRecord
from kv_agent.kv.block_copy import BlockCopier, Copying
from kv_agent.kv.block_kernels import Strided
from kv_agent.kv.rope import RotaryScheme
from kv_agent.storage.codecs import PLAIN, Codec
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.tiers import Loaded
from kv_agent.storage.turn_writes import AddResult
from kv_agent.vllm_plugin.chains import cut_segments
from kv_agent.vllm_plugin.jobs import CaptureJob, ChunkLoad, LoadFailure, LoadJob, StepJobs, WorkerReport
from kv_agent.vllm_plugin.paged_cache import NULL_BLOCK, Put, Reading
from kv_agent.vllm_plugin.worker import WorkerSide
from tests.unit.vllm_plugin.builders import FINGERPRINT, ROOT, SCOPE

# L layers, T tokens, H kv heads, D head dim, P tokens per block, S slots of the whole cache
L, H, D, P = 3, 2, 8, 4
NUM_BLOCKS = 24
CHUNK = 6
WAIT_S = 30.0
SCHEME = RotaryScheme(
    inv_freq=tuple(1.0 / 100 ** (i / 3) for i in range(3)), rotary_dim=6, neox=True
)  # two of eight dims are not rotated
POOLED = (0, 2)


class DenseCopier(BlockCopier):
    """Into the dense tensor, unless its cache is broken."""

    cache: DenseCache

    def scatter(self, *arguments: Any) -> Copying:
        self.cache._fail_if_broken()
        return super().scatter(*arguments)


class DenseCache:
    """The paged cache's methods on one dense tensor ``[L, 2, S, H, D]``.

    A ``direct`` one has its copier, too, and one that ``has_streams`` those of a CPU, which do nothing.
    """

    block_tokens = P
    num_layers = L
    num_heads = H
    head_dim = D
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, *, direct: bool = False, has_streams: bool = False) -> None:
        shape = (L, 2, NUM_BLOCKS * P, H, D)
        self.dtype = dtype
        self.memory_L2SHD = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        self.broken: Exception | None = None
        self.copier = self._copier() if direct else None
        self.has_streams = has_streams

    def _copier(self) -> DenseCopier:
        rows = {"token": H * D, "head": D, "dim": 1}
        copier = DenseCopier(
            caches_L=[memory_2SHD[0].view(NUM_BLOCKS, P, H, D) for memory_2SHD in self.memory_L2SHD],
            block_items=P * H * D,
            shape_PHD=(P, H, D),
            key=Strided(first=0, **rows),
            value=Strided(first=self.memory_L2SHD.stride(1), **rows),
        )
        object.__setattr__(copier, "cache", self)
        return copier

    @property
    def token_bytes(self) -> int:
        return self.memory_L2SHD[:, :, 0].nbytes

    def fits(self, kv_L2THD: Tensor) -> bool:
        L, two, _, H, D = kv_L2THD.shape
        shape = self.memory_L2SHD.shape
        same = (L, two, H, D) == (shape[0], shape[1], shape[3], shape[4])
        return same and kv_L2THD.dtype == self.memory_L2SHD.dtype

    def read(
        self, block_ids: Sequence[int], start: int, end: int, layers: Sequence[int] | None = None
    ) -> Tensor:
        return self.begin_reading(block_ids, start, end, layers).wait()

    def begin_reading(
        self, block_ids: Sequence[int], start: int, end: int, layers: Sequence[int] | None = None
    ) -> Reading:
        self._fail_if_broken()
        chosen_L2SHD = self.memory_L2SHD[list(range(L) if layers is None else layers)]
        return Reading(kv_L2THD=chosen_L2SHD[:, :, slots(block_ids, start, end)])

    def write(
        self, kv_l2THD: Tensor, block_ids: Sequence[int], start: int, layers: slice = slice(None)
    ) -> None:
        self._fail_if_broken()
        assert kv_l2THD.dtype == self.memory_L2SHD.dtype
        self.memory_L2SHD[layers][:, :, slots(block_ids, start, start + kv_l2THD.shape[2])] = kv_l2THD

    def puts_alike(self, put: Put) -> bool:
        before = self.memory_L2SHD.clone()
        put(before[:, :, P : 2 * P], [NULL_BLOCK], 0)
        puts_all = torch.equal(self.memory_L2SHD[:, :, :P], before[:, :, P : 2 * P])
        self.memory_L2SHD.copy_(before)
        return puts_all

    def _fail_if_broken(self) -> None:
        if self.broken is not None:
            raise self.broken


def slots(block_ids: Sequence[int], start: int, end: int) -> list[int]:
    return [block_ids[position // P] * P + position % P for position in range(start, end)]


class TroubledStore(LocalStore):
    """A store that fails or waits where a test says so."""

    load_error: Exception | None = None
    put_error: Exception | None = None

    def __init__(self, root: Path, host_bytes: int, warm_bytes: int, codec: Codec) -> None:
        super().__init__(root, host_bytes, warm_bytes=warm_bytes, codec=codec)
        self.may_load = threading.Event()
        self.may_put = threading.Event()
        self.given_vectors: dict[ChunkKey, bytes | None] = {}
        self.may_load.set()
        self.may_put.set()

    def load(self, record: ChunkRecord, delta: int = 0) -> Loaded:
        assert self.may_load.wait(WAIT_S)
        if self.load_error is not None:
            raise self.load_error
        return super().load(record, delta)

    def put_turn(
        self,
        turn: TurnRecord,
        context: Sequence[NewChunk],
        content: Sequence[NewChunk],
        *,
        is_part: bool = False,
    ) -> AddResult:
        assert self.may_put.wait(WAIT_S)
        if self.put_error is not None:
            raise self.put_error
        self.given_vectors.update({chunk.key: chunk.vector for chunk in (*context, *content)})
        return super().put_turn(turn, context, content, is_part=is_part)


class Bench:
    """A worker's half with its store and cache, stepped as vLLM steps it."""

    def __init__(
        self,
        root: Path,
        *,
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 0,
        warm_bytes: int = 0,
        queue_bytes: int = 1 << 30,
        scheme: RotaryScheme | None = SCHEME,
        direct: bool = False,
        has_streams: bool = False,
        codec: Codec = PLAIN,
    ) -> None:
        self.cache = DenseCache(dtype, direct=direct, has_streams=has_streams)
        self.store = TroubledStore(root, host_bytes, warm_bytes, codec)
        self.worker = WorkerSide(
            self.cache,
            self.store,
            scheme,
            pooled_layers=POOLED,
            queue_bytes=queue_bytes,
            load_threads=2,
            decode=lambda ids: " ".join(map(str, ids)),
        )
        self.report = WorkerReport()
        self.told: dict[ChunkKey, str | None] = {}  # what is in memory
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.invalid_blocks: set[int] = set()

    def close(self) -> None:
        self.store.may_load.set()
        self.store.may_put.set()
        self.worker.close()

    def step(self, **jobs: list) -> None:
        step_jobs = StepJobs(**jobs)
        self.worker.begin(step_jobs)
        self.worker.start()
        self.worker.save(step_jobs)
        sent, received = self.worker.take_finished()
        self.sent |= sent
        self.received |= received
        self.invalid_blocks |= self.worker.take_invalid_blocks()
        report = self.worker.take_report()
        self.report.merge(report)
        if report.residents is not None:
            self.told |= report.residents.checksums

    def step_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.001)
            self.step()

    def capture(self, job: CaptureJob) -> list[ChunkRecord]:
        """Capture and wait until it is settled; the records of its segments that were stored."""
        self.step(captures=[job])
        self.step_until(lambda: job.turn_id in self.report.settled)
        found = self.store.catalog.chunks([segment.key for segment in job.segments])
        return [found[segment.key] for segment in job.segments if segment.key in found]

    def load(self, job: LoadJob) -> LoadFailure | None:
        self.step(loads=[job])
        self.step_until(lambda: job.request_id in self.received)
        return self.report.loaded[job.request_id]

    def kv(self, block_ids: Sequence[int], start: int, end: int) -> Tensor:
        return self.cache.memory_L2SHD[:, :, slots(block_ids, start, end)].clone()


def capture_job(
    num_tokens: int = 16,
    *,
    name: str = "turn",
    blocks: Sequence[int] = (3, 1, 4, 9, 5),
    start: int = 0,
    content_start: int | None = None,
    parent: ChunkKey = ROOT,
    first_token: int = 100,
) -> CaptureJob:
    """Tokens ``[start, num_tokens)`` of a sequence, those before ``content_start`` as context."""
    tokens = range(first_token, first_token + num_tokens)
    split = start if content_start is None else content_start
    context = cut_segments(parent, tokens, start, split, CHUNK, FINGERPRINT)
    parent = context[-1].key if context else parent
    content = cut_segments(parent, tokens, split, num_tokens, CHUNK, FINGERPRINT)
    return CaptureJob(
        request_id=f"request of {name}",
        block_ids=tuple(blocks),
        turn_id=TurnId(name),
        scope=SCOPE,
        fingerprint=FINGERPRINT,
        context=context,
        content=content,
        content_keys=tuple(one.key for one in content),
        content_tokens=tuple(tokens[split:]),
        created=12.5,
        metadata={"topic": "x"},
        expires=60.5,
    )


def load_job(
    records: Sequence[ChunkRecord],
    *,
    at: int = 0,
    skip: int = 0,
    blocks: Sequence[int] = (20, 12, 17, 11, 14),
) -> LoadJob:
    """The records one behind the other from position ``at``, without the first ``skip`` tokens."""
    loads, position = [], at
    for one in records:
        missing = skip if not loads else 0
        loads.append(
            ChunkLoad(
                key=one.key,
                checksum=one.checksum,
                num_tokens=one.num_tokens,
                skip=missing,
                start=position + missing,
                delta=position - one.start,
            )
        )
        position += one.num_tokens
    return LoadJob(
        request_id="loading",
        block_ids=tuple(blocks),
        chunks=tuple(loads),
        records={one.key: one for one in records},
    )
