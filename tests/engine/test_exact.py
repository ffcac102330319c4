"""Exact reuse: what comes back is bit-identical to what was there."""

from __future__ import annotations

import pytest

from kv_agent.chunking import cut_lengths
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support
from tests.engine.conftest import FirstLife, resume

pytestmark = pytest.mark.engine


def test_resume_after_a_restart_equals_the_run_before_it(first_life: FirstLife, engine: VllmEngine) -> None:
    again = resume(engine, first_life.conversation, first_life.chunks, "second")

    assert again.reuse.exact == len(support.tokens_of(first_life.chunks))
    assert again.reuse.adapted == again.reuse.local == 0
    assert not again.reuse.refused
    assert again.token_ids == first_life.resumed.token_ids
    assert again.logprobs == first_life.resumed.logprobs


def test_injected_blocks_are_bit_identical_to_a_local_prefix_cache_hit(
    first_life: FirstLife, engine: VllmEngine
) -> None:
    hit = first_life.local_hit.reuse.local
    aligned = [c for c in first_life.chunks if c.start + c.num_tokens <= hit]
    assert len(support.tokens_of(aligned)) == hit > 0

    again = resume(engine, first_life.conversation, aligned, "second aligned")

    assert again.reuse.exact == hit
    for injected in (first_life.aligned, again):
        assert injected.token_ids == first_life.local_hit.token_ids
        assert injected.logprobs == first_life.local_hit.logprobs


def test_all_chunks_but_the_last_token_are_stored(first_life: FirstLife) -> None:
    stored = support.tokens_of(first_life.chunks)

    # The last sampled token was never fed back, so it has no KV; behind it stands the question.
    assert stored == first_life.conversation[: len(stored)]
    turns = (stored[:128], stored[128:])
    lengths = [length for turn in turns for length in cut_lengths(turn, support.CHUNK)]
    assert [chunk.num_tokens for chunk in first_life.chunks] == lengths


def test_the_same_plan_again_hits_the_local_cache_and_says_so(
    first_life: FirstLife, engine: VllmEngine
) -> None:
    one = resume(engine, first_life.conversation, first_life.chunks, "twice")
    two = resume(engine, first_life.conversation, first_life.chunks, "twice")

    assert two.token_ids == one.token_ids
    assert two.reuse.exact == one.reuse.exact
    assert two.reuse.chunk_ids == one.reuse.chunk_ids


def test_what_is_in_memory_is_put_back_bit_by_bit_each_time(
    first_life: FirstLife, engine: VllmEngine
) -> None:
    """The first time it comes from disk; then it is in memory, and the step that computes puts it back."""
    for number in range(4):
        again = resume(engine, first_life.conversation, first_life.chunks, f"in memory {number}")
        assert again.reuse.exact == len(support.tokens_of(first_life.chunks))
        assert again.token_ids == first_life.resumed.token_ids
        assert again.logprobs == first_life.resumed.logprobs


def test_a_conversation_that_goes_on_stores_only_its_new_tokens(
    first_life: FirstLife, engine: VllmEngine, catalog: Catalog
) -> None:
    known = len(support.tokens_of(first_life.chunks))

    new = support.capture(engine, catalog, first_life.conversation)

    assert new[0].parent == first_life.chunks[-1].key
    assert new[0].start == known
    assert support.tokens_of(new) == first_life.conversation[known:]


def test_storing_the_same_turn_twice_keeps_one_blob(engine: VllmEngine, catalog: Catalog) -> None:
    token_ids = support.encode(engine, "A cat and a dog sat in the sun.")
    chunks = support.capture(engine, catalog, token_ids, content_start=0)
    before = catalog.stats()

    again = support.capture(engine, catalog, token_ids, content_start=0)

    assert again == chunks
    assert catalog.stats() == before


def test_a_request_without_scope_or_with_store_off_is_not_captured(engine: VllmEngine) -> None:
    token_ids = support.encode(engine, "Nobody will remember this.")

    assert support.run(engine, token_ids, max_tokens=2).turn_id is None
    assert support.run(engine, token_ids, max_tokens=2, scope=support.scope(), store=False).turn_id is None
