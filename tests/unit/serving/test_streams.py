"""What engine tests compare streams by."""

from __future__ import annotations

import json

import pytest

from tests.engine.serving.streams import put_together


@pytest.mark.parametrize("cuts", [(), (5,), (1, 7), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_a_stream_put_together_is_the_same_however_it_was_cut(cuts: tuple[int, ...]) -> None:
    arguments = '{"a": "b"}'
    parts = [arguments[a:b] for a, b in zip((0, *cuts), (*cuts, len(arguments)), strict=True)]
    calls = [{"index": 0, "function": {"arguments": part}} for part in parts]
    chunks = [
        {"choices": [{"delta": {"tool_calls": [call]}, "logprobs": {"content": [1]}}]} for call in calls
    ]
    chunks[0]["choices"][0]["logprobs"]["content"] = [1] * (10 - len(cuts))
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    (whole,) = put_together(body.encode())

    (choice,) = whole["choices"]
    assert choice["delta"]["tool_calls"] == [{"index": 0, "function": {"arguments": arguments}}]
    assert choice["logprobs"]["content"] == [1] * 10
