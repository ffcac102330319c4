"""What is counted, as plain values: collected where it happens, sent with vLLM's own statistics.

A name is ``family|label value``, say ``tokens|exact``; :data:`COUNTERS` and :data:`GAUGES` say what families
there are. Counters are sent as what was added since they were sent last, gauges as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kv_agent.vllm_plugin.plan import Refusal

Numbers = dict[str, float]


class Family(NamedTuple):
    """What is counted, and the values of its label that are 0 from the start, so that 0 is told as 0."""

    label: str
    about: str
    known: tuple[str, ...] = ()


COUNTERS: dict[str, Family] = {
    "tokens": Family(
        "source",
        "prompt tokens of requests that asked for memory, by where their KV came from",
        ("exact", "adapted", "local", "computed"),
    ),
    "saved_tokens": Family(
        "kind",
        "prompt tokens that were not computed because stored KV was put in their place",
        ("exact", "adapted"),
    ),
    "hits": Family(
        "kind",
        "requests into which stored KV was put, exact or adapted, or not",
        ("exact", "adapted", "none"),
    ),
    "refused_chunks": Family(
        "reason", "chunks of plans that were computed instead, by reason", tuple(map(str, Refusal))
    ),
    "load_failures": Family(
        "reason",
        "loads that ended early, by reason",
        (
            "blob is missing",
            "blob is corrupt",
            "blob could not be read",
            "load took too long",
            "chunk could not be loaded",
        ),
    ),
    "turns": Family("outcome", "captured turns, by what became of them", ("stored", "lost")),
    "rejected_requests": Family(
        "reason", "requests whose plugin fields were not followed", ("malformed", "unsigned")
    ),
    "moved_bytes": Family(
        "direction",
        "bytes of KV put into the engine's cache (load) and copied off it (save)",
        ("load", "save"),
    ),
    "moved_seconds": Family("direction", "seconds that took on the engine's step thread", ("load", "save")),
    "dropped_turns": Family(
        "reason",
        "turns that were not stored, by what kept them from it",
        ("queue full", "storing is paused", "disk trouble", "unstorable", "error"),
    ),
}
GAUGES: dict[str, Family] = {
    "tier_bytes": Family("tier", "bytes of the copies in a tier in memory"),
    "tier_limit_bytes": Family("tier", "bytes a tier in memory may take"),
    "tier_chunks": Family("tier", "copies in a tier in memory"),
    "queue_bytes": Family("queue", "bytes that wait to be written"),
    "queue_turns": Family("queue", "turns that wait to be written"),
}

# Gauges are looked at so often at most; counters go with every step in which one changed.
_GAUGE_PERIOD_S = 1.0


@dataclass(slots=True)
class Tally:
    """Numbers of one process on their way to vLLM's statistics. Used on the engine's step thread."""

    gauges: Callable[[], Mapping[str, float]] = dict
    clock: Callable[[], float] = time.monotonic
    _sent: Numbers = field(default_factory=dict)
    _looked: float = float("-inf")

    def take(self, counters: Mapping[str, float]) -> dict[str, Numbers]:
        """What to send now, given the counters so far; nothing if nothing changed."""
        added = {
            name: value - self._sent.get(name, 0)
            for name, value in counters.items()
            if value != self._sent.get(name, 0)
        }
        self._sent.update({name: counters[name] for name in added})
        data: dict[str, Numbers] = {}
        if added:
            data["counters"] = added
        if (now := self.clock()) - self._looked >= _GAUGE_PERIOD_S:
            self._looked = now
            if gauges := dict(self.gauges()):
                data["gauges"] = gauges
        return data


def merge(one: Mapping[str, Numbers], other: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Both together: counters add up, the later gauge counts."""
    counters = dict(one.get("counters", {}))
    for name, value in other.get("counters", {}).items():
        counters[name] = counters.get(name, 0) + value
    gauges = {**one.get("gauges", {}), **other.get("gauges", {})}
    return {kind: numbers for kind, numbers in (("counters", counters), ("gauges", gauges)) if numbers}
