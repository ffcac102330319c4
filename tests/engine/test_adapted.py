"""Adapted reuse: moved chunks, checked against an independent assembly of the same KV in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def turns(engine: VllmEngine, catalog: Catalog) -> list[ChunkRecord]:
    """Two turns of two sessions, each computed at the start of its own sequence."""
    first = support.encode(engine, support.STORY)[:60]
    second = support.encode(engine, support.OTHER_STORY)[:45]
    one = support.capture(engine, catalog, first, scope=support.scope(session_id="one"))
    two = support.capture(engine, catalog, second, scope=support.scope(session_id="two"))
    return [*one, *two]


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(support.EXACTNESS_MODEL, dtype=torch.float32).eval()


def test_moved_chunks_answer_like_the_same_kv_assembled_in_transformers(
    engine: VllmEngine, turns: list[ChunkRecord], reference: torch.nn.Module
) -> None:
    order = [turns[1], turns[0]]  # never computed in this order
    fresh = support.encode(engine, support.QUESTION)
    prompt = support.tokens_of(order) + fresh
    plan = support.plan(order, fresh_start=len(prompt) - len(fresh))

    answer = support.run(engine, prompt, salt="swap", scope=support.scope(), store=False, plan=plan)

    # The first chunk stands where it was computed, only the second one moved.
    assert answer.reuse.exact == turns[1].num_tokens
    assert answer.reuse.adapted == turns[0].num_tokens
    assert answer.reuse.computed == len(fresh)
    expected = support.assembled_logprobs(reference, order, fresh, answer.token_ids)
    assert tuple(expected.argmax(-1).tolist()) == answer.token_ids
    worst = max(
        abs(value - expected[step, token].item())
        for step, logprobs in enumerate(answer.logprobs)
        for token, value in logprobs.items()
    )
    assert worst < 2e-4


def test_adapted_reuse_stays_near_full_recomputation(
    engine: VllmEngine, turns: list[ChunkRecord], record_property: pytest.RecordProperty
) -> None:
    order = [turns[1], turns[0]]
    fresh = support.encode(engine, support.QUESTION)
    prompt = support.tokens_of(order) + fresh
    plan = support.plan(order, fresh_start=len(prompt) - len(fresh))

    adapted = support.run(engine, prompt, salt="near", scope=support.scope(), store=False, plan=plan)
    computed = support.run(engine, prompt)

    agreed = next(
        (i for i, (a, b) in enumerate(zip(adapted.token_ids, computed.token_ids, strict=True)) if a != b),
        len(computed.token_ids),
    )
    first_step = max(
        abs(adapted.logprobs[0][t] - computed.logprobs[0][t])
        for t in adapted.logprobs[0].keys() & computed.logprobs[0].keys()
    )
    record_property("tokens_agreed_of_24", agreed)
    record_property("first_token_logprob_difference", round(first_step, 4))
    # The moved chunk never saw the one before it, so the two differ; they must not fall apart.
    assert adapted.token_ids[0] == computed.token_ids[0]
    assert first_step < 1.0


@pytest.mark.parametrize("shift", [1, 31, 32, 33, 200])
def test_a_chunk_lands_right_at_any_token_offset(
    engine: VllmEngine, catalog: Catalog, reference: torch.nn.Module, shift: int
) -> None:
    user = f"offset {shift}"
    scope = support.scope(user)
    story = support.encode(engine, support.STORY)
    lead = tuple((story * 2)[100 : 100 + shift])
    moved = support.capture(engine, catalog, story[:50], scope=scope)
    before = support.capture(engine, catalog, lead, scope=scope)
    fresh = support.encode(engine, support.QUESTION)
    prompt = lead + story[:50] + fresh
    plan = support.plan([*before, *moved], fresh_start=shift + 50)

    answer = support.run(engine, prompt, max_tokens=8, salt=user, scope=scope, store=False, plan=plan)

    assert (answer.reuse.exact, answer.reuse.adapted) == (shift, 50)
    # The lead is one sequence, however many chunks it was cut into.
    whole = [_joined(before), *moved]
    expected = support.assembled_logprobs(reference, whole, fresh, answer.token_ids)
    worst = max(
        abs(value - expected[step, token].item())
        for step, logprobs in enumerate(answer.logprobs)
        for token, value in logprobs.items()
    )
    assert worst < 2e-4


def _joined(chunks: Sequence[ChunkRecord]) -> ChunkRecord:
    return replace(chunks[0], token_ids=support.tokens_of(chunks))


def test_what_is_captured_behind_moved_chunks_is_not_taken_for_exact_text(
    engine: VllmEngine, catalog: Catalog, turns: list[ChunkRecord]
) -> None:
    order = [turns[1], turns[0]]
    fresh = support.encode(engine, "Lily saw a bird and")
    prompt = support.tokens_of(order) + fresh
    plan = support.plan(order, fresh_start=len(prompt) - len(fresh))

    behind = support.capture(engine, catalog, prompt, salt="behind moved", plan=plan)
    plain = support.capture(engine, catalog, prompt, content_start=len(prompt) - len(fresh))

    assert support.tokens_of(behind) == fresh
    assert behind[0].start == len(prompt) - len(fresh)
    assert {c.key for c in behind}.isdisjoint(c.key for c in plain)
    # Behind the same plan it is exact again.
    again = support.run(
        engine,
        (*prompt, *support.encode(engine, support.QUESTION)),
        salt="behind moved",
        scope=support.scope(),
        store=False,
        plan=support.plan([*order, *behind], fresh_start=len(prompt)),
    )
    assert again.reuse.exact == turns[1].num_tokens + len(fresh)
    assert again.reuse.adapted == turns[0].num_tokens
