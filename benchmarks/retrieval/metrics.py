"""How good a ranking is, given which documents are evidence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

CUTOFFS = (1, 5, 10)


def evidence_recall(ranking: Sequence[str], evidence: Collection[str], k: int) -> float:
    """Share of the evidence among the first ``k``."""
    return len(set(ranking[:k]) & set(evidence)) / len(evidence)


def reciprocal_rank(ranking: Sequence[str], evidence: Collection[str]) -> float:
    """1 / rank of the first evidence; 0 if none was found."""
    return next((1 / rank for rank, found in enumerate(ranking, start=1) if found in evidence), 0.0)


def ndcg(ranking: Sequence[str], evidence: Collection[str], k: int = 10) -> float:
    """Normalised discounted cumulative gain at ``k`` with gains of 0 and 1."""
    gains = (1 / math.log2(rank + 1) for rank, found in enumerate(ranking[:k], start=1) if found in evidence)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(evidence)) + 1))
    return sum(gains) / best


def summarize(outcomes: Iterable[tuple[str, Sequence[str], Collection[str]]]) -> dict[str, dict[str, float]]:
    """Means over (group, ranking, evidence) triples, for all and by group, with their number."""
    values: dict[str, list[dict[str, float]]] = defaultdict(list)
    for group, ranking, evidence in outcomes:
        measured = {f"recall@{k}": evidence_recall(ranking, evidence, k) for k in CUTOFFS}
        measured |= {"mrr": reciprocal_rank(ranking, evidence), "ndcg@10": ndcg(ranking, evidence)}
        values["all"].append(measured)
        values[group].append(measured)
    return {
        group: {name: sum(one[name] for one in many) / len(many) for name in many[0]} | {"queries": len(many)}
        for group, many in values.items()
    }
