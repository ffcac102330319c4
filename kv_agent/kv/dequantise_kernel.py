"""Bfloat16 KV from few bits a number, on the CPU in one pass: keys turned to their position, rounded once.

torch goes over float32 copies a dozen times. What comes out is the same, bit for bit. Keys are stored channel
by channel and wanted token by token: their codes change places first, while they are single bytes.

Machine code knows no bounds: :func:`dequantised` checks them. Addresses here are signed, as all it adds to
them: numba makes floats of signed and unsigned integers together.

Legend: L layers, 2 = (key, value), T tokens, H kv heads, D head dim, V = H D values of a token, F rotary
planes, of which ``i`` is dims ``(i, i + F)``; G groups of a row, S codes of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kv_agent.kv.quantize import FEW_BITS, LOW_OF_8_BITS, SCALES, Quantised
from kv_agent.kv.unpacking import transposer, unpacker
from kv_agent.kv.vector_code import CODES
from kv_agent.kv.vector_words import group_writer, quantised_turner, quantised_writer

_ITEM_BYTES, _FLOAT_BYTES = 2, 4


class MachineCode(NamedTuple):
    """What writes the keys and what writes the values of KV, without the GIL."""

    write_keys: Callable[..., None]
    write_values: Callable[..., None]


def writes(dtype: torch.dtype) -> bool:
    """Whether there is machine code for KV of this type."""
    return dtype == torch.bfloat16


def serves(shape: tuple[int, ...], dtype: torch.dtype, rotary_dim: int, data: Tensor) -> bool:
    """Whether there is anything here for KV ``[L, 2, T, H, D]`` of such data, none of it empty."""
    is_kv = len(shape) == 5 and min(shape) > 0 and shape[1] == 2 and shape[4] >= rotary_dim
    is_run = data.dtype == torch.uint8 and data.ndim == 1 and data.is_contiguous()
    return is_kv and is_run and writes(dtype) and data.device.type == "cpu"


def dequantised(keys: Quantised, values: Quantised, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Keys ``[L, H, D, T]``, turned in the planes ``(i, i + F)``, and values ``[L, T, V]`` -> KV, bfloat16.

    Cosines and sines are float32. The first call with so many bits in a process compiles, which takes a
    second or two.
    """
    (L, H, D, T), F = keys.layout.shape, cos_TF.shape[-1]
    if (
        min(L, H, D, T, F, D - 2 * F + 1) <= 0
        or values.layout.shape != (L, T, H * D)
        or values.layout.bits != keys.layout.bits
        or not cos_TF.shape == sin_TF.shape == (T, F)
    ):
        raise ValueError(f"keys {keys.layout}, values {values.layout} and turns {list(cos_TF.shape)} differ")
    kv_L2THD = torch.empty((L, 2, T, H, D), dtype=torch.bfloat16)
    items_L2THD, steps = kv_L2THD.view(torch.uint16).numpy(), SCALES.numpy()
    machine_code = compiled(keys.layout.bits)
    # Scratch memory is handed in: numba would free its own once only the address is still used.
    machine_code.write_keys(
        *_arrays(keys, D), steps, cos_TF.numpy(), sin_TF.numpy(), np.empty((T, D), np.uint8),
        np.full(D, LOW_OF_8_BITS, np.float32), np.empty(D, np.float32), items_L2THD,
    )  # fmt: skip
    machine_code.write_values(*_arrays(values, 1), steps, items_L2THD.reshape(L, 2, T, H * D))
    return kv_L2THD


def _arrays(quantised: Quantised, rows_at_once: int) -> tuple[Any, ...]:
    """Codes, scales and lows; groups of a row and codes of a group; room for the codes of so many rows."""
    (G, S), is_packed = quantised.layout.groups_GS, quantised.layout.bits == FEW_BITS
    unpacked = np.empty(rows_at_once * G * S + 2 if is_packed else 0, np.uint8)  # one more at either end
    return quantised.codes.numpy(), quantised.scales.numpy(), quantised.lows.numpy(), G, S, unpacked


@cache
def compiled(bits: int) -> MachineCode:
    """The machine code for so many bits, made once a process and never kept on disk."""
    import numba  # takes a second, too, unless vLLM has imported it

    codes, sizes, floats = numba.uint8[::1], (numba.int64, numba.int64), numba.float32[::1]
    quantised = (codes, codes, numba.int8[::1], *sizes, codes, floats)
    tables, rows, items = (numba.float32[:, ::1],) * 2, numba.uint8[:, ::1], numba.uint16
    of_keys = numba.void(*quantised, *tables, rows, floats, floats, items[:, :, :, :, ::1])
    of_values = numba.void(*quantised, items[:, :, :, ::1])
    make = numba.njit(of_keys, nogil=True, error_model="numpy")
    make_values = numba.njit(of_values, nogil=True, error_model="numpy")
    is_packed = bits == FEW_BITS
    return MachineCode(make(_key_writer(is_packed)), make_values(_value_writer(is_packed)))


def _key_writer(is_packed: bool) -> Any:
    unpack, transpose, write_group = unpacker(), transposer(), _key_group_writer()

    def write_keys(
        codes: Any,
        scales: Any,
        lows: Any,
        G: Any,
        S: Any,
        unpacked: Any,
        steps: Any,
        cos_TF: Any,
        sin_TF: Any,
        codes_TD: Any,
        lows_D: Any,
        scales_D: Any,
        out_L2THD: Any,
    ) -> None:
        L, _, T, H, D = out_L2THD.shape
        for layer in range(L):
            for h in range(H):
                channel = (layer * H + h) * D
                first = channel * G * S
                if is_packed:
                    unpack(unpacked, codes, first, D * G * S)
                    transpose(codes_TD, unpacked, first & 1, G * S)
                else:
                    transpose(codes_TD, codes, first, G * S)
                for g in range(G):
                    for d in range(D):
                        group = (channel + d) * G + g
                        scales_D[d] = steps[scales[group]]
                        if is_packed:
                            lows_D[d] = lows[group]
                    start, end = min(g * S, T), min(g * S + S, T)  # the last groups may be all padding
                    write_group(out_L2THD, layer, h, start, end, codes_TD, lows_D, scales_D, cos_TF, sin_TF)

    return write_keys


def _value_writer(is_packed: bool) -> Any:
    unpack, write_many = unpacker(), group_writer()
    number, rounded, low_of_8_bits = _inlined(_number), _inlined(_rounded), np.float32(LOW_OF_8_BITS)

    def write_values(
        codes: Any, scales: Any, lows: Any, G: Any, S: Any, unpacked: Any, steps: Any, out_L2TV: Any
    ) -> None:
        L, _, T, V = out_L2TV.shape
        for layer in range(L):
            for t in range(T):
                token = layer * T + t
                first = token * G * S
                if is_packed:
                    unpack(unpacked, codes, first, G * S)
                    first = first & 1
                found = unpacked if is_packed else codes
                source = np.int64(found.ctypes.data) + first
                target = np.int64(out_L2TV.ctypes.data) + ((layer * 2 + 1) * T + t) * V * _ITEM_BYTES
                for g in range(G):
                    scale, low = steps[scales[token * G + g]], low_of_8_bits
                    if is_packed:
                        low = np.float32(lows[token * G + g])
                    start, end = min(g * S, V), min(g * S + S, V)  # the last groups may be all padding
                    rest = end - (end - start) % CODES
                    for v in range(start, rest, CODES):
                        write_many(target + v * _ITEM_BYTES, source + v, low, scale)
                    for v in range(rest, end):
                        out_L2TV[layer, 1, t, v] = rounded(number(found[first + v], low, scale))

    return write_values


def _key_group_writer() -> Any:
    """``(out, layer, h, start, end, ...)``: one head's keys of the tokens of a group, turned."""
    turn_planes, write_channels = quantised_turner(), quantised_writer()
    number, rounded = _inlined(_number), _inlined(_rounded)

    # No slices: numba would count references to them, which takes longer than what is done here.
    def write_group(
        out_L2THD: Any,
        layer: Any,
        h: Any,
        start: Any,
        end: Any,
        codes_TD: Any,
        lows_D: Any,
        scales_D: Any,
        cos_TF: Any,
        sin_TF: Any,
    ) -> None:
        _, _, T, H, D = out_L2THD.shape
        F = cos_TF.shape[1]
        rest_F, rest_D = F - F % CODES, D - (D - 2 * F) % CODES
        low, scale = np.int64(lows_D.ctypes.data), np.int64(scales_D.ctypes.data)
        for t in range(start, end):
            target = np.int64(out_L2THD.ctypes.data) + ((layer * 2 * T + t) * H + h) * D * _ITEM_BYTES
            source = np.int64(codes_TD.ctypes.data) + t * D
            cos = np.int64(cos_TF.ctypes.data) + t * F * _FLOAT_BYTES
            sin = np.int64(sin_TF.ctypes.data) + t * F * _FLOAT_BYTES
            for i in range(0, rest_F, CODES):
                there, here, wide = target + i * _ITEM_BYTES, source + i, i * _FLOAT_BYTES
                turn_planes(there, here, low + wide, scale + wide, cos + wide, sin + wide, F)
            for i in range(rest_F, F):
                a = number(codes_TD[t, i], lows_D[i], scales_D[i])
                b = number(codes_TD[t, i + F], lows_D[i + F], scales_D[i + F])
                out_L2THD[layer, 0, t, h, i] = rounded(a * cos_TF[t, i] - b * sin_TF[t, i])
                out_L2THD[layer, 0, t, h, i + F] = rounded(b * cos_TF[t, i] + a * sin_TF[t, i])
            for d in range(2 * F, rest_D, CODES):
                there, here, wide = target + d * _ITEM_BYTES, source + d, d * _FLOAT_BYTES
                write_channels(there, here, low + wide, scale + wide)
            for d in range(rest_D, D):
                out_L2THD[layer, 0, t, h, d] = rounded(number(codes_TD[t, d], lows_D[d], scales_D[d]))

    return _inlined(write_group)


def _number(code: Any, low: Any, scale: Any) -> Any:
    return (np.float32(code) + low) * scale


def _rounded(number: Any) -> Any:
    """To bfloat16, to the nearest, halves to the even one; there is no NaN among dequantised numbers."""
    bits = np.float32(number).view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))


def _inlined(plain: Any) -> Any:
    import numba

    return numba.njit(error_model="numpy")(plain)
