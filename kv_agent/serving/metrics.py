"""The server process's own numbers for Prometheus, as ``kv_agent_...``, beside those of the engine."""

from __future__ import annotations

import os
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kv_agent.searching import Mode
from kv_agent.serving.gauges import FAMILIES, Readings

PREFIX = "kv_agent_"

# Where a request was refused: a route under /memory, the stream of events, or a chat with memory.
Surface = Literal["memory", "stream", "chat"]
# What became of the memory of a chat: some were put in, none was found or wanted, it could not be used.
Outcome = Literal["remembered", "nothing", "failed"]

# Of answers that refuse; 404 is an answer like any other.
REASONS = {
    400: "malformed",
    401: "no good key",
    403: "not the key's namespace",
    413: "too large",
    429: "too many requests",
    503: "unavailable",
    507: "no room",
}
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """Metrics of one server in ``registry``, from now until :meth:`close`. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            PREFIX + "requests",
            "requests to the routes under /memory",
            ["method", "route", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            PREFIX + "request_seconds",
            "seconds until a request to these routes was answered",
            ["method", "route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._refusals = Counter(
            PREFIX + "refusals",
            "requests that were refused, by where and why",
            ["surface", "reason"],
            registry=registry,
        )
        self._chats = Counter(
            PREFIX + "chats",
            "chats, completions and responses with memory, by what became of it",
            ["outcome"],
            registry=registry,
        )
        self._recall_seconds = Histogram(
            PREFIX + "recall_seconds",
            "seconds that memory took before such a prompt went to the engine",
            registry=registry,
            buckets=_SECONDS,
        )
        self._retrieval_seconds = Histogram(
            PREFIX + "retrieval_seconds",
            "seconds of a search, the probe included",
            ["mode"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._probe_seconds = Histogram(
            PREFIX + "probe_seconds",
            "seconds the engine took for the keys of a query",
            registry=registry,
            buckets=_SECONDS,
        )
        self._lost_events = Counter(
            PREFIX + "lost_events",
            "events that a slow listener of /memory/stream missed",
            registry=registry,
        )
        self._gauges = {
            name: Gauge(
                PREFIX + name,
                family.about,
                [family.label] if family.label else [],
                registry=registry,
                multiprocess_mode=family.together,
            )
            for name, family in FAMILIES.items()
        }
        self._shown: dict[str, set[str]] = {name: set() for name in FAMILIES}
        for mode in get_args(Mode):
            self._retrieval_seconds.labels(mode)
        for outcome in get_args(Outcome):
            self._chats.labels(outcome)
        for surface in get_args(Surface):
            for reason in REASONS.values():
                self._refusals.labels(surface, reason)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request to a route under ``/memory``, given by its template."""
        self._requests.labels(method, route, status).inc()
        self._request_seconds.labels(method, route).observe(seconds)
        self.refused("memory", status)

    def refused(self, surface: Surface, status: int) -> None:
        """A request was answered with this status; nothing is counted if that is no refusal."""
        if reason := REASONS.get(status):
            self._refusals.labels(surface, reason).inc()

    def recalled(self, outcome: Outcome, seconds: float) -> None:
        """What became of the memory of a chat, and how long that took."""
        self._chats.labels(outcome).inc()
        self._recall_seconds.observe(seconds)

    def searched(self, mode: Mode, seconds: float, probe_s: float) -> None:
        """A search, and the part of it in which the engine computed the query's keys; 0 if it did not."""
        self._retrieval_seconds.labels(mode).observe(seconds)
        if probe_s:
            self._probe_seconds.observe(probe_s)

    def lost_event(self) -> None:
        """A listener missed an event."""
        self._lost_events.inc()

    def show(self, readings: Readings) -> None:
        """Set the gauges; a namespace that is no longer among the largest is not told of any more."""
        for name, values in readings.items():
            gauge, label = self._gauges[name], FAMILIES[name].label
            for value_of, number in values.items():
                (gauge.labels(value_of) if label else gauge).set(number)
            for left in self._shown[name] - values.keys():
                if _is_one_of_several():  # prometheus_client cannot take a label away there
                    gauge.labels(left).set(0)
                else:
                    gauge.remove(left)
            self._shown[name] = set(values)

    def close(self) -> None:
        """Take all of them out of the registry."""
        for metric in (
            self._requests,
            self._request_seconds,
            self._refusals,
            self._chats,
            self._recall_seconds,
            self._retrieval_seconds,
            self._probe_seconds,
            self._lost_events,
            *self._gauges.values(),
        ):
            self.registry.unregister(metric)


def _is_one_of_several() -> bool:
    """Whether vLLM serves with several processes, which share their numbers through files."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ
