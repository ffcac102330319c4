"""One engine for all tests of a session: starting vLLM takes half a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# vLLM gives an engine with a connector another number of threads; sums must not depend on that.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests ask the worker's process for what nobody else is told.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.base import Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLife:
    """What an engine stored and answered before it was shut down."""

    conversation: tuple[int, ...]  # two turns, the second one's answer, then a new question
    chunks: list[ChunkRecord]
    local_hit: Completion  # the question on top of vLLM's own prefix cache
    resumed: Completion  # the same with all stored chunks injected
    aligned: Completion  # the same with chunks injected up to where the local hit ended


def resume(
    engine: VllmEngine, life_tokens: tuple[int, ...], chunks: list[ChunkRecord], salt: str
) -> Completion:
    fresh_start = len(support.tokens_of(chunks))
    return support.run(
        engine,
        life_tokens,
        salt=salt,
        scope=support.scope(),
        store=False,
        plan=support.plan(chunks, fresh_start=fresh_start),
    )


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def catalog(store_dir: Path) -> Iterator[Catalog]:
    catalog = Catalog(store_dir / "catalog.sqlite3")
    yield catalog
    catalog.close()


@pytest.fixture(scope="session")
def first_life(store_dir: Path, catalog: Catalog) -> FirstLife:
    engine = support.open_engine(store_dir)
    try:
        # With 24 answer tokens 153 have KV: vLLM's own hit ends at 128, where the first turn ends, too.
        prompt = support.encode(engine, support.STORY)[:130]
        chunks = support.capture(engine, catalog, prompt[:128])
        turn = support.run(engine, prompt, scope=support.scope())
        chunks += support.wait_stored(catalog, turn.turn_id)
        conversation = prompt + turn.token_ids + support.encode(engine, support.QUESTION)
        local_hit = support.run(engine, conversation)
        aligned = [chunk for chunk in chunks if chunk.start + chunk.num_tokens <= local_hit.reuse.local]
        return FirstLife(
            conversation=conversation,
            chunks=chunks,
            local_hit=local_hit,
            resumed=resume(engine, conversation, chunks, "first"),
            aligned=resume(engine, conversation, aligned, "first aligned"),
        )
    finally:
        engine.close()


@pytest.fixture(scope="session")
def engine(first_life: FirstLife, store_dir: Path) -> Iterator[VllmEngine]:
    """The second engine process on the same store."""
    engine = support.open_engine(store_dir)
    yield engine
    engine.close()
