"""What is not as it should be: refused in one format, and the next request works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kv_agent.serving.routing import MAX_BODY_BYTES
from kv_agent.serving.schemas import MAX_TOP_K
from tests.unit.serving.conftest import Served
from tests.unit.serving.test_routes import error_of, remember

LONG_NAME = "n" * 257
WRONG: list[tuple[str, Any, str | None]] = [
    ("store", {}, "prompt"),
    ("store", {"prompt": ""}, "prompt"),
    ("store", {"prompt": 1}, "prompt"),
    ("store", {"prompt": "a\0b"}, "prompt"),
    ("store", {"prompt": "a", "text": "b"}, "text"),
    ("store", {"prompt": "a", "namespace": "other"}, "namespace"),
    ("store", {"prompt": "a", "user_id": ""}, "user_id"),
    ("store", {"prompt": "a", "user_id": LONG_NAME}, "user_id"),
    ("store", {"prompt": "a", "user_id": ["u"]}, "user_id"),
    ("store", {"prompt": "a", "session_id": 7}, "session_id"),
    ("store", {"prompt": "a", "ttl_s": 0}, "ttl_s"),
    ("store", {"prompt": "a", "ttl_s": "60"}, "ttl_s"),
    ("store", {"prompt": "a", "metadata": {"a": None}}, "metadata.a.bool"),
    ("store", {"prompt": "a", "metadata": {"a": 2**63}}, "metadata.a.bool"),
    ("store", {"prompt": "a", "metadata": {str(n): n for n in range(65)}}, "metadata"),
    ("store", [], None),
    ("store", None, None),
    ("query", {"query": "a", "top_k": 0}, "top_k"),
    ("query", {"query": "a", "top_k": MAX_TOP_K + 1}, "top_k"),
    ("query", {"query": "a", "top_k": 10**400}, "top_k"),
    ("query", {"query": "a", "top_k": 2.5}, "top_k"),
    ("query", {"query": "a", "top_k": "5"}, "top_k"),
    ("query", {"query": "a", "top_k": True}, "top_k"),
    ("query", {"query": "a", "mode": "magic"}, "mode"),
    ("query", {"query": "a", "share": "world"}, "share"),
    ("query", {"query": "a", "share": "agent"}, None),
    ("query", {"query": "a", "filters": {"since": "yesterday"}}, "filters.since"),
    ("query", {"query": "a", "filters": {"user_id": "v"}}, "filters.user_id"),
    ("query", {"query": "a" * (1 << 15) + "a"}, "query"),
    ("query", {"query": "a " * 10_000, "mode": "latent"}, None),  # longer than the model's context
    ("query", {"query": "a", "neighbours": -1}, "neighbours"),
    ("forget", {"all": True}, "user_id"),
]


@pytest.mark.parametrize(("route", "body", "param"), WRONG)
def test_a_wrong_field_is_named(served: Served, route: str, body: Any, param: str | None) -> None:
    error = error_of(served.client.post(f"/memory/{route}", json=body), 400)

    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert len(error["message"]) < 1000
    remember(served, "Ana")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"query": "\xff\xfe"}', b'{"query": "\\ud800"}', b'{"query": "a", "threshold": NaN}',
        b'{"query": "a", "threshold": Infinity}', b'{"query": "a", "filters": {"since": -Infinity}}',
        b"[" * 200_000, b'{"a":' * 20_000, b"1" * 5000, b"\x00", b"\xef\xbb\xbf{}",
        b'{"query": "a", "filters": {"metadata": {"\\ud800": 1}}}',
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_json_or_no_text_is_refused(served: Served, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}

    error_of(served.client.post("/memory/query", content=content, headers=headers), 400)

    remember(served, "Ana")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_another_content_type_is_refused(served: Served, content_type: str) -> None:
    body = json.dumps({"query": "a"}).encode()

    error_of(served.client.post("/memory/query", content=body, headers={"Content-Type": content_type}), 400)


def test_a_body_that_is_too_large_is_refused_whatever_it_claims(served: Served) -> None:
    def chunks(num_bytes: int) -> Iterator[bytes]:
        yield b'{"query": "a", "mode": "lexical"}'
        for _ in range(num_bytes // 1024):
            yield b" " * 1024

    headers = {"Content-Type": "application/json"}
    for content in (b" " * (MAX_BODY_BYTES + 1), chunks(MAX_BODY_BYTES)):
        answer = served.client.post("/memory/query", content=content, headers=headers)
        assert error_of(answer, 413)["type"] == "RequestTooLargeError"
    fits = served.client.post("/memory/query", content=chunks(MAX_BODY_BYTES - 1024), headers=headers)
    assert fits.status_code == 200


@pytest.mark.parametrize(
    "params",
    [
        {"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"user_id": ""}, {"user_id": LONG_NAME},
        {"cursor": "x" * 1001},
        {"cursor": "x"}, {"cursor": "bnVsbA=="}, {"cursor": "WzEsIDJd"}, {"cursor": "W05hTiwgIngiXQ=="},
        {"cursor": "é"}, {"cursor": "WyJ4IiwgIngiXQ=="}, {"cursor": "W1tbW1s="}, {"agent_id": "a\0"},
        {"user": "u"}, {"top_k": 5},
    ],
)  # fmt: skip
def test_a_wrong_page_is_refused(served: Served, params: dict[str, Any]) -> None:
    error = error_of(served.client.get("/memory", params=params), 400)

    assert error["param"] == next(iter(params))


def test_an_error_never_repeats_what_was_sent(served: Served) -> None:
    answer = served.client.post(
        "/memory/store", json={"prompt": ["my secret"], "metadata": {"a": {"b": "my secret"}}}
    )

    assert "secret" not in answer.text
    error_of(answer, 400)
