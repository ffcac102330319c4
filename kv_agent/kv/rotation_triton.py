"""Rotating keys on a GPU in one pass: loaded, turned in float32, rounded once, stored. Imports Triton.

Legend: T tokens, H kv heads, D head dim, R rotary dim, F = R / 2 planes. A row is one head of one token.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kv_agent.kv.triton_numbers import items, power_of_two, rounded, widened

_ROWS = 16  # that one program turns


def rotate_into(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
    """Write the keys ``[N, T, H, D]`` turned in the planes ``(i, i + F)``; the dims beyond as they are."""
    N, T, H, D = k_THD.shape
    F, num_rows = len(cos_F), T * H
    turn_rows[(-(-num_rows // _ROWS), N)](
        items(k_THD),
        items(out_THD),
        cos_F.to(k_THD.device),
        sin_F.to(k_THD.device),
        k_THD.stride(0),
        out_THD.stride(0),
        num_rows,
        D=D,
        F=F,
        PLANES=power_of_two(F),
        REST=power_of_two(D - 2 * F),
        ROWS=_ROWS,
        IS_BFLOAT16=k_THD.dtype == torch.bfloat16,
        enable_fp_fusion=False,  # torch rounds products, too
    )


@triton.jit(do_not_specialize=["num_rows"])  # chunks differ in it; others are a model's own
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
    a = widened(tl.load(source + first, mask=is_there, other=0), IS_BFLOAT16)
    b = widened(tl.load(source + first + F, mask=is_there, other=0), IS_BFLOAT16)
    c = tl.load(cos + planes, mask=is_plane, other=0)[None, :]
    s = tl.load(sin + planes, mask=is_plane, other=0)[None, :]
    tl.store(target + first, rounded(a * c - b * s, out.dtype.element_ty, IS_BFLOAT16), mask=is_there)
    tl.store(target + first + F, rounded(b * c + a * s, out.dtype.element_ty, IS_BFLOAT16), mask=is_there)
    if REST > 0:
        dims = 2 * F + tl.arange(0, REST)
        beyond = rows[:, None] * D + dims[None, :]
        is_left = (rows < num_rows)[:, None] & (dims < D)[None, :]
        tl.store(target + beyond, tl.load(source + beyond, mask=is_left, other=0), mask=is_left)
