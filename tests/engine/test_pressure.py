"""Long prompts, full caches and many requests at once change nothing about the answers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from tests.engine import support

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def chunks(engine: VllmEngine, catalog: Catalog) -> list[ChunkRecord]:
    """An exact chunk and one that has to move behind it."""
    scope = support.scope("pressure")
    one = support.capture(engine, catalog, support.encode(engine, support.STORY)[20:80], scope=scope)
    two = support.capture(engine, catalog, support.encode(engine, support.OTHER_STORY)[:50], scope=scope)
    return [*one, *two]


def call(chunks: Sequence[ChunkRecord], fresh: Sequence[int], salt: str, max_tokens: int) -> Call:
    memory = support.tokens_of(chunks)
    return Call(
        token_ids=(*memory, *fresh),
        max_tokens=max_tokens,
        ignore_eos=True,
        cache_salt=salt,
        options={
            "scope": support.scope("pressure"),
            "store": False,
            "plan": support.plan(chunks, fresh_start=len(memory)),
        },
    )


def wait_for(lines: IO[str], first_word: str) -> str:
    """Skip the engine's log up to the line that begins with ``first_word``."""
    return next(line for line in lines if line.split()[:1] == [first_word])


def preemptions(engine: VllmEngine) -> int:
    return sum(int(metric.value) for metric in engine.metrics() if metric.name == "vllm:num_preemptions")


def test_a_fresh_turn_of_several_prefill_steps_gives_the_computed_answer(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    fresh = (support.encode(engine, support.STORY) * 4)[:400]
    assert len(fresh) > 3 * support.ENGINE_OPTIONS["max_num_batched_tokens"]

    (injected,) = engine.run([call(chunks[:1], fresh, "long", 24)])
    computed = support.run(engine, (*chunks[0].token_ids, *fresh))

    assert injected.reuse.exact == chunks[0].num_tokens
    assert injected.reuse.computed == len(fresh)
    assert injected.token_ids == computed.token_ids


def test_preempted_requests_with_plans_give_the_same_answers(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    story = support.encode(engine, support.STORY)
    calls = [call(chunks, story[index : index + 40], f"crowd {index}", max_tokens=500) for index in range(6)]
    alone = [engine.run([one])[0] for one in calls]
    before = preemptions(engine)

    crowd = [
        Call(
            token_ids=one.token_ids,
            max_tokens=one.max_tokens,
            ignore_eos=True,
            cache_salt=f"{one.cache_salt} again",
            options=one.options,
        )
        for one in calls
    ]
    together = engine.run(crowd)

    assert preemptions(engine) > before, "the cache was not full enough to preempt anybody"
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_a_batch_of_plans_and_plain_requests_each_get_their_own_answer(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    question = support.encode(engine, support.QUESTION)
    calls = []
    for index in range(4):
        calls.append(call(chunks[: 1 + index % 2], question, f"mixed {index}", 16))
        calls.append(Call(token_ids=(*question, index + 10), max_tokens=16, ignore_eos=True))
    alone: list[Completion] = [engine.run([one])[0] for one in calls]

    engine.reset_prefix_cache()
    together = engine.run(calls)

    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.reuse.adapted > 0 for c in together[::2]] == [False, True, False, True]


def test_collections_in_the_worker_leave_out_what_it_started_with(engine: VllmEngine) -> None:
    def num_left_out(worker: object) -> int:
        return gc.get_freeze_count()

    (count,) = engine._llm.collective_rpc(num_left_out)
    assert count > 100_000  # of the modules alone


def test_two_engines_storing_at_once_keep_everything(
    engine: VllmEngine, catalog: Catalog, store_dir: Path
) -> None:
    script = Path(__file__).with_name("store_turns.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(store_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(support.REPOSITORY)},
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            wait_for(process.stdout, "ready")
            process.stdin.write("go\n")
            process.stdin.flush()
            story = support.encode(engine, support.STORY)
            mine = [
                support.run(engine, story[i : i + 90], max_tokens=1, scope=support.scope("mine")).turn_id
                for i in range(30)
            ]
            theirs = wait_for(process.stdout, "stored").split()[1:]
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()

    assert len(theirs) == 30
    for turn_id in mine:
        support.wait_stored(catalog, turn_id)
    assert len(catalog.known_turns([*mine, *theirs])) == 60
    store = LocalStore(store_dir, host_bytes=0)
    try:
        assert [p for p in store.check() if "belongs to no chunk" not in p] == []
    finally:
        store.close()
