"""The Python interface on the bundled model: store, find, answer, forget."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kv_agent import AgentMemory, CacheManager, ConfigError, KVAgentError, Scope
from kv_agent.chunks import Fingerprint
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.retrieval.sketches import from_sketch
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine

REPLY = "I will remember that."


class SharedEngine:
    """The one engine of this module, given to several managers: closing a manager must not end it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.closed = 0

    @property
    def fingerprint(self) -> Fingerprint:
        return self._engine.fingerprint

    @property
    def tokenizer(self) -> object:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        return self._engine.run(calls)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def recall_engine(store: Path) -> Iterator[SharedEngine]:
    engine = VllmEngine(support.RECALL_MODEL, {"store": str(store)}, dtype="float32", max_model_len=1024)
    yield SharedEngine(engine)
    engine.close()


@pytest.fixture(scope="module")
def manager(recall_engine: SharedEngine, store: Path) -> Iterator[CacheManager]:
    with CacheManager(recall_engine, store=store) as manager:
        yield manager


def test_a_stored_turn_is_found_at_once_with_everything_about_it(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="alice", agent_id="helper", session_id="monday")
    turn_id = memory.store("Mara Dubois lives in Oslo.", REPLY, metadata={"source": "chat"})

    (hit,) = memory.retrieve("Where does Mara Dubois live?", top_k=5)

    assert hit.id == turn_id
    assert hit.text == f"Mara Dubois lives in Oslo.\n{REPLY}"
    assert hit.scope == Scope(user_id="alice", agent_id="helper", session_id="monday")
    assert hit.metadata == {"source": "chat"}
    assert hit.tokens == len(manager.prompts.turn("Mara Dubois lives in Oslo.", REPLY))
    assert len(hit.chunk_ids) == 1
    assert memory.get(hit.id) is not None
    assert [m.id for m in memory.list()] == [hit.id]


def test_memory_turns_a_wrong_answer_into_the_right_one(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="bob")
    question = "What pet does Rosa Bishop have?"
    before = memory.generate(question, max_tokens=8, store=False)
    memory.store("Hugo Thomsen works as a pilot.", REPLY)
    memory.store("Rosa Bishop has a parrot at home.", REPLY)

    after = memory.generate(question, max_tokens=8, store=False)

    assert "parrot" not in before.text
    assert before.reuse.exact == before.reuse.adapted == 0
    assert after.text == "parrot."
    assert {m.text.split("\n")[0] for m in after.memories} == {
        "Hugo Thomsen works as a pilot.",
        "Rosa Bishop has a parrot at home.",
    }
    assert after.reuse.exact + after.reuse.adapted == sum(m.tokens for m in after.memories)
    assert after.reuse.computed == len(manager.prompts.fresh(question).token_ids)
    assert after.reuse.chunk_ids == tuple(key for m in after.memories for key in m.chunk_ids)
    assert not after.reuse.refused


def test_moved_memories_answer_like_the_same_text_computed(
    manager: CacheManager, record_property: pytest.RecordProperty
) -> None:
    memory = AgentMemory(manager, user_id="trent")
    people = [
        "Mara Dubois",
        "Kofi Atwood",
        "Tamar Vogel",
        "Emil Fenwick",
        "Yusuf Khan",
        "Nils Roth",
        "Dorian Adler",
        "Gustav Weber",
        "Hugo Thomsen",
        "Vera Khan",
        "Carla Porter",
        "Otto Flores",
    ]
    cities = [
        "Oslo",
        "Kyoto",
        "Lima",
        "Quito",
        "Rome",
        "Delhi",
        "Dakar",
        "Leeds",
        "Paris",
        "Seoul",
        "Hanoi",
        "Riga",
    ]
    for person, city in zip(people, cities, strict=True):
        memory.store(f"{person} lives in {city}.", REPLY)

    same = 0
    for person in people:
        question = f"Where does {person} live?"
        answer = memory.generate(question, top_k=3, max_tokens=8, store=False)
        records = manager.chunk_records([key for m in answer.memories for key in m.chunk_ids])
        text = [token for m in answer.memories for key in m.chunk_ids for token in records[key].token_ids]
        fresh = manager.prompts.fresh(question).token_ids
        computed = manager.run(Call(token_ids=(*text, *fresh), max_tokens=8, cache_salt=question))
        assert answer.reuse.adapted > 0
        assert computed.reuse.computed == len(text) + len(fresh)
        same += answer.text == computed.text.strip()

    record_property("same_answers_of_12", same)
    assert same >= 10


def test_users_and_namespaces_never_see_each_other(manager: CacheManager) -> None:
    AgentMemory(manager, user_id="carol").store("Project Silent Titan takes place in Lake Eden.", REPLY)
    question = "Where does project Silent Titan take place?"

    for other in (
        AgentMemory(manager, user_id="dave"),
        AgentMemory(manager, user_id="carol", namespace="elsewhere"),
    ):
        assert other.retrieve(question) == []
        assert other.list() == []
        assert "Eden" not in other.generate(question, max_tokens=8, store=False).text


def test_share_says_how_far_a_memory_reads(manager: CacheManager) -> None:
    scope = {"user_id": "erin"}
    AgentMemory(manager, agent_id="one", session_id="a", **scope).store("Vera Khan lives in Boston.", REPLY)
    AgentMemory(manager, agent_id="two", session_id="b", **scope).store("Kofi Atwood lives in Riga.", REPLY)

    def seen(**options: str) -> set[str]:
        memory = AgentMemory(manager, **scope, **options)
        return {m.text.split("\n")[0] for m in memory.retrieve("Who lives where?")}

    both = {"Vera Khan lives in Boston.", "Kofi Atwood lives in Riga."}
    assert seen(agent_id="three") == both
    assert seen(agent_id="one", share="agent") == {"Vera Khan lives in Boston."}
    assert seen(agent_id="two", session_id="b", share="session") == {"Kofi Atwood lives in Riga."}
    assert seen(agent_id="two", session_id="c", share="session") == set()
    with pytest.raises(ConfigError, match="needs agent_id"):
        AgentMemory(manager, share="agent")


def test_storing_the_same_turn_twice_is_one_memory(manager: CacheManager, store: Path) -> None:
    memory = AgentMemory(manager, user_id="frank")
    memory.store("Zoe Nagy has a goat at home.", REPLY)
    manager.wait_durable()
    blobs = set(store.glob("blobs/*/*"))

    memory.store("Zoe Nagy has a goat at home.", REPLY)

    assert len(memory.list()) == 1
    assert set(store.glob("blobs/*/*")) == blobs


def test_what_is_forgotten_is_gone_from_answers_and_disk(manager: CacheManager, store: Path) -> None:
    memory = AgentMemory(manager, user_id="grace")
    memory.store("Lena Holm loves to eat mango.", REPLY)
    question = "What does Lena Holm love to eat?"
    assert memory.generate(question, max_tokens=8, store=False).text == "mango."
    (found,) = memory.list()
    blob = store / manager.chunk_records(found.chunk_ids)[found.chunk_ids[0]].blob
    assert blob.exists()

    assert AgentMemory(manager, user_id="heidi").forget([found.id]) == 0
    assert memory.forget([found.id]) == 1

    assert not blob.exists()
    assert memory.list() == memory.retrieve(question) == []
    assert "mango" not in memory.generate(question, max_tokens=8, store=False).text


def test_a_question_and_its_answer_become_a_memory_by_default(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="ivan")
    memory.store("Emil Fenwick lives in Quito.", REPLY)

    answer = memory.generate("Where does Emil Fenwick live?", max_tokens=8)

    assert answer.text == "Quito."
    assert answer.turn_id is not None
    newest = memory.list()[0]
    assert newest.id == answer.turn_id
    assert newest.text == "Where does Emil Fenwick live?\nQuito."


def test_a_system_prompt_is_stored_once_placed_exactly_and_never_found(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="judy", system_prompt="Be brief.")
    memory.store("Omar Reyes works as a chemist.", REPLY)
    memory.store("Tamar Vogel works as a judge.", REPLY)

    answer = memory.generate("What does Omar Reyes do for work?", top_k=2, max_tokens=8, store=False)

    prefix = len(manager.prompts.prefix("Be brief."))
    assert prefix > 0
    # The first memory was computed right behind the prefix, the second one has to move.
    assert answer.reuse.exact == prefix + answer.memories[0].tokens
    assert answer.reuse.adapted == answer.memories[1].tokens
    assert len(answer.reuse.chunk_ids) == 3
    assert [m.text for m in memory.list() if "Be brief" in m.text] == []


def test_a_system_prompt_longer_than_a_chunk_is_placed_chunk_by_chunk(manager: CacheManager) -> None:
    system_prompt = "Be brief. " * 60
    memory = AgentMemory(manager, user_id="sybil", system_prompt=system_prompt)
    memory.store("Yara Lopez has a duck at home.", REPLY)

    answer = memory.generate("What pet does Yara Lopez have?", max_tokens=8, store=False)

    prefix = len(manager.prompts.prefix(system_prompt))
    assert prefix > 256
    assert not answer.reuse.refused
    assert answer.reuse.exact == prefix + answer.memories[0].tokens
    assert len(answer.reuse.chunk_ids) == -(-prefix // 256) + 1


def test_a_new_manager_on_the_same_store_finds_what_the_old_one_stored(
    recall_engine: SharedEngine, store: Path
) -> None:
    with CacheManager(recall_engine, store=store) as first:
        memory = AgentMemory(first, user_id="ken")
        memory.store("Project Noble Raven takes place in Fort Dover.", REPLY)
        assert len(memory.retrieve("Where does project Noble Raven take place?")) == 1
    assert list(store.glob("index/*")), "closing leaves a snapshot of the index"

    with CacheManager(recall_engine, store=store) as second:
        answer = AgentMemory(second, user_id="ken").generate(
            "Where does project Noble Raven take place?", max_tokens=8, store=False
        )

    assert answer.text == "Fort Dover."


def test_closing_waits_until_everything_is_on_disk(recall_engine: SharedEngine, store: Path) -> None:
    manager = CacheManager(recall_engine, store=store)
    turn_ids = [manager.store_kv(f"Note number {i}.", "Okay.", scope=Scope(user_id="leo")) for i in range(20)]
    closed = recall_engine.closed

    manager.close()
    manager.close()

    assert recall_engine.closed == closed + 1
    catalog = Catalog(store / "catalog.sqlite3")
    assert catalog.known_turns([t for t in turn_ids if t is not None]) == set(turn_ids)
    catalog.close()
    with pytest.raises(KVAgentError, match="closed"):
        manager.store_kv("too", "late")


def test_store_kv_without_a_scope_needs_to_know_the_user(recall_engine: SharedEngine, store: Path) -> None:
    with CacheManager(recall_engine, store=store) as manager:
        mine = AgentMemory(manager, user_id="mallory")
        manager.store_kv("Pia Russo lives in Hanoi.", REPLY)
        assert [m.text.split("\n")[0] for m in mine.list()] == ["Pia Russo lives in Hanoi."]
        AgentMemory(manager, user_id="niaj")
        with pytest.raises(ConfigError, match="several users"):
            manager.store_kv("Whose is this?", "Nobody knows.")


def test_texts_that_do_not_fit_the_model_are_refused_with_the_numbers(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="olivia")
    long = "word " * 2000

    with pytest.raises(ConfigError, match=r"the turn needs \d+ tokens, the model takes 1024"):
        memory.store(long)
    with pytest.raises(ConfigError, match="the query needs"):
        memory.retrieve(long)
    with pytest.raises(ConfigError, match="the query with its answer needs"):
        memory.generate("Short?", max_tokens=2000)
    with pytest.raises(ConfigError, match="top_k must be >= 1"):
        memory.retrieve("Short?", top_k=0)


def test_memories_that_do_not_fit_are_left_out_worst_first(manager: CacheManager) -> None:
    memory = AgentMemory(manager, user_id="peggy")
    for index in range(12):
        memory.store("Rafi likes the number " + " ".join(["nine"] * 40) + f" {index}.", REPLY)

    answer = memory.generate("What does Rafi like?", top_k=12, max_tokens=300, store=False)

    assert 0 < len(answer.memories) < 12
    assert answer.reuse.exact + answer.reuse.adapted == sum(m.tokens for m in answer.memories)


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


def test_the_quick_start_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (support.REPOSITORY / "README.md").read_text()
    match = re.search(r"```python\n(from kv_agent import AgentMemory.*?)```", readme, re.DOTALL)
    assert match is not None
    script = tmp_path / "quickstart.py"  # a plain script, without any __main__ guard
    script.write_text(match.group(1))
    env = os.environ | {"KV_AGENT_STORE": str(tmp_path / "store")}

    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "Oslo." in done.stdout
    assert (tmp_path / "store" / "catalog.sqlite3").exists()


def test_an_unknown_engine_name_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='engine must be "vllm" or an engine object'):
        CacheManager("vlm", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_backend_gpu_without_a_gpu_is_a_clear_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match='backend="gpu" needs a CUDA GPU'):
        AgentMemory(backend="gpu", store=tmp_path)
