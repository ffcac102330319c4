"""The memory routes on a real port, and both clients, the one on an event loop driven as if it waited."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from kv_agent import AgentMemory, AsyncAgentMemory
from kv_agent.serving.access import add_key
from tests.unit.serving.conftest import application

START_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveServer:
    url: str
    store: Path
    keys_file: Path

    def key(self, namespace: str, *, is_admin: bool = False) -> str:
        """A new one, which the server knows at once."""
        return add_key(self.keys_file, namespace, is_admin=is_admin)


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """For all tests: each makes namespaces of its own."""
    folder = tmp_path_factory.mktemp("live")
    keys_file = folder / "keys.json"
    add_key(keys_file, "first")
    config = uvicorn.Config(application(folder, keys_file), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield LiveServer(url=f"http://127.0.0.1:{port}", store=folder / "store", keys_file=keys_file)
    finally:
        server.should_exit = True
        thread.join()


class Awaited:
    """An :class:`AsyncAgentMemory` whose coroutines are run to their end, on one loop."""

    def __init__(self, runner: asyncio.Runner, **options: Any) -> None:
        self._runner = runner
        self._memory = AsyncAgentMemory(**options)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._memory, name)
        return (lambda *a, **k: self._runner.run(member(*a, **k))) if callable(member) else member


class Connect:
    """Makes clients of one kind from their keywords, and closes them."""

    def __init__(self, runner: asyncio.Runner, waits: bool) -> None:
        self._runner = runner
        self._waits = waits
        self._made: list[Any] = []

    def __call__(self, **options: Any) -> Any:
        memory = AgentMemory(**options) if self._waits else Awaited(self._runner, **options)
        self._made.append(memory)
        return memory

    def over(self, transport: httpx.MockTransport, **options: Any) -> Any:
        """A client whose requests go nowhere."""
        kind = httpx.Client if self._waits else httpx.AsyncClient
        return self(http_client=kind(transport=transport), **options)

    def close(self) -> None:
        for memory in self._made:
            memory.close()


@pytest.fixture(params=["waiting", "awaiting"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with asyncio.Runner() as runner:
        connect = Connect(runner, request.param == "waiting")
        yield connect
        connect.close()
