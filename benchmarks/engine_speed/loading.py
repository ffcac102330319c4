"""What those who are being answered notice of others' memories that are loaded from disk meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.engine_speed.engines import SCOPE, Ask, BenchEngine, plan_of, random_tokens
from benchmarks.storage_speed.cold import drop
from benchmarks.storage_speed.timing import percentile, ratios, spread
from kv_agent.chunks import (
    ChunkRecord,
    Fingerprint,
    Scope,
    TurnId,
    TurnRecord,
    chain_key,
    content_key,
    root_key,
)
from kv_agent.storage.store import LocalStore, NewChunk

DECODING = 4
FRESH = 32
CHUNK_TOKENS = 128


def measure(
    model: Path, folder: Path, *, plans: int, memory_tokens: int, memories: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Gaps between tokens of some answers while so many plans come in, of ``memories`` different texts.

    Beside them the same prompts as hits of vLLM's own cache: what remains is the loading.
    """
    with ExitStack() as stack:
        settings = {"store": str(folder), "host_bytes": 0, "warm_bytes": 0}
        options = {"max_num_seqs": DECODING + 4}
        ours = stack.enter_context(closing(BenchEngine(model, settings, **options)))
        texts = [random_tokens(memory_tokens, seed=seed) for seed in range(memories)]
        probe = ours.ask(random_tokens(8, seed=1), scope=SCOPE, store=False)
        turns = _stored(folder, Fingerprint(probe.fields["fingerprint"]), texts)
        files = [folder / record.blob for records in turns for record in records]
        numbers = itertools.count(1_000_000)

        def loads() -> list[Ask]:
            asks = []
            for index in range(plans):
                text, records = texts[index % memories], turns[index % memories]
                prompt = [*text, *random_tokens(FRESH, seed=next(numbers))]
                asked = {"scope": SCOPE, "store": False, "plan": plan_of(records)}
                asks.append(Ask(token_ids=prompt, salt=str(next(numbers)), options=asked))
            return asks

        def hits() -> list[Ask]:
            return [
                Ask(token_ids=[*texts[0], *random_tokens(FRESH, seed=next(numbers))]) for _ in range(plans)
            ]

        gaps: dict[str, list[list[float]]] = {"hits": [], "loads": []}
        for _ in range(rounds):
            ours.run(hits()[:1], 1)  # computed, and in vLLM's cache from then on
            gaps["hits"].append(_gaps(ours, hits()))
            ours.forget_local()
            drop(dict.fromkeys(files))
            gaps["loads"].append(_gaps(ours, loads()))
            ours.forget_local()
    p99 = {name: [1e3 * percentile(one, 0.99) for one in found] for name, found in gaps.items()}
    p50 = {name: [1e3 * percentile(one, 0.50) for one in found] for name, found in gaps.items()}
    mean = {name: [1e3 * fmean(one) for one in found] for name, found in gaps.items()}
    yield {
        "part": "loading",
        "case": f"{plans} plans of {memory_tokens} tokens, {DECODING} answers going on",
        "mean_ms": {name: spread(values, 1) for name, values in mean.items()},
        "p50_ms": {name: spread(values, 1) for name, values in p50.items()},
        "p99_ms": {name: spread(values, 1) for name, values in p99.items()},
        "p99_of_hits": ratios(p99["loads"], p99["hits"]),
    }


def _gaps(engine: BenchEngine, others: Sequence[Ask]) -> list[float]:
    """Seconds between tokens of the answers that go on while the ``others`` are asked."""
    long = [
        Ask(token_ids=random_tokens(64, seed=seed), max_tokens=3 * len(others)) for seed in range(DECODING)
    ]
    answers = engine.run([*long, *others], DECODING + 4)
    over = max(answer.ends_s for answer in answers[DECODING:])
    return [
        after - before
        for answer in answers[:DECODING]
        for before, after in itertools.pairwise(answer.arrivals_s)
        if before + answer.began_s < over
    ]


def _stored(
    folder: Path, fingerprint: Fingerprint, texts: Sequence[Sequence[int]]
) -> list[list[ChunkRecord]]:
    """Turns of these texts with KV of the model's shape, whatever numbers are in it."""
    scope = Scope(**SCOPE)
    store = LocalStore(folder, host_bytes=0)
    found = []
    for number, text in enumerate(texts):
        parent, chunks = root_key(fingerprint, scope.namespace, scope.user_id), []
        for start in range(0, len(text), CHUNK_TOKENS):
            part = tuple(text[start : start + CHUNK_TOKENS])
            key = chain_key(parent, part)
            kv_L2THD = torch.randn(24, 2, len(part), 2, 64).to(torch.bfloat16)
            chunks.append(
                NewChunk(
                    key=key,
                    content_key=content_key(fingerprint, part),
                    parent=parent,
                    start=start,
                    token_ids=part,
                    kv=kv_L2THD,
                    vector=None,
                    sketch=None,
                )
            )
            parent = key
        turn = TurnRecord(
            turn_id=TurnId(f"stored-{number}"),
            scope=scope,
            fingerprint=fingerprint,
            chunk_keys=tuple(chunk.key for chunk in chunks),
            num_tokens=len(text),
            text="",
            created=float(number),
            metadata={},
        )
        store.put_turn(turn, [], chunks)
        records = store.catalog.chunks([chunk.key for chunk in chunks])
        found.append([records[chunk.key] for chunk in chunks])
    store.close()
    return found
