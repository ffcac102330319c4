"""Keys of every token in one byte a value: small enough to keep beside the catalog's row of a chunk.

Legend: T tokens, V values per token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8]

_HEADER = struct.Struct("<II")  # T, V
_SCALE = np.dtype("<f4")  # one a token, the largest of its values / 127
LARGEST_LEVEL = 127
_BLOCK_BYTES = 1 << 20  # of floats made of levels at a time: they stay in a core's cache


class Sketch(NamedTuple):
    """Rounded keys: a token's are its levels times its scale."""

    levels_TV: Levels
    scales_T: Floats

    def keys(self) -> Floats:
        """-> [T, V]"""
        keys_TV: Floats = self.levels_TV * self.scales_T[:, None]
        return keys_TV


def rounded(keys_TV: Floats) -> Sketch:
    """Round each token's keys to 255 levels; they must be finite."""
    scales_T1 = np.abs(keys_TV).max(axis=1, keepdims=True, initial=0)
    scales_T1 = (scales_T1 / LARGEST_LEVEL).astype(_SCALE)
    scaled_TV = np.divide(keys_TV, scales_T1, out=np.zeros_like(keys_TV), where=scales_T1 > 0)
    return Sketch(np.rint(scaled_TV).astype(np.int8), scales_T1[:, 0])


def to_sketch(keys_TV: Tensor | Floats) -> bytes:
    """Keys as :func:`rounded`, in bytes."""
    if isinstance(keys_TV, Tensor):
        keys_TV = keys_TV.detach().float().cpu().numpy()
    if keys_TV.ndim != 2 or not np.isfinite(keys_TV).all():
        raise ValueError(f"keys of shape {keys_TV.shape} are not [T, V], or not finite")
    sketch = rounded(keys_TV)
    return b"".join((_HEADER.pack(*keys_TV.shape), sketch.scales_T.tobytes(), sketch.levels_TV.tobytes()))


def read_sketch(data: bytes) -> Sketch:
    """What :func:`to_sketch` wrote, as views of it; ``ValueError`` if these are not such bytes."""
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are no sketch")
    num_tokens, size = _HEADER.unpack_from(data)
    wanted = _HEADER.size + num_tokens * (_SCALE.itemsize + size)
    if len(data) != wanted:
        raise ValueError(f"a sketch of {num_tokens} tokens has {wanted} bytes, these are {len(data)}")
    scales_T = np.frombuffer(data, _SCALE, num_tokens, _HEADER.size)
    levels = np.frombuffer(data, np.int8, num_tokens * size, _HEADER.size + scales_T.nbytes)
    return Sketch(levels.reshape(num_tokens, size), scales_T.astype(np.float32, copy=False))


def from_sketch(data: bytes) -> Floats:
    """The keys that :func:`to_sketch` rounded -> [T, V]; ``ValueError`` if these are not such bytes."""
    return read_sketch(data).keys()


def float_blocks(levels_TV: Levels) -> Iterator[tuple[slice, Floats]]:
    """The levels as floats, some rows at a time, with the rows they are."""
    num_rows = max(1, _BLOCK_BYTES // (4 * max(1, levels_TV.shape[1])))
    for start in range(0, len(levels_TV), num_rows):
        rows = slice(start, min(start + num_rows, len(levels_TV)))
        yield rows, levels_TV[rows].astype(np.float32)
