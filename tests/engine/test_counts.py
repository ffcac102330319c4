"""What a stored and a resumed turn cost on the real engine, counted. A change of this is to be meant."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import REGISTRY

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine

TURN, LEAD, FRESH = 60, 7, 10  # tokens: of the stored turn, before it where it is moved, behind it
TIMEOUT_S = 20.0
FLUSH = 5  # of a request that brings the numbers of the step before
SCOPE = support.scope("counts")

# By what they are called here: metric and label. vLLM's own numbers, then the plugin's.
COUNTERS = {
    "vllm computed": ("vllm:prompt_tokens_by_source_total", {"source": "local_compute"}),
    "vllm loaded": ("vllm:prompt_tokens_by_source_total", {"source": "external_kv_transfer"}),
    "vllm cached": ("vllm:prompt_tokens_by_source_total", {"source": "local_cache_hit"}),
    "exact": ("kv_agent_tokens_total", {"source": "exact"}),
    "adapted": ("kv_agent_tokens_total", {"source": "adapted"}),
    "local": ("kv_agent_tokens_total", {"source": "local"}),
    "computed": ("kv_agent_tokens_total", {"source": "computed"}),
    "bytes loaded": ("kv_agent_moved_bytes_total", {"direction": "load"}),
    "bytes saved": ("kv_agent_moved_bytes_total", {"direction": "save"}),
    "turns stored": ("kv_agent_turns_total", {"outcome": "stored"}),
}


def now() -> dict[str, float]:
    found = dict.fromkeys(COUNTERS, 0.0)
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            for name, (wanted, labels) in COUNTERS.items():
                if sample.name == wanted and labels.items() <= sample.labels.items():
                    found[name] += sample.value
    return found


@contextmanager
def counted(engine: VllmEngine, *, stored: int = 0) -> Iterator[dict[str, float]]:
    """What grows within, once it is over and so many turns are settled; what stays is left out."""
    grown: dict[str, float] = {}
    flush(engine)
    before = now()
    yield grown
    deadline = time.monotonic() + TIMEOUT_S
    for num_flushed in itertools.count(1):
        flush(engine)
        after = now()
        after["vllm computed"] -= FLUSH * num_flushed
        if after["turns stored"] - before["turns stored"] >= stored:
            break
        assert time.monotonic() < deadline, "the turn was not settled"
    grown.update({name: after[name] - before[name] for name in COUNTERS if after[name] != before[name]})


def flush(engine: VllmEngine) -> None:
    """Numbers arrive with the steps after them."""
    support.run(engine, support.encode(engine, support.OTHER_STORY)[:FLUSH], max_tokens=1, salt="flush")


@pytest.fixture(scope="module")
def text(engine: VllmEngine) -> tuple[int, ...]:
    return support.encode(engine, support.STORY)[::-1]


@pytest.fixture(scope="module")
def chunks(engine: VllmEngine, catalog: Catalog, text: tuple[int, ...]) -> list[ChunkRecord]:
    with counted(engine, stored=1):
        return support.capture(engine, catalog, text[:TURN], scope=SCOPE, salt="chunks")


@pytest.fixture(scope="module")
def token_bytes(chunks: list[ChunkRecord]) -> int:
    return sum(chunk.num_bytes for chunk in chunks) // TURN


def test_a_stored_turn_is_computed_once_and_copied_once(
    engine: VllmEngine, catalog: Catalog, text: tuple[int, ...], token_bytes: int
) -> None:
    with counted(engine, stored=1) as grown:
        support.capture(engine, catalog, text[1 : TURN + 1], scope=SCOPE, salt="stored")

    assert grown == {
        "vllm computed": TURN,
        "computed": TURN,
        "bytes saved": TURN * token_bytes,
        "turns stored": 1,
    }


def test_the_same_turn_again_is_not_copied(
    engine: VllmEngine, text: tuple[int, ...], chunks: list[ChunkRecord]
) -> None:
    with counted(engine) as grown:
        support.run(engine, text[:TURN], max_tokens=1, scope=SCOPE, salt="stored again")

    assert grown == {"vllm computed": TURN, "computed": TURN}


def resumed(
    engine: VllmEngine, text: tuple[int, ...], chunks: list[ChunkRecord], salt: str, lead: int = 0
) -> dict[str, float]:
    """The stored turn behind ``lead`` tokens, with a fresh turn; nothing of it is stored."""
    fresh_start = lead + TURN
    starts = [lead + chunk.start for chunk in chunks]
    prompt = (*text[TURN : TURN + lead], *support.tokens_of(chunks), *text[TURN : TURN + FRESH])
    with counted(engine) as grown:
        support.run(
            engine,
            prompt,
            max_tokens=1,
            salt=salt,
            scope=SCOPE,
            store=False,
            plan=support.plan(chunks, fresh_start=fresh_start, at=starts),
        )
    return grown


def test_an_exact_plan_computes_the_fresh_turn_and_copies_the_rest_once(
    engine: VllmEngine, text: tuple[int, ...], chunks: list[ChunkRecord], token_bytes: int
) -> None:
    assert resumed(engine, text, chunks, "exact") == {
        "vllm computed": FRESH,
        "vllm loaded": TURN,
        "computed": FRESH,
        "exact": TURN,
        "bytes loaded": TURN * token_bytes,
    }


def test_the_same_plan_again_copies_nothing(
    engine: VllmEngine, text: tuple[int, ...], chunks: list[ChunkRecord]
) -> None:
    resumed(engine, text, chunks, "twice")
    whole_blocks = (TURN + FRESH) // support.BLOCK * support.BLOCK

    assert resumed(engine, text, chunks, "twice") == {
        "vllm computed": TURN + FRESH - whole_blocks,
        "vllm cached": whole_blocks,
        "computed": TURN + FRESH - whole_blocks,
        "exact": TURN,
        "local": whole_blocks - TURN,
    }


def test_a_moved_plan_cannot_be_loaded_before_what_stands_in_front_of_it(
    engine: VllmEngine, text: tuple[int, ...], chunks: list[ChunkRecord]
) -> None:
    assert resumed(engine, text, chunks, "behind", lead=LEAD) == {
        "vllm computed": LEAD + TURN + FRESH,
        "computed": LEAD + TURN + FRESH,
    }
