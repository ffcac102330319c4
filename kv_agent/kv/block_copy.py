"""Between plain KV and the blocks of an engine's paged cache: all layers in one call, by the block's layout.

For caches on the CPU whose keys and values stand at regular strides within a block. An attention backend's
own writer is called for every layer, wants keys and values gathered first, and runs on the engine's thread;
this runs on any, beside others, and without the GIL.
"""

# L layers, T tokens, H kv heads, D head dim, P tokens per block
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD_BYTES = 8
_BITS = {2: torch.uint16, 4: torch.uint32}  # by bytes of an item
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes; what is in them is moved, not looked at


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """The same and what else a kernel needs, counted in words of so many items."""

    items: int
    D: int
    block: int
    first: int
    token: int
    head: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class BlockCopier:
    """Copies between ``[L, T, H, D]`` and the blocks of ``caches_L``, one tensor a layer, alike in layout.

    There are ``block_items`` from block to block. The first call of either way compiles for a second.
    Thread-safe as far as nobody else uses the same blocks.
    """

    caches_L: Sequence[Tensor]
    block_items: int
    shape_PHD: tuple[int, int, int]
    key: Strided
    value: Strided

    def scatter(self, key_LTHD: Tensor, value_LTHD: Tensor, block_ids: Sequence[int], start: int) -> None:
        """Write tokens to positions ``[start, start + T)`` of the sequence whose blocks these are.

        Each layer of either must be contiguous. Raises :class:`ValueError` for what does not fit.
        """
        self._scatter(*self._arguments(key_LTHD, value_LTHD, block_ids, start))

    def gather(self, key_LTHD: Tensor, value_LTHD: Tensor, block_ids: Sequence[int], start: int) -> None:
        """Fill both with the tokens at positions ``[start, start + T)``; otherwise as :meth:`scatter`."""
        self._gather(*self._arguments(key_LTHD, value_LTHD, block_ids, start))

    def _arguments(
        self, key_LTHD: Tensor, value_LTHD: Tensor, block_ids: Sequence[int], start: int
    ) -> tuple[Any, ...]:
        T = key_LTHD.shape[1]
        P, H, D = self.shape_PHD
        first, last = start // P, (start + T - 1) // P
        blocks = np.array(block_ids[first : last + 1], dtype=np.int64)
        fits = key_LTHD.shape == value_LTHD.shape == (len(self.caches_L), T, H, D)
        if not fits or T == 0 or start < 0 or len(blocks) != last + 1 - first:
            raise ValueError(
                f"KV {tuple(key_LTHD.shape)} does not fit {len(block_ids)} blocks from {start} on"
            )
        if blocks.min() < 0 or blocks.max() >= self.caches_L[0].shape[0]:
            raise ValueError(f"blocks {blocks.tolist()} of a cache of {self.caches_L[0].shape[0]}")
        keys, values = self._halves
        return (
            *_plain(key_LTHD, keys.items),
            *_plain(value_LTHD, values.items),
            *self._flat_caches,
            blocks.astype(np.uint64),
            np.uint64(start % P),
            np.uint64(T),
        )

    @cached_property
    def _halves(self) -> tuple[_Half, _Half]:
        """Values mostly stand side by side as in plain KV, so that several are moved as one."""
        wide = _WORD_BYTES // self.caches_L[0].element_size()
        half, D = self.value, self.shape_PHD[2]
        numbers = (D, self.block_items, half.first, half.token, half.head)
        starts = {layer.data_ptr() % _WORD_BYTES for layer in self.caches_L}
        is_wide = half.dim == 1 and starts == {0} and all(number % wide == 0 for number in numbers)
        return self._half(self.key, 1), self._half(half, wide if is_wide else 1)

    def _half(self, half: Strided, items: int) -> _Half:
        return _Half(
            items=items,
            D=self.shape_PHD[2] // items,
            block=self.block_items // items,
            first=half.first // items,
            token=half.token // items,
            head=half.head // items,
            dim=half.dim,
        )

    @cached_property
    def _flat_caches(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Every layer as one run of words, for keys and for values."""
        before = (self.caches_L[0].shape[0] - 1) * self.block_items
        keys, values = (
            tuple(_flat(layer, before + part.last(self.shape_PHD) + 1, half.items) for layer in self.caches_L)
            for part, half in zip((self.key, self.value), self._halves, strict=True)
        )
        return keys, values

    @cached_property
    def _scatter(self) -> Callable[..., None]:
        return _compiled(self.shape_PHD, *self._halves, to_blocks=True)

    @cached_property
    def _gather(self) -> Callable[..., None]:
        return _compiled(self.shape_PHD, *self._halves, to_blocks=False)


def _plain(x_LTHD: Tensor, items: int) -> tuple[Any, np.uint64]:
    """All words from the first to the last, and how many it is from layer to layer."""
    word_bytes = x_LTHD.element_size() * items
    if not x_LTHD[0].is_contiguous() or x_LTHD.stride(0) % items or x_LTHD.data_ptr() % word_bytes:
        raise ValueError(f"a layer of KV must be contiguous and aligned, got strides {x_LTHD.stride()}")
    num_items = (x_LTHD.shape[0] - 1) * x_LTHD.stride(0) + x_LTHD[0].numel()
    return _flat(x_LTHD, num_items, items), np.uint64(x_LTHD.stride(0) // items)


def _flat(x: Tensor, num_items: int, items: int) -> Any:
    item_bytes = x.element_size()
    plain = x.as_strided((num_items,), (1,)).view(_BITS[item_bytes]).numpy()
    return plain.view(_WORDS[item_bytes * items])


@cache
def _compiled(
    shape_PHD: tuple[int, int, int], key: _Half, value: _Half, *, to_blocks: bool
) -> Callable[..., None]:
    """Machine code for this layout, whose numbers are constants in it; made once a process."""
    import numba  # takes a second, unless vLLM has imported it

    # Unsigned all over: an index that might be negative would have to be wrapped around.
    P, H = np.uint64(shape_PHD[0]), np.uint64(shape_PHD[1])

    def half_copier(half: _Half) -> Callable[..., None]:
        D, block_step = np.uint64(half.D), np.uint64(half.block)
        first, per_token = np.uint64(half.first), np.uint64(half.token)
        per_head, per_dim = np.uint64(half.head), np.uint64(half.dim)
        row = H * D
        has_token_rows = half.dim <= half.token  # else tokens stand side by side, and dims below each other

        def copy(plain: Any, begin: Any, begun: Any, cache: Any, block: Any, inside: Any, count: Any) -> None:
            """``count`` tokens: plain ones from ``begin`` and ``begun`` on, a block's from ``inside`` on."""
            source = begin + begun * row
            target = block * block_step + first + inside * per_token
            for h in range(H):
                if has_token_rows:
                    for t in range(count):
                        here = source + t * row + h * D
                        there = target + h * per_head + t * per_token
                        for d in range(D):
                            if to_blocks:
                                cache[there + d * per_dim] = plain[here + d]
                            else:
                                plain[here + d] = cache[there + d * per_dim]
                else:
                    for d in range(D):
                        here = source + h * D + d
                        there = target + h * per_head + d * per_dim
                        for t in range(count):
                            if to_blocks:
                                cache[there + t * per_token] = plain[here + t * row]
                            else:
                                plain[here + t * row] = cache[there + t * per_token]

        compiled: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(copy)
        return compiled

    copy_keys, copy_values = half_copier(key), half_copier(value)

    def copy_all(
        keys: Any,
        key_step: Any,
        values: Any,
        value_step: Any,
        key_caches: Any,
        value_caches: Any,
        blocks: Any,
        offset: Any,
        T: Any,
    ) -> None:
        for layer in range(len(key_caches)):
            number = np.uint64(layer)
            done = np.uint64(0)
            while done < T:
                inside = (offset + done) % P
                count = min(P - inside, T - done)
                block = blocks[(offset + done) // P]
                copy_keys(keys, number * key_step, done, key_caches[layer], block, inside, count)
                copy_values(values, number * value_step, done, value_caches[layer], block, inside, count)
                done += count

    machine_code: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(copy_all)
    return machine_code
