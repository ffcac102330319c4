"""The memory routes on stock vLLM's own server, with the bundled model."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

FACTS = {
    "Mara Dubois": "Oslo",
    "Hugo Thomsen": "Dublin",
    "Otto Flores": "Hanoi",
    "Kira Mazur": "Rome",
}


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/memory/{path}", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def remember(client: httpx.Client, user: str, name: str, city: str, **fields: Any) -> str:
    stored = post(
        client,
        "store",
        prompt=f"{name} lives in {city}.",
        response="I will remember that.",
        user_id=user,
        **fields,
    )
    return str(stored["id"])


@contextmanager
def listening(
    server: MemoryServerProcess, query: str = "", key: str | None = None
) -> Iterator[ClientConnection]:
    address = server.base_url.replace("http://", "ws://")
    headers = {} if key is None else {"Authorization": f"Bearer {server.keys[key]}"}
    with connect(f"{address}/memory/stream{query}", additional_headers=headers, proxy=None) as stream:
        yield stream


def next_about(stream: ClientConnection, user: str) -> dict[str, Any]:
    """The next event of this user's memories."""
    while True:
        event: dict[str, Any] = json.loads(stream.recv(timeout=30))
        if event["user_id"] == user:
            return event


def test_what_is_stored_is_found_by_words_and_by_keys(client: httpx.Client) -> None:
    ids = {name: remember(client, "finder", name, city) for name, city in FACTS.items()}

    for mode, most in (("lexical", 1), ("hybrid", 2), ("latent", 3)):  # keys alone do not find the best first
        for name in FACTS:
            answer = post(
                client, "query", query=f"Where does {name} live?", user_id="finder", mode=mode, top_k=most
            )
            found = {memory["id"]: memory for memory in answer["memories"]}
            assert found.keys() <= set(ids.values())
            assert FACTS[name] in found[ids[name]]["text"]
            assert answer["took_ms"] >= answer["probe_ms"]
            assert (answer["probe_ms"] > 0) == (mode != "lexical")


def test_a_stored_memory_has_kv_that_the_engine_puts_back(client: httpx.Client) -> None:
    memory_id = remember(client, "reuser", "Lena Holm", "Oslo")

    answer = chat(client, "Where does Lena Holm live?", user_id="reuser", store=False, top_k=1)

    reuse = answer["kv_transfer_params"]["kv_agent"]
    told = client.get(f"/memory/{memory_id}").json()
    assert [memory["id"] for memory in reuse["memories"]] == [memory_id]
    assert reuse["exact"] + reuse["adapted"] > 0
    assert set(reuse["chunk_ids"]) & set(told["chunk_ids"])
    assert "Oslo" in answer["choices"][0]["message"]["content"]


def chat(client: httpx.Client, question: str, **memory: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "memory": memory}
    return post_v1(client, "/v1/chat/completions", **body)


def post_v1(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_memory_is_told_listed_pinned_and_forgotten(client: httpx.Client) -> None:
    ids = [remember(client, "keeper", name, city, agent_id="a") for name, city in FACTS.items()]

    told = client.get(f"/memory/{ids[0]}").json()
    assert told["text"].startswith("Mara Dubois lives in Oslo.")
    assert (told["agent_id"], told["pinned"], told["expires"]) == ("a", False, None)
    assert client.put(f"/memory/{ids[0]}/pin").json() == {"id": ids[0], "pinned": True}
    assert client.get(f"/memory/{ids[0]}").json()["pinned"]
    first = client.get("/memory", params={"user_id": "keeper", "limit": 3}).json()
    second = client.get("/memory", params={"user_id": "keeper", "limit": 3, "cursor": first["next"]}).json()
    assert [one["id"] for one in first["memories"] + second["memories"]] == ids[::-1]
    assert second["next"] is None
    assert client.delete(f"/memory/{ids[1]}").json() == {"ids": [ids[1]]}
    assert client.get(f"/memory/{ids[1]}").status_code == 404
    assert post(client, "forget", user_id="keeper", agent_id="b")["ids"] == []
    assert post(client, "forget", user_id="keeper", all=True)["ids"] == [ids[0], ids[2], ids[3]]
    assert client.get("/memory", params={"user_id": "keeper"}).json()["memories"] == []


def test_namespaces_do_not_see_each_other(client: httpx.Client, memory_server: MemoryServerProcess) -> None:
    memory_id = remember(client, "private", "Nils Roth", "Bern")

    with memory_server.client("other") as other, memory_server.client("admin") as admin:
        missing = other.get("/memory/" + "0" * 32)
        for method, path in (("GET", ""), ("DELETE", ""), ("PUT", "/pin")):
            answer = other.request(method, f"/memory/{memory_id}{path}")
            assert (answer.status_code, answer.text) == (404, missing.text)
        for mode in ("hybrid", "latent", "lexical"):
            found = post(other, "query", query="Where does Nils Roth live?", user_id="private", mode=mode)
            assert found["memories"] == []
        assert post(other, "forget", user_id="private", all=True) == {"ids": []}
        named = admin.get(f"/memory/{memory_id}", headers={"X-Memory-Namespace": "acme"})
        assert named.json()["id"] == memory_id
        stats = admin.get("/memory/stats", headers={"X-Memory-Namespace": "acme"}).json()
    assert stats["memories"] == client.get("/memory/stats").json()["memories"] >= 1
    assert stats["store"]["turns"] >= 1


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_a_key_only_health_answers(memory_server: MemoryServerProcess, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with memory_server.client(None, **headers) as nobody:
        for method, path in (
            ("POST", "store"), ("POST", "query"), ("POST", "forget"), ("GET", "stats"),
            ("GET", "x"), ("DELETE", "x"),
        ):  # fmt: skip
            answer = nobody.request(method, f"/memory/{path}")
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "AuthenticationError"
        assert nobody.get("/memory/health").json()["status"] == "ok"
        assert nobody.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400), (b"{", 400), (b'{"query": "\xff"}', 400), (b'{"query": "a", "top_k": 1000000}', 400),
        (b'{"query": "a", "unknown": 1}', 400), (b'{"query": 7}', 400),
        (b'{"query": "a", "threshold": NaN}', 400),
        (b'{"query": "' + b"a " * 16_000 + b'"}', 400),  # more than the model takes
        (b" " * ((1 << 20) + 1), 413),
    ],
    ids=range(9),
)  # fmt: skip
def test_bad_input_is_refused_and_the_next_request_works(
    client: httpx.Client, content: bytes, status: int
) -> None:
    answer = client.post("/memory/query", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    assert post(client, "query", query="Where?", user_id="nobody")["memories"] == []


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(
    client: httpx.Client, memory_server: MemoryServerProcess
) -> None:
    address = urlsplit(memory_server.base_url)
    head = (
        "POST /memory/query HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {memory_server.keys['acme']}\r\n"
    )
    body = b'{"query": "Where?"}'
    for sent in (
        head.encode(),
        head.encode() + b"Content-Length: 100\r\n\r\n" + body,
        head.encode() + b"Content-Length: 19\r\n\r\n" + body,
        head.encode() + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"que',
    ):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(sent)
    assert post(client, "query", query="Where?", user_id="nobody")["memories"] == []


def test_many_clients_at_once_get_their_own(memory_server: MemoryServerProcess) -> None:
    def live(number: int) -> bool:
        with memory_server.client() as mine:
            user = f"crowd {number}"
            stored = [remember(mine, user, name, city) for name, city in FACTS.items()]
            found = [
                post(mine, "query", query=f"Where does {name} live?", user_id=user, top_k=1)["memories"][0][
                    "id"
                ]
                for name in FACTS
            ]
            return found == stored

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(live, range(16)))


def test_events_tell_what_happens_whoever_does_it(
    client: httpx.Client, memory_server: MemoryServerProcess
) -> None:
    with (
        listening(memory_server, key="acme") as mine,
        listening(memory_server, key="other") as theirs,
        memory_server.client("other") as other,
    ):
        memory_id = remember(client, "watched", "Uma Berg", "Lima")
        assert next_about(mine, "watched") | {"at": 0} == {
            "event": "stored", "at": 0, "namespace": "acme", "user_id": "watched", "agent_id": None,
            "session_id": None, "ids": [memory_id],
        }  # fmt: skip
        post(client, "query", query="Where does Uma Berg live?", user_id="watched")
        assert next_about(mine, "watched")["event"] == "retrieved"
        # The engine's own capture, without a memory route.
        answer = chat(client, "Where does Uma Berg live?", user_id="watched")
        captured = answer["kv_transfer_params"]["kv_agent"]["turn_id"]
        events = [next_about(mine, "watched") for _ in range(2)]
        assert {(event["event"], *event["ids"]) for event in events} == {
            ("injected", memory_id), ("stored", captured)
        }  # fmt: skip
        client.delete(f"/memory/{memory_id}")
        event = next_about(mine, "watched")
        assert (event["event"], event["ids"]) == ("forgotten", [memory_id])
        # Theirs is the first that they hear.
        their_id = remember(other, "watched", "Otto Flores", "Hanoi")
        assert json.loads(theirs.recv(timeout=30))["ids"] == [their_id]


def test_the_key_of_a_stream_is_not_logged(client: httpx.Client, memory_server: MemoryServerProcess) -> None:
    with listening(memory_server, f"?key={memory_server.keys['acme']}") as stream:
        memory_id = remember(client, "secretive", "Uma Berg", "Lima")
        assert next_about(stream, "secretive")["ids"] == [memory_id]
    for query in ("", "?key=wrong-secret"):
        with pytest.raises(InvalidStatus) as refused, listening(memory_server, query):
            pass
        assert refused.value.response.status_code == 401

    log = memory_server.log_text()
    assert "/memory/stream" in log
    assert memory_server.keys["acme"] not in log
    assert "wrong-secret" not in log
    assert "Uma Berg" not in log


def test_the_description_of_the_api_has_the_routes(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    ours = {path: set(methods) for path, methods in paths.items() if path.startswith("/memory")}
    assert ours == {
        "/memory": {"get"},
        "/memory/store": {"post"},
        "/memory/query": {"post"},
        "/memory/forget": {"post"},
        "/memory/stats": {"get"},
        "/memory/health": {"get"},
        "/memory/{memory_id}": {"get", "delete"},
        "/memory/{memory_id}/pin": {"put", "delete"},
        "/memory/{memory_id}/chunks": {"get"},
        "/memory/users": {"get"},
        "/memory/sessions": {"get"},
        "/memory/namespaces": {"get"},
        "/memory/requests": {"get"},
    }
    assert not any("422" in operation["responses"] for path in ours for operation in paths[path].values())


def test_threads_of_the_server_are_bounded(client: httpx.Client, memory_server: MemoryServerProcess) -> None:
    """A hundred clients at once: all are answered."""
    statuses: list[int] = []

    def ask(number: int) -> None:
        with memory_server.client() as mine:
            statuses.append(
                mine.post(
                    "/memory/query", json={"query": f"Where is {number}?", "user_id": "finder"}
                ).status_code
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert statuses == [200] * 100
