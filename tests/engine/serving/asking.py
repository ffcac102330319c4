"""What clients ask of a server with memory, in a few words."""

from __future__ import annotations

from typing import Any

import httpx


def remember(client: httpx.Client, prompt: str, **fields: Any) -> str:
    body = {"prompt": prompt, "response": "I will remember that.", **fields}
    answer = client.post("/memory/store", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def chat(client: httpx.Client, question: str, **memory: Any) -> dict[str, Any]:
    """A chat with memory -> what it reused."""
    body = {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "memory": memory,
    }
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    reuse: dict[str, Any] = answer.json()["kv_transfer_params"]["kv_agent"]
    return reuse
