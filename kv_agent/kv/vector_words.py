"""What machine code of ours does with vectors, for numba, which has no words for it: each an LLVM intrinsic.

Stores to a cache's blocks go past the processor's own caches (non-temporal): the blocks are as large as those
or larger, and to write half a line otherwise means to read it first. On two cores of an AMD EPYC rows are
written three times as fast by this.

Quantised numbers are ``(code + low) * scale``, each code a byte here: :mod:`kv_agent.kv.quantize`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from kv_agent.kv.vector_code import CODES, VECTOR_BYTES, ByteCode, FloatCode, WordCode

TOKENS = 32  # whose keys are turned into columns at once: the columns fill whole lines of 64 bytes
DIMS = 16  # two bytes each, a vector
_ITEM_BYTES, _FLOAT_BYTES = 2, 4


@cache
def address_pointer(word: Any) -> Any:
    """``(address) -> pointer`` to such words."""
    import numpy as np
    from numba import types
    from numba.extending import intrinsic
    from numba.np.numpy_support import from_dtype

    pointer = types.CPointer(from_dtype(np.dtype(word)))

    @intrinsic  # type: ignore[untyped-decorator]
    def to_pointer(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return pointer(types.uintp), generate

    return to_pointer


@cache
def row_copier(num_bytes: int, *, past_caches: bool) -> Any:
    """``(target, source)``: copies a row of so many bytes, a multiple of a vector's; targets are aligned."""

    def copy(builder: Any, target: Any, source: Any) -> None:
        code = WordCode(builder)
        offsets = range(0, num_bytes, VECTOR_BYTES)
        loaded = [code.load(source, offset) for offset in offsets]
        for offset, vector in zip(offsets, loaded, strict=True):
            code.store(vector, target, offset, past_caches=past_caches)

    return _of_addresses(copy)


@cache
def column_writer(row_bytes: int, column_bytes: int) -> Any:
    """``(target, source)``: of 32 rows, so far apart, 16 items of two bytes each become columns of 32.

    Items are read across rows, in an order that no processor foresees: rows are to be in its nearest cache.
    """

    def write(builder: Any, target: Any, source: Any) -> None:
        code = WordCode(builder)
        lines: list[list[Any]] = [[] for _ in range(DIMS)]
        for first in range(0, TOKENS, 16):
            rows = [code.load(source, (first + token) * row_bytes) for token in range(16)]
            groups = [code.columns_of_four(rows[token : token + 4]) for token in range(0, 16, 4)]
            for number in range(4):
                columns = code.transposed([group[number] for group in groups])
                for word, column in enumerate(columns):
                    lines[4 * word + number].append(column)
        for dim, line in enumerate(lines):
            for part, vector in enumerate(line):
                offset = dim * column_bytes + part * VECTOR_BYTES
                code.store(vector, target, offset, past_caches=True)

    return _of_addresses(write)


@cache
def plane_turner() -> Any:
    """``(target, source, apart, cos, sin)``: turns 16 planes of bfloat16, halves so many bytes apart.

    Widened, turned in float32, rounded to the nearest, halves to the even one; NaN stays NaN.
    """

    def turn(builder: Any, target: Any, source: Any, apart: Any, cos: Any, sin: Any) -> None:
        code = FloatCode(builder)
        a, b = code.widened(source), code.widened(builder.add(source, apart))
        turned_a, turned_b = code.turned(a, b, code.load(cos), code.load(sin))
        code.store_rounded(turned_a, target)
        code.store_rounded(turned_b, builder.add(target, apart))

    return _of_addresses(turn)


@cache
def quantised_turner() -> Any:
    """``(target, codes, lows, scales, cos, sin, apart)``: turns 16 planes of quantised numbers, to bfloat16.

    Halves are so many numbers apart; each number has a low and a scale.
    """

    def turn(
        builder: Any, target: Any, codes: Any, lows: Any, scales: Any, cos: Any, sin: Any, apart: Any
    ) -> None:
        few, code = ByteCode(builder), FloatCode(builder)
        a = few.numbers(codes, code.load(lows), code.load(scales))
        lows, scales = (few.behind(address, apart, _FLOAT_BYTES) for address in (lows, scales))
        b = few.numbers(few.behind(codes, apart, 1), code.load(lows), code.load(scales))
        turned_a, turned_b = code.turned(a, b, code.load(cos), code.load(sin))
        code.store_rounded(turned_a, target)
        code.store_rounded(turned_b, few.behind(target, apart, _ITEM_BYTES))

    return _of_addresses(turn)


@cache
def quantised_writer() -> Any:
    """``(target, codes, lows, scales)``: 16 quantised numbers to bfloat16; each has a low and a scale."""

    def write(builder: Any, target: Any, codes: Any, lows: Any, scales: Any) -> None:
        code = FloatCode(builder)
        numbers = ByteCode(builder).numbers(codes, code.load(lows), code.load(scales))
        code.store_rounded(numbers, target)

    return _of_addresses(write)


@cache
def group_writer() -> Any:
    """``(target, codes, low, scale)``: 16 quantised numbers to bfloat16, of the one low and the one scale."""

    def write(builder: Any, target: Any, codes: Any, low: Any, scale: Any) -> None:
        few = ByteCode(builder)
        FloatCode(builder).store_rounded(few.numbers(codes, few.same(low), few.same(scale)), target)

    return _of_addresses(write, num_floats=2)


@cache
def code_unpacker() -> Any:
    """``(target, source)``: of 16 bytes the 32 halves, the lower one of each first."""

    def unpack(builder: Any, target: Any, source: Any) -> None:
        few = ByteCode(builder)
        few.store(few.zipped(*few.halves(few.load(source)), 0, CODES), target)

    return _of_addresses(unpack)


@cache
def square_transposer() -> Any:
    """``(target, source, row_step, column_step)``: 16 columns of 16 codes become rows."""

    def transpose(builder: Any, target: Any, source: Any, row_step: Any, column_step: Any) -> None:
        few, half = ByteCode(builder), CODES // 2
        lines = [few.load(few.behind(source, column_step, number)) for number in range(CODES)]
        # Where a code is, line and place, is a number of eight bits. Zipping all lines rotates these by one
        # bit: after four times line and place have changed places.
        for _ in range(4):
            pairs = [(lines[i], lines[i + half]) for i in range(half)]
            lines = [few.zipped(a, b, start, start + half) for a, b in pairs for start in (0, half)]
        for number, line in enumerate(lines):
            few.store(line, few.behind(target, row_step, number))

    return _of_addresses(transpose)


@cache
def fence() -> Any:
    """``()``: whoever is told of it afterwards sees all that was stored."""
    from numba import types
    from numba.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def wait(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), generate

    return wait


def _of_addresses(emit: Callable[..., None], num_floats: int = 0) -> Any:
    """A function for machine code: of the addresses, and then floats, ``emit`` takes behind its builder."""
    from numba import types
    from numba.extending import intrinsic

    count = len(inspect.signature(emit).parameters) - 1
    kind = types.void(*(types.uint64,) * (count - num_floats), *(types.float32,) * num_floats)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, *args)
        return context.get_dummy_value()

    # numba reads from the parameters' names how many there are: none may be hidden in ``*addresses``.
    typed = {
        2: lambda context, a, b: (kind, generate),
        4: lambda context, a, b, c, d: (kind, generate),
        5: lambda context, a, b, c, d, e: (kind, generate),
        7: lambda context, a, b, c, d, e, f, g: (kind, generate),
    }
    return intrinsic(typed[count])
