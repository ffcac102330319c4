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
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


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

    bits, number, floats = numba.uint16[::1], numba.int64, numba.float32[::1]
    signature = numba.void(bits, bits, number, number, number, number, number, floats, floats)
    machine_code: Callable[..., None] = numba.njit(signature, nogil=True, error_model="numpy")(_rotate_rows)
    return machine_code


def _flat(x_THD: Tensor) -> Any:
    """From the first element to the last, gaps between leading indices included."""
    num_elements = (x_THD.shape[0] - 1) * x_THD.stride(0) + x_THD[0].numel()
    return x_THD.as_strided((num_elements,), (1,)).view(torch.uint16).numpy()


def _rotate_rows(
    k: Bits,
    out: Bits,
    k_step: int,
    out_step: int,
    N: int,
    num_rows: int,
    D: int,
    cos_F: Floats,
    sin_F: Floats,
) -> None:
    # Compiled, so all of it is spelled out: a call in here would keep the loop over planes from being one of
    # vector instructions, and so would indices that may wrap around (hence slices).
    F = cos_F.size
    for n in range(N):
        for row in range(num_rows):
            first = n * k_step + row * D
            target = n * out_step + row * D
            k_a, k_b = k[first : first + F], k[first + F : first + 2 * F]
            out_a, out_b = out[target : target + F], out[target + F : target + 2 * F]
            for i in range(F):
                # bfloat16 is the upper half of float32
                a = np.uint32(np.uint32(k_a[i]) << np.uint32(16)).view(np.float32)
                b = np.uint32(np.uint32(k_b[i]) << np.uint32(16)).view(np.float32)
                turned_a = np.float32(a * cos_F[i] - b * sin_F[i])
                turned_b = np.float32(b * cos_F[i] + a * sin_F[i])
                bits_a, bits_b = turned_a.view(np.uint32), turned_b.view(np.uint32)
                # To the nearest, halves to the even one; a NaN could be rounded to infinity.
                even_a = (bits_a >> np.uint32(16)) & np.uint32(1)
                even_b = (bits_b >> np.uint32(16)) & np.uint32(1)
                rounded_a = np.uint16((bits_a + np.uint32(0x7FFF) + even_a) >> np.uint32(16))
                rounded_b = np.uint16((bits_b + np.uint32(0x7FFF) + even_b) >> np.uint32(16))
                out_a[i] = rounded_a if turned_a == turned_a else np.uint16(0x7FC0)
                out_b[i] = rounded_b if turned_b == turned_b else np.uint16(0x7FC0)
            for i in range(2 * F, D):
                out[target + i] = k[first + i]
