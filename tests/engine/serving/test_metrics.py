"""What a real server tells on ``/metrics``, against what its clients saw."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kv_agent.serving.metrics import PREFIX, ServerMetrics
from kv_agent.vllm_plugin.tally import COUNTERS, GAUGES
from tests.dashboard import dashboard, expressions, family_of, selectors
from tests.engine.serving.asking import chat
from tests.engine.serving.server_process import MemoryServerProcess
from tests.engine.serving.test_chat import sample

pytestmark = pytest.mark.engine

MODES = ("hybrid", "latent", "lexical")
NAMES = ("Mara Dubois", "Hugo Thomsen", "Lena Holm", "Otto Flores", "Nina Okafor", "Uma Berg")
OF_VLLM = {"model_name", "engine"}


def families_of(server: MemoryServerProcess) -> dict[str, Metric]:
    answer = httpx.get(f"{server.base_url}/metrics", trust_env=False)
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def numbers_of(server: MemoryServerProcess) -> dict[str, float]:
    """Our samples by name and labels of ours."""
    return {
        sample(
            one.name, **{name: value for name, value in one.labels.items() if name not in OF_VLLM}
        ): one.value
        for family in families_of(server).values()
        for one in family.samples
        if one.name.startswith(PREFIX)
    }


def eventually(server: MemoryServerProcess, is_so: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The numbers once they are as they must be: the engine's come with its steps, gauges once a second."""
    deadline = time.monotonic() + 30
    while not is_so(numbers := numbers_of(server)):
        assert time.monotonic() < deadline, numbers
        with server.client() as client:  # a step; it asks for no memory
            model = client.get("/v1/models").json()["data"][0]["id"]
            client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})
        time.sleep(0.1)
    return numbers


def test_a_real_server_exports_what_is_defined_with_its_help_and_what_the_dashboard_shows(
    memory_server: MemoryServerProcess, client: httpx.Client
) -> None:
    client.get("/memory")
    found = families_of(memory_server)

    registry = CollectorRegistry()
    ServerMetrics(registry)
    about = {family.name: family.documentation for family in registry.collect()}
    about |= {PREFIX + name: family.about for name, family in (COUNTERS | GAUGES).items()}
    exported = {name: family.documentation for name, family in found.items() if name.startswith(PREFIX)}
    assert {name: text for name, text in exported.items() if not name.endswith("_created")} == about
    for name in COUNTERS:
        assert found[PREFIX + name].type == "counter"
        assert all(one.labels.keys() >= OF_VLLM for one in found[PREFIX + name].samples)

    asked = {family_of(str(one.name)) for expression in expressions() for one in selectors(expression)}
    variables = [one["definition"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    asked |= {variable.split("(")[1].split("{")[0].split(",")[0] for variable in variables}
    assert asked - found.keys() == set()
    assert exported.keys() - {name for name in exported if name.endswith("_created")} - asked == set()


def test_the_numbers_are_what_the_client_saw(
    memory_server: MemoryServerProcess, client: httpx.Client
) -> None:
    before = numbers_of(memory_server)
    user = "metrics"
    reused: Counts[str] = Counts()
    refused = searched = 0
    for number, name in enumerate(NAMES):
        body = {"prompt": f"{name} lives in Oslo.", "response": "I will remember that.", "user_id": user}
        assert client.post("/memory/store", json=body).status_code == 200
        for mode in MODES[: 1 + number % 3]:
            client.post("/memory/query", json={"query": f"Where is {name}?", "user_id": user, "mode": mode})
            searched += 1
        report = chat(client, f"Where does {name} live?", user_id=user, store=False)
        reused.update({source: report[source] for source in ("exact", "adapted")})
        refused += len(report["refused"])
        assert report["memories"]
    (first, *_) = client.get("/memory", params={"user_id": user}).json()["memories"]
    assert client.delete(f"/memory/{first['id']}").status_code == 200
    assert client.get("/memory/nothing").status_code == 404
    assert client.get("/memory", headers={"Authorization": "Bearer wrong"}).status_code == 401

    def grown(name: str, **labels: str) -> float:
        return after.get(sample(PREFIX + name, **labels), 0) - before.get(sample(PREFIX + name, **labels), 0)

    after = eventually(
        memory_server,
        lambda now: (
            grown_in(now, before, "saved_tokens_total", kind="adapted") == reused["adapted"]
            and grown_in(now, before, "turns_total", outcome="stored") >= len(NAMES)
            and grown_in(now, before, "gone_memories", how="forgotten") == 1
        ),
    )
    assert reused["adapted"] > 0
    for source in ("exact", "adapted"):
        assert grown("tokens_total", source=source) == reused[source]
        assert grown("saved_tokens_total", kind=source) == reused[source]
    assert grown("hits_total", kind="adapted") + grown("hits_total", kind="exact") == len(NAMES)
    assert (
        sum(grown("refused_chunks_total", reason=reason) for reason in COUNTERS["refused_chunks"].known)
        == refused
    )
    assert grown("chats_total", outcome="remembered") == len(NAMES)
    assert grown("recall_seconds_count") == len(NAMES)
    searches = Counts({mode: grown("retrieval_seconds_count", mode=mode) for mode in MODES})
    assert searches == {"hybrid": 6 + len(NAMES), "latent": 4, "lexical": 2}
    assert grown("probe_seconds_count") == searches["hybrid"] + searches["latent"]
    assert grown("probe_seconds_sum") < sum(grown("retrieval_seconds_sum", mode=mode) for mode in MODES)
    assert grown("moved_bytes_total", direction="load") > 0
    assert grown("moved_seconds_total", direction="load") > 0
    assert grown("moved_bytes_total", direction="save") > 0
    for method, route, status, count in (
        ("POST", "/memory/store", "200", len(NAMES)),
        ("POST", "/memory/query", "200", searched),
        ("DELETE", "/memory/{memory_id}", "200", 1),
        ("GET", "/memory/{memory_id}", "404", 1),
        ("GET", "/memory", "401", 1),
    ):
        assert grown("requests_total", method=method, route=route, status=status) == count, route
    assert grown("refusals_total", surface="memory", reason="no good key") == 1
    assert grown("gone_memories", how="forgotten") == 1

    stats = client.get("/memory/stats").json()
    for what in ("memories", "tokens", "bytes"):
        assert after[sample(f"{PREFIX}namespace_{what}", namespace="acme")] == stats[what]
    with memory_server.client("admin") as admin:
        store = admin.get("/memory/stats").json()["store"]
    assert after[PREFIX + "disk_chunks"] == store["chunks"] == store["tier_disk_chunks"]
    assert after[PREFIX + "disk_bytes"] == store["tier_disk_bytes"]
    assert after[PREFIX + "store_tokens"] == store["tokens"]
    assert after[sample(PREFIX + "index_entries", kind="latent")] > 0
    assert after[sample(PREFIX + "index_bytes", kind="latent")] > 0
    assert after[sample(PREFIX + "tier_chunks", tier="host")] > 0
    assert after[sample(PREFIX + "queue_turns", queue="write")] == 0
    assert not [name for name in after if user in name]


def test_a_second_engine_replaces_the_metrics_of_the_first_and_leaves_the_servers() -> None:
    from kv_agent.vllm_plugin.metrics import KVAgentPromMetrics, _forget_earlier

    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    server = ServerMetrics(REGISTRY)
    try:
        for number in range(2):
            engine = KVAgentPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"]})
            engine.observe({"counters": {"tokens|exact": 3.0}, "gauges": {"tier_bytes|host": 5.0 + number}})
        server.lost_event()

        labels = {"model_name": "m", "engine": "0"}
        assert REGISTRY.get_sample_value("kv_agent_tokens_total", {**labels, "source": "exact"}) == 3
        assert REGISTRY.get_sample_value("kv_agent_tokens_total", {**labels, "source": "local"}) == 0
        assert REGISTRY.get_sample_value("kv_agent_tier_bytes", {**labels, "tier": "host"}) == 6
        assert REGISTRY.get_sample_value("kv_agent_lost_events_total") == 1
    finally:
        server.close()
        _forget_earlier()


def grown_in(now: dict[str, float], before: dict[str, float], name: str, **labels: str) -> float:
    key = sample(PREFIX + name, **labels)
    return now.get(key, 0) - before.get(key, 0)
