"""What a server prints: kv_agent's records as JSON, and at no level a word of what it was told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_agent.chunks import Scope
from kv_agent.serving.access import add_key
from kv_agent.storage.store import LocalStore
from tests.engine.serving.server_process import MemoryServerProcess, serving

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SECRET = "xylophonium"


def documented_config() -> dict[str, Any]:
    """The one with formatters that the page on serving gives."""
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (config,) = [json.loads(block) for block in blocks if '"formatters"' in block]
    return dict(config)


def say_it_everywhere(server: MemoryServerProcess, client: httpx.Client) -> None:
    """In prompts, answers, stored turns, metadata, names and requests that are wrong in many ways."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    stored = client.post(
        "/memory/store",
        json={
            "prompt": f"The {SECRET} is in Oslo.",
            "response": f"{SECRET}, noted.",
            "system_prompt": f"You know the {SECRET}.",
            "user_id": "u",
            "metadata": {"note": SECRET, SECRET: 1},
        },
    )
    assert stored.status_code == 200, stored.text
    client.post("/memory/query", json={"query": f"Where is the {SECRET}?", "user_id": "u"})
    client.post("/memory/query", json={"query": SECRET, "user_id": "u", "mode": "lexical"})
    for memory in (
        {"user_id": "u"},
        {"user_id": "u", "quality": "exact", "metadata": {"note": SECRET}},
        None,
    ):
        for stream in (False, True):
            answer = client.post(
                "/v1/chat/completions",
                json={
                    "model": model,
                    "messages": [
                        {"role": "system", "content": f"You know the {SECRET}."},
                        {"role": "user", "content": f"Where is the {SECRET}?"},
                    ],
                    "max_tokens": 8,
                    "stream": stream,
                    **({} if memory is None else {"memory": memory}),
                },
            )
            assert answer.status_code == 200, answer.text
    wrong: list[dict[str, Any]] = [
        {"prompt": [SECRET]},
        {"prompt": SECRET, SECRET: 1},
        {"prompt": SECRET, "response": "x", "metadata": {"a": {"b": SECRET}}},
        {"prompt": SECRET, "response": "x", "ttl_s": SECRET},
        {"prompt": SECRET + "\x00\udcff", "response": "x"},
        {"prompt": f"{SECRET} " * 5000, "response": "x"},
    ]
    for body in wrong:
        answer = client.post("/memory/store", content=json.dumps(body))
        assert answer.status_code == 400, answer.text
    client.post("/memory/query", content=f'{{"query": "{SECRET}"')
    client.post("/memory/forget", json={"user_id": "u", "metadata": {SECRET: [SECRET]}})
    for field in ({"top_k": SECRET}, {SECRET: 1}, SECRET, {"filters": {"metadata": {"a": [SECRET]}}}):
        body = {"model": model, "messages": [{"role": "user", "content": SECRET}], "memory": field}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
    long = [{"role": "user", "content": f"{SECRET} " * 5000}]
    client.post("/v1/chat/completions", json={"model": model, "messages": long, "memory": {}})
    forged = {"kv_agent": {"plan": SECRET}}
    client.post("/v1/completions", json={"model": model, "prompt": SECRET, "kv_transfer_params": forged})
    client.get("/memory", headers={"Authorization": f"Bearer {SECRET}"})


def lose_the_files(store: Path) -> None:
    """So that what is stored is warned of, too."""
    blobs = sorted((store / "blobs").rglob("*.safetensors"))
    assert blobs
    for path in blobs:
        path.unlink()


def test_no_word_of_a_prompt_or_a_memory_is_printed_or_counted_and_records_are_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = documented_config()
    for logger in config["loggers"].values():
        logger["level"] = "DEBUG"
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(config))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(file))
    keys_file = tmp_path / "keys.json"
    keys = {"acme": add_key(keys_file, "acme"), "admin": add_key(keys_file, "ops", is_admin=True)}
    settings = {"host_bytes": 0, "warm_bytes": 0}
    with serving(tmp_path, keys=keys, keys_file=keys_file, settings=settings) as server:
        with server.client() as client:
            say_it_everywhere(server, client)
            lose_the_files(server.store)
            say_it_everywhere(server, client)
            keys_file.write_text("{")  # and a warning of the server's own process
            client.get("/memory")
            metrics = client.get("/metrics").text
        assert server.stop() == 0

    store = LocalStore(server.store, host_bytes=0)  # it was stored; it is only not told
    assert any(SECRET in turn.text for turn in store.catalog.list_turns(Scope(namespace="acme", user_id="u")))
    store.close()
    log = server.log_text()
    assert "DEBUG" in log
    assert SECRET not in log
    assert SECRET not in metrics
    own = [json.loads(line) for line in log.splitlines() if '"name": "kv_agent' in line]
    assert {record["event"] for record in own} >= {"started", "memory_on", "load_failed", "keys_unreadable"}
    assert all({"asctime", "levelname", "message", "event"} <= record.keys() for record in own)
    (failed, *_) = [record for record in own if record["event"] == "load_failed"]
    assert failed["reason"] == "blob is missing"
    assert re.fullmatch(r"[0-9a-f]{8}", failed["chunk"])
    assert {record["vllm_process_name"] for record in own} >= {"APIServer", "EngineCore", "Worker"}


VLLMS_OWN_JSON = """
import logging
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
from kv_agent.vllm_plugin.register import register

register()
register()
configure_logging(LoggingConfig(formatter="json", log_level="WARNING"))
logger = logging.getLogger("kv_agent.storage.writer")
logger.info("unseen", extra={"event": "turn_dropped"})
logger.warning("drops a turn: %s", "full", extra={"event": "turn_dropped", "reason": "queue full"})
"""


def test_vllms_own_json_format_and_level_hold_for_our_records_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "kv_agent")
    done = subprocess.run(
        [sys.executable, "-c", VLLMS_OWN_JSON], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "turn" in line]
    record = json.loads(line)
    assert (record["message"], record["event"], record["reason"]) == (
        "drops a turn: full",
        "turn_dropped",
        "queue full",
    )
