"""Machine code between plain KV and a paged cache's blocks, made for one layout whose numbers are constants.

It takes addresses, so that many pieces of KV and all layers are one call, and knows no bounds: whoever calls
it has checked them. Everything is unsigned: an index that might be negative would have to be wrapped around.
"""

# L layers, T tokens, H kv heads, D head dim, P tokens per block, F rotary planes, N pieces
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kv_agent.kv import rotation_kernel
from kv_agent.kv.vector_code import VECTOR_BYTES
from kv_agent.kv.vector_words import DIMS, TOKENS, address_pointer, column_writer, fence, row_copier

_WORD_BYTES = 8
_TILE = 4  # items of two bytes in a word
_ITEMS = {2: np.uint16, 4: np.uint32}  # by bytes; what is in them is moved, not looked at
_ENDLESS = (1 << 62,)
_LINE_BYTES = np.uint64(64)  # of the processor's caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """Keys or values in a block: items from its start to the first, and from token to token, and so on."""

    first: int
    token: int
    head: int
    dim: int

    def last(self, shape_PHD: tuple[int, int, int]) -> int:
        """Where the last item is."""
        P, H, D = shape_PHD
        return self.first + self.token * (P - 1) + self.head * (H - 1) + self.dim * (D - 1)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.first, self.token, self.head, self.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A cache's blocks, ``block_items`` from one to the next; ``is_wide`` if all addresses are a vector's."""

    shape_PHD: tuple[int, int, int]
    item_bytes: int
    block_items: int
    key: Strided
    value: Strided
    is_wide: bool

    @property
    def row_bytes(self) -> int:
        """Of a token of plain keys or values in a layer."""
        return self.shape_PHD[1] * self.shape_PHD[2] * self.item_bytes


@cache
def compiled(layout: Layout, *, to_blocks: bool, turns: bool) -> Callable[..., None]:
    """The code for a layout and a direction; made once a process, in a second or two.

    With ``turns`` bfloat16 keys of some pieces are rotated on their way. Its arguments are, of N pieces:
    addresses of keys and of values, bytes from layer to layer of either, first position, tokens, whether to
    turn, cosines and sines ``[N, F]``; then the addresses of each layer's blocks, the sequence's block
    numbers, and the layers to do, from and to.
    """
    P = np.uint64(layout.shape_PHD[0])
    row_bytes = np.uint64(layout.row_bytes)
    put_keys = _key_copier(layout, to_blocks=to_blocks, turns=turns)
    put_values = _half_copier(layout, layout.value, to_blocks)
    memory_bytes, all_stored = np.uint64(TOKENS * layout.row_bytes) + _LINE_BYTES, fence()

    def copy_all(
        keys_N: Any,
        values_N: Any,
        key_steps_N: Any,
        value_steps_N: Any,
        starts_N: Any,
        counts_N: Any,
        turned_N: Any,
        cos_NF: Any,
        sin_NF: Any,
        caches_L: Any,
        blocks: Any,
        first_layer: Any,
        end_layer: Any,
    ) -> None:
        memory = np.empty(memory_bytes, np.uint8)
        for layer in range(first_layer, end_layer):
            cache, step = caches_L[layer], np.uint64(layer)
            keys = keys_N + step * key_steps_N
            put_keys(keys, starts_N, counts_N, turned_N, cos_NF, sin_NF, cache, blocks, memory)
            for n in range(len(values_N)):
                values = values_N[n] + step * value_steps_N[n]
                done, start = np.uint64(0), starts_N[n]
                while done < counts_N[n]:
                    inside = (start + done) % P
                    count = min(P - inside, counts_N[n] - done)
                    put_values(values + done * row_bytes, cache, blocks[(start + done) // P], inside, count)
                    done += count
        all_stored()

    machine_code: Callable[..., None] = _machine_code(copy_all)
    return machine_code


def _key_copier(layout: Layout, *, to_blocks: bool, turns: bool) -> Any:
    """Copies keys of all pieces of a layer.

    Those that become columns, or are turned, go through ``memory``, 32 tokens at a time, so few that they
    stay in the nearest cache. Where a piece ends among them the next one's go on: whole lines are fast to
    write. It is an array, not an address: numba frees what is not used any more, and then others get it.
    """
    import numba

    P, num_heads, D = map(np.uint64, layout.shape_PHD)
    row_bytes, at_once = np.uint64(layout.row_bytes), np.uint64(TOKENS)
    copy_keys = _half_copier(layout, layout.key, to_blocks)
    in_groups = to_blocks and _has_columns(layout, layout.key)
    copy_row: Any = row_copier(layout.row_bytes, past_caches=False) if in_groups else None
    rotate: Any = rotation_kernel.compiled() if turns else None
    halves = address_pointer(np.uint16)

    def write_held(scratch: Any, held: Any, until: Any, cache: Any, blocks: Any) -> None:
        if held != until:
            inside = held % P
            copy_keys(scratch + inside % at_once * row_bytes, cache, blocks[held // P], inside, until - held)

    write = _machine_code(write_held)

    def copy(
        keys_N: Any,
        starts_N: Any,
        counts_N: Any,
        turned_N: Any,
        cos_NF: Any,
        sin_NF: Any,
        cache: Any,
        blocks: Any,
        memory: Any,
    ) -> None:
        scratch = np.uint64(memory.ctypes.data) // _LINE_BYTES * _LINE_BYTES + _LINE_BYTES
        held = until = np.uint64(0)  # positions whose keys are in the scratch and not yet in their block
        for n in range(len(keys_N)):
            done = np.uint64(0)
            while done < counts_N[n]:
                position, source = starts_N[n] + done, keys_N[n] + done * row_bytes
                inside = position % P
                count = min(P - inside, counts_N[n] - done)
                if in_groups or (turns and turned_N[n]):
                    place = inside % at_once
                    count = min(count, at_once - place)
                    if position != until:  # it does not go on where the last one ended
                        write(scratch, held, until, cache, blocks)
                        held = position
                    target = scratch + place * row_bytes
                    if turns and turned_N[n]:
                        plain = numba.carray(halves(source), _ENDLESS)
                        turned = numba.carray(halves(target), _ENDLESS)
                        rotate(plain, turned, 0, 0, 1, count * num_heads, D, cos_NF[n], sin_NF[n])
                    elif in_groups:  # else there is no copier of rows, and numba leaves this out
                        for t in range(count):
                            copy_row(target + t * row_bytes, source + t * row_bytes)
                    until = position + count
                    if not in_groups or until % P % at_once == 0:
                        write(scratch, held, until, cache, blocks)
                        held = until
                else:
                    copy_keys(source, cache, blocks[position // P], inside, count)
                done += count
        write(scratch, held, until, cache, blocks)

    return _machine_code(copy)


def _half_copier(layout: Layout, half: Strided, to_blocks: bool) -> Any:
    """Copies ``count`` tokens between plain KV and ``inside`` a block, given the address of either."""
    if half.dim == 1 and _fills(VECTOR_BYTES, layout, half, half.token):
        return _rows(layout, half, to_blocks)
    if to_blocks and _has_columns(layout, half):
        return _columns(layout, half)
    if half.token == 1 and layout.item_bytes == 2 and _fills(_WORD_BYTES, layout, half, half.dim):
        return _tiles(layout, half, to_blocks)
    return _items(layout, half, to_blocks)


def _has_columns(layout: Layout, half: Strided) -> bool:
    """Whether tokens stand side by side, and vectors of them can be written."""
    return half.token == 1 and layout.item_bytes == 2 and _fills(VECTOR_BYTES, layout, half, half.dim)


def _fills(num_bytes: int, layout: Layout, half: Strided, inner: int) -> bool:
    """Whether rows, and what is from one to another, are so many bytes or multiples of that."""
    steps = (layout.shape_PHD[2], layout.block_items, half.first, half.head, inner)
    return layout.is_wide and all(step * layout.item_bytes % num_bytes == 0 for step in steps)


def _machine_code(plain: Any) -> Any:
    import numba

    return numba.njit(nogil=True, error_model="numpy")(plain)


def _rows(layout: Layout, half: Strided, to_blocks: bool) -> Any:
    """Head by head a whole row, as vectors."""
    item_bytes, row_bytes = layout.item_bytes, layout.shape_PHD[2] * layout.item_bytes
    copy_row = row_copier(row_bytes, past_caches=to_blocks)
    H, row = np.uint64(layout.shape_PHD[1]), np.uint64(row_bytes)
    block_step = np.uint64(layout.block_items * item_bytes)
    first, per_token, per_head = (np.uint64(x * item_bytes) for x in (half.first, half.token, half.head))

    def copy(plain: Any, cache: Any, block: Any, inside: Any, count: Any) -> None:
        start = cache + block * block_step + first + inside * per_token
        for t in range(count):
            for h in range(H):
                here, there = plain + (t * H + h) * row, start + t * per_token + h * per_head
                if to_blocks:
                    copy_row(there, here)
                else:
                    copy_row(here, there)

    return _machine_code(copy)


def _columns(layout: Layout, half: Strided) -> Any:
    """Into blocks that have tokens side by side and dims below each other: 32 tokens of 16 dims at once."""
    _, H, D = map(np.uint64, layout.shape_PHD)
    row = H * D * np.uint64(2)
    write_columns = column_writer(int(row), half.dim * 2)
    write_few = _tiles(layout, half, to_blocks=True)
    block_step, first = np.uint64(layout.block_items * 2), np.uint64(half.first * 2)
    per_head, per_dim, item = np.uint64(half.head * 2), np.uint64(half.dim * 2), np.uint64(2)
    at_once, dims = np.uint64(TOKENS), np.uint64(DIMS)

    def copy(plain: Any, cache: Any, block: Any, inside: Any, count: Any) -> None:
        if count != at_once or inside % at_once:
            write_few(plain, cache, block, inside, count)
            return
        start = cache + block * block_step + first + inside * item
        for h in range(H):
            for d in range(np.uint64(0), D, dims):
                write_columns(start + h * per_head + d * per_dim, plain + (h * D + d) * item)

    return _machine_code(copy)


def _tiles(layout: Layout, half: Strided, to_blocks: bool) -> Any:
    """As above either way, four tokens of four dims at once."""
    import numba

    _, H, D = map(np.uint64, layout.shape_PHD)
    word = address_pointer(np.uint64)
    size, two, three = np.uint64(_TILE), np.uint64(2), np.uint64(3)
    words, row_words = D // size, H * D // size
    block_step, first = np.uint64(layout.block_items), np.uint64(half.first)
    per_head, per_dim = np.uint64(half.head // _TILE), np.uint64(half.dim // _TILE)
    one_by_one = _items(layout, half, to_blocks)
    transposed = _machine_code(_transposed)
    row_bytes = H * D * np.uint64(2)

    def copy(plain_address: Any, cache_address: Any, block: Any, inside: Any, count: Any) -> None:
        before = min((size - inside % size) % size, count)
        if before:
            one_by_one(plain_address, cache_address, block, inside, before)
        tiles = (count - before) // size
        plain = numba.carray(word(plain_address + before * row_bytes), _ENDLESS)
        cache = numba.carray(word(cache_address), _ENDLESS)
        start = (block * block_step + first + inside + before) // size
        for h in range(H):
            for column in range(words):
                for tile in range(tiles):
                    a = tile * size * row_words + h * words + column
                    b, c, d = a + row_words, a + two * row_words, a + three * row_words
                    to = start + h * per_head + column * size * per_dim + tile
                    e, f, g = to + per_dim, to + two * per_dim, to + three * per_dim
                    if to_blocks:
                        cache[to], cache[e], cache[f], cache[g] = transposed(
                            plain[a], plain[b], plain[c], plain[d]
                        )
                    else:
                        plain[a], plain[b], plain[c], plain[d] = transposed(
                            cache[to], cache[e], cache[f], cache[g]
                        )
        done = before + tiles * size
        if done < count:
            one_by_one(plain_address + done * row_bytes, cache_address, block, inside + done, count - done)

    return _machine_code(copy)


def _items(layout: Layout, half: Strided, to_blocks: bool) -> Any:
    """Item by item, whatever the layout."""
    import numba

    item = address_pointer(_ITEMS[layout.item_bytes])
    _, H, D = map(np.uint64, layout.shape_PHD)
    block_step = np.uint64(layout.block_items)
    first, per_token, per_head, per_dim = map(np.uint64, half.numbers)
    row = H * D

    def copy(plain_address: Any, cache_address: Any, block: Any, inside: Any, count: Any) -> None:
        plain = numba.carray(item(plain_address), _ENDLESS)
        cache = numba.carray(item(cache_address), _ENDLESS)
        start = block * block_step + first + inside * per_token
        for h in range(H):
            for t in range(count):
                here, there = t * row + h * D, start + h * per_head + t * per_token
                for d in range(D):
                    if to_blocks:
                        cache[there + d * per_dim] = plain[here + d]
                    else:
                        plain[here + d] = cache[there + d * per_dim]

    return _machine_code(copy)


def _transposed(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Four words of four items each, rows in and columns out."""
    even, odd = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFF0000FFFF0000)
    low, high = np.uint64(0x00000000FFFFFFFF), np.uint64(0xFFFFFFFF00000000)
    half, whole = np.uint64(16), np.uint64(32)
    ab_even, ab_odd = (a & even) | ((b & even) << half), ((a & odd) >> half) | (b & odd)
    cd_even, cd_odd = (c & even) | ((d & even) << half), ((c & odd) >> half) | (d & odd)
    return (
        (ab_even & low) | (cd_even << whole),
        (ab_odd & low) | (cd_odd << whole),
        (ab_even >> whole) | (cd_even & high),
        (ab_odd >> whole) | (cd_odd & high),
    )
