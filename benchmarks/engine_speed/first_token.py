"""Time to the first token of a turn behind memory: computed, hit by vLLM itself, ours by tier, and peers'.

Computing long memories takes most of the time and varies least, so it is done twice or, where it takes ten
seconds, once; everything else in every round, when no engine is busy any more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine_speed.engines import (
    SCOPE,
    SPINS_S,
    Ask,
    BenchEngine,
    plan_of,
    random_tokens,
    stored,
)
from benchmarks.peers.asking import Remembered, remembered
from benchmarks.peers.opening import NONE, Openers, Peers, open_peers
from benchmarks.storage_speed.cold import drop
from benchmarks.storage_speed.timing import Arm, against_median, interleaved, ratios, spread
from kv_agent.chunks import ChunkRecord
from kv_agent.storage.catalog import Catalog

FRESH = 32
_ROOMY = 1 << 30
_COMPUTING_S = 3.0  # a memory is computed until so much time went into it, and twice at least,
_LONG_S = 10.0  # unless the first time took so long
Settings = Mapping[str, Mapping[str, Any]]

TIERS: Settings = {
    "host": {"host_bytes": _ROOMY, "warm_bytes": 0},
    "warm": {"host_bytes": 0, "warm_bytes": _ROOMY},
    "disk": {"host_bytes": 0, "warm_bytes": 0},
}
# Beside peers, and for a look.
FEW: Settings = {name: TIERS[name] for name in ("host", "disk")}
# What short memories are asked of: all of them put back, and those that it pays for.
SHORT: Settings = {
    "host": TIERS["host"],
    "when faster": {**TIERS["host"], "load": "faster"},
}


def measure(
    model: Path,
    folder: Path,
    lengths: Sequence[int],
    rounds: int,
    *,
    short: Sequence[int] = (),
    settings: Settings = TIERS,
    peers: Openers = NONE,
) -> Iterator[dict[str, Any]]:
    """A row for each number of memory tokens, an arm for each of the ``settings`` and each peer that hits.

    ``lengths`` ascend, and a peer that missed one is not asked for longer ones. ``short`` ones are a part of
    their own, with the settings for these.
    """
    with ExitStack() as stack:
        engines = _Engines(model, folder, {**settings, **(SHORT if short else {})}, rounds, stack)
        others = open_peers(peers, model, folder / "peers", stack)
        if short:  # as any server has had before
            engines.tiers["when faster"].run([_any_chat(number) for number in range(8)], 1)
        for length in short:
            case = engines.case(length)
            yield {"part": "short memories", **_row(case, engines.asked(case, SHORT))}
        hitting = dict(others.engines)
        for length in lengths:
            case = engines.case(length)
            theirs = {name: remembered(engine, length, case.prompt) for name, engine in hitting.items()}
            row = _row(case, engines.asked(case, settings, theirs))
            yield {"part": "first token", **row, **(_told(others, theirs) if peers else {})}
            hitting = {name: engine for name, engine in hitting.items() if theirs[name].missed is None}


def beside_peers(
    model: Path, folder: Path, lengths: Sequence[int], rounds: int, peers: Openers
) -> Iterator[dict[str, Any]]:
    """A row for each peer and number of memory tokens: one peer at a time, with its server, beside ours.

    All at once would leave each of them little of two cores and of the memory. ``lengths`` ascend.
    """
    with ExitStack() as stack:
        engines = _Engines(model, folder, FEW, rounds, stack)
        cases = {length: engines.case(length) for length in lengths}
        for name, opener in peers.items():
            with ExitStack() as its_own:
                others = open_peers({name: opener}, model, folder / "peers", its_own)
                for length, case in cases.items():
                    theirs = {
                        name: remembered(engine, length, case.prompt)
                        for name, engine in others.engines.items()
                    }
                    seconds = engines.asked(case, FEW, theirs)
                    row = _row(case, seconds) | {"case": f"{length} memory tokens beside {name}"}
                    if name in seconds:
                        row["host_of_peer"] = ratios(seconds["host"], seconds[name])
                    yield {"part": "peers", "peer": name, **row, **_told(others, theirs)}
                    if name not in seconds:
                        break


class _Engines:
    """An engine without the plugin and one for each of the ``settings``, all with one store."""

    def __init__(self, model: Path, folder: Path, settings: Settings, rounds: int, stack: ExitStack) -> None:
        self._folder, self._rounds = folder, rounds
        self._catalog = stack.enter_context(closing(Catalog(folder / "catalog.sqlite3")))
        self._plain = stack.enter_context(closing(BenchEngine(model)))
        self.tiers = {
            name: stack.enter_context(closing(BenchEngine(model, {"store": str(folder), **chosen})))
            for name, chosen in settings.items()
        }

    def case(self, length: int) -> _Case:
        """A memory that is stored, and computed without the plugin."""
        memory = random_tokens(length, seed=length)
        case = _Case(self._folder, memory, stored(self._catalog, self.tiers["host"].ask(memory, scope=SCOPE)))
        time.sleep(SPINS_S)
        case.compute(self._plain, self._rounds)
        return case

    def asked(
        self, case: _Case, settings: Settings, peers: Mapping[str, Remembered] | None = None
    ) -> dict[str, Sequence[float]]:
        """Seconds in every round of all who bring the memory back."""
        peers = peers or {}
        arms = case.arms(self._plain, {name: self.tiers[name] for name in settings})
        return _hits(interleaved(arms | _peer_arms(peers), self._rounds, SPINS_S), peers)


def _any_chat(number: int) -> Ask:
    return Ask(token_ids=random_tokens(300, seed=number), max_tokens=4)


class _Case:
    """Every request has another turn behind the same memory."""

    def __init__(self, folder: Path, memory: Sequence[int], records: Sequence[ChunkRecord]) -> None:
        self.num_tokens, self.num_chunks = len(memory), len(records)
        self._memory = memory
        self._plan = plan_of(records)
        self._files = {folder / record.blob for record in records}
        self._numbers = itertools.count(1_000_000)
        self.computed_s: list[float] = []  # that all of it took, each time

    def compute(self, plain: BenchEngine, most: int) -> None:
        """Compute it so many times at most; then the memory is in the engine's own cache."""
        self.computed_s = seconds = [plain.ask(self.prompt()).ttft_s]
        while (len(seconds) < 2 and seconds[0] < _LONG_S) or (
            sum(seconds) < _COMPUTING_S and len(seconds) < most
        ):
            seconds.append(plain.ask(self.prompt(), salt=str(next(self._numbers))).ttft_s)

    def arms(self, plain: BenchEngine, tiers: Mapping[str, BenchEngine]) -> dict[str, Arm]:
        arms: dict[str, Arm] = {"local": lambda: plain.ask(self.prompt()).ttft_s}
        return arms | {name: partial(self._ours, name, engine) for name, engine in tiers.items()}

    def prompt(self) -> list[int]:
        return [*self._memory, *random_tokens(FRESH, seed=next(self._numbers))]

    def _ours(self, name: str, engine: BenchEngine) -> float:
        engine.forget_local()
        if name == "disk":
            drop(self._files)
        salt = str(next(self._numbers))
        answer = engine.ask(self.prompt(), salt=salt, scope=SCOPE, store=False, plan=self._plan)
        if name in TIERS and answer.fields["exact"] != len(self._memory):
            raise RuntimeError(f"{answer.fields['exact']} of {len(self._memory)} tokens came back")
        return answer.ttft_s


def _peer_arms(peers: Mapping[str, Remembered]) -> dict[str, Arm]:
    return {name: peer.ttft_s for name, peer in peers.items() if peer.missed is None}


def _hits(
    seconds: Mapping[str, Sequence[float]], peers: Mapping[str, Remembered]
) -> dict[str, Sequence[float]]:
    """Without peers that missed in some round."""
    return {name: times for name, times in seconds.items() if name not in peers or peers[name].missed is None}


def _told(others: Peers, peers: Mapping[str, Remembered]) -> dict[str, Any]:
    """The fewest tokens each peer brought back in a round, who missed and who is not there, and why."""
    return {
        "brought_back": {name: peer.num_brought for name, peer in peers.items()},
        "missed": {name: peer.missed for name, peer in peers.items() if peer.missed is not None},
        "skipped": dict(others.skipped),
    }


def _row(case: _Case, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    local, computed = seconds["local"], case.computed_s
    every = {"computed": computed, **seconds}
    return {
        "case": f"{case.num_tokens} memory tokens",
        "chunks": case.num_chunks,
        "ms": {name: spread([1e3 * one for one in times], 1) for name, times in every.items()},
        "of_local": {name: ratios(times, local) for name, times in seconds.items() if times is not local},
        "times_faster": {name: against_median(times, computed) for name, times in seconds.items()},
    }
