"""Time to the first token of a turn behind memory: computed, hit by vLLM itself, and ours from every tier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine_speed.engines import SCOPE, Ask, BenchEngine, plan_of, random_tokens, stored
from benchmarks.engine_speed.peers import PEERS
from benchmarks.storage_speed.cold import drop
from benchmarks.storage_speed.timing import Arm, interleaved, ratios, spread
from kv_agent.chunks import ChunkRecord
from kv_agent.storage.catalog import Catalog

FRESH = 32
_ROOMY = 1 << 30
Settings = Mapping[str, Mapping[str, Any]]

TIERS: Settings = {
    "host": {"host_bytes": _ROOMY, "warm_bytes": 0},
    "warm": {"host_bytes": 0, "warm_bytes": _ROOMY},
    "disk": {"host_bytes": 0, "warm_bytes": 0},
}
# Short memories: all of them put back, and those that it pays for.
SHORT: Settings = {
    "host": TIERS["host"],
    "when faster": {**TIERS["host"], "load": "faster"},
}


def measure(
    model: Path, folder: Path, lengths: Sequence[int], rounds: int, settings: Settings = TIERS
) -> Iterator[dict[str, Any]]:
    """A row for each number of memory tokens, an arm for each of the ``settings``."""
    with ExitStack() as stack:
        catalog = stack.enter_context(closing(Catalog(folder / "catalog.sqlite3")))
        plain = stack.enter_context(closing(BenchEngine(model)))
        tiers = {
            name: stack.enter_context(closing(BenchEngine(model, {"store": str(folder), **chosen})))
            for name, chosen in settings.items()
        }
        peers = {
            name: stack.enter_context(closing(BenchEngine(model, **options(folder))))
            for name, options in (PEERS if settings is TIERS else {}).items()
        }
        if "when faster" in tiers:  # as any server has had before
            tiers["when faster"].run([_any_chat(number) for number in range(8)], 1)
        for length in lengths:
            memory = random_tokens(length, seed=length)
            records = stored(catalog, tiers["host"].ask(memory, scope=SCOPE))
            seconds = interleaved(_Case(folder, memory, records).arms(plain, tiers, peers), rounds)
            part = "first token" if settings is TIERS else "short memories"
            yield {"part": part, **_row(length, len(records), seconds)}


def _any_chat(number: int) -> Ask:
    return Ask(token_ids=random_tokens(300, seed=number), max_tokens=4)


class _Case:
    """Every request has another turn behind the same memory."""

    def __init__(self, folder: Path, memory: Sequence[int], records: Sequence[ChunkRecord]) -> None:
        self._memory = memory
        self._plan = plan_of(records)
        self._files = {folder / record.blob for record in records}
        self._numbers = itertools.count(1_000_000)

    def arms(
        self, plain: BenchEngine, tiers: Mapping[str, BenchEngine], peers: Mapping[str, BenchEngine]
    ) -> dict[str, Arm]:
        arms: dict[str, Arm] = {
            "computed": lambda: plain.ask(self._prompt(), salt=str(next(self._numbers))).ttft_s,
            "local": lambda: plain.ask(self._prompt()).ttft_s,
        }
        arms |= {name: partial(self._ours, name, engine) for name, engine in tiers.items()}
        return arms | {name: partial(self._peers, engine) for name, engine in peers.items()}

    def _prompt(self) -> list[int]:
        return [*self._memory, *random_tokens(FRESH, seed=next(self._numbers))]

    def _peers(self, engine: BenchEngine) -> float:
        engine.forget_local()
        return engine.ask(self._prompt()).ttft_s

    def _ours(self, name: str, engine: BenchEngine) -> float:
        engine.forget_local()
        if name == "disk":
            drop(self._files)
        salt = str(next(self._numbers))
        answer = engine.ask(self._prompt(), salt=salt, scope=SCOPE, store=False, plan=self._plan)
        if name in TIERS and answer.fields["exact"] != len(self._memory):
            raise RuntimeError(f"{answer.fields['exact']} of {len(self._memory)} tokens came back")
        return answer.ttft_s


def _row(length: int, num_chunks: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    local, computed = seconds["local"], seconds["computed"]
    return {
        "case": f"{length} memory tokens",
        "chunks": num_chunks,
        "ms": {name: spread([1e3 * one for one in times], 1) for name, times in seconds.items()},
        "of_local": {name: ratios(times, local) for name, times in seconds.items() if times is not local},
        "times_faster": {
            name: ratios(computed, times) for name, times in seconds.items() if times is not computed
        },
    }
