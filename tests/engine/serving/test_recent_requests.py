"""What the last requests reused is what their answers said, however they were asked."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

COUNTS = ("exact", "adapted", "local", "computed")


def ask(client: httpx.Client, path: str, memory: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The whole answer to a question about Ana."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    asked = "Where does Ana live?"
    body = {"prompt": asked} if path == "completions" else {"messages": [{"role": "user", "content": asked}]}
    answer = client.post(
        f"/v1/{path}", json={"model": model, "max_tokens": 8, "memory": memory, **body, **fields}
    )
    assert answer.status_code == 200, answer.text
    if fields.get("stream"):
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        chunks: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines]
        return chunks[-1]
    whole: dict[str, Any] = answer.json()
    return whole


def newest(client: httpx.Client) -> dict[str, Any]:
    (request,) = client.get("/memory/requests", params={"limit": 1}).json()["requests"]
    found: dict[str, Any] = request
    return found


@pytest.mark.parametrize(
    ("path", "fields"),
    [("chat/completions", {}), ("chat/completions", {"stream": True}), ("completions", {})],
    ids=["chat", "stream", "completion"],
)
def test_it_says_what_was_reused(client: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "Ana lives in Oslo.", "response": "Noted.", "user_id": "recent"}
    client.post("/memory/store", json=body)

    memory = {"user_id": "recent", "agent_id": "a", "session_id": "s", "store": False}
    report = ask(client, path, memory, **fields)["kv_transfer_params"]["kv_agent"]

    request = newest(client)
    assert [request[name] for name in COUNTS] == [report[name] for name in COUNTS]
    assert request["ids"] == [one["id"] for one in report["memories"]]
    assert (request["user_id"], request["agent_id"], request["session_id"]) == ("recent", "a", "s")
    assert not request["failed"]
    assert request["recall_ms"] > 0
    assert "Ana" not in json.dumps(request)


def test_without_memories_all_but_the_prefix_is_computed(client: httpx.Client) -> None:
    answer = ask(client, "chat/completions", {"user_id": "nobody-yet", "store": False})

    request = newest(client)
    assert request["ids"] == []
    assert request["exact"] + request["adapted"] == 0
    assert sum(request[name] for name in COUNTS) == answer["usage"]["prompt_tokens"]


def test_where_memory_could_not_be_used_it_says_so(client: httpx.Client) -> None:
    answer = ask(client, "chat/completions", {"user_id": "recent", "share": "agent"})
    assert "error" in answer["kv_transfer_params"]["kv_agent"]

    request = newest(client)
    assert (request["failed"], request["ids"]) == (True, [])
    assert request["exact"] + request["adapted"] == 0
    assert sum(request[name] for name in COUNTS) == answer["usage"]["prompt_tokens"]
