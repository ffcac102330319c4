"""Servers that are started or stopped in other ways."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from kv_agent.chunks import TurnId
from kv_agent.storage.store import LocalStore
from tests.engine.serving.server_process import MemoryServerProcess, serving

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


def test_a_template_that_has_no_place_for_memories_is_told_at_start_and_vllm_answers(tmp_path: Path) -> None:
    template = tmp_path / "irregular.jinja"
    template.write_text(
        "{% for one in messages %}{{ one.role }}: {{ one.content }}{% if loop.first %} (first){% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    options = ("--chat-template", str(template))
    with serving(tmp_path, keys={}, keys_file=None, options=options) as server, server.client(None) as client:
        assert "chats get no memories: the model's chat template renders a first turn" in server.log_text()
        chat = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2, "temperature": 0}
        plain = client.post("/v1/chat/completions", json=chat)
        asked = client.post("/v1/chat/completions", json={**chat, "memory": {"user_id": "u"}})

        assert (plain.status_code, asked.status_code) == (200, 200)
        assert asked.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]
        assert "log says why" in asked.json()["kv_transfer_params"]["kv_agent"]["error"]


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


def test_requests_of_an_engine_that_ended_do_not_keep_the_server(tmp_path: Path) -> None:
    """vLLM itself would wait for the answers to what it sent to an engine that stops."""
    options = ("--shutdown-timeout", "1")
    with serving(tmp_path, keys={}, keys_file=None, options=options) as server, server.client(None) as client:
        remembered = {"prompt": "The dog is called Rex.", "user_id": "u"}
        assert client.post("/memory/store", json=remembered).status_code == 200
        chat = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
        requests: list[tuple[str, dict[str, Any]]] = [
            ("/memory/store", {"prompt": "The cat is called Tom.", "user_id": "u"}),
            ("/memory/query", {"query": "Who is Rex?", "user_id": "u"}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "stream": True}),
            ("/v1/chat/completions", {**chat, "memory": {"user_id": "u"}}),
        ]
        os.kill(_engine_of(server), signal.SIGSTOP)

        def post(path: str, body: dict[str, Any]) -> int:
            with server.client(None) as another:
                return another.post(path, json=body).status_code

        with ThreadPoolExecutor(len(requests)) as threads:
            asked = [threads.submit(post, *request) for request in requests]
            time.sleep(2)  # until they all wait for the engine
            assert not any(one.done() for one in asked)
            assert server.stop() == 0
            statuses = [one.result() for one in asked]

        # The head of a streamed answer was out already.
        assert [status >= 500 for status in statuses] == [True, True, True, False, True]


def _engine_of(server: MemoryServerProcess) -> int:
    """The process that runs the model."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    return engine.pid
