"""Which turns a query finds: by their words, by the model's own keys, or by both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import ConfigError
from kv_agent.manager import CacheManager

Mode = Literal["hybrid", "latent", "lexical"]
Probe = Callable[[str], npt.NDArray[np.float32]]


def find_turns(
    manager: CacheManager, probe: Probe, query: str, scope: Scope, top_k: int, mode: Mode
) -> dict[TurnId, float]:
    """The ``top_k`` best turns that ``scope`` admits, best first, with their scores.

    ``probe`` gives the pooled keys of a query; it is called only when they are needed. Hybrid takes what
    shares words with the query first and fills free places by keys: the keys were measured near chance, and
    merging a ranking at chance as an equal makes results worse than text search alone.
    """
    if top_k < 1:
        raise ConfigError(f"top_k must be >= 1, got {top_k}")
    if mode not in get_args(Mode):
        raise ConfigError(f'mode must be "hybrid", "latent" or "lexical", got {mode!r}')
    manager.wait_durable()
    found: dict[TurnId, float] = {}
    if mode != "latent":
        hits = manager.store.catalog.search_text(query, scope, manager.fingerprint, top_k)
        found = {hit.turn_id: hit.score for hit in hits}
        if mode == "lexical":
            return found
    if len(found) < top_k:
        latent = {hit.turn_id: hit.score for hit in manager.index.search(probe(query), scope, top_k)}
        if mode == "latent":
            return latent
        found |= {turn_id: 0.0 for turn_id in latent if turn_id not in found}
    best = list(found)[:top_k]
    return {turn_id: 1.0 / rank for rank, turn_id in enumerate(best, start=1)}
