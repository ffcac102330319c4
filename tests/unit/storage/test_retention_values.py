"""Limits as values: which are sound, what a window leaves out, and what a rank may be."""

from __future__ import annotations

from typing import Any

import pytest

from kv_agent.chunks import TurnId
from kv_agent.errors import ConfigError
from kv_agent.storage.policy import Usage
from kv_agent.storage.retention import Retention, SessionTurn, default_disk_bytes, in_order, outside_window


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"policy": "arc"}, "no policy is called 'arc'; choose one of lru, fifo, importance"),
        ({"max_bytes": 0}, "max_bytes must be a whole number from 1 on, or None, got 0"),
        ({"max_tokens": -1}, "max_tokens must be"),
        ({"max_memories": True}, "max_memories must be a whole number"),
        ({"max_bytes": 1.5}, "max_bytes must be a whole number"),
        ({"max_bytes": 2**63}, "max_bytes must be"),
        ({"window_tokens": "9"}, "window_tokens must be a whole number"),
        ({"ttl_s": 0.0}, "ttl_s must be a positive number of seconds"),
        ({"ttl_s": float("nan")}, "ttl_s must be"),
        ({"ttl_s": float("inf")}, "ttl_s must be"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Retention(**fields)


def test_what_the_disk_may_take_is_never_less_than_what_is_there() -> None:
    assert default_disk_bytes(free_bytes=1000, used_bytes=0) == 900
    assert default_disk_bytes(free_bytes=500, used_bytes=500) == 900
    assert default_disk_bytes(free_bytes=50, used_bytes=950) == 950  # others filled it
    assert default_disk_bytes(free_bytes=0, used_bytes=950) == 950
    assert default_disk_bytes(free_bytes=0, used_bytes=0) == 1


def test_a_window_counts_from_the_newest_and_never_takes_it() -> None:
    session = [
        SessionTurn(turn_id=TurnId(name), num_tokens=num_tokens, pinned=name == "old")
        for name, num_tokens in (("new", 7), ("mid", 3), ("old", 3), ("oldest", 1))
    ]

    assert outside_window(session, 100) == []
    assert outside_window(session, 13) == ["oldest"]  # the pinned one takes room
    assert outside_window(session, 10) == ["oldest"]
    assert outside_window(session, 9) == ["mid", "oldest"]
    assert outside_window(session, 1) == ["mid", "oldest"]


def test_a_rank_that_is_no_number_is_an_error() -> None:
    class Nan:
        def rank(self, usage: Usage) -> float:
            return float("nan")

    usage = Usage(num_bytes=1, num_tokens=1, created=0, last_used=0)
    with pytest.raises(ValueError, match="gave a turn no rank"):
        in_order({TurnId("one"): usage}, Nan())
