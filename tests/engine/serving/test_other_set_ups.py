"""Servers that are started or stopped in other ways."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_agent.chunks import TurnId
from kv_agent.storage.store import LocalStore
from tests.engine.serving.server_process import serving

pytestmark = pytest.mark.engine


def test_without_our_connector_the_routes_say_so_and_vllm_serves(tmp_path: Path) -> None:
    with (
        serving(tmp_path, keys={}, keys_file=None, with_connector=False) as server,
        server.client(None) as client,
    ):
        for path in ("health", "stats", "x"):
            answer = client.get(f"/memory/{path}")
            assert answer.status_code == 503
            assert "KVAgentConnector" in answer.json()["error"]["message"]
        answer = client.post("/v1/completions", json={"prompt": "Hello.", "max_tokens": 1})
        assert answer.status_code == 200
        assert "memory is off" in server.log_text()
        assert server.stop() == 0


def test_vllms_own_key_guards_memory_and_a_stop_amid_requests_is_clean(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    options = ("--api-key", "secret")
    with serving(tmp_path, keys={"own": "secret"}, keys_file=None, options=options) as server:
        with server.client(None) as nobody:
            assert nobody.get("/memory").status_code == 401
        is_stopping = threading.Event()

        def store(number: int) -> None:
            with server.client("own") as client:
                for turn in range(1000):
                    body: dict[str, Any] = {"prompt": f"Number {turn} of client {number}.", "user_id": "u"}
                    try:
                        answers.append(client.post("/memory/store", json=body))
                    except httpx.TransportError:
                        return
                    if len(answers) > 20:
                        is_stopping.set()

        threads = [threading.Thread(target=store, args=(number,)) for number in range(4)]
        for one in threads:
            one.start()
        assert is_stopping.wait(60)
        assert server.stop() == 0
        for one in threads:
            one.join()
        assert "no memory keys" not in server.log_text()

    assert {answer.status_code for answer in answers} <= {200, 503}
    stored = [TurnId(answer.json()["id"]) for answer in answers if answer.status_code == 200]
    store = LocalStore(server.store, host_bytes=0)
    try:
        assert store.check() == []
        assert store.catalog.known_turns(stored) == set(stored)
    finally:
        store.close()
