"""The same promises on each bundled model: Qwen3 style (q/k norm, other RoPE base, 6 heads) and Llama."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine

FACTS = (
    ("Hugo Thomsen lives in Paris.", "Noted."),
    ("The badge number of Lena Holm is 4271.", "Understood."),
    ("Project Silent Comet is led by Hugo Thomsen.", "Noted."),
)


@dataclass(frozen=True)
class Family:
    folder: Path
    engine: VllmEngine
    catalog: Catalog


@pytest.fixture(scope="module", params=["recall", "recall-llama"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder, store = support.MODELS / request.param, tmp_path_factory.mktemp(request.param)
    settings = {"store": str(store), "chunk_tokens": support.CHUNK}
    # An engine with statistics would take the place of the shared one's in the process's registry.
    options = support.ENGINE_OPTIONS | {"disable_log_stats": True}
    engine = VllmEngine(folder, settings, **options)
    catalog = Catalog(store / "catalog.sqlite3")
    yield Family(folder=folder, engine=engine, catalog=catalog)
    catalog.close()
    engine.close()


def chat(engine: VllmEngine, *turns: tuple[str, str]) -> tuple[int, ...]:
    roles = ("user", "assistant")
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)
    ]
    return tuple(engine.tokenizer.apply_chat_template(messages, return_dict=False))


def question(engine: VllmEngine, text: str) -> tuple[int, ...]:
    messages = [{"role": "user", "content": text}]
    return tuple(
        engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


def test_the_two_families_differ_in_more_than_their_weights() -> None:
    configs = [
        json.loads((support.MODELS / name / "config.json").read_text()) for name in ("recall", "recall-llama")
    ]
    for field in ("model_type", "num_attention_heads", "rope_parameters"):
        one, other = (config[field] for config in configs)
        assert one != other, field


def test_a_resumed_conversation_equals_recomputation_bit_for_bit(family: Family) -> None:
    engine, stored = family.engine, family.catalog
    past = chat(engine, *FACTS)
    chunks = support.capture(engine, stored, past)
    prompt = past + question(engine, "Where does Hugo Thomsen live?")

    computed = support.run(engine, prompt, salt="computed")
    resumed = support.run(
        engine,
        prompt,
        salt="resumed",
        scope=support.scope(),
        store=False,
        plan=support.plan(chunks, fresh_start=len(past)),
    )

    assert computed.reuse.computed == len(prompt)
    assert resumed.reuse.exact == len(past)
    assert resumed.token_ids == computed.token_ids
    assert resumed.logprobs == computed.logprobs


def test_moved_turns_answer_like_the_same_kv_assembled_in_transformers(family: Family) -> None:
    engine, stored = family.engine, family.catalog
    scope = support.scope("moved")
    one, two, three = (
        support.capture(engine, stored, chat(engine, fact), scope={**scope, "session_id": str(number)})
        for number, fact in enumerate(FACTS)
    )
    order = [*three, *one, *two]  # never computed in this order
    fresh = question(engine, "What is the badge number of Lena Holm?")
    prompt = support.tokens_of(order) + fresh
    plan = support.plan(order, fresh_start=len(prompt) - len(fresh))

    answer = support.run(engine, prompt, max_tokens=8, salt="moved", scope=scope, store=False, plan=plan)

    assert answer.reuse.exact == three[0].num_tokens
    assert answer.reuse.adapted == one[0].num_tokens + two[0].num_tokens
    model = AutoModelForCausalLM.from_pretrained(family.folder, dtype=torch.float32).eval()
    expected = support.assembled_logprobs(model, order, fresh, answer.token_ids)
    worst = max(
        abs(value - expected[step, token].item())
        for step, logprobs in enumerate(answer.logprobs)
        for token, value in logprobs.items()
    )
    assert worst < 2e-4
