"""KV from few bits a number on a GPU in one pass, keys turned to their position. Imports Triton.

Keys are stored channel by channel and wanted token by token; Triton has a tile's numbers change places
between threads, so that loads and stores both go along memory.

Legend: L layers, 2 = (key, value), T tokens, H kv heads, D head dim, V = H D values of a token, F rotary
planes, of which ``i`` is dims ``(i, i + F)``; G groups of a row, S codes of a group.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kv_agent.kv.quantize import FEW_BITS, LOW_OF_8_BITS, SCALES, Quantised
from kv_agent.kv.triton_numbers import items, power_of_two, rounded

_TOKENS, _WIDTH = 32, 64  # of one program: tokens, and values of each
# Chunks differ in these: code made for all of them is made when an engine starts, not when one is loaded.
_ANY_SIZE, _ANYWHERE = ["T", "G", "S"], ["codes", "scales", "lows"]

_LOW_OF_8_BITS = tl.constexpr(LOW_OF_8_BITS)


def write(out_L2THD: Tensor, keys: Quantised, values: Quantised, cos_TF: Tensor, sin_TF: Tensor) -> None:
    """Write keys ``[L, H, D, T]``, turned in the planes ``(i, i + F)``, and values ``[L, T, V]``.

    All are on one device. Nothing is checked here: see :func:`kv_agent.kv.dequantise_gpu.dequantised`.
    """
    L, _, T, H, D = out_L2THD.shape
    F = cos_TF.shape[1]
    numbers = {"IS_PACKED": keys.layout.bits == FEW_BITS, "IS_BFLOAT16": out_L2THD.dtype == torch.bfloat16}
    out, steps, num_tiles = items(out_L2THD), _steps(out_L2THD.device), triton.cdiv(T, _TOKENS)
    # Torch rounds products, too: no fused multiplication and addition.
    write_keys[(num_tiles, H, L)](
        *_parts(keys), steps, cos_TF, sin_TF, out, T, *keys.layout.groups_GS,
        D=D, F=F, PLANES=power_of_two(F), REST=power_of_two(D - 2 * F), TOKENS=_TOKENS, **numbers,
        enable_fp_fusion=False,
    )  # fmt: skip
    write_values[(num_tiles, triton.cdiv(H * D, _WIDTH), L)](
        *_parts(values), steps, out, T, *values.layout.groups_GS,
        V=H * D, TOKENS=_TOKENS, WIDTH=_WIDTH, **numbers, enable_fp_fusion=False,
    )  # fmt: skip


def _parts(quantised: Quantised) -> tuple[Tensor, Tensor, Tensor]:
    return quantised.codes, quantised.scales, quantised.lows


@cache
def _steps(device: torch.device) -> Tensor:
    return SCALES.to(device)


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANYWHERE)
def write_keys(
    codes,
    scales,
    lows,
    steps,
    cos,
    sin,
    out,
    T,
    G,
    S,
    D: tl.constexpr,
    F: tl.constexpr,
    PLANES: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    """One head's keys of ``TOKENS`` tokens; ``PLANES`` and ``REST`` are powers of two that hold the dims."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    row = (layer * H + h) * D
    target = out + ((layer * 2 * T + t) * H + h)[None, :] * D
    dtype = out.dtype.element_ty
    i = tl.arange(0, PLANES)
    is_there = (i < F)[:, None] & (t < T)[None, :]
    a = _numbers(codes, scales, lows, steps, row + i, t, is_there, G, S, IS_PACKED)
    b = _numbers(codes, scales, lows, steps, row + F + i, t, is_there, G, S, IS_PACKED)
    turn = t[None, :] * F + i[:, None]
    c = tl.load(cos + turn, mask=is_there, other=0)
    s = tl.load(sin + turn, mask=is_there, other=0)
    tl.store(target + i[:, None], rounded(a * c - b * s, dtype, IS_BFLOAT16), mask=is_there)
    tl.store(target + F + i[:, None], rounded(b * c + a * s, dtype, IS_BFLOAT16), mask=is_there)
    if REST > 0:
        d = 2 * F + tl.arange(0, REST)
        is_left = (d < D)[:, None] & (t < T)[None, :]
        x = _numbers(codes, scales, lows, steps, row + d, t, is_left, G, S, IS_PACKED)
        tl.store(target + d[:, None], rounded(x, dtype, IS_BFLOAT16), mask=is_left)


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANYWHERE)
def write_values(
    codes,
    scales,
    lows,
    steps,
    out,
    T,
    G,
    S,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    """``WIDTH`` values of each of ``TOKENS`` tokens."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    v = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    layer = tl.program_id(2).to(tl.int64)
    is_there = (t < T)[:, None] & (v < V)[None, :]
    x = _numbers(codes, scales, lows, steps, layer * T + t, v, is_there, G, S, IS_PACKED)
    target = out + ((layer * 2 + 1) * T + t)[:, None] * V + v[None, :]
    tl.store(target, rounded(x, out.dtype.element_ty, IS_BFLOAT16), mask=is_there)


@triton.jit
def _numbers(codes, scales, lows, steps, rows, places, is_there, G, S, IS_PACKED: tl.constexpr):
    """What stands at these places of these rows, float32 ``[rows, places]``."""
    code_at = rows[:, None] * (G * S) + places[None, :]
    group = rows[:, None] * G + (places // S)[None, :]
    scale = tl.load(steps + tl.load(scales + group, mask=is_there, other=0).to(tl.int32))
    if IS_PACKED:
        pair = tl.load(codes + (code_at >> 1), mask=is_there, other=0).to(tl.int32)
        code = (pair >> ((code_at & 1) * 4).to(tl.int32)) & 15
        low = tl.load(lows + group, mask=is_there, other=0).to(tl.float32)
        return (code.to(tl.float32) + low) * scale
    else:  # noqa: RET505  # Triton compiles one of both
        code = tl.load(codes + code_at, mask=is_there, other=0)
        return (code.to(tl.float32) + _LOW_OF_8_BITS) * scale
