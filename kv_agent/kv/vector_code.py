"""Emits LLVM's vector instructions: words that are copied and transposed, floats that are turned, codes of
quantised numbers that become floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VECTOR_BYTES = 32
PLANES = 16  # of bfloat16 that are turned at once, in float32
CODES = PLANES  # of quantised numbers that become floats at once


class WordCode:
    """Emits vectors of four words of four items each."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self._ir = ir
        self._builder = builder
        self._word = ir.IntType(64)
        self._vector = ir.VectorType(self._word, 4)

    def load(self, address: Any, offset: int) -> Any:
        loaded = self._builder.load(self._at(address, offset))
        loaded.align = 1
        return loaded

    def store(self, vector: Any, address: Any, offset: int, *, past_caches: bool) -> None:
        stored = self._builder.store(vector, self._at(address, offset))
        stored.align = VECTOR_BYTES
        if past_caches:
            once = self._builder.module.add_metadata([self._ir.Constant(self._ir.IntType(32), 1)])
            stored.set_metadata("nontemporal", once)

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
        build, shift = self._builder, self._same(16)
        even, odd = self._same(0x0000FFFF0000FFFF), self._same(0xFFFF0000FFFF0000)
        return (
            build.or_(build.and_(a, even), build.shl(build.and_(b, even), shift)),
            build.or_(build.lshr(build.and_(a, odd), shift), build.and_(b, odd)),
        )

    def _joined(self, a: Any, b: Any, *, is_low: bool) -> Any:
        """The lower, or the upper, halves of the words of both."""
        build, shift = self._builder, self._same(32)
        low, high = self._same(0x00000000FFFFFFFF), self._same(0xFFFFFFFF00000000)
        if is_low:
            return build.or_(build.and_(a, low), build.shl(b, shift))
        return build.or_(build.lshr(a, shift), build.and_(b, high))

    def _mixed(self, a: Any, b: Any, places: Sequence[int]) -> Any:
        mask = self._ir.Constant(self._ir.VectorType(self._ir.IntType(32), 4), list(places))
        return self._builder.shuffle_vector(a, b, mask)

    def _same(self, number: int) -> Any:
        return self._ir.Constant(self._vector, [number] * 4)

    def _at(self, address: Any, offset: int) -> Any:
        moved = self._builder.add(address, self._ir.Constant(self._word, offset))
        return self._builder.inttoptr(moved, self._vector.as_pointer())


class FloatCode:
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

    def turned(self, a: Any, b: Any, cosines: Any, sines: Any) -> tuple[Any, Any]:
        build = self._builder
        return (
            build.fsub(build.fmul(a, cosines), build.fmul(b, sines)),
            build.fadd(build.fmul(b, cosines), build.fmul(a, sines)),
        )

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


class ByteCode:
    """Emits vectors of 16 codes, a byte each, and the floats these stand for."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self._ir = ir
        self._builder = builder
        self._floats = ir.VectorType(ir.FloatType(), CODES)

    def load(self, address: Any) -> Any:
        loaded = self._builder.load(self._at(address, CODES))
        loaded.align = 1
        return loaded

    def store(self, codes: Any, address: Any) -> None:
        stored = self._builder.store(codes, self._at(address, codes.type.count))
        stored.align = 1

    def numbers(self, address: Any, lows: Any, scales: Any) -> Any:
        build = self._builder
        return build.fmul(build.fadd(build.uitofp(self.load(address), self._floats), lows), scales)

    def halves(self, codes: Any) -> tuple[Any, Any]:
        """The lower four bits of each, and the upper four."""
        low, four = (self._ir.Constant(codes.type, [number] * CODES) for number in (15, 4))
        return self._builder.and_(codes, low), self._builder.lshr(codes, four)

    def zipped(self, a: Any, b: Any, start: int, end: int) -> Any:
        """One of ``a`` and one of ``b`` by turns, of each those from ``start`` to ``end``."""
        return self._mixed(a, b, [place for i in range(start, end) for place in (i, i + CODES)])

    def same(self, number: Any) -> Any:
        """A vector of one float."""
        first = self._ir.Constant(self._ir.IntType(32), 0)
        alone = self._builder.insert_element(self._ir.Constant(self._floats, None), number, first)
        return self._mixed(alone, alone, [0] * CODES)

    def behind(self, address: Any, step: Any, count: int) -> Any:
        """The address ``count`` steps behind this one."""
        return self._builder.add(address, self._builder.mul(step, self._ir.Constant(step.type, count)))

    def _mixed(self, a: Any, b: Any, places: list[int]) -> Any:
        mask = self._ir.Constant(self._ir.VectorType(self._ir.IntType(32), len(places)), places)
        return self._builder.shuffle_vector(a, b, mask)

    def _at(self, address: Any, count: int) -> Any:
        kind = self._ir.VectorType(self._ir.IntType(8), count)
        return self._builder.inttoptr(address, kind.as_pointer())
