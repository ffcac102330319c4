"""Distances between continuations, against the same sums written out."""

from __future__ import annotations

import math

import pytest

from benchmarks.reuse.measures import agreed, divergence, worst_of_likely


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2, 3, 4], [9, 2, 3, 4], 0.0),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([1, 2], [1, 2, 3], 1.0),
    ],
)
def test_agreement_ends_at_the_first_token_that_differs(
    one: list[int], other: list[int], share: float
) -> None:
    assert agreed(one, other) == share


def logprobs(*chances: float) -> dict[int, float]:
    return {token: math.log(chance) for token, chance in enumerate(chances)}


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    one, other = logprobs(0.5, 0.25, 0.25), logprobs(0.25, 0.25, 0.5)
    assert divergence(one, one) == 0.0
    assert divergence(one, other) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert divergence(one, other) > 0.0


def test_only_likely_tokens_count_for_the_worst() -> None:
    expected, found = logprobs(0.9, 0.095, 0.005), logprobs(0.8, 0.199, 0.001)
    assert worst_of_likely(expected, found) == pytest.approx(math.log(0.199 / 0.095))
    assert worst_of_likely(expected, found, least=0.001) == pytest.approx(math.log(5))
