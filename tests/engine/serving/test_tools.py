"""Tools and memory in one request, on a real server whose chat template renders tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from kv_agent.serving.access import add_key
from tests.engine import support
from tests.engine.serving.server_process import MemoryServerProcess, serving
from tests.engine.serving.streams import put_together
from tests.engine.serving.test_chat import remember, report_of, text_of

pytestmark = pytest.mark.engine

TEMPLATE = Path(__file__).with_name("tools.jinja")
OPTIONS = (
    "--chat-template", str(TEMPLATE),
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip

FACTS = ("Hugo Thomsen lives in Paris.", "Otto Flores lives in Hanoi.")
QUESTION = "Where does Hugo Thomsen live?"
ANSWER = "Paris."


def function(name: str, argument: str, values: list[str]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {argument: {"enum": values}},
        "required": [argument],
        "additionalProperties": False,
    }
    return {"name": name, "description": f"Looks up a {argument}.", "parameters": parameters, "strict": True}


FUNCTIONS = (function("find_home", "person", ["Hugo", "Otto"]), function("find_pet", "owner", ["Mara"]))
TOOLS = [{"type": "function", "function": one} for one in FUNCTIONS]
FORCED = {"type": "function", "function": {"name": "find_pet"}}
CHOICES = ["none", "auto", FORCED, "required"]


@pytest.fixture(scope="module")
def tools_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryServerProcess]:
    folder = tmp_path_factory.mktemp("tools-server")
    keys_file = folder / "keys.json"
    keys = {"acme": add_key(keys_file, "acme")}
    with serving(folder, keys=keys, keys_file=keys_file, options=OPTIONS) as server:
        yield server


@pytest.fixture
def client(tools_server: MemoryServerProcess) -> Iterator[httpx.Client]:
    with tools_server.client() as client:
        yield client


@pytest.fixture
def ask(tools_server: MemoryServerProcess) -> openai.OpenAI:
    key = tools_server.keys["acme"]
    return openai.OpenAI(base_url=f"{tools_server.base_url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Renders as the server does, on its own."""
    tokenizer = AutoTokenizer.from_pretrained(support.RECALL_MODEL)
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def round_of_tools(call: Mapping[str, str], result: str) -> list[dict[str, Any]]:
    """What clients send back: the call as it was answered, and what the tool said."""
    function = {"type": "function", "function": dict(call), "id": "call-1"}
    return [
        {"role": "assistant", "content": None, "tool_calls": [function]},
        {"role": "tool", "tool_call_id": "call-1", "content": result},
    ]


def chat(client: openai.OpenAI, memory: dict[str, Any] | None, **options: Any) -> Any:
    wanted = {
        "model": str(support.RECALL_MODEL),
        "messages": [user(QUESTION)],
        "tools": TOOLS,
        "parallel_tool_calls": False,  # left to itself the little model never stops calling
        "temperature": 0,
        "max_tokens": 100,
        **options,
    }
    body = {"return_token_ids": True, **({} if memory is None else {"memory": memory})}
    return client.chat.completions.create(extra_body=body, **wanted)


def said(answer: Any) -> dict[str, Any]:
    """What an answer says, but for ids and the blanks between arguments."""
    (choice,) = answer.choices
    calls = [(one.function.name, compact(one.function.arguments)) for one in choice.message.tool_calls or ()]
    return {"text": choice.message.content or "", "calls": calls, "finish": choice.finish_reason}


def streamed(chunks: list[Any]) -> dict[str, Any]:
    """The same of a streamed answer."""
    text, finish = "", None
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for one in choice.delta.tool_calls or ():
                call = calls.setdefault(one.index, ["", ""])
                call[0] += one.function.name or ""
                call[1] += one.function.arguments or ""
    called = [(name, compact(arguments)) for name, arguments in calls.values()]
    return {"text": text, "calls": called, "finish": finish}


def compact(arguments: str) -> str:
    return json.dumps(json.loads(arguments))


def texts_of(client: httpx.Client, user_id: str) -> list[str]:
    """Texts of all memories of a user, oldest first."""
    memories = client.get("/memory", params={"user_id": user_id}).json()["memories"]
    return [memory["text"] for memory in reversed(memories)]


def assert_called_well(answered: dict[str, Any], names: set[str]) -> None:
    """The calls are of these functions, with arguments that their schemas admit."""
    schemas = {one["name"]: one["parameters"]["properties"] for one in FUNCTIONS}
    assert answered["calls"]
    for name, arguments in answered["calls"]:
        assert name in names
        parsed = json.loads(arguments)
        assert parsed.keys() == schemas[name].keys()
        assert all(value in schemas[name][key]["enum"] for key, value in parsed.items())


@pytest.mark.parametrize("choice", CHOICES, ids=["none", "auto", "named", "required"])
def test_with_memory_an_answer_has_the_form_it_has_without(
    client: httpx.Client, ask: openai.OpenAI, choice: Any
) -> None:
    ids = remember(client, f"form-{choice}", *FACTS)
    memory = {"user_id": f"form-{choice}", "store": False}

    plain = said(chat(ask, None, tool_choice=choice))
    whole = chat(ask, memory, tool_choice=choice)
    chunks = list(chat(ask, memory, tool_choice=choice, stream=True))

    remembered = said(whole)
    assert {one["id"] for one in report_of(whole)["memories"]} == set(ids)
    assert report_of(whole)["exact"] + report_of(whole)["adapted"] > 0
    assert report_of(chunks[-1])["memories"] == report_of(whole)["memories"]
    assert streamed(chunks) == remembered
    assert remembered["finish"] == plain["finish"]
    if choice in ("none", "auto"):
        assert remembered["calls"] == plain["calls"] == []
        assert text_of(whole) == ANSWER != plain["text"].strip()
    else:
        names = {"find_pet"} if choice == FORCED else {one["name"] for one in FUNCTIONS}
        assert_called_well(plain, names)
        assert_called_well(remembered, names)


@pytest.mark.parametrize("system", [None, "You are a helper with tools."])
def test_memories_stand_behind_system_prompt_and_tools_and_before_the_conversation(
    client: httpx.Client, ask: openai.OpenAI, tokenizer: Any, system: str | None
) -> None:
    name = f"order-{bool(system)}"
    remember(client, name, *FACTS)
    first = [] if system is None else [{"role": "system", "content": system}]
    earlier = [user("Lena Holm has a cat."), {"role": "assistant", "content": "Noted."}]
    messages = [*first, *earlier, user(QUESTION)]

    def rendered(messages: list[dict[str, Any]], generate: bool = True) -> list[int]:
        ids = tokenizer.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=generate, return_dict=False
        )
        return list(ids)

    plain = chat(ask, None, messages=messages)
    answer = chat(ask, {"user_id": name, "store": False}, messages=messages)

    whole, ids = rendered(messages), answer.model_extra["prompt_token_ids"]
    behind = rendered([*first, user("x")], generate=False)
    prefix = behind[: -len(tokenizer.encode("<|user|>x<|end|>"))]
    turns = whole[len(prefix) :]
    assert plain.model_extra["prompt_token_ids"] == whole == prefix + turns
    assert (ids[: len(prefix)], ids[-len(turns) :]) == (prefix, turns)
    between = tokenizer.decode(ids[len(prefix) : -len(turns)])
    assert between == "".join(f"<|user|> {fact}<|end|><|assistant|> Noted.<|end|>" for fact in FACTS)
    assert all(one["name"] in tokenizer.decode(prefix) for one in FUNCTIONS)
    assert text_of(answer) == ANSWER


def test_a_round_of_tools_is_stored_with_the_question_it_answers(
    client: httpx.Client, ask: openai.OpenAI
) -> None:
    question = "Where does Rosa Bishop live?"
    memory = {"user_id": "rounds", "session_id": "s1"}
    messages = [user("Ivan Pereira works as a judge."), {"role": "assistant", "content": "Noted."}]
    messages += [user(question)]
    called = chat(ask, memory, messages=messages, tool_choice="required")
    (call, *_) = said(called)["calls"]
    messages += round_of_tools({"name": call[0], "arguments": call[1]}, "Rosa Bishop lives in Porto.")

    answered = chat(ask, memory, messages=messages, max_tokens=8)

    first, second = texts_of(client, "rounds")
    assert first.startswith(f"{question}\n<tool_call>")
    assert call[0] in first
    lines = second.splitlines()
    assert lines[0] == question
    assert json.loads(lines[1].removeprefix("<tool_call>").removesuffix("</tool_call>")) == {
        "name": call[0],
        "arguments": json.loads(call[1]),
    }
    assert lines[2] == "<tool_response>Rosa Bishop lives in Porto.</tool_response>"
    assert lines[3:]
    assert text_of(answered).startswith("\n".join(lines[3:]))  # the last token of a full answer has no KV
    assert report_of(answered)["memories"] == []  # its own first step is in the prompt already
    found = client.post("/memory/query", json={"query": "Porto", "user_id": "rounds", "mode": "lexical"})
    assert [one["id"] for one in found.json()["memories"]] == [report_of(answered)["turn_id"]]


def test_a_question_that_was_answered_by_tools_is_answered_from_memory_later(
    client: httpx.Client, ask: openai.OpenAI
) -> None:
    call = {"name": "find_home", "arguments": '{"person": "Hugo"}'}
    messages = [user("Tell me of Hugo Thomsen."), *round_of_tools(call, "Hugo Thomsen lives in Paris.")]
    chat(ask, {"user_id": "later"}, messages=messages, max_tokens=4)

    answer = chat(ask, {"user_id": "later", "store": False}, tool_choice="none")

    assert len(report_of(answer)["memories"]) == 1
    assert report_of(answer)["adapted"] + report_of(answer)["exact"] > 0


@pytest.mark.parametrize("choice", ["none", "auto", "named", "required"])
def test_responses_with_tools_have_memory_too(client: httpx.Client, ask: openai.OpenAI, choice: str) -> None:
    remember(client, f"responses-{choice}", *FACTS)
    memory = {"memory": {"user_id": f"responses-{choice}", "store": False}}
    options: dict[str, Any] = {
        "model": str(support.RECALL_MODEL),
        "input": QUESTION,
        "tools": [{"type": "function", **one} for one in FUNCTIONS],
        "tool_choice": {"type": "function", "name": "find_pet"} if choice == "named" else choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 100,
        "temperature": 0,
    }

    plain = ask.responses.create(**options)
    whole = ask.responses.create(**options, extra_body=memory)
    events = list(ask.responses.create(**options, extra_body=memory, stream=True))

    assert report_of(whole)["memories"]
    last = events[-1].response
    assert report_of(last)["memories"] == report_of(whole)["memories"]
    kinds = [item.type for item in plain.output]
    assert [item.type for item in whole.output] == [item.type for item in last.output] == kinds
    if choice in ("none", "auto"):
        assert whole.output_text.strip() == ANSWER
    else:
        assert kinds[0] == "function_call"
        for response in (plain, whole, last):
            calls = [(item.name, item.arguments) for item in response.output]
            names = {"find_pet"} if choice == "named" else {one["name"] for one in FUNCTIONS}
            assert_called_well({"calls": calls}, names)


def test_what_tools_answered_to_a_response_is_stored_with_its_question(
    client: httpx.Client, ask: openai.OpenAI
) -> None:
    question = "Where does Uma Berg live?"
    called = {"call_id": "call-1", "name": "find_home", "arguments": '{"person":"Otto"}'}
    ask.responses.create(
        model=str(support.RECALL_MODEL),
        input=[
            user(question),
            {"type": "function_call", **called},
            {"type": "function_call_output", "call_id": "call-1", "output": "Uma Berg lives in Kyoto."},
        ],
        tools=[{"type": "function", **one} for one in FUNCTIONS],
        max_output_tokens=4,
        temperature=0,
        extra_body={"memory": {"user_id": "responses-stored"}},
    )

    (text,) = texts_of(client, "responses-stored")
    assert text.startswith(question)
    assert "<tool_response>Uma Berg lives in Kyoto.</tool_response>" in text


def test_a_template_of_the_server_is_that_of_stored_turns_too(client: httpx.Client, tokenizer: Any) -> None:
    (memory_id,) = remember(client, "template", FACTS[0])

    chunks = client.get(f"/memory/{memory_id}/chunks").json()["chunks"]

    # The model's own has no system prompt where none is given.
    assert chunks[0]["position"] == len(
        tokenizer.encode("<|system|>You answer from what you were told.<|end|>")
    )


# -- requests without the field -------------------------------------------------------------------------


def without_ids(body: bytes) -> bytes:
    """An answer but for what is another each time: times, ids that are drawn, the name of the settings."""
    body = re.sub(rb'"(created|created_at|completed_at)":[0-9.]+', rb'"\1":0', body)
    body = re.sub(rb'"system_fingerprint":"[^"]*"', b'"system_fingerprint":""', body)
    return re.sub(rb'"(chatcmpl-tool|call|fc|msg|resp|item)[-_][0-9a-f]{8,}"', rb'"\1"', body)


def test_requests_without_memory_are_answered_as_by_a_server_without_the_plugin(
    client: httpx.Client, tmp_path: Path
) -> None:
    call = {"name": "find_home", "arguments": '{"person": "Otto"}'}
    remember(client, "default", *FACTS)
    # With salts of their own, so that no request finds the beginning of another one computed.
    common = {"model": str(support.RECALL_MODEL), "temperature": 0, "parallel_tool_calls": False}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {
                **common,
                "messages": messages,
                "tools": TOOLS,
                "tool_choice": choice,
                "stream": stream,
                "logprobs": True,
                "max_tokens": 40,
            },
        )
        for messages in ([user(QUESTION)], [user(QUESTION), *round_of_tools(call, "Hanoi.")])
        for choice in CHOICES
        for stream in (False, True)
    ]
    responses = {**common, "input": QUESTION, "max_output_tokens": 40}
    tools = [{"type": "function", **one} for one in FUNCTIONS]
    bodies += [
        ("/v1/responses", {**responses, "tools": tools, "tool_choice": choice, "stream": stream})
        for choice in ("none", "required")
        for stream in (False, True)
    ]

    def answers(client: httpx.Client) -> list[tuple[int, str | None, bytes | list[Any]]]:
        found = []
        for number, (path, body) in enumerate(bodies):
            headers = {"X-Request-Id": f"number-{number}"}
            got = client.post(path, json={**body, "cache_salt": f"salt-{number}"}, headers=headers)
            content = without_ids(got.content)
            said = put_together(content) if body.get("stream") else content
            found.append((got.status_code, got.headers.get("content-type"), said))
        return found

    with (
        serving(
            tmp_path, keys={}, keys_file=None, options=OPTIONS, with_connector=False, plugins=""
        ) as plain_server,
        plain_server.client(None) as plain,
    ):
        assert plain.get("/memory/health").status_code == 404
        expected = answers(plain)

    for (path, body), one, other in zip(bodies, answers(client), expected, strict=True):
        assert one == other, (path, body)
        assert one[0] == 200, one
