"""Random requests of every kind on one small cache: what is computed in place never depends on the rest.

``KV_AGENT_RANDOM_ROUNDS=100`` makes it that many.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.base import Call
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine

USER = "random"
ROUNDS = int(os.environ.get("KV_AGENT_RANDOM_ROUNDS", "15"))


def chain_to(last: ChunkRecord, records: list[ChunkRecord]) -> list[ChunkRecord]:
    """The chunk with all chunks before it in its own sequence, first one first."""
    by_key = {record.key: record for record in records}
    chain = [last]
    while chain[0].parent in by_key:
        chain.insert(0, by_key[chain[0].parent])
    return chain


def random_call(rng: random.Random, text: tuple[int, ...], records: list[ChunkRecord]) -> Call:
    """Stored chunks as they were computed, or in any order and place, then a fresh turn."""
    tokens: list[int] = []
    placements = []
    chosen = rng.sample(records, min(len(records), rng.choice([0, 1, 2, 4])))
    as_computed = bool(chosen) and rng.random() < 0.4
    if as_computed:
        chosen = chain_to(chosen[0], records)
    for record in chosen:
        if rng.random() < 0.15 and not as_computed:
            tokens += text[: rng.randint(1, 20)]
        if len(tokens) + record.num_tokens > 600:
            break
        key = record.key if rng.random() < 0.95 else "0" * 32
        placements.append({"chunk_id": key, "start": len(tokens)})
        tokens += record.token_ids
    options: dict[str, object] = {"scope": support.scope(USER), "store": rng.random() < 0.5}
    if placements:
        options["plan"] = {"placements": placements, "fresh_start": len(tokens)}
    first = rng.randrange(len(text) - 5)
    tokens += text[first : first + rng.randint(1, 180)]
    return Call(
        token_ids=tuple(tokens),
        max_tokens=rng.choice([1, 8, 40, 150]),
        options=rng.choice([options, options, options, {"probe": {"start": 0}}, {}]),
        cache_salt=rng.choice([None, "one", "two", repr(placements)]),
        ignore_eos=True,
    )


def test_any_mixture_of_requests_is_served_and_counted_and_changes_no_plain_answer(
    engine: VllmEngine, catalog: Catalog, record_property: pytest.RecordProperty
) -> None:
    rng = random.Random(0)
    text = support.encode(engine, support.STORY + support.OTHER_STORY)
    tokens: Counter[str] = Counter()
    num_compared = num_exact = 0
    for _ in range(ROUNDS):
        records = [record for record in catalog.all_chunks() if record.user_id == USER]
        calls = [random_call(rng, text, records) for _ in range(rng.randint(1, 12))]
        if rng.random() < 0.1:
            engine.reset_prefix_cache()
        for call, done in zip(calls, engine.run(calls), strict=True):
            reuse = done.reuse
            tokens.update(
                exact=reuse.exact, adapted=reuse.adapted, local=reuse.local, computed=reuse.computed
            )
            assert len(done.token_ids) == call.max_tokens
            assert reuse.exact + reuse.adapted + reuse.local + reuse.computed == len(call.token_ids)
            if call.cache_salt is None:
                assert reuse.exact == reuse.adapted == 0
            if reuse.adapted == 0:  # then the answer is that of plain computing, however it came about
                num_compared += 1
                num_exact += reuse.exact > 0
                # A salt nobody else has: nothing is cached under it, every token is computed.
                alone = Call(
                    token_ids=call.token_ids,
                    max_tokens=call.max_tokens,
                    ignore_eos=True,
                    cache_salt=f"alone {num_compared}",
                )
                (computed,) = engine.run([alone])
                assert computed.reuse.computed == len(call.token_ids)
                assert done.token_ids == computed.token_ids
    assert min(tokens["exact"], tokens["adapted"], tokens["computed"]) > 0, "some kind of reuse never came up"
    assert num_exact >= 5, "hardly any answer rested on exact chunks alone"
    record_property("answers_compared_with_computing", num_compared)
    record_property("of_them_with_exact_chunks", num_exact)
    record_property("prompt_tokens", dict(tokens))
