"""Requests without a server: what is asked, and how long is waited."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from kv_agent.errors import KVAgentError
from kv_agent.remote.exchange import MAX_TRIES, MAX_WAIT_S, Ask, Pause, Reply, answered, ask


class Anything(BaseModel):
    pass


def reply(status: int = 200, body: bytes = b"{}", retry_after: str | None = None) -> Reply:
    return Reply(url="http://x/memory", status=status, body=body, retry_after=retry_after)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("-3", 0.0),
        ("2.5", 2.5),
        (None, 1.0),
        ("soon", 1.0),
        ("nan", 1.0),
        ("inf", 1.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0),
        (str(MAX_WAIT_S), MAX_WAIT_S),
    ],
)
def test_waits_as_long_as_the_server_says(header: str | None, seconds: float) -> None:
    steps = answered(ask("GET", "/memory"), Anything)

    asked = next(steps)
    assert isinstance(asked, Ask)
    assert steps.send(reply(429, retry_after=header)) == Pause(seconds=seconds)
    assert steps.send(None) == asked
    with pytest.raises(StopIteration) as done:
        steps.send(reply())
    assert isinstance(done.value.value, Anything)


@given(st.integers(100, 999), st.binary(max_size=50), st.none() | st.text(max_size=9))
def test_whatever_is_answered_ends_soon_in_a_value_or_an_error_of_ours(
    status: int, body: bytes, retry_after: str | None
) -> None:
    steps = answered(ask("POST", "/memory/store", {"a": 1}), Anything)
    num_asked, waits = 0, []
    sent: Reply | None = None
    has_value = False
    with suppress(KVAgentError):
        while not has_value:
            try:
                step = steps.send(sent)
            except StopIteration:
                has_value = True
                continue
            if isinstance(step, Pause):
                waits.append(step.seconds)
                sent = None
            else:
                num_asked += 1
                sent = reply(status, body, retry_after)
    assert 200 <= status < 300 or not has_value
    assert num_asked == len(waits) + 1 <= MAX_TRIES
    assert all(0 <= wait_s <= MAX_WAIT_S for wait_s in waits)
