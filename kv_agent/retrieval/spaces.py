"""The spaces in which keys are compared: centred, and whitened where enough is known of their tokens.

Keys of all tokens share a large part, and a few directions vary far more than the others; both hide which
token it is. Whitening takes the shared part away and gives every direction the same weight.

Legend: N vectors, T tokens, V values of a vector, R directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kv_agent.retrieval.token_space import TokenSpace

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_SHRINKAGE = 1e-2  # of the mean variance, added to each, so that rounding is not blown up
# Of 128 directions 8 ranked the turns of the recall world as well as all, see docs/retrieval.md.
_DAMPED = 64
_NOTHING_LEFT = 1e-6  # of a vector's length: what remains is rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """``mean_V`` is taken away, then ``matrix_VV`` multiplied; ``None`` leaves a step out."""

    mean_V: Floats | None = None
    matrix_VV: Floats | None = None

    def unit(self, vectors_NV: Floats) -> Floats:
        """The vectors in this space with length one -> [N, V]; zero where nothing but rounding is left."""
        moved_NV = vectors_NV if self.mean_V is None else vectors_NV - self.mean_V
        left_N1 = _lengths(moved_NV) > _NOTHING_LEFT * _lengths(vectors_NV)
        if self.matrix_VV is not None:
            moved_NV = moved_NV @ self.matrix_VV
        unit_NV: Floats = np.divide(moved_NV, _lengths(moved_NV), out=np.zeros_like(moved_NV), where=left_N1)
        return unit_NV


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spaces:
    """Where means of chunks are compared, and where their tokens are."""

    pooled: Space = field(default_factory=Space)
    tokens: TokenSpace = field(default_factory=TokenSpace)


def centred_on(vectors_NV: Floats) -> Spaces:
    """Without knowledge of single tokens only the mean can be taken away."""
    mean_V = vectors_NV.mean(axis=0, dtype=np.float64).astype(np.float32)
    return Spaces(pooled=Space(mean_V=mean_V), tokens=TokenSpace(mean_V=mean_V))


def whitening_of(tokens_TV: Floats) -> Spaces:
    """Mean zero and, but for shrinkage, unit covariance over these tokens.

    Of single tokens only the directions in which they vary most are brought to the variance of the others.
    """
    mean_V = tokens_TV.mean(axis=0, dtype=np.float64)
    variances_R, directions_VR = _principal(tokens_TV - mean_V)
    mean_variance = variances_R.sum() / len(mean_V)
    if mean_variance <= _NOTHING_LEFT**2 * (mean_V**2).mean():  # all tokens are the same
        return centred_on(tokens_TV)
    shrinkage = _SHRINKAGE * mean_variance
    # Directions in which no token varies have the shrinkage alone.
    elsewhere = shrinkage**-0.5
    scales_R = (variances_R + shrinkage) ** -0.5 - elsewhere
    matrix_VV = (directions_VR * scales_R) @ directions_VR.T
    matrix_VV[np.diag_indices_from(matrix_VV)] += elsewhere
    damped_VR = _damped(variances_R, directions_VR, shrinkage)
    return Spaces(
        pooled=Space(mean_V=mean_V.astype(np.float32), matrix_VV=matrix_VV.astype(np.float32)),
        tokens=TokenSpace(mean_V=mean_V.astype(np.float32), damped_VR=damped_VR),
    )


def _damped(variances_R: Doubles, directions_VR: Doubles, shrinkage: float) -> Floats:
    """The leading directions, of such lengths that what they take away leaves the others' mean variance."""
    strongest = np.argsort(-variances_R)[:_DAMPED]
    leading = variances_R[strongest]
    num_others = len(directions_VR) - len(strongest)
    others = (variances_R.sum() - leading.sum()) / num_others if num_others else 0.0
    taken = 1 - (others + shrinkage) / (leading + shrinkage)
    damped_VR = directions_VR[:, strongest] * np.sqrt(taken.clip(min=0))
    return np.ascontiguousarray(damped_VR, dtype=np.float32)


def _principal(centred_TV: Doubles) -> tuple[Doubles, Doubles]:
    """Variances and directions in which these tokens vary -> [R], [V, R], by the smaller of two matrices."""
    num_tokens, size = centred_TV.shape
    if num_tokens >= size:
        variances_R, directions_VR = np.linalg.eigh(centred_TV.T @ centred_TV / num_tokens)
        return variances_R.clip(min=0), directions_VR
    variances_R, mixtures_TR = np.linalg.eigh(centred_TV @ centred_TV.T / num_tokens)
    is_left_R = variances_R > _NOTHING_LEFT * variances_R.max(initial=0)
    variances_R, mixtures_TR = variances_R[is_left_R], mixtures_TR[:, is_left_R]
    return variances_R, centred_TV.T @ mixtures_TR / np.sqrt(num_tokens * variances_R)


def _lengths(vectors_NV: Floats) -> Floats:
    lengths_N1: Floats = np.linalg.norm(vectors_NV, axis=1, keepdims=True)
    return lengths_N1
