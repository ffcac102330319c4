"""How often a namespace may ask, against the definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kv_agent.serving.errors import RequestError
from kv_agent.serving.limits import RateLimits
from tests.unit.serving.conftest import Served
from tests.unit.serving.test_routes import error_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asks(limits: RateLimits, per_minute: int | None, namespace: str = "acme") -> int:
    """Seconds to wait, 0 if the request may go on."""
    try:
        limits.take(namespace, per_minute)
    except RequestError as refused:
        return int(refused.headers["Retry-After"])
    return 0


@given(
    per_minute=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 90, allow_nan=False), min_size=1, max_size=80),
)
def test_in_no_time_more_go_on_than_a_minutes_burst_and_what_that_time_brings(
    per_minute: int, gaps: list[float]
) -> None:
    clock = Clock()
    limits = RateLimits(clock)
    admitted: list[float] = []
    for gap in gaps:
        clock.now += gap
        wait_s = asks(limits, per_minute)
        if wait_s == 0:
            admitted.append(clock.now)
        else:
            assert wait_s <= math.ceil(60 / per_minute)

    for first, start in enumerate(admitted):
        for last, end in enumerate(admitted[first:], start=first):
            assert last - first + 1 <= per_minute + (end - start) * per_minute / 60 + 1e-6


@given(per_minute=st.integers(1, 600), gap=st.floats(0, 0.01))
@example(per_minute=1, gap=0.00428434985625577)  # 60 seconds later the clock reads 59.99999999999999 more
def test_who_waits_as_long_as_told_goes_on(per_minute: int, gap: float) -> None:
    clock = Clock()
    limits = RateLimits(clock)
    while (wait_s := asks(limits, per_minute)) == 0:
        clock.now += gap / per_minute

    clock.now += wait_s
    assert asks(limits, per_minute) == 0
    clock.now += 60
    assert [asks(limits, per_minute) for _ in range(per_minute)] == [0] * per_minute
    assert asks(limits, per_minute) > 0


def test_each_namespace_is_counted_for_itself_and_without_a_limit_not_at_all() -> None:
    limits = RateLimits(Clock())

    assert [asks(limits, 1), asks(limits, 1, "other")] == [0, 0]
    assert asks(limits, 1) == asks(limits, 1, "other") == 60
    assert [asks(limits, None, "free") for _ in range(1000)] == [0] * 1000


def test_too_many_requests_are_answered_with_429_and_when_to_come_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(served.app.state.kv_agent, "_limits", RateLimits(clock))
    monkeypatch.setattr(served.app.state.kv_agent.access, "requests_per_minute", {"acme": 3}.get)

    assert [served.client.get("/memory").status_code for _ in range(3)] == [200] * 3
    answer = served.client.post("/memory/query", content=b"not even JSON")
    assert error_of(answer, 429)["type"] == "RateLimitError"
    assert answer.headers["Retry-After"] == "20"
    assert served.client.get("/memory", headers=served.headers("other")).status_code == 200
    assert served.client.get("/memory/health").status_code == 200
    clock.now = 20
    assert served.client.get("/memory").status_code == 200
    error_of(served.client.get("/memory"), 429)
