"""Stock vLLM's OpenAI server with the plugin named on the command line, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_agent.chunks import ChunkRecord, TurnId
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from tests.engine import support

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
SCOPE = {"user_id": "http"}
FACTS = (
    "<|user|>Lena Holm lives in Oslo.<|end|><|assistant|>I will remember that.<|end|>"
    "<|user|>Ben works as a baker.<|end|><|assistant|>I will remember that.<|end|>"
    "<|user|>Kira Mazur lives in Rome.<|end|><|assistant|>"
)
QUESTION = "<|user|>Where does Lena Holm live?<|end|><|assistant|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path
    store: Path

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    def complete(
        self, token_ids: Sequence[int], *, kv_agent: dict[str, Any] | None = None, **body: Any
    ) -> dict[str, Any]:
        if kv_agent is not None:
            body["kv_transfer_params"] = {"kv_agent": kv_agent}
        return self.post("/v1/completions", prompt=list(token_ids), max_tokens=12, temperature=0, **body)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    store = folder / "store"
    # No module path: vLLM finds the connector by the entry point of the installed package.
    transfer = {
        "kv_connector": "KVAgentConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kv_agent": {"store": str(store), "chunk_tokens": 32}},
    }
    port = _free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(support.RECALL_MODEL), "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port),
        "--kv-transfer-config", json.dumps(transfer),
        "--shutdown-timeout", "30",  # vLLM's default 0 kills the engine while it writes the last turn
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,  # not the repository: the package must be found where it is installed
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            _wait_healthy(process, client, log)
            yield Server(process=process, client=client, log=log, store=store)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(autouse=True)
def _show_log(server: Server) -> Iterator[None]:
    """What the server logged during a test; pytest shows it if the test failed."""
    seen = len(server.log.read_bytes())
    yield
    sys.stdout.write(server.log.read_bytes()[seen:].decode(errors="replace"))


@pytest.fixture(scope="module")
def catalog(server: Server) -> Iterator[Catalog]:
    catalog = Catalog(server.store / "catalog.sqlite3")
    yield catalog
    catalog.close()


@pytest.fixture(scope="module")
def conversation(server: Server) -> list[int]:
    """Facts, the model's answer to them, and a question."""
    facts = server.tokens(FACTS)
    answer = server.complete(facts, return_token_ids=True)["choices"][0]["token_ids"]
    return facts + answer + server.tokens(QUESTION)


@pytest.fixture(scope="module")
def chunks(server: Server, catalog: Catalog) -> list[ChunkRecord]:
    """The facts and the answer, stored."""
    reuse = reuse_of(server.complete(server.tokens(FACTS), kv_agent={"scope": SCOPE}))
    return support.wait_stored(catalog, TurnId(reuse["turn_id"]))


def reuse_of(body: dict[str, Any]) -> dict[str, Any] | None:
    return (body["kv_transfer_params"] or {}).get("kv_agent")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_healthy(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-8000:]}")
        time.sleep(0.2)


def test_a_completion_with_a_scope_is_stored(chunks: list[ChunkRecord], conversation: list[int]) -> None:
    stored = support.tokens_of(chunks)

    assert list(stored) == conversation[: len(stored)]
    assert {chunk.user_id for chunk in chunks} == {"http"}
    assert {chunk.namespace for chunk in chunks} == {"default"}


def test_a_plan_injects_stored_chunks_and_the_answer_is_the_computed_one(
    server: Server, chunks: list[ChunkRecord], conversation: list[int]
) -> None:
    stored = len(support.tokens_of(chunks))
    plan = support.plan(chunks, fresh_start=stored)

    injected = server.complete(
        conversation, cache_salt="http", kv_agent={"scope": SCOPE, "store": False, "plan": plan}
    )
    computed = server.complete(conversation)  # too short for vLLM's own prefix cache

    reuse = reuse_of(injected)
    assert reuse is not None
    assert (reuse["exact"], reuse["adapted"], reuse["local"]) == (stored, 0, 0)
    assert reuse["computed"] == len(conversation) - stored
    assert reuse["chunk_ids"] == [chunk.key for chunk in chunks]
    assert reuse["refused"] == []
    assert injected["choices"][0]["text"] == computed["choices"][0]["text"]
    assert computed["choices"][0]["text"].strip() == "Oslo."


def test_an_unknown_field_is_told_and_the_request_is_answered(server: Server) -> None:
    question = server.tokens(QUESTION)

    body = server.complete(question, kv_agent={"scop": SCOPE})

    reuse = reuse_of(body)
    assert reuse is not None
    assert "kv_transfer_params.kv_agent: scop" in reuse["error"]
    assert "turn_id" not in reuse
    assert body["choices"][0]["text"] == server.complete(question)["choices"][0]["text"]


def test_a_request_without_the_field_is_answered_without_it(server: Server) -> None:
    assert reuse_of(server.complete(server.tokens(QUESTION))) is None


def test_a_chat_with_a_scope_is_stored(server: Server, catalog: Catalog) -> None:
    body = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Otto Flores has a cat at home."}],
        max_tokens=8,
        temperature=0,
        kv_transfer_params={"kv_agent": {"scope": SCOPE, "metadata": {"source": "chat"}}},
    )

    reuse = reuse_of(body)
    assert reuse is not None
    turn_id = TurnId(reuse["turn_id"])
    support.wait_stored(catalog, turn_id)
    turn = catalog.turns([turn_id])[turn_id]
    assert "Otto Flores has a cat at home." in turn.text
    assert turn.metadata == {"source": "chat"}


# Last, because nothing is served afterwards.
def test_sigterm_right_after_an_answer_loses_nothing_and_leaves_a_clean_store(
    server: Server, catalog: Catalog
) -> None:
    text = server.tokens("<|user|>Uma loves to eat soup.<|end|><|assistant|>")
    reuse = reuse_of(server.complete(text, kv_agent={"scope": SCOPE}))
    assert reuse is not None

    server.stop()

    store = LocalStore(server.store, host_bytes=0)
    try:
        assert store.check() == []
        assert store.catalog.known_turns([TurnId(reuse["turn_id"])]) == {reuse["turn_id"]}
    finally:
        store.close()
