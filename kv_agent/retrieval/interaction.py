"""Late interaction: texts compared token by token, and competing for each token of the query.

MaxSim (ColBERT, Khattab and Zaharia, 2020) sums, over the query's tokens, the best cosine with a token of
the document. Here the documents share each query token between them by a softmax over those cosines, as
keys share the attention of a query: a token that all of them have says nothing, one that a single document
has is worth a whole point. That does what weights by rarity do, without knowing any frequencies. Documents
that are no candidates compete, too, by a sample of them: candidates are alike in what they were chosen for.

Legend: N documents, t tokens of the query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_agent.retrieval.maxsim_kernel import best_cosines
from kv_agent.retrieval.sketches import Floats
from kv_agent.retrieval.token_space import Query, Tokens

# How sharply documents compete: between 5 and 40 recall@5 on the recall world changed by less than 0.01.
SHARPNESS = 10.0


def shares(
    query: Query, candidates: Sequence[Tokens], background: Sequence[Tokens] = (), num_others: int = 0
) -> Floats:
    """What part of the query each candidate wins -> [N], at most 1 in all.

    ``background`` stands for ``num_others`` further documents. Each document has at least one token.
    """
    best_Nt = best_cosines(query, candidates)
    top_t = best_Nt.max(axis=0)
    won_Nt = np.exp(SHARPNESS * (best_Nt - top_t))
    total_t = won_Nt.sum(axis=0)
    if background and num_others > 0:
        others_Nt = np.exp(SHARPNESS * (best_cosines(query, background) - top_t))
        total_t = total_t + num_others * others_Nt.mean(axis=0)
    shares_N: Floats = (won_Nt / total_t).mean(axis=1)
    return shares_N
