"""Pooled keys: one vector per chunk that says what it is about, wherever it stood in its context.

Legend: L layers, T tokens, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kv_agent.kv.rope import RotaryScheme, unrotate_keys

_STORED = np.dtype("<f4")


def pool_keys(k_LTHD: Tensor, start: int, scheme: RotaryScheme, layers: Sequence[int]) -> Tensor:
    """Un-rotated keys of ``layers``, averaged over tokens -> [len(layers) * H * D], float32, on k's device.

    Token ``t`` of ``k_LTHD`` stands at position ``start + t``. There must be at least one token.
    """
    if k_LTHD.ndim != 4 or k_LTHD.shape[1] == 0:
        raise ValueError(f"keys {list(k_LTHD.shape)} are not [L, T >= 1, H, D]")
    chosen_LTHD = k_LTHD[list(layers)]
    return unrotate_keys(chosen_LTHD, start, scheme).mean(dim=1).flatten()  # [layers, H, D] -> one vector


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
