"""A request's way through the scheduler's half, as vLLM would lead it, without vLLM."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kv_agent.chunks import ChunkKey, ChunkRecord, CodecName, Scope
from kv_agent.config import PlanOptions, PluginConfig
from kv_agent.vllm_plugin.jobs import CaptureJob, LoadFailure, LoadJob, StepJobs, WorkerReport
from kv_agent.vllm_plugin.resolver import Resolved, Resolver
from kv_agent.vllm_plugin.scheduler import SchedulerSide
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    LIMITS,
    SCOPE,
    FakeCatalog,
    plan_options,
    tokens_of,
)

BLOCK = 4
CHUNK = 4
NOW = 1234.5
WAIT_S = 30.0
FRESH = (90, 91, 92)


@dataclass(slots=True, kw_only=True)
class FakeRequest:
    """What the scheduler's half reads of vLLM's ``Request``."""

    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = "salt"
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    output_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.prompt_token_ids or [])

    @property
    def all_token_ids(self) -> Sequence[int]:
        return [*(self.prompt_token_ids or []), *self.output_token_ids]


class WatchedResolver(Resolver):
    """Remembers the last look-up, so that a test can wait for it."""

    last: Future[Resolved] | None = None

    def submit(self, *args: Any, **kwargs: Any) -> Future[Resolved]:
        self.last = super().submit(*args, **kwargs)
        return self.last


def scope_fields(scope: Scope = SCOPE) -> dict[str, Any]:
    return {"namespace": scope.namespace, "user_id": scope.user_id}


def request(
    tokens: Iterable[int],
    request_id: str = "r",
    *,
    plan: PlanOptions | None = None,
    salt: str | None = "salt",
    scope: Scope | None = SCOPE,
    **options: Any,
) -> FakeRequest:
    """A request with kv_agent fields: a scope, perhaps a plan, and whatever ``options`` say."""
    if scope is not None:
        options["scope"] = scope_fields(scope)
    if plan is not None:
        options["plan"] = plan.model_dump()
    return FakeRequest(
        request_id=request_id,
        prompt_token_ids=list(tokens),
        cache_salt=salt,
        kv_transfer_params={"kv_agent": options},
    )


def row(*records: ChunkRecord) -> tuple[tuple[int, ...], PlanOptions]:
    """A prompt of the records' tokens and a fresh turn, and the plan that goes with it."""
    placements, position = [], 0
    for one in records:
        placements.append((one, position))
        position += one.num_tokens
    return tokens_of(records) + FRESH, plan_options(*placements, fresh_start=position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of a request: the answer, its load jobs, its capture, and where computing began."""

    answer: Mapping[str, Any]
    loads: tuple[LoadJob, ...]
    capture: CaptureJob | None
    cached_end: int
    blocks_kept: bool

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return tuple(self.answer[name] for name in ("exact", "adapted", "local", "computed"))

    @property
    def reasons(self) -> dict[str, str]:
        return {refused["chunk_id"]: refused["reason"] for refused in self.answer["refused"]}

    @property
    def captured(self) -> CaptureJob:
        assert self.capture is not None, "nothing was captured"
        return self.capture


class Desk:
    """A scheduler's half with a real resolver on a fake catalog, and vLLM's part of the protocol."""

    def __init__(
        self,
        catalog: FakeCatalog,
        *,
        prefix_caching: bool = True,
        chunk_tokens: int = CHUNK,
        load: Literal["always", "faster"] = "always",
    ) -> None:
        self.catalog = catalog
        self.resolver = WatchedResolver(catalog, FINGERPRINT)
        self.resolver.limits = LIMITS
        self.side = SchedulerSide(
            PluginConfig(chunk_tokens=chunk_tokens, load=load),
            FINGERPRINT,
            self.resolver,
            block_tokens=BLOCK,
            prefix_caching=prefix_caching,
            clock=lambda: NOW,
        )

    def close(self) -> None:
        self.catalog.gate.set()
        self.resolver.close()

    def ask(self, request_id: str, local: int = 0) -> int:
        """``match`` until the look-up has an answer."""
        deadline = time.monotonic() + WAIT_S
        while (matched := self.side.match(request_id, local))[0] is None:
            assert time.monotonic() < deadline, "the look-up never ended"
            time.sleep(0.0005)
        assert matched[0] > 0 or not matched[1]
        return matched[0]

    def wait_looked_up(self) -> None:
        if self.resolver.last is not None:
            self.resolver.last.exception(timeout=WAIT_S)

    def load(
        self,
        one: FakeRequest,
        local: int = 0,
        failing: Collection[ChunkKey] = (),
    ) -> tuple[list[LoadJob], int]:
        """Match, allocate and load as vLLM does, asking again when not even one block is left."""
        jobs: list[LoadJob] = []
        while True:
            count = self.ask(one.request_id, local)
            if count == 0:
                self.side.allocated(one.request_id, [], 0)
                return jobs, local
            blocks = range(100, 100 + -(-(local + count) // BLOCK))
            self.side.allocated(one.request_id, list(blocks), count)
            (job,) = self.side.take_jobs().loads
            jobs.append(job)
            failed = next((load for load in job.chunks if load.key in failing), None)
            failure = failed and LoadFailure(key=failed.key, start=failed.start, reason="blob is missing")
            self.side.report(WorkerReport(loaded={one.request_id: failure}))
            if failure is None:
                return jobs, local + count
            valid = failure.start // BLOCK * BLOCK
            if valid > 0:
                return jobs, valid
            local = 0

    def finish(
        self, one: FakeRequest, outputs: Sequence[int] = (), *, complete: bool = True
    ) -> tuple[bool, Mapping[str, Any], StepJobs]:
        one.output_token_ids = list(outputs)
        one.num_computed_tokens = max(0, len(one.all_token_ids) - (1 if outputs else 0))
        keep, answer = self.side.finished(one, self.blocks_of(one), complete=complete)
        assert answer is not None
        return keep, answer["kv_agent"], self.side.take_jobs()

    def blocks_of(self, one: FakeRequest) -> list[int]:
        return list(range(100, 100 + -(-len(one.all_token_ids) // BLOCK)))

    def serve(
        self,
        one: FakeRequest,
        *,
        local: int = 0,
        failing: Collection[ChunkKey] = (),
        outputs: Sequence[int] = (70,),
        complete: bool = True,
        durable: bool = True,
    ) -> Served:
        """One request from arrival to its end; ``durable``: its capture is stored at once."""
        self.side.new_request(one)
        loads, cached_end = self.load(one, local, failing)
        self.wait_looked_up()
        keep, answer, jobs = self.finish(one, outputs, complete=complete)
        capture = jobs.captures[0] if jobs.captures else None
        if capture is not None and durable:
            self.store(capture)
        return Served(
            answer=answer, loads=tuple(loads), capture=capture, cached_end=cached_end, blocks_kept=keep
        )

    def store(self, job: CaptureJob) -> None:
        """Make a capture durable, as the worker would."""
        self.catalog.add(*(replace(one, codec=codec_for(one.key)) for one in records_of(job)))
        self.side.report(WorkerReport(settled={job.turn_id: None}))

    def lose(self, job: CaptureJob) -> None:
        self.side.report(WorkerReport(settled={job.turn_id: "could not be written"}))


def codec_for(key: ChunkKey) -> CodecName:
    """One chunk in four is stored with loss, always the same ones."""
    return "raw" if int(key[0], 16) % 4 else "int8"


def records_of(job: CaptureJob) -> list[ChunkRecord]:
    return [
        ChunkRecord(
            key=segment.key,
            content_key=segment.content_key,
            parent=segment.parent,
            fingerprint=job.fingerprint,
            namespace=job.scope.namespace,
            user_id=job.scope.user_id,
            start=segment.start,
            token_ids=segment.token_ids,
            blob="blobs/ab/ab.safetensors",
            tensor=segment.key,
            checksum="",
            num_bytes=0,
        )
        for segment in job.segments
    ]
