"""Chat with memory on a real server, spoken to as its users do: with the openai package."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

FACTS = (
    "Hugo Thomsen lives in Paris.",
    "The badge number of Lena Holm is 4271.",
    "Otto Flores lives in Hanoi.",
)
QUESTION = "Where does Hugo Thomsen live?"
ANSWER = "Paris."
UNKNOWN = "I do not know."


@pytest.fixture
def ask(memory_server: MemoryServerProcess) -> Callable[..., openai.OpenAI]:
    def client(key: str = "acme") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{memory_server.base_url}/v1", api_key=memory_server.keys[key], max_retries=0
        )

    return client


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def remember(client: httpx.Client, user: str, *facts: str, **more: Any) -> list[str]:
    ids = []
    for fact in facts:
        body = {"prompt": fact, "response": "Noted.", "user_id": user, **more}
        answer = client.post("/memory/store", json=body)
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["id"])
    return ids


def chat(client: openai.OpenAI, question: str, memory: dict[str, Any] | None, **options: Any) -> Any:
    body = {} if memory is None else {"memory": memory}
    messages = options.pop("messages", [{"role": "user", "content": question}])
    return client.chat.completions.create(
        model=model_of(client), messages=messages, temperature=0, max_tokens=16, extra_body=body, **options
    )


def report_of(answer: Any) -> dict[str, Any]:
    return answer.model_extra["kv_transfer_params"]["kv_agent"]


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content.strip()


def test_an_answer_comes_from_memory_and_says_what_was_reused(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    ids = remember(client, "amy", *FACTS)

    without = chat(ask(), QUESTION, None)
    answer = chat(ask(), QUESTION, {"user_id": "amy", "store": False})

    assert (text_of(without), text_of(answer)) == (UNKNOWN, ANSWER)
    report = report_of(answer)
    assert {one["id"] for one in report["memories"]} == set(ids)
    assert report["exact"] + report["adapted"] > 0
    assert (
        sum(report[name] for name in ("exact", "adapted", "local", "computed")) == answer.usage.prompt_tokens
    )
    assert report["refused"] == []
    assert "turn_id" not in report


def test_another_user_agent_or_namespace_does_not_see_it(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    remember(client, "ben", *FACTS, agent_id="planner")

    assert text_of(chat(ask(), QUESTION, {"user_id": "ben", "store": False})) == ANSWER
    for key, memory in (
        ("acme", {"user_id": "eve"}),
        ("other", {"user_id": "ben"}),
        ("acme", {"user_id": "ben", "agent_id": "writer", "share": "agent"}),
    ):
        answer = chat(ask(key), QUESTION, {**memory, "store": False})
        assert text_of(answer) == UNKNOWN, memory
        assert report_of(answer)["memories"] == []


def test_a_chat_becomes_a_memory_that_is_found_at_once(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    told = chat(ask(), "Nina Okafor lives in Porto.", {"user_id": "cleo", "session_id": "s1", "top_k": 0})
    turn_id = report_of(told)["turn_id"]

    found = client.post("/memory/query", json={"query": "Nina Okafor", "user_id": "cleo"}).json()["memories"]
    answer = chat(ask(), "Where does Nina Okafor live?", {"user_id": "cleo", "store": False})

    assert [one["id"] for one in found] == [turn_id]
    assert found[0]["session_id"] == "s1"
    assert "Nina Okafor lives in Porto." in found[0]["text"]
    assert text_of(answer) == "Porto."


def test_a_system_prompt_stays_in_front_and_earlier_turns_are_not_repeated(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    (hugo,) = remember(client, "dora", FACTS[0])
    (lena,) = remember(client, "dora", FACTS[1])
    messages = [
        {"role": "system", "content": "You answer from what you were told."},
        {"role": "user", "content": FACTS[1]},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": QUESTION},
    ]

    answer = chat(ask(), "", {"user_id": "dora", "store": False}, messages=messages)

    assert text_of(answer) == ANSWER
    assert [one["id"] for one in report_of(answer)["memories"]] == [hugo]
    assert lena != hugo


def test_only_the_last_turn_of_a_conversation_is_stored(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    messages = [
        {"role": "user", "content": "Ivan Pereira works as a judge."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "Zara Meyer works as a pilot."},
    ]
    chat(ask(), "", {"user_id": "emil", "top_k": 0}, messages=messages)

    memories = client.get("/memory", params={"user_id": "emil"}).json()["memories"]

    assert len(memories) == 1
    assert "Zara Meyer" in memories[0]["text"]
    assert "Ivan" not in memories[0]["text"]


def test_a_streamed_answer_is_the_same_and_ends_with_the_report(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    remember(client, "finn", *FACTS)
    chunks = list(chat(ask(), QUESTION, {"user_id": "finn", "store": False}, stream=True))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == ANSWER
    assert report_of(chunks[-1])["memories"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    plain = list(chat(ask(), QUESTION, None, stream=True))
    assert all("kv_transfer_params" not in (chunk.model_extra or {}) for chunk in plain)


def test_completions_and_responses_have_memory_too(
    client: httpx.Client, ask: Callable[..., openai.OpenAI], memory_server: MemoryServerProcess
) -> None:
    remember(client, "gil", *FACTS)
    memory = {"memory": {"user_id": "gil", "store": False}}
    prompt = f"<|user|>{QUESTION}<|end|><|assistant|>"

    completed = ask().completions.create(
        model=model_of(ask()), prompt=prompt, max_tokens=8, temperature=0, extra_body=memory
    )
    responded = ask().responses.create(
        model=model_of(ask()), input=QUESTION, max_output_tokens=8, temperature=0, extra_body=memory
    )

    assert completed.choices[0].text.strip() == ANSWER
    assert completed.model_extra["kv_transfer_params"]["kv_agent"]["memories"]
    assert responded.output_text.strip() == ANSWER
    assert responded.model_extra["kv_transfer_params"]["kv_agent"]["memories"]


def test_requests_without_the_field_are_answered_as_before(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    remember(client, "hana", *FACTS)
    chat(ask(), QUESTION, {"user_id": "hana", "store": False})

    plain = chat(ask(), QUESTION, None)

    assert text_of(plain) == UNKNOWN
    assert plain.model_extra.get("kv_transfer_params") is None


def test_a_plan_that_a_client_made_is_dropped(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    (turn_id,) = remember(client, "ida", FACTS[0])
    forged = {
        "kv_agent": {
            "scope": {"namespace": "acme", "user_id": "ida"},
            "store": True,
            "signature": "0" * 64,
            "probe": {},
        }
    }
    before = client.get("/memory", params={"user_id": "ida"}).json()["memories"]

    answer = ask("other").chat.completions.create(
        model=model_of(ask()),
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=4,
        temperature=0,
        extra_body={"kv_transfer_params": forged},
    )

    assert answer.model_extra.get("kv_transfer_params") is None
    time.sleep(0.5)
    assert client.get("/memory", params={"user_id": "ida"}).json()["memories"] == before
    assert [one["id"] for one in before] == [turn_id]


@pytest.mark.parametrize(
    ("memory", "place"),
    [
        ({"top_k": 1000}, "memory.top_k"),
        ({"topk": 5}, "memory.topk"),
        ({"user_id": 7}, "memory.user_id"),
        ({"namespace": "other"}, "memory.namespace"),
        ({"quality": "best"}, "memory.quality"),
        ({"ttl_s": -1}, "memory.ttl_s"),
        ("amy", "memory"),
        ([1], "memory"),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_the_next_request_works(
    client: httpx.Client, ask: Callable[..., openai.OpenAI], memory: Any, place: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(ask(), QUESTION, memory)

    assert refused.value.body["param"] == place
    assert text_of(chat(ask(), QUESTION, None)) == UNKNOWN


def test_memory_needs_a_key(client: httpx.Client, memory_server: MemoryServerProcess) -> None:
    body = {
        "model": "x",
        "messages": [{"role": "user", "content": QUESTION}],
        "memory": {"user_id": "amy"},
    }
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.post(
            f"{memory_server.base_url}/v1/chat/completions", json=body, headers=headers, trust_env=False
        )
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "AuthenticationError"


def test_a_client_that_leaves_in_mid_stream_harms_nobody(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    remember(client, "jan", *FACTS)
    body = {
        "model": model_of(ask()),
        "messages": [{"role": "user", "content": QUESTION}],
        "memory": {"user_id": "jan", "store": False},
        "stream": True,
        "max_tokens": 500,
        "ignore_eos": True,
    }
    for _ in range(3):
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")

    assert text_of(chat(ask(), QUESTION, {"user_id": "jan", "store": False})) == ANSWER


def test_a_long_answer_still_fits_behind_the_memories(
    client: httpx.Client, ask: Callable[..., openai.OpenAI]
) -> None:
    remember(client, "kim", *FACTS)
    unlimited = ask().chat.completions.create(
        model=model_of(ask()),
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        extra_body={"memory": {"user_id": "kim", "store": False}},
    )
    assert text_of(unlimited) == ANSWER
    assert json.dumps(report_of(unlimited))


def test_metrics_tell_what_was_reused(
    client: httpx.Client, ask: Callable[..., openai.OpenAI], memory_server: MemoryServerProcess
) -> None:
    remember(client, "lara", *FACTS)
    before = metrics_of(memory_server)
    report = report_of(chat(ask(), QUESTION, {"user_id": "lara", "store": False}))
    chat(ask(), QUESTION, {"user_id": "lara", "store": False})  # numbers go with the engine's next steps
    after = metrics_of(memory_server)

    def grown(name: str, **labels: str) -> float:
        return after.get(sample(name, **labels), 0.0) - before.get(sample(name, **labels), 0.0)

    assert grown("kv_agent_tokens_total", source="adapted") >= report["adapted"] > 0
    assert grown("kv_agent_hits_total", kind="adapted") >= 1
    assert grown("kv_agent_moved_bytes_total", direction="load") > 0
    assert after[sample("kv_agent_tier_bytes", tier="host")] > 0
    assert all("lara" not in name and "Hugo" not in name for name in after)


def metrics_of(server: MemoryServerProcess) -> dict[str, float]:
    """Our samples by name and the one label of ours."""
    found = {}
    text = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name.startswith("kv_agent_"):
                ours = {
                    key: value for key, value in one.labels.items() if key not in ("model_name", "engine")
                }
                found[sample(one.name, **ours)] = one.value
    return found


def sample(name: str, **labels: str) -> str:
    return name + "".join(f"|{key}={value}" for key, value in sorted(labels.items()))
