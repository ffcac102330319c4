"""Late interaction: texts compared token by token, and competing for each token of the query.

MaxSim (ColBERT, Khattab and Zaharia, 2020) sums, over the query's tokens, the best cosine with a token of
the document. Here the documents share each query token between them by a softmax over those cosines, as
keys share the attention of a query: a token that all of them have says nothing, one that a single document
has is worth a whole point. That does what weights by rarity do, without knowing any frequencies. Documents
that are no candidates compete, too, by a sample of them: candidates are alike in what they were chosen for.

Legend: N documents, T tokens of all of them, t tokens of the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_agent.retrieval.sketches import Floats
from kv_agent.retrieval.token_space import Query, Tokens

# How sharply documents compete: between 5 and 40 recall@5 on the recall world changed by less than 0.01.
SHARPNESS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Documents:
    """Their tokens one after another, and how many each has: at least one."""

    tokens: Tokens
    sizes_N: npt.NDArray[np.int64]


def documents_of(parts: Sequence[Tokens]) -> Documents:
    """At least one, each with at least one token."""
    tokens = Tokens(
        levels_TV=np.concatenate([part.levels_TV for part in parts]),
        scales_T=np.concatenate([part.scales_T for part in parts]),
        inverse_T=np.concatenate([part.inverse_T for part in parts]),
    )
    return Documents(tokens=tokens, sizes_N=np.array([len(part.levels_TV) for part in parts]))


def shares(
    query: Query, candidates: Documents, background: Documents | None = None, num_others: int = 0
) -> Floats:
    """What part of the query each candidate wins -> [N], at most 1 in all.

    ``background`` stands for ``num_others`` further documents.
    """
    best_Nt = _best(query, candidates)
    top_t = best_Nt.max(axis=0)
    won_Nt = np.exp(SHARPNESS * (best_Nt - top_t))
    total_t = won_Nt.sum(axis=0)
    if background is not None and num_others > 0:
        others_Nt = np.exp(SHARPNESS * (_best(query, background) - top_t))
        total_t = total_t + num_others * others_Nt.mean(axis=0)
    shares_N: Floats = (won_Nt / total_t).mean(axis=1)
    return shares_N


def _best(query: Query, documents: Documents) -> Floats:
    """The largest cosine of each query token with a token of each document -> [N, t]."""
    starts_N = np.cumsum(documents.sizes_N) - documents.sizes_N
    best_Nt: Floats = np.maximum.reduceat(documents.tokens.cosines(query), starts_N, axis=0)
    return best_Nt
