"""Prompts made ready for the engine, against its own check of a plan: all of it is placed, in its place."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Scope, TurnRecord
from kv_agent.engines.base import Call
from kv_agent.placing import Quality
from kv_agent.planning import MemoryPrompt, build_prompt
from kv_agent.recognition import SHORTEST_STRETCH
from kv_agent.repair import stretches_of
from kv_agent.storage.catalog import Catalog
from tests.unit.placed_prompts import CHUNK_TOKENS, OPENING, World
from tests.unit.vllm_plugin.builders import ROOT, SCOPE


@contextmanager
def empty_world() -> Iterator[World]:
    with TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder) / "catalog.sqlite3")
        yield World(catalog=catalog)
        catalog.close()


@pytest.fixture
def world() -> Iterator[World]:
    with empty_world() as world:
        yield world


def text(seed: int, size: int) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=size)


def asked(world: World, fresh: list[int], memories: list[list[int]] | None = None) -> MemoryPrompt:
    """A prompt with these memories, computed elsewhere, in front of the fresh turn."""
    turns = [world.remember(one, start=0) for one in memories or []]
    keys = [key for turn in turns for key in turn.chunk_keys]
    return build_prompt(
        [],
        turns,
        world.catalog.chunks(keys),
        tuple(fresh),
        max_prompt_tokens=10_000,
    )


def placed(world: World, prompt: MemoryPrompt, quality: Quality = "fast") -> MemoryPrompt:
    return world.placer.placed(prompt, SCOPE, SCOPE, quality)


def test_a_document_behind_another_beginning_is_put_back(world: World) -> None:
    document = text(1, 400)
    world.remember([*text(2, 9), *document, *text(3, 5)])

    prompt = placed(world, asked(world, [*text(4, 21), *document, *text(5, 12)]))

    plan = world.check(prompt)
    moved = sum(one.end - one.start for one in plan.placed if not one.exact)
    assert plan.refused == ()
    assert plan.reach(0) == prompt.known_end
    assert moved >= 400 - 3 * CHUNK_TOKENS
    assert len(world.rungs) == 1


def test_new_text_between_two_documents_is_computed_in_its_place(world: World) -> None:
    one, other = text(1, 300), text(2, 300)
    world.remember(one)
    world.remember([*text(3, 30), *other])

    fresh = [*text(4, 10), *other, *text(5, 50), *one, *text(6, 10)]
    prompt = placed(world, asked(world, fresh))

    plan = world.check(prompt)
    assert plan.refused == ()
    assert plan.reach(0) == prompt.known_end
    assert len(world.rungs) == 2
    assert sum(one.end - one.start for one in plan.placed if not one.exact) >= 600 - 6 * CHUNK_TOKENS
    exact = [chunk for chunk in plan.placed if chunk.exact]
    assert exact[0].start == 0  # what was computed at the beginning of this prompt
    assert [token for chunk in plan.placed for token in chunk.record.token_ids] == fresh[: prompt.known_end]

    before = len(world.rungs)
    assert placed(world, asked(world, fresh)) == prompt
    assert len(world.rungs) == before  # the same prompt again needs none


def test_a_word_put_into_a_document_costs_the_chunks_around_it_only(world: World) -> None:
    document = text(1, 600)
    world.remember(document)
    prompt = placed(world, asked(world, [*document[:300], 7, *document[300:], *text(2, 8)]))
    plan = world.check(prompt)
    assert plan.refused == ()
    assert sum(chunk.end - chunk.start for chunk in plan.placed) == plan.reach(0)
    moved = sum(chunk.end - chunk.start for chunk in plan.placed if not chunk.exact)
    begins = sum(chunk.end - chunk.start for chunk in plan.placed if chunk.exact)
    assert begins >= 300 - 2 * CHUNK_TOKENS  # it stands where it was computed
    assert moved >= 300 - 4 * CHUNK_TOKENS


@pytest.mark.parametrize("size", [8, SHORTEST_STRETCH - CHUNK_TOKENS])
def test_short_known_text_is_not_worth_a_request(world: World, size: int) -> None:
    document = text(1, size)
    world.remember(document)
    prompt = asked(world, [*text(2, 200), *document, *text(3, 9)])
    assert placed(world, prompt) == prompt
    assert world.rungs == []


def test_what_another_user_or_session_said_is_not_recognised(world: World) -> None:
    document = text(1, 400)
    world.remember(document, scope=Scope(namespace="team", user_id="ann", session_id="there"))
    prompt = asked(world, [*text(2, 9), *document, *text(3, 9)])
    here = Scope(namespace="team", user_id="ann", session_id="here")
    assert world.placer.placed(prompt, here, here, "fast") == prompt
    other = Scope(namespace="team", user_id="bob")
    assert world.placer.placed(prompt, other, other, "fast") == prompt
    elsewhere = Scope(namespace="other", user_id="ann")
    assert world.placer.placed(prompt, elsewhere, elsewhere, "fast") == prompt
    assert placed(world, prompt).known_end > 0


def test_exact_quality_recognises_nothing_that_would_be_moved(world: World) -> None:
    document = text(1, 400)
    world.remember(document)
    prompt = placed(world, asked(world, [*text(2, 9), *document, *text(3, 9)]), "exact")
    assert prompt.placements == ()
    assert world.rungs == []


def three_memories(world: World) -> tuple[list[TurnRecord], MemoryPrompt]:
    """Two that began a sequence and one that did not, 22 tokens each, in this order."""
    texts = [[*OPENING, *text(seed, 20)] for seed in (1, 2, 3)]
    turns = [world.remember(one, start=start) for one, start in zip(texts, (0, 0, 9), strict=True)]
    keys = [key for turn in turns for key in turn.chunk_keys]
    fresh = tuple(text(4, 9))
    return turns, build_prompt([], turns, world.catalog.chunks(keys), fresh, max_prompt_tokens=1000)


def stands(world: World, prompt: MemoryPrompt) -> list[tuple[str, int, int]]:
    plan = world.check(prompt)
    assert plan.refused == ()
    return [(chunk.record.key, chunk.start, chunk.skip) for chunk in plan.placed]


def test_what_began_a_sequence_and_is_moved_gets_another_opening(world: World) -> None:
    opening = world.store_opening()
    turns, prompt = three_memories(world)
    first, second, third = (turn.chunk_keys[0] for turn in turns)

    found = stands(world, placed(world, prompt))

    assert (first, 0, 0) in found  # exact where it is
    assert (opening.key, 22, 0) in found
    assert (second, 24, 2) in found
    assert (third, 44, 0) in found  # it never began a sequence
    assert world.check(placed(world, prompt)).reach(0) == prompt.fresh_start
    assert world.rungs == []


def test_links_come_before_openings(world: World) -> None:
    opening = world.store_opening()
    turns, prompt = three_memories(world)
    found = stands(world, placed(world, prompt, "balanced"))
    assert opening.key not in [key for key, _, _ in found]
    assert (turns[1].chunk_keys[0], 24, 2) in found
    assert len(world.rungs) == 2


def test_without_a_stored_opening_memories_are_put_back_as_they_are(world: World) -> None:
    turns, prompt = three_memories(world)
    found = stands(world, placed(world, prompt))
    assert [(turn.chunk_keys[0], 22 * number, 0) in found for number, turn in enumerate(turns)] == [True] * 3


def test_rungs_of_several_prompts_are_in_the_engine_together(world: World) -> None:
    """A server's engine computes them in one batch; here none goes on before all are there."""
    documents = [text(seed, 400) for seed in range(4)]
    for document in documents:
        world.remember([*text(9, 9), *document])
    prompts = [asked(world, [*text(8, 21), *document, *text(7, 12)]) for document in documents]
    all_there, one_at_a_time = threading.Barrier(len(prompts), timeout=30), threading.Lock()

    def run(call: Call) -> None:
        all_there.wait()
        with one_at_a_time:
            world.run(call)

    placer = replace(world.placer, run=run)
    with ThreadPoolExecutor(len(prompts)) as threads:
        ready = list(threads.map(lambda prompt: placer.placed(prompt, SCOPE, SCOPE, "fast"), prompts))

    assert len(world.rungs) == len(prompts)
    assert all(world.check(prompt).reach(0) == prompt.known_end for prompt in ready)


def test_a_rung_that_fails_leaves_a_plan_that_holds(world: World) -> None:
    one, other = text(1, 300), text(2, 300)
    world.remember(one)
    world.remember(other)
    world.fails_at = 1
    prompt = placed(world, asked(world, [*text(4, 10), *one, *text(5, 50), *other, *text(6, 10)]))
    plan = world.check(prompt)
    assert plan.refused == ()
    assert 200 < plan.reach(0) < 320
    assert len(world.rungs) == 2


def test_a_memory_forgotten_meanwhile_is_left_to_the_engine(world: World) -> None:
    prompt = asked(world, text(1, 9), [text(2, 40)])
    world.catalog.forget([turn.turn_id for turn in prompt.turns])
    assert placed(world, prompt, "balanced") == prompt


@given(
    sizes=st.lists(st.integers(1, 120), max_size=4),
    documents=st.lists(st.integers(20, 250), max_size=3),
    gaps=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    quality=st.sampled_from(["fast", "balanced"]),
)
@settings(max_examples=60, deadline=None)
def test_every_prompt_becomes_a_plan_without_a_hole(
    sizes: list[int], documents: list[int], gaps: list[int], quality: Quality
) -> None:
    with empty_world() as world:
        fresh: list[int] = []
        for number, size in enumerate(documents):
            document = text(100 + number, size)
            world.remember([*text(200 + number, 5), *document])
            fresh += [*text(300 + number, gaps[number]), *document]
        fresh += text(400, gaps[3] + 2)
        before = asked(world, fresh, [text(500 + number, size) for number, size in enumerate(sizes)])

        prompt = placed(world, before, quality)

        assert (prompt.token_ids, prompt.fresh_start) == (before.token_ids, before.fresh_start)
        plan = world.check(prompt)
        assert plan.refused == ()
        assert plan.reach(0) == max(prompt.fresh_start, prompt.known_end)
        # Computed in their place are links and gaps only, and links are a tenth at most.
        computed = [chunk for chunk in plan.placed if chunk.context != ROOT and chunk.exact]
        assert all(chunk.record.start == chunk.start for chunk in computed)
        links = sum(chunk.skip for chunk in plan.placed)
        assert links <= sum(chunk.end - chunk.start for chunk in plan.placed) / 10
        chunks = world.catalog.chunks([one.key for one in before.placements])
        skipped = {chunk.record.key: chunk.skip for chunk in plan.placed}
        for stretch in stretches_of(before, chunks):
            is_exact = stretch.start == 0  # only the first stands where it was computed
            assert skipped[stretch.placed[0].key] == (
                stretch.link_tokens if quality == "balanced" and not is_exact else 0
            )
        # The same prompt again finds all of it.
        num_rungs = len(world.rungs)
        assert placed(world, before, quality) == prompt
        assert len(world.rungs) == num_rungs
