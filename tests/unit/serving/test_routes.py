"""What the routes do, over HTTP, without a model: nothing here is found by keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from kv_agent.serving import routes
from kv_agent.storage.retention import Retention
from tests.unit.serving.conftest import Served, application


def remember(served: Served, name: str, key: str = "acme", **fields: Any) -> str:
    body = {"prompt": f"{name} lives in Oslo.", "response": "I will remember that.", **fields}
    answer = served.client.post("/memory/store", json=body, headers=served.headers(key))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def ask(served: Served, query: str, key: str = "acme", **fields: Any) -> list[dict[str, Any]]:
    body = {"query": query, "mode": "lexical", **fields}
    answer = served.client.post("/memory/query", json=body, headers=served.headers(key))
    assert answer.status_code == 200, answer.text
    memories: list[dict[str, Any]] = answer.json()["memories"]
    return memories


def listed(served: Served, **params: Any) -> list[str]:
    """All ids, page by page."""
    ids: list[str] = []
    while True:
        answer = served.client.get("/memory", params=params).json()
        ids += [memory["id"] for memory in answer["memories"]]
        if answer["next"] is None:
            return ids
        params["cursor"] = answer["next"]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    error: dict[str, Any] = body["error"]
    return error


def test_what_was_stored_comes_back_with_all_that_is_known_of_it(served: Served) -> None:
    fields = {
        "user_id": "u",
        "agent_id": "a",
        "session_id": "s",
        "metadata": {"n": 1, "f": 1.5, "b": True, "t": "x"},
    }
    memory_id = remember(served, "Mara", ttl_s=3600.0, **fields)

    memory = served.client.get(f"/memory/{memory_id}").json()

    (turn,) = served.store.catalog.turns([memory_id]).values()
    assert memory == {
        "id": memory_id,
        "text": turn.text,
        "score": None,
        "tokens": turn.num_tokens,
        "created": turn.created,
        "expires": turn.created + 3600,
        "pinned": False,
        "namespace": "acme",
        **fields,
        "chunk_ids": list(turn.chunk_keys),
        "voices": {},
        "neighbour_of": None,
    }
    assert turn.text.startswith("Mara lives in Oslo.")


def test_a_query_finds_what_its_user_agent_session_and_filters_admit(served: Served) -> None:
    by_scope = {
        (user, agent, session): remember(served, "Mara", user_id=user, agent_id=agent, session_id=session)
        for user in ("u", "v")
        for agent in ("a", "b")
        for session in ("s", "t")
    }

    def expected(user: str, agent: str | None = None, session: str | None = None) -> set[str]:
        return {
            memory_id
            for (of_user, of_agent, of_session), memory_id in by_scope.items()
            if of_user == user and agent in (None, of_agent) and session in (None, of_session)
        }

    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"user_id": "u"}, expected("u")),
        ({"user_id": "u", "agent_id": "a"}, expected("u")),
        ({"user_id": "u", "agent_id": "a", "share": "agent"}, expected("u", "a")),
        ({"user_id": "u", "agent_id": "a", "session_id": "s", "share": "session"}, expected("u", "a", "s")),
        ({"user_id": "v", "filters": {"agent_id": "b"}}, expected("v", "b")),
        ({"user_id": "v", "filters": {"session_id": "t"}}, expected("v", None, "t")),
        ({"user_id": "u", "agent_id": "a", "share": "agent", "filters": {"agent_id": "b"}}, set()),
        ({"user_id": "w"}, set()),
    ]
    # A text that is stored more than once counts once, as its newest copy.
    newest = list(by_scope.values())
    for body, admitted in cases:
        best = max(admitted, key=newest.index, default=None)
        assert [memory["id"] for memory in ask(served, "Mara", **body)] == ([best] if best else [])


def test_time_and_metadata_narrow_a_query(served: Served) -> None:
    ids = [
        remember(served, name, metadata={"even": idx % 2 == 0})
        for idx, name in enumerate(["Ana", "Bo", "Cy"])
    ]
    times = [served.client.get(f"/memory/{memory_id}").json()["created"] for memory_id in ids]

    def found(**filters: Any) -> set[str]:
        return {memory["id"] for memory in ask(served, "Oslo", filters=filters)}

    assert found() == set(ids)
    assert found(since=times[1]) == {ids[1], ids[2]}
    assert found(until=times[1]) == {ids[0]}
    assert found(metadata={"even": True}) == {ids[0], ids[2]}
    assert found(metadata={"even": 1}) == set()


def test_a_threshold_keeps_the_good_ones_and_their_neighbours(served: Served) -> None:
    ids = [remember(served, name, session_id="s") for name in ("Ana Ana", "Bo", "Cy", "Di")]
    scored = {memory["id"]: memory["score"] for memory in ask(served, "Ana Oslo", explain=True)}
    best = max(scored, key=scored.__getitem__)
    assert best == ids[0]

    kept = ask(served, "Ana Oslo", threshold=scored[best], top_k=4)
    assert [memory["id"] for memory in kept] == [best]
    assert ask(served, "Ana Oslo", threshold=scored[best] * 1.01) == []
    beside = ask(served, "Ana Oslo", threshold=scored[best], top_k=1, neighbours=2)
    assert [(memory["id"], memory["neighbour_of"]) for memory in beside] == [
        (ids[0], None), (ids[1], ids[0]), (ids[2], ids[0])
    ]  # fmt: skip


def test_explain_says_what_each_way_of_searching_thought(served: Served) -> None:
    remember(served, "Mara")

    (plain,) = ask(served, "Mara")
    (explained,) = ask(served, "Mara", explain=True)

    assert plain["voices"] == {}
    assert explained["voices"] == {"lexical": {"rank": 1, "score": explained["score"]}}


def test_pages_together_are_the_whole_list_also_among_memories_of_one_time(
    served: Served,
) -> None:
    engine = served.app.state.kv_agent._engine
    ids = []
    for idx, name in enumerate(["Ana", "Bo", "Cy", "Di", "Eve", "Flo", "Gus"]):
        engine.now = float(idx // 3)
        ids.append(remember(served, name, user_id="u"))
    remember(served, "Hal", user_id="v")

    order = listed(served, user_id="u", limit=1000)
    assert set(order) == set(ids)
    for limit in (1, 2, 3, 6, 7):
        assert listed(served, user_id="u", limit=limit) == order


def test_a_foreign_id_is_answered_exactly_as_one_that_does_not_exist(served: Served) -> None:
    foreign = remember(served, "Mara", key="other")

    for method, path in (
        ("GET", "/memory/{}"), ("DELETE", "/memory/{}"), ("PUT", "/memory/{}/pin"),
        ("DELETE", "/memory/{}/pin"),
    ):  # fmt: skip
        answers = [
            served.client.request(method, path.format(memory_id))
            for memory_id in (foreign, "0" * 32, "%00", f"{foreign}%00x", "%ff")
        ]
        assert {(answer.status_code, answer.text) for answer in answers} == {(404, answers[0].text)}
        assert error_of(answers[0], 404)["type"] == "NotFoundError"
    assert served.client.get(f"/memory/{foreign}", headers=served.headers("other")).status_code == 200


def test_a_memory_of_another_user_is_told_only_without_a_user(served: Served) -> None:
    memory_id = remember(served, "Mara", user_id="u")

    assert served.client.get(f"/memory/{memory_id}", params={"user_id": "u"}).status_code == 200
    assert served.client.get(f"/memory/{memory_id}").status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
        answer = served.client.request(method, f"/memory/{memory_id}{path}", params={"user_id": "v"})
        error_of(answer, 404)
        misspelt = served.client.request(method, f"/memory/{memory_id}{path}", params={"user": "u"})
        assert error_of(misspelt, 400)["param"] == "user"


def test_one_memory_is_forgotten_for_good(served: Served) -> None:
    ids = [remember(served, name) for name in ("Ana", "Bo")]

    answer = served.client.delete(f"/memory/{ids[0]}")

    assert answer.json() == {"ids": [ids[0]]}
    assert listed(served) == [ids[1]]
    error_of(served.client.delete(f"/memory/{ids[0]}"), 404)
    assert [memory["id"] for memory in ask(served, "Ana Oslo")] == [ids[1]]


def test_a_filter_forgets_what_it_admits_and_says_what(served: Served) -> None:
    scopes = [("u", "a"), ("u", "a"), ("u", "b"), ("v", "a")]
    ids = [
        remember(
            served, f"Name{idx}", user_id=user, agent_id=agent, metadata={"n": idx}, system_prompt="Be kind."
        )
        for idx, (user, agent) in enumerate(scopes)
    ]
    foreign = remember(served, "Mara", key="other", user_id="u", agent_id="a")

    def forget(**body: Any) -> list[str]:
        answer = served.client.post("/memory/forget", json=body)
        assert answer.status_code == 200, answer.text
        gone: list[str] = answer.json()["ids"]
        return gone

    assert forget(user_id="u", metadata={"n": 7}) == []
    assert forget(user_id="u", metadata={"n": 1}) == [ids[1]]
    assert forget(user_id="u", agent_id="a") == [ids[0]]
    assert forget(user_id="u", all=True) == [ids[2]]
    assert listed(served, user_id="u") == []
    assert listed(served, user_id="v") == [ids[3]]
    assert served.store.catalog.known_turns([foreign]) == {foreign}


@pytest.mark.parametrize(
    "body", [{"user_id": "u"}, {"user_id": "u", "all": True, "since": 1.0}, {"all": True}]
)
def test_forgetting_wants_to_be_told_clearly_what(served: Served, body: dict[str, Any]) -> None:
    error_of(served.client.post("/memory/forget", json=body), 400)


def test_a_pinned_memory_stays_when_others_go(served: Served) -> None:
    pinned = remember(served, "Ana")
    assert served.client.put(f"/memory/{pinned}/pin").json() == {"id": pinned, "pinned": True}
    served.store.set_retention("acme", Retention(max_memories=2))

    others = [remember(served, name) for name in ("Bo", "Cy", "Di")]

    assert set(listed(served)) == {pinned, others[-1]}
    assert served.client.delete(f"/memory/{pinned}/pin").json() == {"id": pinned, "pinned": False}
    last = remember(served, "Eve")
    assert set(listed(served)) == {others[-1], last}


def test_a_turn_too_large_for_its_namespace_is_refused_with_507_and_the_next_is_stored(
    served: Served,
) -> None:
    served.store.set_retention("acme", Retention(max_tokens=60))

    too_long = {"prompt": "Mara lives in Oslo. " * 40}
    error = error_of(served.client.post("/memory/store", json=too_long), 507)

    assert error["type"] == "InsufficientStorageError"
    stored = remember(served, "Ana")
    assert listed(served) == [stored]


def test_stats_are_those_of_the_namespace(served: Served) -> None:
    for name in ("Ana", "Bo"):
        remember(served, name)
    remember(served, "Cy", key="other")
    served.store.set_retention("acme", Retention(max_memories=10))

    stats = served.client.get("/memory/stats").json()
    held = served.store.catalog.ledger.held("acme")
    assert (stats["memories"], stats["tokens"], stats["bytes"]) == (2, held.num_tokens, held.num_bytes)
    assert stats["limits"]["max_memories"] == 10
    assert stats["store"] is None
    everything = served.client.get("/memory/stats", headers=served.headers("admin")).json()
    assert everything["memories"] == 0
    assert everything["store"]["turns"] == served.store.catalog.stats()["turns"]


def test_an_admin_may_name_a_namespace_and_nobody_else(served: Served) -> None:
    mine = remember(served, "Ana")
    named = {"X-Memory-Namespace": "acme"}

    as_admin = served.client.get(f"/memory/{mine}", headers={**served.headers("admin"), **named})
    assert as_admin.status_code == 200
    assert served.client.get(f"/memory/{mine}", headers=named).status_code == 200
    error_of(served.client.get(f"/memory/{mine}", headers={**served.headers("other"), **named}), 403)
    error_of(served.client.get(f"/memory/{mine}", headers=served.headers("admin")), 404)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer ü"]
)
def test_without_a_good_key_nothing_but_health_is_told(served: Served, header: str | None) -> None:
    memory_id = remember(served, "Ana")
    value = (header or "").format(served.keys["acme"]).encode("latin-1")
    headers = [] if header is None else [(b"Authorization", value)]
    plain = TestClient(served.app)
    calls = [
        ("POST", "/memory/store"), ("POST", "/memory/query"), ("POST", "/memory/forget"), ("GET", "/memory"),
        ("GET", "/memory/stats"), ("GET", f"/memory/{memory_id}"), ("DELETE", f"/memory/{memory_id}"),
        ("PUT", f"/memory/{memory_id}/pin"), ("DELETE", f"/memory/{memory_id}/pin"),
    ]  # fmt: skip

    for method, path in calls:
        answer = plain.request(method, path, headers=headers)  # type: ignore[arg-type]
        assert error_of(answer, 401)["type"] == "AuthenticationError"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert plain.get("/memory/health", headers=headers).json() == {  # type: ignore[arg-type]
        "status": "ok", "engine": True, "store": True, "index_lag": 0
    }  # fmt: skip


def test_health_says_what_is_wrong(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app.state.kv_agent._engine, "is_alive", False)

    answer = served.client.get("/memory/health")

    assert answer.status_code == 503
    assert answer.json() == {"status": "unwell", "engine": False, "store": True, "index_lag": 0}


def test_a_store_that_is_gone_is_503_and_no_path_is_told(served: Served, tmp_path: Path) -> None:
    (tmp_path / "store").rename(tmp_path / "away")
    try:
        assert served.client.get("/memory/health").json()["store"] is False
        error = error_of(served.client.post("/memory/store", json={"prompt": "Ana."}), 503)
        assert str(tmp_path) not in error["message"]
    finally:
        (tmp_path / "away").rename(tmp_path / "store")
    remember(served, "Ana")


def test_without_our_connector_every_route_says_so() -> None:
    app = FastAPI()
    app.include_router(routes.router)

    with TestClient(app) as client:
        for path in ("/memory/health", "/memory/stats", "/memory/x"):
            assert "KVAgentConnector" in error_of(client.get(path), 503)["message"]


def test_without_keys_there_is_one_namespace_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(application(tmp_path)) as client:
        stored = client.post("/memory/store", json={"prompt": "Ana lives in Oslo."}).json()
        assert client.get(f"/memory/{stored['id']}").json()["namespace"] == "default"
        error_of(client.get("/memory", headers={"X-Memory-Namespace": "acme"}), 403)

    assert sum("no memory keys" in record.message for record in caplog.records) == 1


def test_the_servers_own_keys_guard_memory_where_it_has_none(tmp_path: Path) -> None:
    with TestClient(application(tmp_path, server_keys=["secret"])) as client:
        error_of(client.get("/memory"), 401)
        answer = client.get("/memory", headers={"Authorization": "Bearer secret"})
        assert answer.json() == {"memories": [], "next": None}


def test_no_route_answers_with_tensors_or_vectors(served: Served) -> None:
    """KV stays on the machine that computed it: answers are words and single numbers."""
    described = served.client.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    seen: set[str] = set()

    def walk(schema: dict[str, Any], where: str) -> None:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in seen:
                seen.add(name)
                walk(schemas[name], name)
        assert schema.get("format") not in ("binary", "byte"), where
        if schema.get("type") == "array":
            assert schema.get("items", {}).get("type") != "number", where
        for key, inner in schema.get("properties", {}).items():
            walk(inner, f"{where}.{key}")
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                walk(schema[key], f"{where}.{key}")
        for kind in ("anyOf", "oneOf", "allOf"):
            for inner in schema.get(kind, ()):
                walk(inner, where)

    kinds = set()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            for answer in operation["responses"].values():
                for kind, content in answer.get("content", {}).items():
                    kinds.add(kind)
                    walk(content.get("schema", {}), f"{method} {path}")
    assert kinds <= {"application/json", "text/plain", "text/html"}
    assert {"MemoryBody", "ChunkBody", "RequestBody"} <= seen
