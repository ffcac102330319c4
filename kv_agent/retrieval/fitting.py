"""What an index learns from the rows it has, computed from arrays alone and so on any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kv_agent.chunks import ChunkKey
from kv_agent.retrieval.entries import Halves, Rows
from kv_agent.retrieval.neighbours import Neighbours, build
from kv_agent.retrieval.sketches import Sketch
from kv_agent.retrieval.snapshot import Arrays
from kv_agent.retrieval.spaces import Space, Spaces, centred_on, whitening_of
from kv_agent.retrieval.token_space import Tokens, TokenSpace

MIN_CENTRED = 2  # of one entry alone nothing would be left
_COLUMNS = ("levels", "scales", "inverse")  # of tokens, in a snapshot
_SAMPLED_TOKENS = 16_384
_SAMPLED_ROWS = 65_536  # for a mean, where no tokens are known


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Spaces, documents sampled in that of tokens, and ``rows_N`` of a table searchable in their order."""

    rows_N: Rows
    num_rows: int  # of the table, dead ones included, when it was fitted
    spaces: Spaces
    background: list[Tokens]  # of each document sampled; empty if no single tokens are known
    sampled: list[ChunkKey]  # whose documents they are
    neighbours: Neighbours


def fit(vectors_NV: Halves, rows_N: Rows, sample: Mapping[ChunkKey, Sketch]) -> Fit:
    """``vectors_NV`` with dead rows, ``rows_N`` the live ones; ``sample`` holds tokens of some."""
    size = vectors_NV.shape[1]
    num_tokens = {key: len(one.scales_T) for key, one in sample.items() if one.levels_TV.shape[1] == size}
    sampled = [key for key, num in num_tokens.items() if num]
    while len(sampled) > 1 and sum(num_tokens[key] for key in sampled) > _SAMPLED_TOKENS:
        sampled = sampled[::2]
    known = [sample[key] for key in sampled]
    spaces, background = Spaces(), list[Tokens]()
    if len(rows_N) >= MIN_CENTRED and sum(num_tokens[key] for key in sampled) >= MIN_CENTRED:
        spaces = whitening_of(np.concatenate([one.keys() for one in known]))
        background = spaces.tokens.place(known)
    elif len(rows_N) >= MIN_CENTRED:
        step = -(-len(rows_N) // _SAMPLED_ROWS)
        spaces = centred_on(vectors_NV[rows_N[::step]].astype(np.float32))
    return Fit(
        rows_N=rows_N,
        num_rows=len(vectors_NV),
        spaces=spaces,
        background=background,
        sampled=sampled if background else [],
        neighbours=build(
            size, len(rows_N), lambda a, b: spaces.pooled.unit(vectors_NV[rows_N[a:b]].astype(np.float32))
        ),
    )


def fitted_arrays(spaces: Spaces, background: Sequence[Tokens]) -> Arrays:
    """For a snapshot."""
    arrays: dict[str, npt.NDArray[Any] | None] = {
        "mean": spaces.pooled.mean_V,
        "matrix": spaces.pooled.matrix_VV,
        "damped": spaces.tokens.damped_VR,
    }
    if background:
        columns = zip(*background, strict=True)
        arrays |= {name: np.concatenate(parts) for name, parts in zip(_COLUMNS, columns, strict=True)}
        arrays["sizes"] = np.array([len(tokens.scales_T) for tokens in background])
    return {name: np.ascontiguousarray(values) for name, values in arrays.items() if values is not None}


def fitted_from(arrays: Arrays) -> tuple[Spaces, list[Tokens]]:
    """Inverse of :func:`fitted_arrays`."""
    mean_V = arrays.get("mean")
    spaces = Spaces(
        pooled=Space(mean_V=mean_V, matrix_VV=arrays.get("matrix")),
        tokens=TokenSpace(mean_V=mean_V, damped_VR=arrays.get("damped")),
    )
    if "sizes" not in arrays:
        return spaces, []
    ends_N = np.cumsum(arrays["sizes"])
    columns = (np.split(arrays[name], ends_N[:-1]) for name in _COLUMNS)
    return spaces, [Tokens(*parts) for parts in zip(*columns, strict=True)]
