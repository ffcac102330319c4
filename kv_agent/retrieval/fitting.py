"""What an index learns from the rows it has, computed from arrays alone and so on any thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kv_agent.chunks import ChunkKey
from kv_agent.retrieval.entries import Floats, Halves, Rows
from kv_agent.retrieval.interaction import Documents
from kv_agent.retrieval.neighbours import Neighbours, build
from kv_agent.retrieval.spaces import Space, centred_on, whitening_of

MIN_CENTRED = 2  # of one entry alone nothing would be left
_SAMPLED_TOKENS = 16_384
_SAMPLED_ROWS = 65_536  # for a mean, where no tokens are known


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """A space, a sample of documents in it, and ``rows_N`` of a table searchable in their order."""

    rows_N: Rows
    num_rows: int  # of the table, dead ones included, when it was fitted
    space: Space
    background: Documents | None
    sampled: list[ChunkKey]  # the documents of the background
    neighbours: Neighbours


def fit(vectors_NV: Halves, rows_N: Rows, sample: Mapping[ChunkKey, Floats]) -> Fit:
    """``vectors_NV`` with dead rows, ``rows_N`` the live ones; ``sample`` holds tokens [T, V] of some."""
    size = vectors_NV.shape[1]
    sampled = [key for key, keys_TV in sample.items() if keys_TV.shape[1] == size and len(keys_TV)]
    while len(sampled) > 1 and sum(len(sample[key]) for key in sampled) > _SAMPLED_TOKENS:
        sampled = sampled[::2]
    known = [sample[key] for key in sampled]
    space, background = Space(), None
    if len(rows_N) >= MIN_CENTRED and sum(map(len, known)) >= MIN_CENTRED:
        tokens_TV = np.concatenate(known)
        space = whitening_of(tokens_TV)
        background = Documents(
            tokens_TV=space.unit(tokens_TV), sizes_N=np.array([len(keys_TV) for keys_TV in known])
        )
    elif len(rows_N) >= MIN_CENTRED:
        step = -(-len(rows_N) // _SAMPLED_ROWS)
        space = centred_on(vectors_NV[rows_N[::step]].astype(np.float32))
    return Fit(
        rows_N=rows_N,
        num_rows=len(vectors_NV),
        space=space,
        background=background,
        sampled=sampled if background is not None else [],
        neighbours=build(
            size, len(rows_N), lambda a, b: space.unit(vectors_NV[rows_N[a:b]].astype(np.float32))
        ),
    )
