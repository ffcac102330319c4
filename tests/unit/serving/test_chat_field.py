"""The field ``memory`` beside vLLM's own: what is noted, what passes untouched, what a stream ends with."""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from kv_agent.serving.access import Access
from kv_agent.serving.chat import _ASKED, ChatMemory, is_under_way, last_question
from kv_agent.serving.metrics import ServerMetrics
from kv_agent.serving.recalling import _stands_in

CHAT = "/v1/chat/completions"


class Server:
    """As much of a memory server as the middleware asks: who may come in."""

    def __init__(self) -> None:
        self._access = Access()
        self.metrics = ServerMetrics(CollectorRegistry())

    def admit(self, authorization: str | None, namespace: str | None = None) -> Any:
        return self._access.caller(None, namespace)


class Seen:
    """An application that keeps what reached it, and answers with ``events``."""

    def __init__(self, events: tuple[bytes, ...] = (b"{}",), kind: bytes = b"application/json") -> None:
        self.body: bytes | None = None
        self.asked: Any = None
        self._events, self._kind = events, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked = _ASKED.get()
        self.body = b""
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self.asked is not None:
            self.asked.report |= {"exact": 3}
        headers = [(b"content-type", self._kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def call(
    app: Seen, *parts: bytes, path: str = CHAT, method: str = "POST", is_on: bool = True
) -> list[Message]:
    """What the client gets."""
    sent: list[Message] = []
    waiting = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": method, "path": path, "headers": [], "app": object()}
    middleware = ChatMemory(app, server_of=lambda _: Server() if is_on else None)  # type: ignore[arg-type, return-value]
    asyncio.run(middleware(scope, receive, send))
    assert _ASKED.get() is None
    return sent


def answer_of(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": []}',
        b'{ "model":"x" ,\n "note": "memory" }',
        b'{"memory": null}',
        b'{"memory": ',
        b'["memory"]',
        b"\xff\xfe memory",
        b"",
    ],
)
def test_what_does_not_ask_passes_byte_for_byte(body: bytes) -> None:
    for parts in ((body,), (body[:3], body[3:7], body[7:])):
        app = Seen()
        call(app, *parts)
        assert app.body == body
        assert app.asked is None


def test_what_asks_passes_byte_for_byte_too_and_is_noted() -> None:
    body = (
        b'{ "messages" : [{"role":"user","content":"Where?"}], "memory":{"user_id":"amy"}, "max_tokens": 7 }'
    )
    app = Seen()
    call(app, body[:20], body[20:])
    assert app.body == body
    assert (app.asked.wanted.user_id, app.asked.query, app.asked.max_tokens) == ("amy", "Where?", 7)
    assert app.asked.caller.namespace == "default"


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/embeddings", "POST"), (CHAT, "GET"), ("/memory/query", "POST"), ("/v1/chat", "POST")],
)
def test_other_routes_are_not_read(path: str, method: str) -> None:
    app = Seen()
    call(app, b'{"memory": {"user_id": 7}}', path=path, method=method)
    assert app.asked is None


@pytest.mark.parametrize(
    ("memory", "extra", "status", "place"),
    [
        ({"top_k": 101}, {}, 400, "memory.top_k"),
        ({"unknown": 1}, {}, 400, "memory.unknown"),
        ({"filters": {"agent_id": "x"}}, {}, 400, "memory.filters.agent_id"),
        (7, {}, 400, "memory"),
        ({}, {"use_beam_search": True}, 400, "memory"),
    ],
)
def test_a_wrong_field_is_answered_and_goes_no_further(
    memory: object, extra: dict[str, object], status: int, place: str
) -> None:
    app = Seen()
    sent = call(app, json.dumps({"messages": [], "memory": memory, **extra}).encode())
    assert app.body is None
    assert sent[0]["status"] == status
    assert json.loads(answer_of(sent))["error"]["param"] == place


def test_where_memory_is_off_it_says_so() -> None:
    sent = call(Seen(), b'{"memory": {}}', is_on=False)
    assert sent[0]["status"] == 503


def test_a_stream_ends_with_what_was_reused() -> None:
    shared = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
    first = b"data: %b\n\n" % json.dumps({**shared, "choices": []}).encode()
    app = Seen((first, b"data: [DONE]\n\n"), b"text/event-stream; charset=utf-8")

    events = answer_of(call(app, b'{"memory": {}}')).split(b"\n\n")

    assert events[0] + b"\n\n" == first
    assert json.loads(events[1].removeprefix(b"data: ")) == {
        **shared,
        "choices": [],
        "kv_transfer_params": {"kv_agent": {"exact": 3}},
    }
    assert events[2] == b"data: [DONE]"
    plain = Seen((first, b"data: [DONE]\n\n"), b"text/event-stream")
    assert answer_of(call(plain, b"{}")) == first + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("path", "fields", "question"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "b"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "a"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
            "a\nb",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        (CHAT, {"messages": 7}, None),
        (CHAT, {}, None),
        ("/v1/responses", {"input": "a"}, "a"),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}]}, "a"),
        ("/v1/completions", {"prompt": "a"}, None),
    ],
)
def test_the_last_question_is_what_the_user_said_last(
    path: str, fields: dict[str, object], question: str | None
) -> None:
    assert last_question(path, fields) == question


@pytest.mark.parametrize(
    ("path", "last", "is_so"),
    [
        (CHAT, {"role": "tool", "content": "Oslo", "tool_call_id": "x"}, True),
        (CHAT, {"role": "user", "content": "Where?"}, False),
        (CHAT, {"role": "assistant", "content": None, "tool_calls": []}, False),
        ("/v1/responses", {"type": "function_call_output", "call_id": "x", "output": "Oslo"}, True),
        ("/v1/responses", {"role": "user", "content": "Where?"}, False),
        ("/v1/responses", "tool", False),
        (CHAT, 7, False),
    ],
)
def test_a_turn_is_under_way_when_a_tool_answered_last(path: str, last: Any, is_so: bool) -> None:
    name = "messages" if path == CHAT else "input"
    assert is_under_way(path, {name: [{"role": "user", "content": "Where?"}, last]}) is is_so
    for fields in ({}, {name: None}, {name: []}, {name: "tool"}, {name: {"role": "tool"}}):
        assert not is_under_way(path, fields)


@given(
    whole=st.lists(st.integers(0, 3), max_size=12), part=st.lists(st.integers(0, 3), min_size=1, max_size=4)
)
def test_tokens_stand_in_others_as_whole_numbers(whole: list[int], part: list[int]) -> None:
    expected = any(whole[at : at + len(part)] == part for at in range(len(whole)))
    assert _stands_in(array("i", part).tobytes(), array("i", whole).tobytes()) == expected


def test_bytes_across_numbers_do_not_count() -> None:
    assert not _stands_in(array("i", [256]).tobytes(), array("i", [65536, 0]).tobytes())
