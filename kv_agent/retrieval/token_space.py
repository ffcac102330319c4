"""The space in which single tokens are compared, without moving any stored token into it.

The directions in which tokens vary most are damped until they vary as the rest does on average: a whitening
whose small variances are taken to be one (probabilistic principal components). With x the keys less their
mean and B the damped directions, two tokens have the product x.y - (B'x).(B'y). So the query alone is moved,
into one that a stored token's rounded keys are multiplied with; of a stored token only the length is needed.

Legend: T stored tokens, t tokens of a query, V values, R directions, K = 1 + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kv_agent.retrieval.sketches import LARGEST_LEVEL, Floats, Levels, Sketch, float_blocks

Doubles = npt.NDArray[np.float64]

_LARGEST_VALUE, _LARGEST_SUM = 2**15 - 1, 2**31 - 1
_ROUNDING = 1e-5  # of a squared length: what remains when the mean is taken away may be rounding alone


class Query(NamedTuple):
    """Of length one in the space: its products with stored keys k are scales * (values @ k) - offsets.

    Divided by the length of k in the space these are cosines. Values are rounded to whole numbers, as finely
    as no sum of products with a token's levels can exceed 32 bits, whatever the levels are.
    """

    values_tV: npt.NDArray[np.int16]
    scales_t: Floats
    offsets_t: Floats


class Tokens(NamedTuple):
    """A sketch with 1 / length of its tokens in the space, 0 where nothing is left of one."""

    levels_TV: Levels
    scales_T: Floats
    inverse_T: Floats

    @property
    def nbytes(self) -> int:
        return self.levels_TV.nbytes + self.scales_T.nbytes + self.inverse_T.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSpace:
    """``mean_V`` is taken away, ``damped_VR`` has columns B as above; ``None`` leaves a step out."""

    mean_V: Floats | None = None
    damped_VR: Floats | None = None

    def query(self, query_tV: Floats) -> Query:
        """Tokens of which nothing is left have no product with any."""
        mean_V, damped_VR = self._parts(query_tV.shape[1])
        centred_tV = query_tV.astype(np.float64) - mean_V
        moved_tV = centred_tV - (centred_tV @ damped_VR) @ damped_VR.T
        squares_t = (centred_tV * moved_tV).sum(axis=1)
        is_left_t = (centred_tV**2).sum(axis=1) > _ROUNDING * (query_tV.astype(np.float64) ** 2).sum(axis=1)
        inverse_t = _inverse_roots(squares_t, is_left_t)
        directions_tV = moved_tV * inverse_t[:, None]
        scales_t = _finest_scales(directions_tV)
        rounded_tV = np.rint(directions_tV / scales_t[:, None])
        # Of what they were rounded to: tokens share a large part, whose product would not cancel otherwise.
        offsets_t = scales_t * (rounded_tV @ mean_V)
        return Query(rounded_tV.astype(np.int16), scales_t.astype(np.float32), offsets_t.astype(np.float32))

    def place(self, sketches: Sequence[Sketch]) -> list[Tokens]:
        """These sketches, at least one and all of the same V, as they are compared."""
        inverse_T = self._inverse_lengths(together(sketches))
        ends = accumulate(len(sketch.scales_T) for sketch in sketches)
        return [
            Tokens(*sketch, inverse_T[end - len(sketch.scales_T) : end].copy())
            for sketch, end in zip(sketches, ends, strict=True)
        ]

    def _inverse_lengths(self, sketch: Sketch) -> Floats:
        """By products with the mean and the damped directions: no token is centred, which would cost more."""
        num_tokens, size = sketch.levels_TV.shape
        mean_V, damped_VR = self._parts(size)
        sides_VK = np.column_stack([mean_V, damped_VR])
        products_TK = np.empty((num_tokens, sides_VK.shape[1]), dtype=np.float32)
        squares_T = np.empty(num_tokens, dtype=np.float32)
        for rows, levels_BV in float_blocks(sketch.levels_TV):
            np.matmul(levels_BV, sides_VK, out=products_TK[rows])
            np.einsum("tv,tv->t", levels_BV, levels_BV, out=squares_T[rows])
        products_TK *= sketch.scales_T[:, None]
        squares_T *= sketch.scales_T**2
        centred_T = squares_T - 2 * products_TK[:, 0] + mean_V @ mean_V
        damped_TR = products_TK[:, 1:] - mean_V @ damped_VR
        # No direction is damped to nothing: a shorter length is rounding.
        least = 1 - (damped_VR**2).sum(axis=0).max(initial=0)
        squared_T = np.maximum(centred_T - np.einsum("tr,tr->t", damped_TR, damped_TR), least * centred_T)
        is_left_T = centred_T > _ROUNDING * squares_T
        return _inverse_roots(squared_T.astype(np.float64), is_left_T).astype(np.float32)

    def _parts(self, size: int) -> tuple[Floats, Floats]:
        mean_V = np.zeros(size, dtype=np.float32) if self.mean_V is None else self.mean_V
        damped_VR = np.empty((size, 0), dtype=np.float32) if self.damped_VR is None else self.damped_VR
        return mean_V, damped_VR


def together(sketches: Sequence[Sketch]) -> Sketch:
    """The tokens of all, one after another."""
    return Sketch(
        np.concatenate([one.levels_TV for one in sketches]),
        np.concatenate([one.scales_T for one in sketches]),
    )


def _finest_scales(directions_tV: Doubles) -> Doubles:
    """By which directions are divided to be rounded; 1 where there is nothing."""
    sizes_tV = np.abs(directions_tV)
    # Rounding may add a half to every value.
    largest_sum = _LARGEST_SUM / LARGEST_LEVEL - directions_tV.shape[1] / 2
    scales_t = np.maximum(sizes_tV.max(axis=1) / _LARGEST_VALUE, sizes_tV.sum(axis=1) / largest_sum)
    return np.where(scales_t > 0, scales_t, 1.0)


def _inverse_roots(squares_T: Doubles, is_left_T: npt.NDArray[np.bool_]) -> Doubles:
    """1 / root, and 0 where nothing is left."""
    is_left_T = is_left_T & (squares_T > 0)
    inverse_T: Doubles = np.where(is_left_T, squares_T, np.inf) ** -0.5
    return inverse_T
