"""Where a sequence of tokens is cut into chunks: at places that the tokens themselves choose.

Every place has a hash of the tokens before it; one is a cut if no place around it has a smaller hash. So the
same text is cut alike wherever it stands, but for its edges, and an inserted word moves only the cuts around
it (the local maximum approach of Bjørner, Blass and Gurevich, 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_WINDOW = 4  # tokens that are hashed
_SHORTEST = 4  # chunks but the last have at least one of so many parts of the most tokens
_MULTIPLIERS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], dtype=np.uint64)
_SHIFT = np.uint64(29)


def cut_lengths(token_ids: Sequence[int], most: int) -> list[int]:
    """Lengths of the chunks of these tokens, each at most ``most``; they add up to all tokens.

    Cuts that the text chooses are at least a quarter of ``most`` apart, half of it on average. What lies
    between two of them and is too long, or all where ``most`` is too small for a choice, is cut by length.
    """
    shortest = most // _SHORTEST
    chosen = _places(token_ids, shortest) if shortest >= _WINDOW else []
    lengths: list[int] = []
    for start, end in pairwise([0, *chosen, len(token_ids)]):
        whole, rest = divmod(end - start, most)
        lengths += [most] * whole + ([rest] if rest else [])
    return lengths


def _places(token_ids: Sequence[int], apart: int) -> list[int]:
    """Where the hash is smaller than anywhere nearer than ``apart``; that far from the beginning, too."""
    if len(token_ids) <= apart:
        return []
    hashes_N = _hashes(np.asarray(token_ids, dtype=np.uint64))
    beyond = np.full(apart - 1, np.iinfo(np.uint64).max)
    least_N = _running_least(np.concatenate([beyond, hashes_N, beyond]), apart - 1)
    is_least_N = (hashes_N < least_N[: len(hashes_N)]) & (hashes_N < least_N[apart : apart + len(hashes_N)])
    places = np.flatnonzero(is_least_N) + _WINDOW
    return [int(place) for place in places if apart <= place < len(token_ids)]


def _hashes(ids_T: Hashes) -> Hashes:
    """One for every window -> [T - _WINDOW + 1]; sums and products wrap around."""
    num = len(ids_T) - _WINDOW + 1
    mixed_N = np.zeros(num, dtype=np.uint64)
    for at, multiplier in enumerate(_MULTIPLIERS):
        mixed_N += (ids_T[at : at + num] + np.uint64(1)) * multiplier
    mixed_N ^= mixed_N >> _SHIFT
    mixed_N *= _MULTIPLIERS[0]
    mixed_N ^= mixed_N >> _SHIFT
    return mixed_N


def _running_least(hashes_N: Hashes, size: int) -> Hashes:
    """The least of ``size`` hashes from each one on -> [N - size + 1], in steps that double what is seen."""
    least_N, seen = hashes_N, 1
    while seen < size:
        step = min(seen, size - seen)
        least_N = np.minimum(least_N[:-step], least_N[step:])
        seen += step
    return least_N
