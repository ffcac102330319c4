"""Fake attention backends: each packs a block in its own way and has a writer of its own.

B blocks, P tokens per block, T tokens, H kv heads, D head dim. Every cache is shown to the plugin as
``[B, H, P, 2 D]``; ``None`` slots of real backends do not occur here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_agent.vllm_plugin.paged_cache import PagedLayer
from kv_agent.vllm_plugin.paging import SlotWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    B: int
    P: int
    H: int
    D: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """``memory`` is the whole allocation; ``cache_BHPC`` the view the plugin gets."""

    sizes: Sizes
    memory: Tensor
    cache_BHPC: Tensor
    write: SlotWriter

    def layer(self) -> PagedLayer:
        return PagedLayer(
            kv_cache_BHNC=self.cache_BHPC,
            write=self.write,
            num_kv_heads=self.sizes.H,
            head_dim=self.sizes.D,
        )


def _memory(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Random bits, NaNs included, as an engine's uninitialised memory."""
    num_bytes = num_elements * torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return bits.view(dtype)


def token_rows_nhd(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> Backend:
    """FlashAttention-like: a row per token and head, keys then values; heads inside tokens."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    memory = _memory(B * P * H * 2 * D, dtype).to(device)
    rows_BPHC = memory.view(B, P, H, 2 * D)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        rows_BPHC[slots_T // P, slots_T % P] = torch.cat((key_THD, value_THD), dim=-1)

    return Backend(sizes=sizes, memory=memory, cache_BHPC=rows_BPHC.permute(0, 2, 1, 3), write=write)


def token_rows_hnd(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """As above, tokens inside heads."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    memory = _memory(B * P * H * 2 * D, dtype)
    cache_BHPC = memory.view(B, H, P, 2 * D)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        for key_HD, value_HD, slot in zip(key_THD, value_THD, slots_T.tolist(), strict=True):
            cache_BHPC[slot // P, :, slot % P, :D] = key_HD
            cache_BHPC[slot // P, :, slot % P, D:] = value_HD

    return Backend(sizes=sizes, memory=memory, cache_BHPC=cache_BHPC, write=write)


def one_layer_of_many(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """All layers of a block side by side: a large block stride, and the view starts inside the memory."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    lead, layers, mine = 13, 3, 1
    memory = _memory(lead + B * layers * P * H * 2 * D, dtype)
    rows_BPHC = memory[lead:].view(B, layers, P, H, 2 * D)[:, mine]

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        rows_BPHC[slots_T // P, slots_T % P] = torch.cat((key_THD, value_THD), dim=-1)

    return Backend(sizes=sizes, memory=memory, cache_BHPC=rows_BPHC.permute(0, 2, 1, 3), write=write)


def heads_outermost(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """All blocks of a head together: blocks interleave, a block spans more than its stride."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    memory = _memory(H * B * P * 2 * D, dtype)
    cache_BHPC = memory.view(H, B, P, 2 * D).permute(1, 0, 2, 3)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        flat = memory.view(H, B * P, 2 * D)
        flat[:, slots_T, :D] = key_THD.transpose(0, 1)
        flat[:, slots_T, D:] = value_THD.transpose(0, 1)

    return Backend(sizes=sizes, memory=memory, cache_BHPC=cache_BHPC, write=write)


def transposed_keys(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """CPU "vec": per head, keys ``[D, P]`` and then values ``[P, D]``."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    memory = _memory(B * H * 2 * P * D, dtype)
    heads_BHE = memory.view(B, H, 2 * P * D)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        keys_BHDP = heads_BHE[..., : P * D].unflatten(-1, (D, P))
        values_BHPD = heads_BHE[..., P * D :].unflatten(-1, (P, D))
        for key_HD, value_HD, slot in zip(key_THD, value_THD, slots_T.tolist(), strict=True):
            keys_BHDP[slot // P, :, :, slot % P] = key_HD
            values_BHPD[slot // P, :, slot % P] = value_HD

    return Backend(sizes=sizes, memory=memory, cache_BHPC=heads_BHE.view(B, H, P, 2 * D), write=write)


def interleaved_pairs(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """AMX-like: key dims in pairs ``[D/2, P, 2]``, value tokens in pairs ``[P/2, D, 2]``; last ones alone."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    memory = _memory(B * H * 2 * P * D, dtype)
    heads_BHE = memory.view(B, H, 2 * P * D)

    def pairs(outer: int, inner: int, outer_size: int, inner_size: int) -> int:
        """Offset of ``outer`` in pairs: ``[outer/2, inner, 2]``; an odd last ``outer`` has no partner."""
        partners = 1 if outer_size % 2 and outer == outer_size - 1 else 2
        return outer // 2 * 2 * inner_size + inner * partners + outer % 2

    key_PD = torch.tensor([[pairs(d, p, D, P) for d in range(D)] for p in range(P)])
    value_PD = P * D + torch.tensor([[pairs(p, d, P, D) for d in range(D)] for p in range(P)])

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        for key_HD, value_HD, slot in zip(key_THD, value_THD, slots_T.tolist(), strict=True):
            heads_BHE[slot // P][:, key_PD[slot % P]] = key_HD
            heads_BHE[slot // P][:, value_PD[slot % P]] = value_HD

    return Backend(sizes=sizes, memory=memory, cache_BHPC=heads_BHE.view(B, H, P, 2 * D), write=write)


def pairs_with_heads_outermost(sizes: Sizes, dtype: torch.dtype) -> Backend:
    """Packed pairs in interleaving blocks: the gather must not run past the end of the memory."""
    B, P, H, D = sizes.B, sizes.P, sizes.H, sizes.D
    packed = interleaved_pairs(sizes, dtype)
    lead = 5
    memory = _memory(lead + H * B * 2 * P * D, dtype)
    heads_BHE = memory[lead:].view(H, B, 2 * P * D).permute(1, 0, 2)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        blocks_T = torch.unique(slots_T // P)
        staged_BHE = packed.memory.view(B, H, 2 * P * D)
        staged_BHE[blocks_T] = heads_BHE[blocks_T]
        packed.write(key_THD, value_THD, slots_T)
        heads_BHE[blocks_T] = staged_BHE[blocks_T]

    return Backend(sizes=sizes, memory=memory, cache_BHPC=heads_BHE.unflatten(-1, (P, 2 * D)), write=write)


STRIDED: tuple[Callable[[Sizes, torch.dtype], Backend], ...] = (
    token_rows_nhd,
    token_rows_hnd,
    one_layer_of_many,
    heads_outermost,
    transposed_keys,
)
PACKED: tuple[Callable[[Sizes, torch.dtype], Backend], ...] = (interleaved_pairs, pairs_with_heads_outermost)
