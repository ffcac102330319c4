"""A projection learns from unlabelled texts which tokens go together."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks.retrieval.keys import Encoded
from benchmarks.retrieval.latent import Texts, competing
from benchmarks.retrieval.projection import Pairs, projected

NUM_COUPLES, SIZE = 20, 64
KEYS = torch.randn(2 * NUM_COUPLES, SIZE, generator=torch.Generator().manual_seed(0))


def texts(ids: list[list[int]]) -> Texts:
    encoded = [
        Encoded(token_ids=one, keys=KEYS[one][None, :, None], queries=torch.empty(1, len(one), 0, SIZE))
        for one in ids
    ]
    return Texts(encoded=encoded, spans=[(0, len(one)) for one in ids])


@pytest.mark.parametrize("pairs", get_args(Pairs))
def test_tokens_that_stand_together_find_each_other(pairs: Pairs) -> None:
    """Token 2n comes with token 2n + 1, in one text or in two that follow each other."""
    rng = random.Random(0)
    drawn = [rng.sample(range(NUM_COUPLES), 4) for _ in range(200)]
    if pairs == "cloze":
        told = [[2 * n + side for side in (0, 1) for n in four] for four in drawn]
    else:
        told = [[2 * n + side for n in four] for four in drawn for side in (0, 1)]
    sessions = [str(number // 2) for number in range(len(told))]
    asked_for = [[2 * n] for n in range(NUM_COUPLES)]
    documents, queries = texts(told + asked_for), texts([[2 * n + 1] for n in range(NUM_COUPLES)])
    sessions += [f"alone {n}" for n in range(NUM_COUPLES)]

    def right(scores: Tensor) -> float:
        """Among the texts of one token, where the words themselves are of no help."""
        best = scores[:, len(told) :].argmax(dim=-1)
        return float((best == torch.arange(NUM_COUPLES)).float().mean())

    learned = projected(documents, queries, [0], sessions, pairs=pairs)
    assert right(learned) >= right(competing(documents, queries, [0])) + 0.4
