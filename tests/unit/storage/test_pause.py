"""Pauses double, end with the first success, and are short again after a while without trouble."""

from __future__ import annotations

import random

import pytest

from kv_agent.storage.pause import Pause
from tests.unit.storage.clock import Clock


def lengths(pause: Pause, clock: Clock, num_trials: int) -> list[float]:
    """How long each pause is when every trial fails the moment it may be made."""
    found = []
    for _ in range(num_trials):
        pause.failed("full")
        found.append(pause.remaining_s)
        clock.now += pause.remaining_s
        assert pause.remaining_s == 0
    return found


def test_without_trouble_there_is_nothing_to_wait_for(clock: Clock) -> None:
    pause = Pause(1, 30, clock)

    assert (pause.cause, pause.remaining_s, pause.worked()) == (None, 0, False)


def test_pauses_double_up_to_the_longest(clock: Clock) -> None:
    assert lengths(Pause(1, 30, clock), clock, 8) == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_pause_runs_out_with_the_clock(clock: Clock) -> None:
    pause = Pause(4, 30, clock)
    pause.failed("full")

    clock.now += 3
    assert pause.remaining_s == 1
    clock.now += 100
    assert pause.remaining_s == 0
    assert pause.cause == "full"  # nothing has shown that it works again


def test_only_the_first_failure_and_the_first_success_are_news(clock: Clock) -> None:
    pause = Pause(1, 30, clock)

    assert [pause.failed("full"), pause.failed("broken"), pause.failed("broken")] == [True, False, False]
    assert pause.cause == "broken"
    assert [pause.worked(), pause.worked()] == [True, False]
    assert (pause.cause, pause.remaining_s) == (None, 0)


def test_what_fails_again_soon_goes_on_doubling_and_later_begins_anew(clock: Clock) -> None:
    pause = Pause(1, 30, clock)
    assert lengths(pause, clock, 3) == [1, 2, 4]
    pause.worked()
    clock.now += 30

    assert lengths(pause, clock, 2) == [8, 16]

    pause.worked()
    clock.now += 30.5
    assert lengths(pause, clock, 2) == [1, 2]


def test_a_disk_that_fails_every_other_time_is_tried_no_more_than_the_pauses_allow(clock: Clock) -> None:
    """Brute force: whatever comes, trials that fail are never closer together than the pause before them."""
    pick = random.Random(3)
    pause, last_failure, required, news = Pause(1, 30, clock), -1e9, 0.0, 0
    for _ in range(20_000):
        clock.now += pick.choice((1 / 64, 1 / 4, 2))  # exact in binary
        if pause.remaining_s:
            continue
        if pick.random() < 0.5:
            assert clock.now - last_failure >= required
            news += pause.failed("flapping")
            last_failure, required = clock.now, pause.remaining_s
            assert 1 <= required <= 30
        else:
            news += pause.worked()

    assert news < 2 * clock.now / 30  # a line when it begins and one when it ends, half a minute apart


@pytest.mark.parametrize(("first_s", "longest_s"), [(0, 30), (-1, 30), (2, 1), (float("nan"), 30)])
def test_pauses_that_make_no_sense_are_refused(first_s: float, longest_s: float) -> None:
    with pytest.raises(ValueError, match="pauses must be"):
        Pause(first_s, longest_s)
