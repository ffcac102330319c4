"""Shares of a query against sums written out, and what competing is for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kv_agent.retrieval.interaction import SHARPNESS, shares
from kv_agent.retrieval.sketches import rounded
from kv_agent.retrieval.token_space import Query, Tokens, TokenSpace


def unit(rng: np.random.Generator, num_tokens: int, size: int = 8) -> np.ndarray:
    vectors = rng.normal(size=(num_tokens, size))
    vectors = rounded(vectors.astype(np.float32)).keys()
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def bag(documents: list[np.ndarray]) -> list[Tokens]:
    return TokenSpace().place([rounded(document) for document in documents])


def asked(query: np.ndarray) -> Query:
    return TokenSpace().query(query)


@pytest.mark.parametrize("num_others", [0, 1, 500])
def test_shares_are_the_mean_softmax_of_best_cosines(num_others: int) -> None:
    rng = np.random.default_rng(num_others)
    documents = [unit(rng, size) for size in (1, 5, 3, 1)]
    others = [unit(rng, size) for size in (2, 1, 4)]
    query = unit(rng, 6)
    expected = np.zeros(4)
    for token in query:
        best = [max(float(token @ one) for one in document) for document in documents]
        rest = [max(float(token @ one) for one in other) for other in others]
        total = sum(math.exp(SHARPNESS * cosine) for cosine in best)
        total += num_others * sum(math.exp(SHARPNESS * cosine) for cosine in rest) / 3
        expected += [math.exp(SHARPNESS * cosine) / total / 6 for cosine in best]
    found = shares(asked(query), bag(documents), bag(others), num_others)
    assert found == pytest.approx(expected, rel=1e-4)
    if not num_others:
        assert shares(asked(query), bag(documents)) == pytest.approx(expected, rel=1e-4)
        assert found.sum() == pytest.approx(1, rel=1e-5)


def test_what_all_have_in_common_says_nothing() -> None:
    common, rare, other = np.eye(3, dtype=np.float32)
    documents = [np.stack([common, rare]), *(np.stack([common, other]) for _ in range(9))]
    query = np.stack([common, rare])
    plain, *rest = shares(asked(query), bag(documents))
    assert plain > 10 * max(rest)


def test_others_take_weight_from_what_they_have_too() -> None:
    """Two candidates match a token each; one of the tokens is everywhere else, too."""
    frequent, rare, other = np.eye(3, dtype=np.float32)
    documents = [frequent[None], rare[None]]
    query = np.stack([frequent, rare])
    one, two = shares(asked(query), bag(documents))
    assert one == pytest.approx(two)
    one, two = shares(asked(query), bag(documents), bag([np.stack([frequent, other])]), 100)
    assert two > 5 * one
