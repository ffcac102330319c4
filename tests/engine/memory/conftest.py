"""One engine with the bundled model for all tests of the Python interface, closed after the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_agent import CacheManager
from kv_agent.engines.vllm_local import VllmEngine
from tests.engine import support
from tests.engine.memory.shared import SharedEngine


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="package")
def recall_engine(store: Path) -> Iterator[SharedEngine]:
    engine = VllmEngine(support.RECALL_MODEL, {"store": str(store)}, dtype="float32", max_model_len=1024)
    yield SharedEngine(engine)
    engine.close()


@pytest.fixture(scope="package")
def manager(recall_engine: SharedEngine, store: Path) -> Iterator[CacheManager]:
    with CacheManager(recall_engine, store=store) as manager:
        yield manager
