"""Rotating keys on a GPU in one pass: loaded, turned in float32, rounded once, stored. Imports Triton.

bfloat16 comes as its bits and is widened and rounded by hand, for Triton's interpreter, which runs the same
code on the CPU, would cut it off where a GPU rounds.

Legend: T tokens, H kv heads, D head dim, R rotary dim, F = R / 2 planes. A row is one head of one token.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # that one program turns


def rotate_into(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
    """Write the keys ``[N, T, H, D]`` turned in the planes ``(i, i + F)``; the dims beyond as they are."""
    N, T, H, D = k_THD.shape
    F, num_rows = len(cos_F), T * H
    is_bfloat16 = k_THD.dtype == torch.bfloat16
    turn_rows[(-(-num_rows // _ROWS), N)](
        k_THD.view(torch.int16) if is_bfloat16 else k_THD,
        out_THD.view(torch.int16) if is_bfloat16 else out_THD,
        cos_F.to(k_THD.device),
        sin_F.to(k_THD.device),
        k_THD.stride(0),
        out_THD.stride(0),
        num_rows,
        D=D,
        F=F,
        PLANES=_power_of_two(F),
        REST=_power_of_two(D - 2 * F),
        ROWS=_ROWS,
        IS_BFLOAT16=is_bfloat16,
        enable_fp_fusion=False,  # torch rounds products, too
    )


@triton.jit
def turn_rows(
    k,
    out,
    cos,
    sin,
    k_step,
    out_step,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    PLANES: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    """Of ``num_rows`` rows a leading index; ``PLANES`` and ``REST`` are powers of two that hold the dims."""
    n = tl.program_id(1).to(tl.int64)
    source, target = k + n * k_step, out + n * out_step
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    planes = tl.arange(0, PLANES)
    is_plane = planes < F
    is_there = (rows < num_rows)[:, None] & is_plane[None, :]
    first = rows[:, None] * D + planes[None, :]
    a = _widened(tl.load(source + first, mask=is_there, other=0), IS_BFLOAT16)
    b = _widened(tl.load(source + first + F, mask=is_there, other=0), IS_BFLOAT16)
    c = tl.load(cos + planes, mask=is_plane, other=0)[None, :]
    s = tl.load(sin + planes, mask=is_plane, other=0)[None, :]
    tl.store(target + first, _rounded(a * c - b * s, out.dtype.element_ty, IS_BFLOAT16), mask=is_there)
    tl.store(target + first + F, _rounded(b * c + a * s, out.dtype.element_ty, IS_BFLOAT16), mask=is_there)
    if REST > 0:
        dims = 2 * F + tl.arange(0, REST)
        beyond = rows[:, None] * D + dims[None, :]
        is_left = (rows < num_rows)[:, None] & (dims < D)[None, :]
        tl.store(target + beyond, tl.load(source + beyond, mask=is_left, other=0), mask=is_left)


@triton.jit
def _widened(x, IS_BFLOAT16: tl.constexpr):
    if IS_BFLOAT16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  # Triton compiles one of both
        return x.to(tl.float32)


@triton.jit
def _rounded(x, dtype: tl.constexpr, IS_BFLOAT16: tl.constexpr):
    """To the nearest, halves to the even one; a NaN rounded like a number could become infinite."""
    if IS_BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, upper, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)
    else:  # noqa: RET505
        return x.to(dtype)


def _power_of_two(count: int) -> int:
    """The next one, as Triton's ranges want; none of nothing."""
    return 1 << (count - 1).bit_length() if count else 0
