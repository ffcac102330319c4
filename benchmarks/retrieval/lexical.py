"""Okapi BM25 over any terms: words or token ids."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_K1 = 1.2
_B = 0.75


def bm25(documents: Sequence[Sequence[Hashable]], queries: Sequence[Sequence[Hashable]]) -> Tensor:
    """Scores -> [queries, documents], with the parameters of SQLite's FTS5."""
    postings: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for number, terms in enumerate(documents):
        for term, count in Counter(terms).items():
            postings[term].append((number, count))
    mean = sum(map(len, documents)) / max(1, len(documents))
    scores = torch.zeros(len(queries), len(documents))
    for row, query in enumerate(queries):
        for term in set(query):
            found = postings.get(term, [])
            idf = math.log(1 + (len(documents) - len(found) + 0.5) / (len(found) + 0.5))
            for number, count in found:
                length = 1 - _B + _B * len(documents[number]) / mean
                scores[row, number] += idf * count * (_K1 + 1) / (count + _K1 * length)
    return scores
