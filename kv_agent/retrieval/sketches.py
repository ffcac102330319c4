"""Keys of every token in one byte a value: small enough to keep beside the catalog's row of a chunk.

Legend: T tokens, V values per token.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]

_HEADER = struct.Struct("<II")  # T, V
_SCALE = np.dtype("<f4")  # one a token, the largest of its values / 127
_LEVELS = 127


def to_sketch(keys_TV: Tensor | Floats) -> bytes:
    """Round each token's keys to 255 levels; they must be finite."""
    if isinstance(keys_TV, Tensor):
        keys_TV = keys_TV.detach().float().cpu().numpy()
    if keys_TV.ndim != 2 or not np.isfinite(keys_TV).all():
        raise ValueError(f"keys of shape {keys_TV.shape} are not [T, V], or not finite")
    scale_T1 = np.abs(keys_TV).max(axis=1, keepdims=True, initial=0)
    scale_T1 = (scale_T1 / _LEVELS).astype(_SCALE)
    scaled_TV = np.divide(keys_TV, scale_T1, out=np.zeros_like(keys_TV), where=scale_T1 > 0)
    levels_TV = np.rint(scaled_TV).astype(np.int8)
    num_tokens, size = keys_TV.shape
    return b"".join((_HEADER.pack(num_tokens, size), scale_T1.tobytes(), levels_TV.tobytes()))


def from_sketch(data: bytes) -> Floats:
    """The keys that :func:`to_sketch` rounded -> [T, V]; ``ValueError`` if these are not such bytes."""
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are no sketch")
    num_tokens, size = _HEADER.unpack_from(data)
    wanted = _HEADER.size + num_tokens * (_SCALE.itemsize + size)
    if len(data) != wanted:
        raise ValueError(f"a sketch of {num_tokens} tokens has {wanted} bytes, these are {len(data)}")
    scale_T = np.frombuffer(data, _SCALE, num_tokens, _HEADER.size)
    levels = np.frombuffer(data, np.int8, num_tokens * size, _HEADER.size + scale_T.nbytes)
    keys_TV: Floats = levels.reshape(num_tokens, size) * scale_T.astype(np.float32)[:, None]
    return keys_TV
