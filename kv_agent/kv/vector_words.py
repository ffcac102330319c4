"""What machine code of ours does with vectors, for numba, which has no words for it: each an LLVM intrinsic.

Stores to a cache's blocks go past the processor's own caches (non-temporal): the blocks are as large as those
or larger, and to write half a line otherwise means to read it first. On two cores of an AMD EPYC rows are
written three times as fast by this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from kv_agent.kv.vector_code import VECTOR_BYTES, FloatCode, WordCode

TOKENS = 32  # whose keys are turned into columns at once: the columns fill whole lines of 64 bytes
DIMS = 16  # two bytes each, a vector
_LINE_BYTES = 64


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
    """``(target, source, ahead)``: of 32 rows, so far apart, 16 items of two bytes each become columns of 32.

    As many bytes are fetched from ``ahead`` as are read here: items are read across rows, in an order that no
    processor foresees.
    """

    def write(builder: Any, target: Any, source: Any, ahead: Any) -> None:
        code = WordCode(builder)
        for offset in range(0, TOKENS * VECTOR_BYTES, _LINE_BYTES):
            code.fetch(ahead, offset)
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
        cosines, sines = code.load(cos), code.load(sin)
        turned_a = builder.fsub(builder.fmul(a, cosines), builder.fmul(b, sines))
        turned_b = builder.fadd(builder.fmul(b, cosines), builder.fmul(a, sines))
        code.store_rounded(turned_a, target)
        code.store_rounded(turned_b, builder.add(target, apart))

    return _of_addresses(turn)


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


def _of_addresses(emit: Callable[..., None]) -> Any:
    """A function for machine code: of the addresses that ``emit`` takes behind its builder."""
    from numba import types
    from numba.extending import intrinsic

    names = list(inspect.signature(emit).parameters)[1:]
    kind = types.void(*(types.uint64,) * len(names))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, *args)
        return context.get_dummy_value()

    # numba reads from the parameters' names how many there are: none may be hidden in ``*addresses``.
    typed = {
        2: lambda context, a, b: (kind, generate),
        3: lambda context, a, b, c: (kind, generate),
        5: lambda context, a, b, c, d, e: (kind, generate),
    }
    return intrinsic(typed[len(names)])
