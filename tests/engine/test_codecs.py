"""A store of fewer bytes on the real engine: answers as before, and never a word about exact reuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kv_agent.chunks import CodecName
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.manager import CacheManager
from kv_agent.memory import AgentMemory
from tests.engine import support

pytestmark = pytest.mark.engine

CODECS: list[CodecName] = ["int4+zstd", "raw+zstd"]
FACTS = [
    "Hugo Thomsen lives in Paris.",
    "The badge number of Lena Holm is 4271.",
    "Project Silent Comet is led by Hugo Thomsen.",
    "Otto Flores lives in Hanoi.",
]
QUESTIONS = {
    "Where does Hugo Thomsen live?": "Paris.",
    "What is the badge number of Lena Holm?": "4271.",
    "Who leads project Silent Comet?": "Hugo Thomsen.",
    "Where does Otto Flores live?": "Hanoi.",
}


@dataclass(frozen=True)
class Place:
    codec: CodecName
    engine: VllmEngine
    manager: CacheManager


@pytest.fixture(scope="module", params=CODECS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Nothing is kept in memory: every chunk that comes back was written and read by the codec."""
    store = tmp_path_factory.mktemp("store")
    settings = {"store": str(store), "codec": request.param, "host_bytes": 0, "warm_bytes": 0}
    # An engine with statistics would take the place of the shared one's in the process's registry.
    options = support.ENGINE_OPTIONS | {"disable_log_stats": True}
    engine = VllmEngine(support.RECALL_MODEL, settings, **options)
    with CacheManager(engine, store=store) as manager:
        yield Place(codec=request.param, engine=engine, manager=manager)


def test_answers_come_from_what_the_codec_wrote(place: Place) -> None:
    memory = AgentMemory(place.manager, user_id="alice")
    for fact in FACTS:
        memory.store(fact, "Noted.")

    answers = {question: memory.generate(question, store=False) for question in QUESTIONS}

    assert {question: answer.text for question, answer in answers.items()} == QUESTIONS
    assert {record.codec for record in place.manager.store.catalog.all_chunks()} == {place.codec}
    for answer in answers.values():
        assert answer.reuse.adapted > 0
        assert not answer.reuse.refused
        assert place.codec == "raw+zstd" or answer.reuse.exact == 0


def test_only_a_lossless_chunk_at_its_own_place_is_exact(place: Place) -> None:
    memory = AgentMemory(place.manager, user_id="bob")
    memory.store("Nina Okafor lives in Porto.", "Noted.")
    question = "Where does Nina Okafor live?"

    exact = memory.generate(question, 1, store=False, quality="exact")
    fast = memory.generate(question, 1, store=False)

    assert exact.text == fast.text == "Porto."
    is_lossless = place.codec == "raw+zstd"
    assert (exact.reuse.exact > 0, exact.reuse.adapted) == (is_lossless, 0)
    assert (fast.reuse.exact > 0, fast.reuse.adapted > 0) == (is_lossless, not is_lossless)


def test_what_was_quantised_does_not_reach_those_who_did_not_ask_for_it(place: Place) -> None:
    memory = AgentMemory(place.manager, user_id="carol")
    memory.store("Sven Chandra lives in Cairo. Tessa Novak lives in Turin.", "Noted.")
    question = "Where does Tessa Novak live?"
    prompt = (
        *place.manager.prompts.turn("Sven Chandra lives in Cairo. Tessa Novak lives in Turin.", "Noted."),
        *place.manager.prompts.fresh(question).token_ids,
    )
    memory.generate(question, 1, store=False)
    plain = support.run(place.engine, prompt, max_tokens=4, store=False)
    alone = support.run(place.engine, prompt, max_tokens=4, salt="alone", store=False)

    assert plain.reuse.exact == plain.reuse.adapted == 0
    assert plain.token_ids == alone.token_ids
    assert plain.logprobs == alone.logprobs
