"""What the plugin adds to vLLM's scheduler thread: every call it makes there, while many requests wait.

The catalog, the look-ups and the decisions are the real ones; vLLM's part of the protocol is played. The
yardstick is the same loop around functions that do nothing.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from benchmarks.storage_speed.filling import TURN_CHUNKS, fill
from benchmarks.storage_speed.timing import percentile
from benchmarks.storage_speed.turns import FINGERPRINT, SCOPE, VOCABULARY
from kv_agent.chunks import ChunkRecord
from kv_agent.config import PlanOptions, PluginConfig
from kv_agent.storage.catalog import Catalog
from kv_agent.vllm_plugin.jobs import StepJobs, WorkerReport
from kv_agent.vllm_plugin.plan import Limits, Refusal
from kv_agent.vllm_plugin.resolver import Resolved, Resolver
from kv_agent.vllm_plugin.scheduler import SchedulerSide
from kv_agent.vllm_plugin.signing import SIGNING_ENV, signed
from kv_agent.vllm_plugin.tally import Tally

BLOCK_TOKENS = 16  # vLLM's default on a GPU
ADMITTED_AT_ONCE = 8  # requests that a step admits
STEP_S = 0.002  # in which a step computes, and other threads run
CASES = ((5, 32), (5, 8000), (40, 32))  # memories of a plan, tokens of the fresh turn
SIGNING_KEY = "key"
STEP = "a step: all that wait asked, some admitted"

Seconds = defaultdict[str, list[float]]  # by call


@dataclass(slots=True, kw_only=True)
class Waiting:
    """What the plugin reads of vLLM's ``Request``."""

    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None
    cache_salt: str | None
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def all_token_ids(self) -> Sequence[int]:
        return [*(self.prompt_token_ids or ()), *self.output_token_ids]


class Deciding(Protocol):
    """The calls that vLLM's scheduler thread makes."""

    @property
    def counters(self) -> Mapping[str, float]: ...
    def new_request(self, request: Waiting) -> None: ...
    def match(self, request_id: str, num_computed: int) -> tuple[int | None, bool]: ...
    def allocated(self, request_id: str, block_ids: Sequence[int], num_external: int) -> None: ...
    def take_jobs(self) -> StepJobs: ...
    def report(self, report: WorkerReport) -> None: ...
    def finished(
        self, request: Waiting, block_ids: Sequence[int], *, complete: bool
    ) -> tuple[bool, dict[str, Any] | None]: ...


class Nothing:
    """The same calls without a plugin behind them."""

    counters: Mapping[str, float] = {}
    _jobs = StepJobs()

    def new_request(self, request: Waiting) -> None:
        pass

    def match(self, request_id: str, num_computed: int) -> tuple[int | None, bool]:
        return 0, False

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external: int) -> None:
        pass

    def take_jobs(self) -> StepJobs:
        return self._jobs

    def report(self, report: WorkerReport) -> None:
        pass

    def finished(
        self, request: Waiting, block_ids: Sequence[int], *, complete: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None


class TimedResolver(Resolver):
    """Notes how long each look-up took from when it was asked for."""

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(catalog, FINGERPRINT)
        self.limits = Limits(window=32_768)
        self.seconds: list[float] = []

    def submit(self, *args: Any, **kwargs: Any) -> Future[Resolved]:
        start = time.perf_counter()
        future = super().submit(*args, **kwargs)
        future.add_done_callback(lambda _: self.seconds.append(time.perf_counter() - start))
        return future


def measure(folder: Path, num_turns: int, num_waiting: int) -> Iterator[dict[str, Any]]:
    """``folder`` gets a store's catalog unless it has one already."""
    path = folder / "catalog.sqlite3"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fill(path, num_turns * TURN_CHUNKS)
    catalog = Catalog(path, "never")
    try:
        for num_memories, num_fresh in CASES:
            yield from _rows(catalog, num_turns, num_waiting, num_memories, num_fresh)
    finally:
        catalog.close()


def _rows(
    catalog: Catalog, num_turns: int, num_waiting: int, num_memories: int, num_fresh: int
) -> Iterator[dict[str, Any]]:
    requests = _requests(catalog, num_waiting, num_memories, num_fresh)
    resolver = TimedResolver(catalog)
    side = _side(resolver)
    seconds, own_seconds = serve(side, requests)
    resolver.submit((), SCOPE, None, find_stored=False).result()  # behind those that nobody waited for
    at_once, resolver.seconds = resolver.seconds[:-1], []
    for request in requests[: max(20, num_waiting // 10)]:
        options = PlanOptions.model_validate(_plan_of(request))
        resolver.submit(request.prompt_token_ids, SCOPE, options, find_stored=True).result()
    resolver.close()
    empty, _ = serve(Nothing(), requests)
    common = {
        "part": "scheduler thread",
        "turns": num_turns,
        "waiting": num_waiting,
        "prompt_tokens": requests[0].num_prompt_tokens,
        "plan_chunks": len(_plan_of(requests[0])["placements"]),
    }
    told = f"{num_memories} memories, {num_fresh} fresh tokens"
    for name, times in seconds.items():
        yield {
            **common,
            "case": f"{name}: {told}",
            "calls": len(times),
            "ms": _milliseconds(times),
            "own_ms": _milliseconds(own_seconds[name]),
            "ms_without_plugin": _milliseconds(empty[name]),
        }
    for name, times in (("a look-up alone", resolver.seconds), ("look-ups of all that wait", at_once)):
        yield {
            **common,
            "case": f"{name}: {told}",
            "calls": len(times),
            "ms": _milliseconds(times),
            "chunks_refused_as_late": side.counters[f"refused_chunks|{Refusal.LATE}"],
        }


def serve(side: Deciding, requests: Sequence[Waiting]) -> tuple[Seconds, Seconds]:
    """All of them arrive at once; every step asks about all that wait and admits some.

    Returns seconds by call: as the clock has them, and those in which this thread had a processor.
    """
    seconds: Seconds = defaultdict(list)
    own_seconds: Seconds = defaultdict(list)

    def timed(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = time.thread_time()
        start = time.perf_counter()
        answer = call(*args, **kwargs)
        seconds[name].append(time.perf_counter() - start)
        own_seconds[name].append(time.thread_time() - own)
        return answer

    tally = Tally()
    for request in requests:
        timed("new_request", side.new_request, request)
    waiting, running = list(requests), list[Waiting]()
    while waiting or running:
        own, start = time.thread_time(), time.perf_counter()
        admitted: list[Waiting] = []
        for request in waiting:
            count, _ = timed("match", side.match, request.request_id, 0)
            if count is not None and len(admitted) < ADMITTED_AT_ONCE:
                blocks = _blocks(request.num_prompt_tokens)
                timed("allocated", side.allocated, request.request_id, blocks, count)
                admitted.append(request)
        jobs = timed("take_jobs", side.take_jobs)
        are_served = {request.request_id for request in admitted}
        waiting = [request for request in waiting if request.request_id not in are_served]
        seconds[STEP].append(time.perf_counter() - start)
        own_seconds[STEP].append(time.thread_time() - own)
        time.sleep(STEP_S)
        report = WorkerReport(
            loaded={job.request_id: None for job in jobs.loads},
            settled={job.turn_id: None for job in jobs.captures},
        )
        timed("report", side.report, report)
        for request in running:
            timed("finished", side.finished, request, _blocks(request.num_computed_tokens), complete=True)
        timed("statistics", tally.take, side.counters)
        running = admitted
    side.take_jobs()
    return seconds, own_seconds


def _side(resolver: Resolver) -> SchedulerSide:
    with patch.dict(os.environ, {SIGNING_ENV: SIGNING_KEY}):  # as where a server serves memory
        return SchedulerSide(
            PluginConfig(), FINGERPRINT, resolver, block_tokens=BLOCK_TOKENS, prefix_caching=True
        )


def _requests(catalog: Catalog, count: int, num_memories: int, num_fresh: int) -> list[Waiting]:
    """Requests with plans of memories drawn at random, with an answer of 20 tokens already."""
    choice = random.Random(num_memories)
    turn_ids = sorted(catalog.turns_by_age(None, None, None))
    requests = []
    for number in range(count):
        turns = catalog.turns(choice.sample(turn_ids, num_memories)).values()
        keys = [key for turn in turns for key in turn.chunk_keys]
        known = catalog.chunks(keys)
        records = [known[key] for key in keys]
        prompt = [token for record in records for token in record.token_ids]
        plan = {"placements": _in_a_row(records), "fresh_start": len(prompt)}
        prompt += choice.choices(range(VOCABULARY), k=num_fresh)
        options = {"scope": {"session_id": "session"}, "plan": plan}
        requests.append(
            Waiting(
                request_id=f"request-{number}",
                prompt_token_ids=prompt,
                kv_transfer_params={"kv_agent": signed(options, SIGNING_KEY.encode())},
                cache_salt=f"salt-{number}",
                num_prompt_tokens=len(prompt),
                num_computed_tokens=len(prompt) + 19,
                output_token_ids=choice.choices(range(VOCABULARY), k=20),
            )
        )
    return requests


def _in_a_row(records: Sequence[ChunkRecord]) -> list[dict[str, Any]]:
    placements, start = [], 0
    for record in records:
        placements.append({"chunk_id": record.key, "start": start})
        start += record.num_tokens
    return placements


def _plan_of(request: Waiting) -> dict[str, Any]:
    plan: dict[str, Any] = (request.kv_transfer_params or {})["kv_agent"]["plan"]
    return plan


def _blocks(num_tokens: int) -> range:
    return range(1, 2 + num_tokens // BLOCK_TOKENS)


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(percentile(seconds, share) * 1e3, 4) for name, share in shares.items()}
