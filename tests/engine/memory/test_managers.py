"""The life of a cache manager: from the quick start and wrong settings to closing and opening again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kv_agent import AgentMemory, CacheManager, ConfigError, KVAgentError, Scope
from kv_agent.storage.catalog import Catalog
from tests.engine import support
from tests.engine.memory.shared import REPLY, SharedEngine

pytestmark = pytest.mark.engine


def test_a_new_manager_on_the_same_store_finds_what_the_old_one_stored(
    recall_engine: SharedEngine, store: Path
) -> None:
    with CacheManager(recall_engine, store=store) as first:
        memory = AgentMemory(first, user_id="ken")
        memory.store("Project Noble Raven takes place in Fort Dover.", REPLY)
        assert len(memory.retrieve("Where does project Noble Raven take place?")) == 1
    assert list(store.glob("index/*")), "closing leaves a snapshot of the index"

    with CacheManager(recall_engine, store=store) as second:
        answer = AgentMemory(second, user_id="ken").generate(
            "Where does project Noble Raven take place?", max_tokens=8, store=False
        )

    assert answer.text == "Fort Dover."


def test_closing_waits_until_everything_is_on_disk(recall_engine: SharedEngine, store: Path) -> None:
    manager = CacheManager(recall_engine, store=store)
    turn_ids = [manager.store_kv(f"Note number {i}.", "Okay.", scope=Scope(user_id="leo")) for i in range(20)]
    closed = recall_engine.closed

    manager.close()
    manager.close()

    assert recall_engine.closed == closed + 1
    catalog = Catalog(store / "catalog.sqlite3")
    assert catalog.known_turns([t for t in turn_ids if t is not None]) == set(turn_ids)
    catalog.close()
    with pytest.raises(KVAgentError, match="closed"):
        manager.store_kv("too", "late")


def test_store_kv_without_a_scope_needs_to_know_the_user(recall_engine: SharedEngine, store: Path) -> None:
    with CacheManager(recall_engine, store=store) as manager:
        mine = AgentMemory(manager, user_id="mallory")
        manager.store_kv("Pia Russo lives in Hanoi.", REPLY)
        assert [m.text.split("\n")[0] for m in mine.list()] == ["Pia Russo lives in Hanoi."]
        AgentMemory(manager, user_id="niaj")
        with pytest.raises(ConfigError, match="several users"):
            manager.store_kv("Whose is this?", "Nobody knows.")


def test_the_quick_start_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (support.REPOSITORY / "README.md").read_text()
    match = re.search(r"```python\n(from kv_agent import AgentMemory.*?)```", readme, re.DOTALL)
    assert match is not None
    script = tmp_path / "quickstart.py"  # a plain script, without any __main__ guard
    script.write_text(match.group(1))
    env = os.environ | {"KV_AGENT_STORE": str(tmp_path / "store")}

    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "Oslo." in done.stdout
    assert (tmp_path / "store" / "catalog.sqlite3").exists()


def test_an_unknown_engine_name_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='engine must be "vllm" or an engine object'):
        CacheManager("vlm", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_backend_gpu_without_a_gpu_is_a_clear_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match='backend="gpu" needs a CUDA GPU'):
        AgentMemory(backend="gpu", store=tmp_path)
