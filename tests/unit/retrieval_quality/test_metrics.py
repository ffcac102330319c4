"""Ranking metrics against values worked out from their definitions."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.retrieval.metrics import evidence_recall, ndcg, reciprocal_rank, summarize

DOCUMENTS = "abcdefghijkl"
rankings = st.permutations(DOCUMENTS)
evidences = st.sets(st.sampled_from(DOCUMENTS), min_size=1)


@given(rankings, evidences, st.integers(1, len(DOCUMENTS)))
def test_recall_is_the_share_of_evidence_among_the_first(
    ranking: list[str], evidence: set[str], k: int
) -> None:
    found = [document for document in evidence if ranking.index(document) < k]
    assert evidence_recall(ranking, evidence, k) == pytest.approx(len(found) / len(evidence))


@given(rankings, evidences)
def test_reciprocal_rank_is_that_of_the_first_evidence(ranking: list[str], evidence: set[str]) -> None:
    best = min(ranking.index(document) for document in evidence)
    assert reciprocal_rank(ranking, evidence) == pytest.approx(1 / (best + 1))


def test_without_any_evidence_found_the_rank_counts_nothing() -> None:
    assert reciprocal_rank(["a", "b"], {"z"}) == 0.0


@pytest.mark.parametrize("evidence", ["a", "ad", "abc"])
def test_ndcg_is_the_gain_over_that_of_the_best_order(evidence: str) -> None:
    def gain(order: tuple[str, ...]) -> float:
        return sum((one in evidence) / math.log2(at + 2) for at, one in enumerate(order))

    orders = list(permutations("abcde"))
    best = max(gain(order) for order in orders)
    for order in orders:
        assert ndcg(order, evidence) == pytest.approx(gain(order) / best)


def test_ndcg_with_more_evidence_than_places_can_still_be_one() -> None:
    documents = [str(number) for number in range(20)]
    assert ndcg(documents, documents, k=10) == pytest.approx(1.0)


def test_summary_has_means_for_all_and_for_each_group() -> None:
    summary = summarize([("x", "abc", "a"), ("y", "abc", "c"), ("y", "abc", "z")])
    assert {group: row["queries"] for group, row in summary.items()} == {"all": 3, "x": 1, "y": 2}
    assert summary["all"]["recall@1"] == pytest.approx(1 / 3)
    assert summary["y"]["mrr"] == pytest.approx((1 / 3 + 0) / 2)
