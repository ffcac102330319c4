"""Codes of quantised numbers, brought to where machine code wants them: a byte each, token by token.

Functions for numba. They know no bounds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kv_agent.kv.vector_code import CODES
from kv_agent.kv.vector_words import code_unpacker, square_transposer


@cache
def unpacker() -> Any:
    """``(unpacked, packed, first, count)``: so many codes from ``first`` on, a byte each.

    Whole bytes are unpacked: with an odd ``first`` a code stands before it.
    """
    import numba

    unpack_many = code_unpacker()

    def unpack(unpacked: Any, packed: Any, first: Any, count: Any) -> None:
        start, end = first >> 1, (first + count + 1) >> 1
        target, source = np.int64(unpacked.ctypes.data), np.int64(packed.ctypes.data) + start
        rest = (end - start) - (end - start) % CODES
        for pair in range(0, rest, CODES):
            unpack_many(target + 2 * pair, source + pair)
        for pair in range(rest, end - start):
            unpacked[2 * pair] = packed[start + pair] & np.uint8(15)
            unpacked[2 * pair + 1] = packed[start + pair] >> np.uint8(4)

    return numba.njit(error_model="numpy")(unpack)


@cache
def transposer() -> Any:
    """``(rows_TD, codes, first, step)``: D columns of T codes, ``step`` apart, become rows."""
    import numba

    transpose_square = square_transposer()

    def transpose(rows_TD: Any, codes: Any, first: Any, step: Any) -> None:
        T, D = rows_TD.shape
        target, source = np.int64(rows_TD.ctypes.data), np.int64(codes.ctypes.data) + first
        rest_T, rest_D = T - T % CODES, D - D % CODES
        for d in range(0, rest_D, CODES):
            for t in range(0, rest_T, CODES):
                transpose_square(target + t * D + d, source + d * step + t, D, step)
        for d in range(D):
            for t in range(rest_T if d < rest_D else 0, T):
                rows_TD[t, d] = codes[first + d * step + t]

    return numba.njit(error_model="numpy")(transpose)
