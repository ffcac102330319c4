"""Ways to compare texts by what the model's attention sees of them, as functions from keys to scores.

N documents, Q queries, T tokens of all documents, t tokens of one text, V values of a pooled vector.
Every function returns scores [Q, N], higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.retrieval.keys import Encoded
from kv_agent.retrieval.interaction import SHARPNESS

Space = Literal["plain", "centred", "whitened", "all_but_the_top"]

_SHRINKAGE = 1e-2  # of the mean variance, added to each, so that noise is not blown up
_TOP_DIRECTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Encoded texts with the tokens that count: those of a query's own words, all of a document's."""

    encoded: Sequence[Encoded]
    spans: Sequence[tuple[int, int]]

    def keys(self, layers: Sequence[int]) -> list[Tensor]:
        """Un-rotated keys of the layers side by side, one [t, V] a text."""
        pairs = zip(self.encoded, self.spans, strict=True)
        return [
            torch.cat([one.keys[layer, start:end].flatten(1) for layer in layers], dim=-1)
            for one, (start, end) in pairs
        ]

    def token_ids(self) -> list[list[int]]:
        pairs = zip(self.encoded, self.spans, strict=True)
        return [one.token_ids[start:end] for one, (start, end) in pairs]


def pooled(
    documents: Texts,
    queries: Texts,
    layers: Sequence[int],
    *,
    space: Space,
    own_query_mean: bool = False,
    by_rarity: bool = False,
) -> Tensor:
    """Cosine of mean keys. ``own_query_mean`` centres queries and documents each on their own mean.

    Otherwise both are centred on that of the documents' tokens, to which the space is fitted, too.
    ``by_rarity`` weights tokens by their inverse document frequency.
    """
    document_keys, query_keys = documents.keys(layers), queries.keys(layers)
    rarity = inverse_document_frequency(documents)
    weigh = _by_rarity(rarity) if by_rarity else _evenly
    documents_NV = _means(document_keys, documents.token_ids(), weigh)
    queries_QV = _means(query_keys, queries.token_ids(), weigh)
    mean_V, matrix_VV = fit_space(torch.cat(document_keys), space)
    query_mean_V = queries_QV.mean(0) if own_query_mean else mean_V
    document_mean_V = documents_NV.mean(0) if own_query_mean else mean_V
    return (
        unit((queries_QV - query_mean_V) @ matrix_VV) @ unit((documents_NV - document_mean_V) @ matrix_VV).T
    )


def late_interaction(
    documents: Texts,
    queries: Texts,
    layers: Sequence[int],
    *,
    space: Space,
    own_query_mean: bool = False,
    by_rarity: bool = False,
) -> Tensor:
    """MaxSim: for every token of the query its best cosine with a token of the document, summed."""
    document_keys, query_keys = documents.keys(layers), queries.keys(layers)
    tokens_TV = torch.cat(document_keys)
    mean_V, matrix_VV = fit_space(tokens_TV, space)
    query_mean_V = torch.cat(query_keys).mean(0) if own_query_mean else mean_V
    tokens_TV = unit((tokens_TV - mean_V) @ matrix_VV)
    owners_T = owners_of(document_keys)
    rarity = inverse_document_frequency(documents)
    scores = torch.empty(len(query_keys), len(document_keys))
    for row, (keys_tV, ids) in enumerate(zip(query_keys, queries.token_ids(), strict=True)):
        best_tN = best_of_each(unit((keys_tV - query_mean_V) @ matrix_VV) @ tokens_TV.T, owners_T)
        weights_t = rarity[torch.tensor(ids)] if by_rarity else torch.ones(len(ids))
        scores[row] = weights_t @ best_tN
    return scores


def competing(documents: Texts, queries: Texts, layers: Sequence[int]) -> Tensor:
    """MaxSim of whitened keys whose documents share each query token by a softmax, over all documents.

    What :mod:`kv_agent.retrieval.interaction` does for some candidates.
    """
    document_keys = documents.keys(layers)
    tokens_TV = torch.cat(document_keys)
    mean_V, matrix_VV = fit_space(tokens_TV, "whitened")
    tokens_TV, owners_T = unit((tokens_TV - mean_V) @ matrix_VV), owners_of(document_keys)
    rows = [
        (SHARPNESS * best_of_each(unit((keys_tV - mean_V) @ matrix_VV) @ tokens_TV.T, owners_T))
        .softmax(dim=-1)
        .mean(0)
        for keys_tV in queries.keys(layers)
    ]
    return torch.stack(rows)


def attention(
    documents: Texts, queries: Texts, layer: int, head: int, *, last_only: bool, shared: bool
) -> Tensor:
    """Largest query-key product of one head with any token of a document, summed over query tokens.

    ``shared`` lets the documents compete for each query token (softmax) before the sum. A query ends
    where its answer would begin.
    """
    _, _, num_kv_heads, size = documents.encoded[0].keys.shape
    num_heads = queries.encoded[0].queries.shape[2]
    kv_head = head * num_kv_heads // num_heads
    keys = [one.keys[layer, :, kv_head] for one in documents.encoded]
    keys_TD, owners_T = torch.cat(keys), owners_of(keys)
    scores = torch.empty(len(queries.encoded), len(keys))
    for row, one in enumerate(queries.encoded):
        asking_tD = one.queries[layer, -1:, head] if last_only else one.queries[layer, :, head]
        best_tN = best_of_each(asking_tD @ keys_TD.T / size**0.5, owners_T)
        scores[row] = (best_tN.softmax(dim=-1) if shared else best_tN).sum(0)
    return scores


def key_boxes(documents: Texts, queries: Texts, layer: int) -> Tensor:
    """Upper bound of query-key products from each document's smallest and largest key values (MemArt).

    Per query token the bounds are normalised over documents, then summed over tokens and heads.
    """
    lows_NKD = torch.stack([one.keys[layer].amin(0) for one in documents.encoded])
    highs_NKD = torch.stack([one.keys[layer].amax(0) for one in documents.encoded])
    scores = torch.zeros(len(queries.encoded), len(documents.encoded))
    for row, one in enumerate(queries.encoded):
        num_heads, num_kv_heads = one.queries.shape[2], lows_NKD.shape[1]
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            asking_tD = one.queries[layer, :, head]
            bound_tN = asking_tD.clamp(min=0) @ highs_NKD[:, kv_head].T
            bound_tN += asking_tD.clamp(max=0) @ lows_NKD[:, kv_head].T
            scores[row] += (bound_tN / asking_tD.shape[-1] ** 0.5).softmax(dim=-1).sum(0)
    return scores


def inverse_document_frequency(documents: Texts) -> Tensor:
    """By token id, long enough for every id of a vocabulary of 2^18."""
    counts = torch.zeros(1 << 18)
    for ids in documents.token_ids():
        counts[list(set(ids))] += 1
    return torch.log1p((len(documents.encoded) - counts + 0.5) / (counts + 0.5))


def reciprocal_rank_fusion(scores: Sequence[Tensor], weights: Sequence[float], constant: int = 60) -> Tensor:
    """Weighted reciprocal ranks, summed (Cormack et al., 2009)."""
    fused = torch.zeros_like(scores[0])
    for one, weight in zip(scores, weights, strict=True):
        ranks = one.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        fused += weight / (constant + 1 + ranks)
    return fused


def fit_space(tokens_TV: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """Mean and matrix that make a space of the tokens' one."""
    size = tokens_TV.shape[1]
    mean_V, identity_VV = tokens_TV.mean(0), torch.eye(size)
    if space == "plain":
        return torch.zeros(size), identity_VV
    if space == "centred":
        return mean_V, identity_VV
    variances_V, directions_VV = torch.linalg.eigh(torch.cov(tokens_TV.T))  # smallest first
    if space == "all_but_the_top":
        directions_VV = directions_VV[:, :-_TOP_DIRECTIONS]
        return mean_V, directions_VV
    scales_V = (variances_V.clamp(min=0) + _SHRINKAGE * variances_V.mean()) ** -0.5
    return mean_V, directions_VV * scales_V


def _means(keys: Sequence[Tensor], ids: Sequence[list[int]], weigh: Callable[[list[int]], Tensor]) -> Tensor:
    means = []
    for keys_tV, own in zip(keys, ids, strict=True):
        weights_t = weigh(own)
        means.append(weights_t @ keys_tV / weights_t.sum())
    return torch.stack(means)


def _evenly(ids: list[int]) -> Tensor:
    return torch.ones(len(ids))


def _by_rarity(rarity: Tensor) -> Callable[[list[int]], Tensor]:
    return lambda ids: rarity[torch.tensor(ids)]


def owners_of(keys: Sequence[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(one) for one in keys]))


def best_of_each(products_tT: Tensor, owners_T: Tensor) -> Tensor:
    """The largest product of each query token with any token of each document -> [t, N]."""
    num_documents = int(owners_T[-1]) + 1
    best = torch.full((len(products_tT), num_documents), -torch.inf)
    return best.scatter_reduce(1, owners_T.expand(len(products_tT), -1), products_tT, "amax")


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
