"""Scores of keys against the same sums written out, text by text and token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.retrieval.keys import Encoded
from benchmarks.retrieval.latent import (
    Texts,
    attention,
    key_boxes,
    late_interaction,
    pooled,
    reciprocal_rank_fusion,
)
from benchmarks.retrieval.lexical import bm25

LAYERS, KV_HEADS, HEADS, SIZE = 2, 2, 4, 3


def texts(lengths: list[int], seed: int) -> Texts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) + 0.5

    encoded = [
        Encoded(
            token_ids=[(seed + 3 * at) % 11 for at in range(length)],
            keys=draw(LAYERS, length, KV_HEADS, SIZE),
            queries=draw(LAYERS, length, HEADS, SIZE),
        )
        for length in lengths
    ]
    return Texts(encoded=encoded, spans=[(1, length) for length in lengths])


DOCUMENTS = texts([4, 7, 3, 5], seed=1)
QUERIES = texts([3, 6], seed=2)


def compare(scores: Tensor, expected: Callable[[Encoded, Encoded], float]) -> None:
    table = [[expected(query, document) for document in DOCUMENTS.encoded] for query in QUERIES.encoded]
    torch.testing.assert_close(scores, torch.tensor(table), atol=1e-5, rtol=1e-4)


def test_pooled_is_the_cosine_of_mean_keys_within_the_spans() -> None:
    def cosine(query: Encoded, document: Encoded) -> float:
        one, other = (text.keys[1, 1:].flatten(1).mean(0) for text in (query, document))
        return float(torch.cosine_similarity(one, other, dim=0))

    compare(pooled(DOCUMENTS, QUERIES, [1], space="plain"), cosine)


def test_whitening_makes_the_tokens_covariance_round() -> None:
    many = texts([60] * 40, seed=3)
    raw, whitened = (pooled(many, many, [0], space=space) for space in ("centred", "whitened"))
    # Independent and equally spread already: whitening turns the space, it changes no angle by much.
    assert (raw - whitened).abs().mean() < 0.05
    stretched = [
        Encoded(token_ids=one.token_ids, keys=one.keys * torch.tensor([4.0, 1, 1]), queries=one.queries)
        for one in many.encoded
    ]
    again = Texts(encoded=stretched, spans=many.spans)
    assert (pooled(again, again, [0], space="centred") - raw).abs().mean() > 0.1
    assert (pooled(again, again, [0], space="whitened") - whitened).abs().mean() < 0.05


def test_late_interaction_sums_the_best_match_of_each_query_token() -> None:
    def best_matches(query: Encoded, document: Encoded) -> float:
        return sum(
            max(
                float(torch.cosine_similarity(asked.flatten(), said.flatten(), dim=0))
                for said in document.keys[0, 1:]
            )
            for asked in query.keys[0, 1:]
        )

    compare(late_interaction(DOCUMENTS, QUERIES, [0], space="plain"), best_matches)


@pytest.mark.parametrize("head", range(HEADS))
def test_attention_of_the_last_token_takes_the_kv_head_of_its_group(head: int) -> None:
    def largest(query: Encoded, document: Encoded) -> float:
        keys_TD = document.keys[1, :, head // (HEADS // KV_HEADS)]
        return float((keys_TD @ query.queries[1, -1, head]).max()) / math.sqrt(SIZE)

    compare(attention(DOCUMENTS, QUERIES, 1, head, last_only=True, shared=False), largest)


def test_documents_that_compete_share_one_for_each_query_token() -> None:
    scores = attention(DOCUMENTS, QUERIES, 0, 2, last_only=False, shared=True)
    torch.testing.assert_close(scores.sum(-1), torch.tensor([3.0, 6.0]))


def test_key_boxes_share_one_for_each_head_and_token_and_favour_the_wider_box() -> None:
    assert torch.allclose(key_boxes(DOCUMENTS, QUERIES, 0).sum(-1), torch.tensor([3.0, 6.0]) * HEADS)
    wide = DOCUMENTS.encoded[0]
    wider = Encoded(token_ids=wide.token_ids, keys=wide.keys * 3, queries=wide.queries)
    both = Texts(encoded=[wide, wider], spans=[(1, 4)] * 2)
    scores = key_boxes(both, QUERIES, 0)
    assert scores.isfinite().all()


def test_fusion_adds_weighted_reciprocal_ranks() -> None:
    one, other = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.1, 0.3, 0.2]])
    fused = reciprocal_rank_fusion([one, other], [1.0, 0.5])
    expected = [1 / 61 + 0.5 / 63, 1 / 62 + 0.5 / 61, 1 / 63 + 0.5 / 62]
    torch.testing.assert_close(fused, torch.tensor([expected]))


def test_bm25_is_okapis_formula() -> None:
    documents = [["red", "ball"], ["red", "red", "dog", "house"], ["tree"]]
    scores = bm25(documents, [["red", "tree", "sky"]])
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    mean = 7 / 3

    def part(idf: float, count: int, length: int) -> float:
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))

    expected = [part(common, 1, 2), part(common, 2, 4), part(rare, 1, 1)]
    torch.testing.assert_close(scores, torch.tensor([expected]))
