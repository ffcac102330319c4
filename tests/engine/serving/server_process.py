"""A real API server with memory, started as users start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_agent.serving.access import KEYS_ENV
from tests.engine import support

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryServerProcess:
    """``keys`` are API keys by a name: ``acme``, ``other`` (namespaces of that name) and ``admin``."""

    process: subprocess.Popen[bytes]
    base_url: str
    keys: Mapping[str, str]
    log: Path
    store: Path

    def client(self, key: str | None = "acme", **headers: str) -> httpx.Client:
        """A client with the key of that name."""
        if key is not None:
            headers["Authorization"] = f"Bearer {self.keys[key]}"
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=60, trust_env=False)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """Ask the server to end -> its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server did not stop:\n{self.log_text()[-8000:]}")


@contextmanager
def serving(
    folder: Path,
    *,
    keys: Mapping[str, str],
    keys_file: Path | None,
    options: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
    with_connector: bool = True,
    plugins: str = "kv_agent",
) -> Iterator[MemoryServerProcess]:
    """A server on a free port, killed at the end if it still runs."""
    store = folder / "store"
    transfer = {
        "kv_connector": "KVAgentConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "kv_agent": {"store": str(store), "chunk_tokens": 32, **(settings or {})}
        },
    }
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(support.RECALL_MODEL), "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port),
        "--shutdown-timeout", "30",
        *(("--kv-transfer-config", json.dumps(transfer)) if with_connector else ()),
        *options,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": plugins}
    environment.pop(KEYS_ENV, None)
    if keys_file is not None:
        environment[KEYS_ENV] = str(keys_file)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    base_url = f"http://127.0.0.1:{port}"
    server = MemoryServerProcess(process=process, base_url=base_url, keys=keys, log=log, store=store)
    try:
        wait_healthy(server)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_healthy(server: MemoryServerProcess) -> None:
    """Return when it answers; the test fails if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with server.client(None) as client:
        while True:
            with suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    return
            if server.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{server.log_text()[-8000:]}")
            time.sleep(0.2)
