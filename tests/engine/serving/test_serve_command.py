"""``kv-agent serve`` as users start it, spoken to with the openai package and ended by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from kv_agent import AgentMemory
from kv_agent.keys import KEYS_ENV
from tests.engine import support
from tests.engine.memory.shared import REPLY
from tests.engine.serving.server_process import (
    STOP_TIMEOUT_S,
    MemoryServerProcess,
    free_port,
    wait_healthy,
)

pytestmark = pytest.mark.engine

COMMAND = str(Path(sys.executable).with_name("kv-agent"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[MemoryServerProcess]:
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    for name in (KEYS_ENV, "VLLM_PLUGINS", "KV_AGENT_STORE"):
        environment.pop(name, None)
    keys_file, store, log = tmp_path / "keys.json", tmp_path / "store", tmp_path / "server.log"
    add = [COMMAND, "keys", "add", "acme", "--memory-keys", str(keys_file)]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                COMMAND, "serve", str(support.RECALL_MODEL),
                "--store", str(store), "--memory-keys", str(keys_file), "--kv-agent-config",
                "chunk_tokens=32", "--host", "127.0.0.1", "--port", str(port),
                "--served_model_name", "recall",
            ],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = MemoryServerProcess(
        process=process, base_url=f"http://127.0.0.1:{port}", keys={"acme": key}, log=log, store=store
    )
    try:
        wait_healthy(server)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_of(session: int) -> list[str]:
    """Command lines of what still runs of a session, its zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def test_it_serves_with_memory_and_ends_with_its_last_process(served: MemoryServerProcess) -> None:
    lines = served.log_text().splitlines()
    assert [line for line in lines if line.startswith("store ") and line.endswith(str(served.store))]
    assert [line for line in lines if line.startswith("setting ") and line.endswith("chunk_tokens = 32")]
    assert [line for line in lines if line.startswith("keys ") and "1 of 1 namespaces" in line]
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key=served.keys["acme"], max_retries=0)
    assert [model.id for model in client.models.list().data] == ["recall"]

    with AgentMemory(base_url=served.base_url, api_key=served.keys["acme"], user_id="u") as memory:
        stored = memory.store("Rosa Bishop has a parrot at home.", REPLY)
        answer = client.chat.completions.create(
            model="recall",
            messages=[{"role": "user", "content": "What pet does Rosa Bishop have?"}],
            max_tokens=8,
            temperature=0,
            extra_body={"memory": {"user_id": "u", "store": True}},
        )
        assert answer.choices[0].message.content == " parrot."
        report = answer.model_extra["kv_transfer_params"]["kv_agent"]
        assert [one["id"] for one in report["memories"]] == [stored]
        assert report["exact"] + report["adapted"] > 0

    assert len(processes_of(served.process.pid)) > 1  # the engine has its own
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(STOP_TIMEOUT_S) == 0, served.log_text()[-4000:]
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := processes_of(served.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert "the server has stopped" in served.log_text().splitlines()
    # What was captured in the last moment is on disk.
    store = [COMMAND, "ls", "--store", str(served.store), "--namespace", "acme", "--user", "u"]
    listed = subprocess.run(store, capture_output=True, text=True, check=True).stdout
    assert stored is not None
    assert stored in listed
    assert report["turn_id"] in listed
