"""The same promises on another architecture: the bundled model is Qwen3-style (q/k norm, other RoPE base)."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen3")


@pytest.fixture(scope="module")
def qwen3(store: Path) -> Iterator[VllmEngine]:
    settings = {"store": str(store), "chunk_tokens": support.CHUNK}
    engine = VllmEngine(support.RECALL_MODEL, settings, **support.ENGINE_OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def stored(store: Path) -> Iterator[Catalog]:
    catalog = Catalog(store / "catalog.sqlite3")
    yield catalog
    catalog.close()


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


def test_a_resumed_conversation_equals_recomputation_bit_for_bit(qwen3: VllmEngine, stored: Catalog) -> None:
    past = chat(qwen3, *FACTS)
    chunks = support.capture(qwen3, stored, past)
    prompt = past + question(qwen3, "Where does Hugo Thomsen live?")

    computed = support.run(qwen3, prompt, salt="computed")
    resumed = support.run(
        qwen3,
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


def test_moved_turns_answer_like_the_same_kv_assembled_in_transformers(
    qwen3: VllmEngine, stored: Catalog
) -> None:
    scope = support.scope("moved")
    one, two, three = (
        support.capture(qwen3, stored, chat(qwen3, fact), scope={**scope, "session_id": str(number)})
        for number, fact in enumerate(FACTS)
    )
    order = [*three, *one, *two]  # never computed in this order
    fresh = question(qwen3, "What is the badge number of Lena Holm?")
    prompt = support.tokens_of(order) + fresh
    plan = support.plan(order, fresh_start=len(prompt) - len(fresh))

    answer = support.run(qwen3, prompt, max_tokens=8, salt="moved", scope=scope, store=False, plan=plan)

    assert answer.reuse.exact == three[0].num_tokens
    assert answer.reuse.adapted == one[0].num_tokens + two[0].num_tokens
    model = AutoModelForCausalLM.from_pretrained(support.RECALL_MODEL, dtype=torch.float32).eval()
    expected = support.assembled_logprobs(model, order, fresh, answer.token_ids)
    worst = max(
        abs(value - expected[step, token].item())
        for step, logprobs in enumerate(answer.logprobs)
        for token, value in logprobs.items()
    )
    assert worst < 2e-4
