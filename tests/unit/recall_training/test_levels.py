"""Levels are passed by their rule alone."""

from __future__ import annotations

from itertools import repeat

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.models.recall_training.curriculum import LEVELS, WINDOW, Progress

# Steps with so many right answers of 8: their sums are exact in floating point.
RUNS = st.lists(
    st.tuples(st.integers(min_value=1, max_value=2 * WINDOW), st.integers(min_value=3, max_value=7)),
    min_size=1,
    max_size=20,
)


def answers(num_right: int) -> list[bool]:
    return [True] * num_right + [False] * (8 - num_right)


def wanted(level: int) -> float:
    """Right answers of 8 over the steps of a window that open the next level, by fractions of 20."""
    twentieths = 12 if LEVELS[level] < 14 else 15
    return 8 * WINDOW * twentieths / 20


def levels_by_rule(steps: list[int], level: int) -> list[int]:
    """The level after each step: passed when the latest WINDOW steps at it have the share wanted."""
    since = 0
    levels = []
    for number in range(len(steps)):
        at_level = steps[since : number + 1]
        is_right = len(at_level) >= WINDOW and sum(at_level[-WINDOW:]) >= wanted(level)
        if is_right and level < len(LEVELS) - 1:
            level, since = level + 1, number + 1
        levels.append(level)
    return levels


@settings(max_examples=100, deadline=None)
@given(runs=RUNS, first=st.integers(min_value=0, max_value=len(LEVELS) - 1))
@example(runs=[(20 * WINDOW, 6)], first=0)
@example(runs=[(20 * WINDOW, 5)], first=0)  # enough for the small levels, not for the large
def test_level_follows_the_rule_and_never_falls(runs: list[tuple[int, int]], first: int) -> None:
    steps = [num_right for length, num_right in runs for num_right in repeat(num_right, length)]
    progress = Progress(level=first)
    levels, passes = [], []
    for num_right in steps:
        before = progress.level
        passes.append(progress.record(answers(num_right)))
        levels.append(progress.level)
        assert passes[-1] == (progress.level > before)
    assert levels == levels_by_rule(steps, first)
    assert levels == sorted(levels)


@pytest.mark.parametrize(
    ("num_facts", "counts"),
    [
        (2, [4, 5, 5, 5, 5]),  # of 8: a share of exactly 0.6
        (9, [4, 5, 5, 5, 5]),
        (14, [6, 6, 6, 6, 6]),  # 0.75
        (50, [6, 6, 6, 6, 6]),
    ],
)
def test_level_is_passed_at_its_share_and_not_just_below_it(num_facts: int, counts: list[int]) -> None:
    counts = counts * (WINDOW // 5)
    for short in (0, 1):
        progress = Progress(level=LEVELS.index(num_facts))
        passed = [progress.record(answers(count)) for count in counts[:-1]]
        passed.append(progress.record(answers(counts[-1] - short)))
        assert passed == [False] * (WINDOW - 1) + [short == 0]


def test_last_level_is_never_passed() -> None:
    progress = Progress(level=len(LEVELS) - 1)
    assert not any(progress.record([True]) for _ in range(3 * WINDOW))
    assert progress.level == len(LEVELS) - 1


def test_right_answers_at_one_level_do_not_count_at_the_next() -> None:
    progress = Progress()
    assert [progress.record([True]) for _ in range(2 * WINDOW)].count(True) == 2
    assert progress.level == 2
    assert progress.right == 0.0


def test_levels_rise() -> None:
    assert list(LEVELS) == sorted(set(LEVELS))
