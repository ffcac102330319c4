"""Rotating bfloat16 keys on the CPU in one pass: widened, turned in float32, rounded once, written.

torch does it in a dozen passes over float32 copies. What comes out is the same, bit for bit; only which NaN
stands for one may differ.

Legend: T tokens, H kv heads, D head dim, R rotary dim, F = R / 2 planes. A row is one head of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kv_agent.kv.vector_code import PLANES
from kv_agent.kv.vector_words import plane_turner

_ITEM_BYTES, _FLOAT_BYTES = 2, 4


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is anything here for such keys."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def fits(out_THD: Tensor, k_THD: Tensor) -> bool:
    """Whether :func:`rotate_into` takes them: such keys, one run of rows per leading index."""
    return all(
        serves(x.dtype, x.device) and x.ndim == 4 and x.numel() > 0 and x[0].is_contiguous()
        for x in (out_THD, k_THD)
    )


def rotate_into(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
    """Write the keys ``[N, T, H, D]`` turned in the planes ``(i, i + F)``; the dims beyond as they are.

    Without the GIL. The first call in a process compiles, which takes about a second.
    """
    N, T, H, D = k_THD.shape
    compiled()(
        _flat(k_THD),
        _flat(out_THD),
        k_THD.stride(0),
        out_THD.stride(0),
        N,
        T * H,
        D,
        cos_F.numpy(),
        sin_F.numpy(),
    )


@cache
def compiled() -> Callable[..., None]:
    """The machine code, made once a process and never kept on disk."""
    import numba  # takes a second, too, unless vLLM has imported it

    turn_planes = plane_turner()

    def rotate_rows(
        k: Any, out: Any, k_step: Any, out_step: Any, N: Any, num_rows: Any, D: Any, cos_F: Any, sin_F: Any
    ) -> None:
        F = cos_F.size
        by_vectors = F // PLANES * PLANES
        cos, sin = np.uint64(cos_F.ctypes.data), np.uint64(sin_F.ctypes.data)
        source, target = np.uint64(k.ctypes.data), np.uint64(out.ctypes.data)
        apart = np.uint64(F * _ITEM_BYTES)
        for n in range(N):
            for row in range(num_rows):
                first, there = n * k_step + row * D, n * out_step + row * D
                for i in range(0, by_vectors, PLANES):
                    turn_planes(
                        target + np.uint64((there + i) * _ITEM_BYTES),
                        source + np.uint64((first + i) * _ITEM_BYTES),
                        apart,
                        cos + np.uint64(i * _FLOAT_BYTES),
                        sin + np.uint64(i * _FLOAT_BYTES),
                    )
                for i in range(by_vectors, F):
                    turn_plane(k, out, first + i, there + i, F, cos_F[i], sin_F[i])
                for i in range(2 * F, D):
                    out[there + i] = k[first + i]

    bits, number, floats = numba.uint16[::1], numba.int64, numba.float32[::1]
    turn_plane = numba.njit(error_model="numpy")(_turn_plane)
    signature = numba.void(bits, bits, number, number, number, number, number, floats, floats)
    machine_code: Callable[..., None] = numba.njit(signature, nogil=True, error_model="numpy")(rotate_rows)
    return machine_code


def _flat(x_THD: Tensor) -> Any:
    """From the first element to the last, gaps between leading indices included."""
    num_elements = (x_THD.shape[0] - 1) * x_THD.stride(0) + x_THD[0].numel()
    return x_THD.as_strided((num_elements,), (1,)).view(torch.uint16).numpy()


def _turn_plane(k: Any, out: Any, first: Any, there: Any, F: Any, cos: Any, sin: Any) -> None:
    """What :func:`plane_turner` does with many."""
    # bfloat16 is the upper half of float32
    a = np.uint32(np.uint32(k[first]) << np.uint32(16)).view(np.float32)
    b = np.uint32(np.uint32(k[first + F]) << np.uint32(16)).view(np.float32)
    turned_a, turned_b = np.float32(a * cos - b * sin), np.float32(b * cos + a * sin)
    bits_a, bits_b = turned_a.view(np.uint32), turned_b.view(np.uint32)
    even_a = (bits_a >> np.uint32(16)) & np.uint32(1)
    even_b = (bits_b >> np.uint32(16)) & np.uint32(1)
    rounded_a = np.uint16((bits_a + np.uint32(0x7FFF) + even_a) >> np.uint32(16))
    rounded_b = np.uint16((bits_b + np.uint32(0x7FFF) + even_b) >> np.uint32(16))
    out[there] = rounded_a if turned_a == turned_a else np.uint16(0x7FC0)
    out[there + F] = rounded_b if turned_b == turned_b else np.uint16(0x7FC0)
