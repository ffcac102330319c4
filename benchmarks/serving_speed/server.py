"""A server with memory, started as users start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from kv_agent.serving.access import KEYS_ENV, add_key

_COMMAND = str(Path(sys.executable).with_name("kv-agent"))
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """``keys`` are one for each namespace, in their order."""

    base_url: str
    keys: Sequence[str]
    pid: int


@contextmanager
def served(model: Path, folder: Path, namespaces: Sequence[str]) -> Iterator[Served]:
    """A server on a free port, with its store and its log in ``folder``; ended afterwards."""
    keys_file = folder / "keys.json"
    keys = [add_key(keys_file, namespace) for namespace in namespaces]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                _COMMAND, "serve", str(model), "--store", str(folder / "store"),
                "--host", "127.0.0.1", "--port", str(port),
            ],
            env={**os.environ, KEYS_ENV: str(keys_file)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_healthy(process, base_url, folder / "server.log")
        yield Served(base_url=base_url, keys=keys, pid=process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{base_url}/health", trust_env=False).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)
