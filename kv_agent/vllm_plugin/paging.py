"""Where a backend keeps K and V inside a block: measured at start, then used to read any slots.

Attention backends pack blocks differently (token rows, transposed keys, AMX tiles). Instead of knowing
each of them, we let the backend's own writer store numbered elements into one block and look where every
number landed. Writing KV back always goes through the backend's writer.
"""

# B blocks, P tokens per block, T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_kernels import Strided

# Small integers survive bf16 (8 significant bits) exactly; an element's number travels in base-64 digits.
_BASE = 64

# (key_THD, value_THD, slots_T): stores one token per slot through the attention backend.
SlotWriter = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Element ``(token, head, dim)`` of K or V of a block: its storage offset from the block's start.

    ``key_PHD`` and ``value_PHD`` hold the offsets; ``*_strides`` are the ``(token, head, dim)`` strides
    when the offsets are affine, which allows a plain strided view instead of a gather.
    """

    key_PHD: Tensor
    value_PHD: Tensor
    key_strides: tuple[int, int, int] | None
    value_strides: tuple[int, int, int] | None

    @property
    def block_tokens(self) -> int:
        return int(self.key_PHD.shape[0])

    @property
    def strided(self) -> tuple[Strided, Strided] | None:
        """Keys and values by their strides, where both are affine."""
        if self.key_strides is None or self.value_strides is None:
            return None
        return _strided(self.key_PHD, self.key_strides), _strided(self.value_PHD, self.value_strides)


def _strided(offset_PHD: Tensor, strides: tuple[int, int, int]) -> Strided:
    token, head, dim = strides
    return Strided(first=int(offset_PHD[0, 0, 0]), token=token, head=head, dim=dim)


def measure_layout(
    kv_cache_BHNC: Tensor, write: SlotWriter, *, scratch_block: int, shape_PHD: tuple[int, int, int]
) -> BlockLayout:
    """Find the layout of ``kv_cache_BHNC`` (logical ``[blocks, heads, tokens, content]``) by writing to it.

    ``scratch_block`` is overwritten and restored. Raises :class:`UnsupportedModelError` when the backend
    does not keep every element exactly once.
    """
    P, H, D = shape_PHD
    total = P * H * D
    block = kv_cache_BHNC[scratch_block]
    saved = block.clone()
    slots_T = torch.arange(scratch_block * P, (scratch_block + 1) * P, device=block.device)
    number_PHD = torch.arange(total, device=block.device).view(P, H, D)
    try:
        found_key = torch.zeros(block.numel(), dtype=torch.int64, device=block.device)
        found_value = torch.zeros_like(found_key)
        scale = 1
        while scale < total:
            digit_PHD = (number_PHD // scale) % _BASE
            # Digits are stored as 1..64, the other half as 0: one pass tells keys from values.
            digit_PHD = (digit_PHD + 1).to(block.dtype)
            for found, pair in (
                (found_key, (digit_PHD, torch.zeros_like(digit_PHD))),
                (found_value, (torch.zeros_like(digit_PHD), digit_PHD)),
            ):
                block.zero_()
                write(pair[0], pair[1], slots_T)
                code = block.reshape(-1).to(torch.int64)
                found += torch.where(code > 0, (code - 1) * scale, 0)
                if scale == 1:
                    found -= torch.where(code > 0, 0, total)  # not an element of this half
            scale *= _BASE
    finally:
        block.copy_(saved)
    physical = _storage_offsets(block)
    key_PHD = _invert(found_key, physical, shape_PHD)
    value_PHD = _invert(found_value, physical, shape_PHD)
    return BlockLayout(
        key_PHD=key_PHD,
        value_PHD=value_PHD,
        key_strides=_affine_strides(key_PHD),
        value_strides=_affine_strides(value_PHD),
    )


def _storage_offsets(block: Tensor) -> Tensor:
    """Storage offset, from the block's first element, of each element in logical order -> [numel]."""
    offsets = torch.zeros(block.shape, dtype=torch.int64, device=block.device)
    for dim, (size, stride) in enumerate(zip(block.shape, block.stride(), strict=True)):
        view = [1] * block.dim()
        view[dim] = size
        offsets += (torch.arange(size, device=block.device) * stride).view(view)
    return offsets.reshape(-1)


def _invert(found: Tensor, physical: Tensor, shape_PHD: tuple[int, int, int]) -> Tensor:
    total = shape_PHD[0] * shape_PHD[1] * shape_PHD[2]
    where = torch.nonzero(found >= 0).view(-1)
    numbers = found[where]
    if where.numel() != total or torch.unique(numbers).numel() != total:
        raise UnsupportedModelError(
            "the attention backend does not keep every KV element once per block, so kv_agent cannot "
            "copy its blocks; choose another attention backend or start without kv_agent"
        )
    offsets = torch.empty(total, dtype=torch.int64, device=found.device)
    offsets[numbers] = physical[where]
    return offsets.view(shape_PHD)


def _affine_strides(offset_PHD: Tensor) -> tuple[int, int, int] | None:
    """Strides ``(token, head, dim)`` if offsets are ``first + t*a + h*b + d*c``, else ``None``."""
    base = int(offset_PHD[0, 0, 0])
    strides = []
    for dim, size in enumerate(offset_PHD.shape):
        index = [0, 0, 0]
        index[dim] = 1
        strides.append(int(offset_PHD[tuple(index)]) - base if size > 1 else 1)
    a, b, c = strides
    steps = [torch.arange(size, device=offset_PHD.device) for size in offset_PHD.shape]
    expected = base + steps[0][:, None, None] * a + steps[1][None, :, None] * b + steps[2] * c
    return (a, b, c) if min(strides) > 0 and torch.equal(expected, offset_PHD) else None


def read_slots(kv_cache_BHNC: Tensor, layout: BlockLayout, blocks_T: Tensor, offsets_T: Tensor) -> Tensor:
    """K and V of the tokens at ``(blocks_T, offsets_T)`` -> ``[2, T, H, D]`` on the cache's device."""
    halves = (
        (layout.key_PHD, layout.key_strides),
        (layout.value_PHD, layout.value_strides),
    )
    return torch.stack(
        [_read_half(kv_cache_BHNC, where, strides, blocks_T, offsets_T) for where, strides in halves]
    )


def _read_half(
    kv_cache_BHNC: Tensor,
    offset_PHD: Tensor,
    strides: tuple[int, int, int] | None,
    blocks_T: Tensor,
    offsets_T: Tensor,
) -> Tensor:
    num_blocks, block_stride = kv_cache_BHNC.shape[0], kv_cache_BHNC.stride(0)
    start = kv_cache_BHNC.storage_offset()
    if strides is not None:
        view_BPHD = kv_cache_BHNC.as_strided(
            (num_blocks, *offset_PHD.shape),
            (block_stride, *strides),
            start + int(offset_PHD[0, 0, 0]),
        )
        return view_BPHD[blocks_T, offsets_T]
    span = int(offset_PHD.max()) + 1
    flat_BE = kv_cache_BHNC.as_strided((num_blocks, span), (block_stride, 1), start)
    return flat_BE[blocks_T[:, None, None], offset_PHD[offsets_T]]  # [T, H, D]
