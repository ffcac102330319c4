"""How memories are found: by every mode, with neighbours, by an embedder and by the model's own keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kv_agent import AgentMemory, CacheManager, ConfigError
from kv_agent.engines.base import Call
from kv_agent.retrieval.sketches import from_sketch
from tests.engine import support
from tests.engine.memory.shared import REPLY, SharedEngine

pytestmark = pytest.mark.engine


def test_a_probe_returns_the_models_own_keys(manager: CacheManager) -> None:
    token_ids = manager.prompts.fresh("Where does Mara Dubois live?").token_ids
    start, end = 2, len(token_ids) - 1
    completion = manager.run(
        Call(
            token_ids=token_ids,
            max_tokens=2,
            ignore_eos=True,
            options={"probe": {"start": start, "end": end}},
        )
    )

    model = AutoModelForCausalLM.from_pretrained(support.RECALL_MODEL, dtype=torch.float32).eval()
    keys: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    # What RoPE is applied to.
    last = getattr(attention, "k_norm", attention.k_proj)
    hook = last.register_forward_hook(lambda _m, _i, out: keys.append(out[0].flatten(1)))
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    hook.remove()
    (expected,) = (layer_keys[start:end] for layer_keys in keys)
    assert completion.probe is not None
    probe = torch.tensor(from_sketch(completion.probe))
    rounding = expected.abs().amax(1, keepdim=True) / 127
    assert ((probe - expected).abs() <= 0.51 * rounding + 2e-4).all()
    assert completion.turn_id is None


def test_every_mode_finds_the_fact_among_others_and_says_how(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="modes")
    facts = {
        "Mara Dubois": "Mara Dubois lives in Oslo.",
        "Noor Petrov": "Noor Petrov wears badge 4711.",
        "Noble Raven": "Project Noble Raven takes place in Lisbon.",
        "Ida Castillo": "The favorite food of Ida Castillo is soup.",
    }
    for fact in facts.values():
        memory.store(fact, REPLY)

    for mode in ("latent", "lexical", "hybrid"):
        for name, fact in facts.items():
            best, *others = memory.retrieve(f"What about {name}?", top_k=4, mode=mode, explain=True)  # type: ignore[arg-type]
            assert fact in best.text, (mode, name)
            assert set(best.voices) == ({"latent", "lexical"} if mode == "hybrid" else {mode})
            assert all(voice.rank == 1 for voice in best.voices.values())
            assert all(other.score <= best.score for other in others)
    assert memory.retrieve("What about Noor?")[0].voices == {}


def test_neighbours_come_behind_what_was_found_within_what_may_be_read(manager: CacheManager) -> None:
    one = AgentMemory(manager, user_id="beside", agent_id="one", session_id="s")
    two = AgentMemory(manager, user_id="beside", agent_id="two", session_id="s")
    said = ["The weather is fine.", "Mara Dubois lives in Oslo.", "Now something else.", "And good bye."]
    for number, text in enumerate(said):
        (two if number == 2 else one).store(text, REPLY)

    def found(memory: AgentMemory, **options: Any) -> list[tuple[str, bool]]:
        memories = memory.retrieve("Where does Mara Dubois live?", top_k=1, **options)
        texts = [next(text for text in said if text in memory.text) for memory in memories]
        return [(text, memory.neighbour_of is None) for text, memory in zip(texts, memories, strict=True)]

    assert found(one) == [(said[1], True)]
    assert found(one, neighbours=1) == [(said[1], True), (said[0], False), (said[2], False)]
    assert [text for text, _ in found(one, neighbours=9)] == [said[1], said[0], said[2], said[3]]
    alone = AgentMemory(manager, user_id="beside", agent_id="one", session_id="s", share="agent")
    assert [text for text, _ in found(alone, neighbours=9)] == [said[1], said[0], said[3]]
    answer = one.generate("Where does Mara Dubois live?", top_k=1, neighbours=1, max_tokens=4, store=False)
    assert len(answer.memories) == 3
    assert answer.reuse.exact + answer.reuse.adapted == sum(memory.tokens for memory in answer.memories)
    with pytest.raises(ConfigError, match="neighbours"):
        one.retrieve("Where?", neighbours=-1)


class Synonyms:
    """A text embedder of two topics."""

    name = "test/synonyms 1"

    def encode(self, sentences: list[str], /) -> list[list[float]]:
        topics = (("live", "lives", "house", "dwelling"), ("eat", "food", "soup"))
        return [
            [float(any(word in re.findall("[a-z]+", text.lower()) for word in topic)) for topic in topics]
            for text in sentences
        ]


def test_an_embedder_is_a_third_voice_of_hybrid_searches(recall_engine: SharedEngine, store: Path) -> None:
    with CacheManager(recall_engine, store=store, embedder=Synonyms()) as manager:
        memory = AgentMemory(manager, user_id="synonyms", namespace="synonyms")
        memory.store("Mara Dubois lives in Oslo.", REPLY)
        memory.store("The favorite food of Ida Castillo is soup.", REPLY)
        found = memory.retrieve("Whose dwelling?", top_k=2, explain=True)
        assert {("Oslo" in one.text): one.voices["embedding"].rank for one in found} == {True: 1, False: 2}
    assert len(list((store / "index").glob("texts-*/*.safetensors"))) == 1


def test_an_empty_query_finds_nothing_and_is_answered_without_memories(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="empty")
    memory.store("Mara Dubois lives in Oslo.", REPLY)
    assert memory.retrieve("  ") == []
    assert memory.generate(" ", max_tokens=2, store=False).memories == ()
