"""The model's own keys as vectors: one per token, or their mean, wherever the text stood in its context.

Legend: L layers, T tokens, H kv heads, D head dim, V values of a vector: those of some layers side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.kv.rope import RotaryScheme, unrotate_keys

_STORED = np.dtype("<f4")


def token_keys(k_LTHD: Tensor, start: int, scheme: RotaryScheme, layers: Sequence[int]) -> Tensor:
    """Un-rotated keys of ``layers`` side by side -> [T, len(layers) * H * D], float32, on k's device.

    Token ``t`` of ``k_LTHD`` stands at position ``start + t``. There must be at least one token.
    """
    if k_LTHD.ndim != 4 or k_LTHD.shape[1] == 0:
        raise ValueError(f"keys {list(k_LTHD.shape)} are not [L, T >= 1, H, D]")
    return unrotate_keys(k_LTHD[list(layers)], start, scheme).transpose(0, 1).flatten(1)


def pool_keys(keys_TV: Tensor) -> Tensor:
    """The mean of :func:`token_keys` -> [V]."""
    return keys_TV.mean(dim=0)


def to_bytes(vector: Tensor | npt.NDArray[np.float32]) -> bytes:
    """A vector as little-endian float32, the form that the catalog stores."""
    return as_array(vector).astype(_STORED).tobytes()


def from_bytes(data: bytes) -> npt.NDArray[np.float32]:
    """Inverse of :func:`to_bytes`; a read-only view of ``data`` where the machine is little-endian."""
    return np.frombuffer(data, dtype=_STORED).astype(np.float32, copy=False)


def as_array(vector: Tensor | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A vector of any device and float type as a flat float32 array on the host."""
    if isinstance(vector, Tensor):
        vector = vector.detach().float().cpu().numpy()
    return np.asarray(vector, dtype=np.float32).reshape(-1)


def as_rows(vectors: Tensor | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One vector or several as a float32 array on the host -> [N, V]."""
    return as_array(vectors).reshape(-1, vectors.shape[-1])
