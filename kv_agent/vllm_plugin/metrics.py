"""Our numbers on vLLM's ``/metrics``, as ``kv_agent_...``, and in the line it logs now and then."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kv_agent.vllm_plugin.tally import COUNTERS, GAUGES, merge

_PREFIX = "kv_agent_"


class KVAgentStats(KVConnectorStats):
    """Numbers of some steps, see :mod:`kv_agent.vllm_plugin.tally`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return KVAgentStats(data=merge(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """The counters, for the log."""
        return {name: round(value, 3) for name, value in sorted(self.data.get("counters", {}).items())}

    def is_empty(self) -> bool:
        return not self.data


def _forget_earlier() -> None:
    """As vLLM does with its own metrics: those of an engine that this process had before make way."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).removeprefix(_PREFIX) in COUNTERS.keys() | GAUGES.keys():
            REGISTRY.unregister(collector)


class KVAgentPromMetrics(KVConnectorPromMetrics):
    """One metric a family; an engine's numbers carry its labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier()
        self._counters = {
            name: metric_types[Counter](_PREFIX + name, family.about, [*labelnames, family.label])
            for name, family in COUNTERS.items()
        }
        self._gauges = {
            # Of several API servers, each is sent the numbers of some steps.
            name: metric_types[Gauge](
                _PREFIX + name, family.about, [*labelnames, family.label], multiprocess_mode="mostrecent"
            )
            for name, family in GAUGES.items()
        }
        for labels in per_engine_labelvalues.values():
            for name, family in COUNTERS.items():
                for value in family.known:
                    self._counters[name].labels(*labels, value)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.get("counters", {}).items():
            family, _, label = name.partition("|")
            self._counters[family].labels(*labels, label).inc(value)
        for name, value in transfer_stats_data.get("gauges", {}).items():
            family, _, label = name.partition("|")
            self._gauges[family].labels(*labels, label).set(value)
