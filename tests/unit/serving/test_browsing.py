"""The routes that show what there is, against what was stored; and what was reused lately."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from typing import Any

import pytest

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.serving.recent import KEPT, AnsweredRequest, RecentRequests
from tests.unit.serving.conftest import Served
from tests.unit.serving.test_routes import error_of, remember


def pages(served: Served, path: str, what: str, key: str = "acme", **params: Any) -> list[dict[str, Any]]:
    """All of a list, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        answer = served.client.get(path, params=params, headers=served.headers(key))
        assert answer.status_code == 200, answer.text
        found += answer.json()[what]
        if answer.json()["next"] is None:
            return found
        assert len(answer.json()[what]) == params["limit"]
        params["cursor"] = answer.json()["next"]


def fill(served: Served) -> list[dict[str, Any]]:
    """Memories of three users, some without agent or session -> all that can be listed."""
    for number, user in enumerate(("u", "v", "ü") * 4):
        owner = {
            "agent_id": [None, "a", "b"][number // 3 % 3],
            "session_id": [None, "s"][number // 6],
        }
        remember(served, f"Mara {number}", user_id=user, **owner)
    remember(served, "Hugo", "other", user_id="w")
    memories: list[dict[str, Any]] = []
    for user in ("u", "v", "ü"):
        memories += served.client.get("/memory", params={"user_id": user}).json()["memories"]
    return memories


def summed(memories: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    groups: dict[tuple[str | None, ...], list[dict[str, Any]]] = defaultdict(list)
    for memory in memories:
        groups[tuple(memory[name] for name in names)].append(memory)
    return [
        {
            **dict(zip(names, group, strict=True)),
            "memories": len(groups[group]),
            "tokens": sum(memory["tokens"] for memory in groups[group]),
            "newest": max(memory["created"] for memory in groups[group]),
        }
        for group in sorted(groups, key=lambda group: [name or "" for name in group])
    ]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_users_and_their_sessions_are_those_of_their_memories(served: Served, limit: int) -> None:
    memories = fill(served)

    assert pages(served, "/memory/users", "users", limit=limit) == summed(memories, "user_id")
    for user in ("u", "v", "ü"):
        of_user = [memory for memory in memories if memory["user_id"] == user]
        found = pages(served, "/memory/sessions", "sessions", limit=limit, user_id=user)
        assert found == summed(of_user, "agent_id", "session_id")


def test_nobody_sees_the_users_of_another_namespace(served: Served) -> None:
    fill(served)

    assert [user["user_id"] for user in pages(served, "/memory/users", "users", "other")] == ["w"]
    assert pages(served, "/memory/sessions", "sessions", "other", user_id="u") == []


def test_only_an_admin_sees_namespaces_and_may_look_into_them(served: Served) -> None:
    memories = fill(served)

    error_of(served.client.get("/memory/namespaces"), 403)
    found = pages(served, "/memory/namespaces", "namespaces", "admin", limit=1)
    assert [one["namespace"] for one in found] == ["acme", "other"]
    stats = served.client.get("/memory/stats").json()
    assert found[0] == {name: stats[name] for name in ("namespace", "memories", "tokens", "bytes")}
    inside = {**served.headers("admin"), "X-Memory-Namespace": "acme"}
    users = served.client.get("/memory/users", headers=inside).json()["users"]
    assert users == summed(memories, "user_id")


def test_the_chunks_of_a_memory_are_its_text_one_after_the_other(served: Served) -> None:
    memory_id = remember(served, "Mara " * 100, user_id="u")
    longer = remember(served, "Mara " * 100, user_id="u", response="Well, I will.")
    (turn,) = served.store.catalog.turns([TurnId(memory_id)]).values()
    records = served.store.catalog.chunks(turn.chunk_keys)
    (other,) = served.store.catalog.turns([TurnId(longer)]).values()
    shared = set(turn.chunk_keys) & set(other.chunk_keys)
    assert shared
    assert len(turn.chunk_keys) > len(shared)

    answer = served.client.get(f"/memory/{memory_id}/chunks").json()

    assert answer["id"] == memory_id
    assert [chunk["id"] for chunk in answer["chunks"]] == list(turn.chunk_keys)
    start = 0
    for chunk in answer["chunks"]:
        record = records[ChunkKey(chunk["id"])]
        text = chunk.pop("text")
        assert text in turn.text
        assert chunk == {
            "id": record.key,
            "tokens": record.num_tokens,
            "start": start,
            "position": record.start,
            "bytes": record.num_bytes,
            "codec": record.codec,
            "damaged": False,
            "other_memories": int(record.key in shared),
        }
        start += record.num_tokens
    assert start == turn.num_tokens


def test_a_damaged_chunk_is_told(served: Served) -> None:
    memory_id = remember(served, "Mara", user_id="u")
    (key, *_) = served.client.get(f"/memory/{memory_id}").json()["chunk_ids"]

    served.store.quarantine(key, "its bytes are bad")

    chunks = served.client.get(f"/memory/{memory_id}/chunks").json()["chunks"]
    assert [chunk["damaged"] for chunk in chunks] == [chunk["id"] == key for chunk in chunks]


def test_chunks_of_others_do_not_exist(served: Served) -> None:
    memory_id = remember(served, "Mara", user_id="u")

    error_of(served.client.get(f"/memory/{memory_id}/chunks", headers=served.headers("other")), 404)
    error_of(served.client.get(f"/memory/{memory_id}/chunks?user_id=v"), 404)
    assert served.client.get(f"/memory/{memory_id}/chunks?user_id=u").status_code == 200
    error_of(served.client.get("/memory/unknown/chunks"), 404)


@pytest.mark.parametrize("path", ["/memory/users", "/memory/sessions", "/memory/namespaces"])
@pytest.mark.parametrize(
    "cursor",
    ["x", "bnVsbA==", base64.b64encode(b"[1]").decode(), base64.b64encode(b'["a","b","c"]').decode()],
)
def test_a_cursor_of_ones_own_making_is_refused(served: Served, path: str, cursor: str) -> None:
    answer = served.client.get(path, params={"cursor": cursor}, headers=served.headers("admin"))
    assert error_of(answer, 400)["param"] == "cursor"


@pytest.mark.parametrize("name", ["namespaces", "users", "sessions", "requests", "x/chunks"])
def test_looking_around_needs_a_key_and_counts_as_a_request(served: Served, name: str) -> None:
    error_of(served.client.get(f"/memory/{name}", headers={"Authorization": "Bearer wrong"}), 401)
    error_of(served.client.get(f"/memory/{name}?surprise=1"), 400)

    keys = json.loads(served.keys_file.read_text())
    served.keys_file.write_text(json.dumps({**keys, "requests_per_minute": {"acme": 1}}))
    served.client.get("/memory/stats")
    error_of(served.client.get(f"/memory/{name}"), 429)


def request(number: int, namespace: str = "acme") -> AnsweredRequest:
    return AnsweredRequest(
        at=float(number),
        scope=Scope(namespace=namespace, user_id="u", agent_id="a", session_id="s"),
        ids=(TurnId("one"), TurnId("two")),
        exact=number,
        adapted=2,
        local=3,
        computed=4,
        recall_ms=1.5,
        failed=False,
    )


def test_the_last_requests_of_the_namespace_are_told_newest_first(served: Served) -> None:
    for number in range(3):
        served.app.state.kv_agent.recent.note(request(number))
    served.app.state.kv_agent.recent.note(request(9, "other"))

    answer = served.client.get("/memory/requests").json()["requests"]

    assert [one["at"] for one in answer] == [2.0, 1.0, 0.0]
    assert answer[0] == {
        "at": 2.0, "user_id": "u", "agent_id": "a", "session_id": "s", "ids": ["one", "two"],
        "exact": 2, "adapted": 2, "local": 3, "computed": 4, "recall_ms": 1.5, "failed": False,
    }  # fmt: skip
    assert served.client.get("/memory/requests?limit=1").json()["requests"] == answer[:1]
    others = served.client.get("/memory/requests", headers=served.headers("other")).json()["requests"]
    assert [one["at"] for one in others] == [9.0]


def test_only_so_many_requests_of_so_many_namespaces_are_kept() -> None:
    recent = RecentRequests()
    for number in range(3 * KEPT):
        recent.note(request(number))
    assert [one.at for one in recent.newest("acme", KEPT)] == [float(at) for at in range(299, 199, -1)]

    for number in range(1000):
        recent.note(request(number, f"n{number}"))
        recent.note(request(number, "busy"))
    assert recent.newest("acme", 1) == []
    assert recent.newest("n999", 1) == [request(999, "n999")]
    assert len(recent.newest("busy", 1000)) == KEPT
    assert len(recent._of) == 256


def test_who_only_looks_uses_nothing_and_is_no_event(served: Served) -> None:
    memory_id = remember(served, "Mara", user_id="u")
    body = {"query": "Mara", "mode": "lexical", "user_id": "u"}

    with served.client.websocket_connect("/memory/stream", headers=served.headers()) as listening:
        looked = served.client.post("/memory/query", json={**body, "peek": True}).json()["memories"]
        asked = served.client.post("/memory/query", json=body).json()["memories"]
        events = [listening.receive_json()]
        while events[-1]["event"] != "retrieved":
            events.append(listening.receive_json())
        remember(served, "Hugo", user_id="u")
        while events[-1]["event"] != "stored":
            events.append(listening.receive_json())

    assert [one["id"] for one in looked] == [one["id"] for one in asked] == [memory_id]
    assert [event["event"] for event in events].count("retrieved") == 1
    served.app.state.kv_agent.service.manager._uses.shutdown()  # what is noted is counted now
    assert served.store.catalog.ledger.usages("acme")[TurnId(memory_id)].num_hits == 1
