"""What both clients make of servers that are gone, slow, busy, broken or something else altogether."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from kv_agent import AgentMemory, AsyncAgentMemory, ConfigError, ServerError
from tests.unit.remote.conftest import Connect

URL = "http://memory.example:8000"
PAGE = {"memories": [], "next": None}


def refused(status: int, message: str, **headers: str) -> httpx.Response:
    error = {"message": message, "type": "SomeError", "param": None, "code": status}
    return httpx.Response(status, json={"error": error}, headers=headers)


class Script:
    """A server that answers one response after the other, and keeps what it was asked."""

    def __init__(self, answers: Sequence[httpx.Response | Exception]) -> None:
        self._answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        # Anew: a response belongs to the client that had it.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


@pytest.fixture
def scripted(connect: Connect) -> Callable[..., tuple[Any, Script]]:
    def client(*answers: httpx.Response | Exception) -> tuple[Any, Script]:
        script = Script(answers)
        return connect.over(httpx.MockTransport(script), base_url=URL), script

    return client


Scripted = Callable[..., tuple[Any, Script]]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_port_where_nobody_listens(connect: Connect) -> None:
    with socket.socket() as taken:  # bound, so that nobody else gets it, and closed to connections
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"{url} gave no answer .*is the server running there"):
            connect(base_url=url).list()


def test_a_host_that_cannot_be_one(connect: Connect) -> None:
    with pytest.raises(ServerError, match="http://a b gave no answer"):
        connect(base_url="http://a b").list()


def test_a_server_that_does_not_answer_in_time(connect: Connect, silent_port: int) -> None:
    url = f"http://127.0.0.1:{silent_port}"
    with pytest.raises(ServerError, match=f"{url} did not answer in time.*timeout_s"):
        connect(base_url=url, timeout_s=0.1).store("x")


def test_too_many_requests_are_sent_again_when_the_server_says(scripted: Scripted) -> None:
    busy = [refused(429, "wait", **{"Retry-After": "0"}) for _ in range(3)]
    memory, script = scripted(*busy, httpx.Response(200, json=PAGE))

    assert memory.list() == []
    assert len(script.asked) == 4
    assert len({(one.method, str(one.url), one.content) for one in script.asked}) == 1


def test_too_many_requests_are_given_up_after_a_few(scripted: Scripted) -> None:
    memory, script = scripted(
        *(refused(429, "more than 5 a minute", **{"Retry-After": "0"}) for _ in "12345")
    )

    with pytest.raises(ServerError, match="asked too often: more than 5 a minute"):
        memory.store("x")
    assert len(script.asked) == 4


def test_a_long_wait_is_the_callers_to_decide(scripted: Scripted) -> None:
    memory, script = scripted(refused(429, "wait 3600 s", **{"Retry-After": "3600"}))

    with pytest.raises(ServerError, match="wait 3600 s"):
        memory.list()
    assert len(script.asked) == 1


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        (refused(503, "the store rests"), ServerError, "status 503: the store rests"),
        (refused(507, "no room"), ServerError, "status 507: no room"),
        (httpx.Response(500, text="<html>"), ServerError, "status 500: its log may say why"),
        (refused(400, "top_k: too large"), ConfigError, "^top_k: too large$"),
        (httpx.Response(400, json={"error": "odd"}), ConfigError, "^odd$"),
        (httpx.Response(422, json={"detail": [{"loc": ["x"]}]}), ConfigError, "status 422"),
        (httpx.Response(401, json={"error": "Unauthorized"}), ConfigError, "does not accept this API key"),
        (httpx.Response(404, json={"detail": "Not Found"}), ConfigError, "no memory on this server"),
        (httpx.Response(404, text="nginx"), ConfigError, "no memory on this server"),
        (refused(404, "Not Found"), ConfigError, "no memory on this server"),
        (httpx.Response(308, headers={"Location": "https://x"}), ConfigError, "change base_url"),
        (httpx.Response(200, text="{"), ServerError, "something else than was asked for"),
        (httpx.Response(200, content=b"\xff\xfe"), ServerError, "something else than was asked for"),
        (httpx.Response(200, json={"memories": [{}], "next": None}), ServerError, "something else"),
        (httpx.Response(200, json=[]), ServerError, "something else"),
        (httpx.Response(200, text="[" * 100_000), ServerError, "something else"),
        (httpx.Response(503, text="[" * 100_000), ServerError, "status 503"),
        (httpx.ReadError("reset"), ServerError, "gave no answer .reset."),
        (httpx.RemoteProtocolError("left"), ServerError, "gave no answer .left."),
        (httpx.PoolTimeout("full"), ServerError, "did not answer in time"),
    ],
)
def test_an_answer_that_is_none(scripted: Scripted, answer: Any, error: type, sentence: str) -> None:
    memory, script = scripted(answer, httpx.Response(200, json=PAGE))

    with pytest.raises(error, match=sentence) as raised:
        memory.list()
    assert URL in str(raised.value) or error is ConfigError
    assert memory.list() == []  # the next request works
    assert len(script.asked) == 2


CHAT: dict[str, Any] = {"choices": [{"message": {"content": " Oslo. "}}], "kv_transfer_params": None}
COUNTS = {"exact": 1, "adapted": 2, "local": 3, "computed": 4, "chunk_ids": ["c"], "refused": []}


def chat(**said: Any) -> httpx.Response:
    return httpx.Response(200, json=CHAT | {"kv_transfer_params": {"kv_agent": said}})


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (httpx.Response(200, json=CHAT), "knows no field `memory`"),
        (chat(error="memory could not be used"), "answered without memory: memory could not be used"),
        (chat(**COUNTS), "something else"),  # names no memories
        (chat(memories=[], exact="many"), "something else"),
    ],
)
def test_a_chat_without_memory_is_an_error(scripted: Scripted, answer: Any, sentence: str) -> None:
    memory, _ = scripted(answer)
    with pytest.raises(ServerError, match=sentence):
        memory.generate("x")


def test_a_memory_that_was_used_and_is_gone_is_left_out(scripted: Scripted) -> None:
    used = [{"id": "a", "score": 0.5}]
    memory, script = scripted(chat(**COUNTS, memories=used, turn_id="t"), refused(404, "no such memory"))

    answer = memory.generate("Where?", top_k=3, only=AgentMemory.search.__kwdefaults__["only"])

    assert (answer.text, answer.memories, answer.turn_id, answer.reuse.chunk_ids) == (
        "Oslo.",
        (),
        "t",
        ("c",),
    )
    assert answer.reuse.exact + answer.reuse.adapted + answer.reuse.local + answer.reuse.computed == 10
    assert json.loads(script.asked[0].content)["memory"]["top_k"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://x"},
        {"base_url": "http://"},
        {"base_url": "http://[::1"},
        {"base_url": "http://x?y=z"},
        {"base_url": "http://x:99999"},
        {"base_url": "http://x:port"},
        {"base_url": URL, "api_key": ""},
        {"base_url": URL, "api_key": "a b"},
        {"base_url": URL, "api_key": "a\r\nX-Memory-Namespace:b"},
        {"base_url": URL, "api_key": "schlüssel"},
        {"base_url": URL, "namespace": "büro"},
        {"base_url": URL, "user_id": ""},
        {"base_url": URL, "share": "agent"},
        {"base_url": URL, "share": "world"},
    ],
)
@pytest.mark.parametrize("kind", [AgentMemory, AsyncAgentMemory])
def test_what_cannot_be_an_address_is_refused_at_once(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(**options)
