"""A linear map of whitened keys, learned without labels from the texts that are searched.

A text is to be found by a part of it that was taken out (inverse cloze, Lee et al., 2019), or by the turn
before it in its session.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.retrieval.latent import Texts, best_of_each, fit_space, owners_of, unit
from kv_agent.retrieval.interaction import SHARPNESS

Pairs = Literal["cloze", "turns"]

_STEPS = 300
_BATCH = 64
_RATE = 3e-3
_TAKEN = (0.2, 0.5)  # share of a text's tokens that ask for the rest
_FEWEST_TOKENS = 6


def projected(
    documents: Texts,
    queries: Texts,
    layers: Sequence[int],
    sessions: Sequence[str],
    *,
    pairs: Pairs,
    seed: int = 0,
) -> Tensor:
    """Competing late interaction as in ``latent.competing``, in a space learned from pairs -> [Q, N]."""
    keys = documents.keys(layers)
    mean_V, matrix_VV = fit_space(torch.cat(keys), "whitened")
    white = [(keys_tV - mean_V) @ matrix_VV for keys_tV in keys]
    learned_VV = _learn(white, sessions, pairs, random.Random(seed))
    tokens_TV, owners_T = unit(torch.cat(white) @ learned_VV), owners_of(white)
    rows = []
    for keys_tV in queries.keys(layers):
        asked_tV = unit((keys_tV - mean_V) @ matrix_VV @ learned_VV)
        rows.append((SHARPNESS * best_of_each(asked_tV @ tokens_TV.T, owners_T)).softmax(dim=-1).mean(0))
    return torch.stack(rows)


def _learn(white: Sequence[Tensor], sessions: Sequence[str], pairs: Pairs, rng: random.Random) -> Tensor:
    size = white[0].shape[1]
    learned_VV = torch.eye(size, requires_grad=True)
    optimizer = torch.optim.AdamW([learned_VV], lr=_RATE, weight_decay=0.0)
    if pairs == "cloze":
        pool = [number for number, one in enumerate(white) if len(one) >= _FEWEST_TOKENS]
    else:
        pool = [number for number in range(1, len(white)) if sessions[number] == sessions[number - 1]]
    for _ in range(_STEPS):
        chosen = rng.sample(pool, min(_BATCH, len(pool)))
        asking, asked = zip(*(_pair(white, number, pairs, rng) for number in chosen), strict=True)
        tokens_TV, owners_T = unit(torch.cat(asked) @ learned_VV), owners_of(asked)
        best_tN = best_of_each(unit(torch.cat(asking) @ learned_VV) @ tokens_TV.T, owners_T)
        shares = (SHARPNESS * best_tN).softmax(dim=-1).split([len(one) for one in asking])
        won = torch.stack([shares_tN[:, row].mean() for row, shares_tN in enumerate(shares)])
        (-won.log().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return learned_VV.detach()


def _pair(white: Sequence[Tensor], number: int, pairs: Pairs, rng: random.Random) -> tuple[Tensor, Tensor]:
    """What asks, and what it is to find."""
    text = white[number]
    if pairs == "turns":
        return white[number - 1], text
    length = max(1, round(rng.uniform(*_TAKEN) * len(text)))
    start = rng.randint(0, len(text) - length)
    return text[start : start + length], torch.cat([text[:start], text[start + length :]])
