"""The server process's own metrics, against what its client saw and its store holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient, WebSocketDenialResponse

from kv_agent.chunks import Scope
from kv_agent.serving.gauges import FAMILIES, LARGEST, readings
from kv_agent.serving.metrics import PREFIX, REASONS, ServerMetrics
from kv_agent.serving.server import MemoryServer
from kv_agent.storage.retention import Retention
from tests.unit.serving.conftest import Served, application
from tests.unit.serving.test_routes import ask, remember

ROOT = Path(__file__).resolve().parents[3]


def samples(metrics: ServerMetrics) -> dict[str, float]:
    """By name without the prefix and, sorted, the labels."""
    text = generate_latest(metrics.registry).decode()
    return {
        sample.name.removeprefix(PREFIX)
        + "".join(f"|{name}={sample.labels[name]}" for name in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def server_of(served: Served) -> MemoryServer:
    server: MemoryServer = served.app.state.kv_agent
    return server


def shown(served: Served) -> dict[str, float]:
    """As a scrape finds it, once the gauges have been looked at again."""
    server_of(served)._show_gauges()
    return samples(server_of(served).metrics)


def soon(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.01)


def test_requests_are_counted_by_the_templates_of_their_routes_and_their_status(served: Served) -> None:
    client = served.client
    ids = [remember(served, name) for name in ("Mara", "Nils")]
    for memory_id in (*ids, "none", "neither/nor"):
        client.get(f"/memory/{memory_id}")
    client.put(f"/memory/{ids[0]}/pin")
    client.post("/memory/query", content=b"{")
    client.get("/memory/health", headers={"Authorization": "Bearer wrong"})
    client.delete(f"/memory/{ids[1]}", headers={"Authorization": "Bearer wrong"})

    found = samples(server_of(served).metrics)
    assert {name: value for name, value in found.items() if name.startswith("requests_total")} == {
        "requests_total|method=POST|route=/memory/store|status=200": 2,
        "requests_total|method=GET|route=/memory/{memory_id}|status=200": 2,
        "requests_total|method=GET|route=/memory/{memory_id}|status=404": 1,
        "requests_total|method=PUT|route=/memory/{memory_id}/pin|status=200": 1,
        "requests_total|method=POST|route=/memory/query|status=400": 1,
        "requests_total|method=GET|route=/memory/health|status=200": 1,
        "requests_total|method=DELETE|route=/memory/{memory_id}|status=401": 1,
    }
    assert found["request_seconds_count|method=GET|route=/memory/{memory_id}"] == 3
    assert found["refusals_total|reason=malformed|surface=memory"] == 1
    assert found["refusals_total|reason=no good key|surface=memory"] == 1


def test_a_request_that_fails_on_a_bug_is_counted_as_500(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server_of(served).service, "page", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        served.client.get("/memory")
    found = samples(server_of(served).metrics)
    assert found["requests_total|method=GET|route=/memory|status=500"] == 1
    assert shown(served)["requests_in_progress"] == 0


def test_refusals_are_told_by_where_and_why_and_never_by_whom(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.store.set_retention("other", Retention(max_tokens=1))
    body = {"prompt": "Mara lives in Oslo.", "response": "Yes."}
    assert served.client.post("/memory/store", json=body, headers=served.headers("other")).status_code == 507
    monkeypatch.setattr(server_of(served).access, "requests_per_minute", {"acme": 1}.get)
    statuses = [served.client.get("/memory").status_code for _ in range(4)]
    assert statuses == [200, 429, 429, 429]
    assert served.client.get("/memory", headers={"X-Memory-Namespace": "other"}).status_code == 403
    with pytest.raises(WebSocketDenialResponse), served.client.websocket_connect("/memory/stream?key=x"):
        pass

    found = samples(server_of(served).metrics)
    refused = {name: value for name, value in found.items() if name.startswith("refusals") and value}
    assert refused == {
        "refusals_total|reason=no room|surface=memory": 1,
        "refusals_total|reason=too many requests|surface=memory": 3,
        "refusals_total|reason=not the key's namespace|surface=memory": 1,
        "refusals_total|reason=too many requests|surface=stream": 1,
    }
    assert len([name for name in found if name.startswith("refusals_total")]) == 3 * len(REASONS)


def test_searches_are_timed_by_their_mode(served: Served) -> None:
    remember(served, "Mara")
    for _ in range(3):
        ask(served, "Mara")

    found = samples(server_of(served).metrics)
    assert found["retrieval_seconds_count|mode=lexical"] == 3
    assert found["retrieval_seconds_count|mode=hybrid"] == 0
    assert found["probe_seconds_count"] == 0  # words need no engine
    within = [found[f"retrieval_seconds_bucket|le={edge}|mode=lexical"] for edge in ("0.001", "60.0", "+Inf")]
    assert within == sorted(within)
    assert within[-1] == 3


def test_gauges_are_what_the_store_holds(served: Served) -> None:
    for number in range(5):
        remember(served, f"Person {number}")
    remember(served, "Mara", key="other")
    gone = [remember(served, f"Gone {number}") for number in range(3)]
    served.client.delete(f"/memory/{gone[0]}")
    served.client.post("/memory/forget", json={"user_id": "default", "since": time.time() + 1e6})
    catalog = served.store.catalog
    short = remember(served, "Short", ttl_s=3600.0)
    with catalog._transaction() as db:
        db.execute("UPDATE turns SET expires = 1 WHERE turn_id = ?", (short,))
    served.client.get("/memory")  # lets go of what is over

    found = shown(served)

    stats = catalog.stats()
    accounts = catalog.ledger.accounts()
    assert found["store_memories"] == sum(one.held.num_memories for one in accounts.values()) == 8
    assert found["store_tokens"] == stats["tokens"]
    assert found["store_bytes"] == stats["bytes"]
    assert found["disk_chunks"] == stats["chunks"]
    assert found["disk_bytes"] == catalog.ledger.held(None).num_bytes > 0
    assert found["disk_free_bytes"] > 0
    assert found["disk_limit_bytes"] > found["disk_bytes"]
    for namespace, account in accounts.items():
        assert found[f"namespace_memories|namespace={namespace}"] == account.held.num_memories
        assert found[f"namespace_tokens|namespace={namespace}"] == account.held.num_tokens
        assert found[f"namespace_bytes|namespace={namespace}"] == account.held.num_bytes
    assert found["index_entries|kind=lexical"] == 8
    assert (found["gone_memories|how=forgotten"], found["gone_memories|how=expired"]) == (1, 1)
    assert (found["gone_memories|how=evicted"], found["gone_memories|how=refused"]) == (0, 0)
    assert (found["listeners"], found["requests_in_progress"], found["index_lag"]) == (0, 0, 0)


def test_gauges_follow_by_themselves(served: Served) -> None:
    remember(served, "Mara")
    with served.client.websocket_connect("/memory/stream"):
        soon(lambda: samples(server_of(served).metrics)["listeners"] == 1)
    soon(lambda: samples(server_of(served).metrics)["listeners"] == 0)
    assert samples(server_of(served).metrics)["store_memories"] == 1


def test_of_very_many_namespaces_the_largest_are_told_and_all_are_in_the_sums(served: Served) -> None:
    add = """
        WITH RECURSIVE n (i) AS (SELECT :first UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :end)
        INSERT INTO holdings (namespace, num_bytes, num_tokens, num_memories)
        SELECT 'tenant ' || i, i, 2 * i, 3 FROM n WHERE true
        ON CONFLICT (namespace) DO UPDATE SET num_bytes = excluded.num_bytes
    """
    with served.store.catalog._transaction() as db:
        db.execute(add, {"first": 0, "end": 1000})

    def told() -> dict[str, float]:
        found = shown(served)
        assert (found["store_memories"], found["store_tokens"]) == (3000, 999_000)
        start = "namespace_bytes|namespace=tenant "
        return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}

    assert told() == {str(i): i for i in range(1000 - LARGEST, 1000)}
    with served.store.catalog._transaction() as db:
        db.execute("UPDATE holdings SET num_bytes = 10000 - num_bytes")
    assert told() == {str(i): 10_000 - i for i in range(LARGEST)}


def test_events_that_a_listener_misses_are_counted(served: Served) -> None:
    server = server_of(served)
    listener = server.hub.add("acme")
    for number in range(300):
        server.hub._deliver("acme", str(number))
    server.hub.remove("acme", listener)

    assert samples(server.metrics)["lost_events_total"] == 300 - 256


def test_no_id_of_a_user_is_in_the_metrics(served: Served) -> None:
    remember(served, "Zanzibar", user_id="somebody", agent_id="anagent", session_id="asession")
    ask(served, "Zanzibar", user_id="somebody")
    shown(served)

    text = generate_latest(server_of(served).metrics.registry).decode()
    assert not [word for word in ("somebody", "anagent", "asession", "Zanzibar") if word in text]


def test_every_family_has_a_sentence_and_belongs_to_one_server(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        ServerMetrics(registry)
    families = {family.name: family for family in registry.collect()}
    assert set(families) >= {PREFIX + name for name in FAMILIES}
    assert all(" " in family.documentation for family in families.values())
    metrics.close()
    assert list(registry.collect()) == []
    ServerMetrics(registry)


def test_a_scrape_waits_for_nobody(served: Served) -> None:
    """Not even while the catalog is written and the index is locked, which the gauges are read from."""
    server = server_of(served)
    shown(served)
    with served.store.catalog._transaction(), server.service.manager.index._lock:
        assert samples(server.metrics)["store_memories"] == 0


def test_gauges_are_read_while_others_write(served: Served) -> None:
    server = server_of(served)
    with served.store.catalog._transaction() as db:
        db.execute("UPDATE totals SET num_memories = 7")
        found = readings(server.service.manager, num_listeners=0, num_in_progress=0)
        assert found["store_memories"] == {"": 0}


def test_expired_memories_go_by_themselves_and_their_leaving_is_told(tmp_path: Path) -> None:
    with TestClient(application(tmp_path, sweep_every_s=0.05)) as client:
        body = {"prompt": "Mara lives in Oslo.", "response": "Yes."}
        stays = client.post("/memory/store", json=body).json()["id"]
        with client.websocket_connect("/memory/stream") as stream:
            goes = client.post("/memory/store", json={**body, "prompt": "Now.", "ttl_s": 0.1}).json()["id"]
            events = [stream.receive_json()]
            while events[-1]["event"] != "forgotten":
                events.append(stream.receive_json())
        assert events[-1]["ids"] == [goes]
        server: MemoryServer = client.app.state.kv_agent  # type: ignore[attr-defined]
        catalog = server.service.manager.store.catalog
        assert [turn.turn_id for turn in catalog.list_turns(Scope())] == [stays]
        server._show_gauges()
        assert samples(server.metrics)["gone_memories|how=expired"] == 1
        assert server.service.manager.store.check() == []


def test_several_servers_on_one_store_let_each_memory_go_once(tmp_path: Path) -> None:
    apps = [application(tmp_path, sweep_every_s=0.01) for _ in range(3)]
    with TestClient(apps[0]) as client, TestClient(apps[1]), TestClient(apps[2]):
        for number in range(20):
            body = {"prompt": f"Number {number}.", "response": "Yes."}
            assert client.post("/memory/store", json=body).status_code == 200
        store = apps[0].state.kv_agent.service.manager.store
        with store.catalog._transaction() as db:
            db.execute("UPDATE turns SET expires = ? + 0.01 * rowid", (time.time(),))
        soon(lambda: store.catalog.ledger.totals().held.num_memories == 0)
        kinds = [event.kind for event in store.catalog.history.since(0)]
        assert (kinds.count("stored"), kinds.count("forgotten"), len(kinds)) == (20, 20, 40)
        assert store.catalog.ledger.totals().expired_turns == 20
        assert store.check() == []


ONE_OF_SEVERAL = """
import sys
from prometheus_client import CollectorRegistry
from kv_agent.serving.metrics import ServerMetrics

metrics = ServerMetrics(CollectorRegistry())
number = int(sys.argv[1])
metrics.show({"store_memories": {"": 7}, "namespace_bytes": {"left": 5, "stays": 1}})
metrics.show({"store_memories": {"": 8}, "namespace_bytes": {"stays": 2}})
metrics.show({"listeners": {"": number}, "index_bytes": {"latent": 10 * number}})
for _ in range(number):
    metrics.refused("chat", 429)
    metrics.searched("latent", 0.5, 0.25)
"""


@pytest.mark.slow
def test_numbers_of_several_server_processes_become_one(tmp_path: Path) -> None:
    """As vLLM adds them up with ``--api-server-count``."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONWARNINGS": "error"}
    for number in ("1", "2"):
        command = [sys.executable, "-c", ONE_OF_SEVERAL, number]
        subprocess.run(command, env=environment, check=True, cwd=ROOT)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(PREFIX + name, labels)

    assert value("store_memories") == 8
    assert value("namespace_bytes", namespace="stays") == 2
    assert value("namespace_bytes", namespace="left") == 0
    assert value("listeners") == 1 + 2
    assert value("index_bytes", kind="latent") == 20
    assert value("refusals_total", surface="chat", reason="too many requests") == 1 + 2
    assert value("retrieval_seconds_count", mode="latent") == 1 + 2
    assert value("probe_seconds_sum") == 3 * 0.25
