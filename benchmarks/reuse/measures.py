"""How far apart two continuations of the same prompt are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Logprobs = Mapping[int, float]  # of every token of the vocabulary


def agreed(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the first continuation up to the first token that differs."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return same / len(one)


def divergence(expected: Logprobs, found: Logprobs) -> float:
    """Kullback-Leibler divergence of ``found`` from ``expected``, in nats."""
    return max(0.0, math.fsum(math.exp(value) * (value - found[token]) for token, value in expected.items()))


def worst_of_likely(expected: Logprobs, found: Logprobs, least: float = 0.01) -> float:
    """Largest difference of log-probabilities among tokens that are expected with a chance of ``least``."""
    likely = (token for token, value in expected.items() if value >= math.log(least))
    return max(abs(expected[token] - found[token]) for token in likely)
