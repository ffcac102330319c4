"""Throughput against the number of agents that ask at once, each with a memory of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine_speed.engines import (
    SCOPE,
    SPINS_S,
    Answer,
    Ask,
    BenchEngine,
    plan_of,
    random_tokens,
    stored,
)
from benchmarks.storage_speed.timing import against_median, interleaved, ratios, spread
from kv_agent.storage.catalog import Catalog

FRESH_TOKENS = 32
ANSWER_TOKENS = 16
_HOST_BYTES = 2 << 30
_FEWEST_REQUESTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What one agent remembers, and the plan that puts it back."""

    memory: Sequence[int]
    plan: Mapping[str, Any]


def measure(
    model: Path, folder: Path, counts: Sequence[int], memory_tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each of ``counts``, which ascend: computed, hit by vLLM itself, ours from host memory."""
    most = max(counts)
    with ExitStack() as stack:
        catalog = stack.enter_context(closing(Catalog(folder / "catalog.sqlite3")))
        settings = {"store": str(folder), "host_bytes": _HOST_BYTES, "warm_bytes": 0}
        plain = stack.enter_context(closing(BenchEngine(model, max_num_seqs=most)))
        ours = stack.enter_context(closing(BenchEngine(model, settings, max_num_seqs=most)))
        agents = [_remembered(catalog, ours, random_tokens(memory_tokens, seed=i)) for i in range(most)]
        for count in counts:
            case = _Case(agents[:count], max(count, _FEWEST_REQUESTS))
            computed = [case.computed(plain)]  # it takes longest and varies least
            seconds = {"computed": computed, **interleaved(case.arms(plain, ours), rounds, SPINS_S)}
            yield _row(case, count, memory_tokens, seconds)


def _remembered(catalog: Catalog, engine: BenchEngine, memory: Sequence[int]) -> Agent:
    return Agent(memory=memory, plan=plan_of(stored(catalog, engine.ask(memory, scope=SCOPE))))


class _Case:
    """So many agents ask at once until all requests are answered; every request asks something else."""

    def __init__(self, agents: Sequence[Agent], num_requests: int) -> None:
        self._agents, self.num_requests = agents, num_requests
        self._numbers = itertools.count(2_000_000)
        self.ttft_s: dict[str, list[float]] = {}

    def computed(self, plain: BenchEngine) -> float:
        return self._run("computed", plain, self._salted)

    def arms(self, plain: BenchEngine, ours: BenchEngine) -> dict[str, Callable[[], float]]:
        return {
            "local": partial(self._run, "local", plain, self._as_is),
            "host": partial(self._run, "host", ours, self._planned),
        }

    def _run(self, arm: str, engine: BenchEngine, ask: Callable[[Agent], Ask]) -> float:
        agents = itertools.islice(itertools.cycle(self._agents), self.num_requests)
        asks = [ask(agent) for agent in agents]
        if arm == "host":
            engine.forget_local()
        began = time.perf_counter()
        answers = engine.run(asks, len(self._agents))
        seconds = time.perf_counter() - began
        self.ttft_s.setdefault(arm, []).append(_median_ttft(answers))
        if arm == "host" and any(one.fields["exact"] != len(self._agents[0].memory) for one in answers):
            raise RuntimeError("a memory did not come back whole")
        return seconds

    def _salted(self, agent: Agent) -> Ask:
        return Ask(token_ids=self._prompt(agent), max_tokens=ANSWER_TOKENS, salt=str(next(self._numbers)))

    def _as_is(self, agent: Agent) -> Ask:
        return Ask(token_ids=self._prompt(agent), max_tokens=ANSWER_TOKENS)

    def _planned(self, agent: Agent) -> Ask:
        options = {"scope": SCOPE, "store": False, "plan": agent.plan}
        salt = str(next(self._numbers))
        return Ask(token_ids=self._prompt(agent), max_tokens=ANSWER_TOKENS, salt=salt, options=options)

    def _prompt(self, agent: Agent) -> list[int]:
        return [*agent.memory, *random_tokens(FRESH_TOKENS, seed=next(self._numbers))]


def _row(
    case: _Case, count: int, memory_tokens: int, seconds: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    per_s = {arm: [case.num_requests / one for one in times] for arm, times in seconds.items()}
    return {
        "part": "agents",
        "case": f"{count} agents",
        "agents": count,
        "requests": case.num_requests,
        "memory_tokens": memory_tokens,
        "answer_tokens": ANSWER_TOKENS,
        "requests_per_s": {arm: spread(found, 2) for arm, found in per_s.items()},
        "of_local": {"host": ratios(per_s["host"], per_s["local"])},
        "of_computed": {
            arm: against_median(per_s["computed"], found) for arm, found in per_s.items() if arm != "computed"
        },
        "ttft_ms": {arm: spread([1e3 * one for one in times], 1) for arm, times in case.ttft_s.items()},
    }


def _median_ttft(answers: Sequence[Answer]) -> float:
    return median(answer.ttft_s for answer in answers)
