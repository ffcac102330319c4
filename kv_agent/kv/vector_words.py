"""What machine code of ours does with vectors, for numba, which has no words for it: each an LLVM intrinsic.

Stores to a cache's blocks go past the processor's own caches (non-temporal): the blocks are as large as those
or larger, and to write half a line otherwise means to read it first. On two cores of an AMD EPYC rows are
written three times as fast by this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

VECTOR_BYTES = 32
TOKENS = 32  # whose keys are turned into columns at once: the columns fill whole lines of 64 bytes
DIMS = 16  # two bytes each, a vector
PLANES = 16  # of bfloat16 that are turned at once, in float32
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

    def copy(code: _Code, target: Any, source: Any) -> None:
        offsets = range(0, num_bytes, VECTOR_BYTES)
        loaded = [code.load(source, offset) for offset in offsets]
        for offset, vector in zip(offsets, loaded, strict=True):
            code.store(vector, target, offset, past_caches=past_caches)

    return _of_addresses(copy, 2)


@cache
def column_writer(row_bytes: int, column_bytes: int) -> Any:
    """``(target, source, ahead)``: of 32 rows, so far apart, 16 items of two bytes each become columns of 32.

    As many bytes are fetched from ``ahead`` as are read here: items are read across rows, in an order that no
    processor foresees.
    """

    def write(code: _Code, target: Any, source: Any, ahead: Any) -> None:
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

    return _of_addresses(write, 3)


@cache
def plane_turner() -> Any:
    """``(target, source, apart, cos, sin)``: turns 16 planes of bfloat16, halves so many bytes apart.

    Widened, turned in float32, rounded to the nearest, halves to the even one; NaN stays NaN.
    """

    def turn(code: _Code, target: Any, source: Any, apart: Any, cos: Any, sin: Any) -> None:
        floats = _Floats(code.builder)
        a, b = floats.widened(source), floats.widened(code.builder.add(source, apart))
        cosines, sines = floats.load(cos), floats.load(sin)
        floats.store_rounded(floats.less(floats.times(a, cosines), floats.times(b, sines)), target)
        turned_b = floats.plus(floats.times(b, cosines), floats.times(a, sines))
        floats.store_rounded(turned_b, code.builder.add(target, apart))

    return _of_addresses(turn, 5)


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


def _of_addresses(emit: Callable[..., None], count: int) -> Any:
    """A function of so many addresses for machine code, that is what ``emit`` emits."""
    from numba import types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(_Code(builder), *args)
        return context.get_dummy_value()

    signature = types.void(*(types.uint64,) * count)
    if count == 2:
        return intrinsic(lambda context, target, source: (signature, generate))
    if count == 3:
        return intrinsic(lambda context, target, source, ahead: (signature, generate))
    return intrinsic(lambda context, target, source, apart, cos, sin: (signature, generate))


class _Code:
    """Emits vectors of four words of four items each."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self._ir = ir
        self.builder = builder
        self._word = ir.IntType(64)
        self._vector = ir.VectorType(self._word, 4)

    def load(self, address: Any, offset: int) -> Any:
        loaded = self.builder.load(self._at(address, offset))
        loaded.align = 1
        return loaded

    def store(self, vector: Any, address: Any, offset: int, *, past_caches: bool) -> None:
        stored = self.builder.store(vector, self._at(address, offset))
        stored.align = VECTOR_BYTES
        if past_caches:
            once = self.builder.module.add_metadata([self._ir.Constant(self._ir.IntType(32), 1)])
            stored.set_metadata("nontemporal", once)

    def fetch(self, address: Any, offset: int) -> None:
        """Bring a line into the nearest cache, if there is anything at this address."""
        number, pointer = self._ir.IntType(32), self._ir.IntType(8).as_pointer()
        kind = self._ir.FunctionType(self._ir.VoidType(), (pointer, number, number, number))
        prefetch = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        place = self.builder.add(address, self._ir.Constant(self._word, offset))
        to_read, keep, data = (self._ir.Constant(number, value) for value in (0, 3, 1))
        self.builder.call(prefetch, (self.builder.inttoptr(place, pointer), to_read, keep, data))

    def columns_of_four(self, rows: Sequence[Any]) -> list[Any]:
        """Of four rows of 16 items -> four vectors, the word ``w`` of vector ``j`` is column ``4 w + j``."""
        a, b, c, d = rows
        even, odd = self._halves_of_two(a, b)
        even_below, odd_below = self._halves_of_two(c, d)
        return [
            self._joined(even, even_below, is_low=True),
            self._joined(odd, odd_below, is_low=True),
            self._joined(even, even_below, is_low=False),
            self._joined(odd, odd_below, is_low=False),
        ]

    def transposed(self, vectors: Sequence[Any]) -> list[Any]:
        """Four vectors of four words -> the words ``w`` of all, for each ``w``."""
        a, b, c, d = vectors
        even, odd = self._mixed(a, b, (0, 4, 2, 6)), self._mixed(a, b, (1, 5, 3, 7))
        even_below, odd_below = self._mixed(c, d, (0, 4, 2, 6)), self._mixed(c, d, (1, 5, 3, 7))
        low, high = (0, 1, 4, 5), (2, 3, 6, 7)
        return [
            self._mixed(even, even_below, low),
            self._mixed(odd, odd_below, low),
            self._mixed(even, even_below, high),
            self._mixed(odd, odd_below, high),
        ]

    def _halves_of_two(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The items at even and at odd places, of ``a`` and of ``b`` by turns."""
        build, shift = self.builder, self._same(16)
        even, odd = self._same(0x0000FFFF0000FFFF), self._same(0xFFFF0000FFFF0000)
        return (
            build.or_(build.and_(a, even), build.shl(build.and_(b, even), shift)),
            build.or_(build.lshr(build.and_(a, odd), shift), build.and_(b, odd)),
        )

    def _joined(self, a: Any, b: Any, *, is_low: bool) -> Any:
        """The lower, or the upper, halves of the words of both."""
        build, shift = self.builder, self._same(32)
        low, high = self._same(0x00000000FFFFFFFF), self._same(0xFFFFFFFF00000000)
        if is_low:
            return build.or_(build.and_(a, low), build.shl(b, shift))
        return build.or_(build.lshr(a, shift), build.and_(b, high))

    def _mixed(self, a: Any, b: Any, places: Sequence[int]) -> Any:
        mask = self._ir.Constant(self._ir.VectorType(self._ir.IntType(32), 4), list(places))
        return self.builder.shuffle_vector(a, b, mask)

    def _same(self, number: int) -> Any:
        return self._ir.Constant(self._vector, [number] * 4)

    def _at(self, address: Any, offset: int) -> Any:
        moved = self.builder.add(address, self._ir.Constant(self._word, offset))
        return self.builder.inttoptr(moved, self._vector.as_pointer())


class _Floats:
    """Emits vectors of 16 items, bfloat16 in memory and float32 at work."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self._ir = ir
        self._builder = builder
        self._halves, self._words = (ir.VectorType(ir.IntType(bits), PLANES) for bits in (16, 32))
        self._floats = ir.VectorType(ir.FloatType(), PLANES)

    def load(self, address: Any) -> Any:
        return self._loaded(address, self._floats, 4)

    def widened(self, address: Any) -> Any:
        """bfloat16 is the upper half of float32."""
        build = self._builder
        words = build.zext(self._loaded(address, self._halves, 2), self._words)
        return build.bitcast(build.shl(words, self._same(16)), self._floats)

    def times(self, a: Any, b: Any) -> Any:
        return self._builder.fmul(a, b)

    def plus(self, a: Any, b: Any) -> Any:
        return self._builder.fadd(a, b)

    def less(self, a: Any, b: Any) -> Any:
        return self._builder.fsub(a, b)

    def store_rounded(self, floats: Any, address: Any) -> None:
        """To the nearest, halves to the even one; a NaN rounded like a number could become infinite."""
        build = self._builder
        words = build.bitcast(floats, self._words)
        is_odd = build.and_(build.lshr(words, self._same(16)), self._same(1))
        raised = build.add(words, build.add(is_odd, self._same(0x7FFF)))
        rounded = build.trunc(build.lshr(raised, self._same(16)), self._halves)
        nan = self._ir.Constant(self._halves, [0x7FC0] * PLANES)
        is_number = build.fcmp_ordered("ord", floats, floats)
        stored = build.store(build.select(is_number, rounded, nan), self._at(address, self._halves))
        stored.align = 2

    def _loaded(self, address: Any, kind: Any, align: int) -> Any:
        loaded = self._builder.load(self._at(address, kind))
        loaded.align = align
        return loaded

    def _at(self, address: Any, kind: Any) -> Any:
        return self._builder.inttoptr(address, kind.as_pointer())

    def _same(self, number: int) -> Any:
        return self._ir.Constant(self._words, [number] * PLANES)
