"""The engine's paged KV of all layers behind two calls: read token ranges, write token ranges."""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.block_copy import BlockCopier, Piece
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.paging import BlockLayout, SlotWriter, measure_layout, read_slots

# vLLM never hands this block to a request; it pads block tables.
NULL_BLOCK = 0

# (kv_L2THD, block_ids, start): puts KV at positions from ``start`` on.
Put = Callable[[Tensor, Sequence[int], int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLayer:
    """One attention layer: its cache ``[blocks, heads, tokens, content]`` and its backend's writer."""

    kv_cache_BHNC: Tensor
    write: SlotWriter
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """KV on its way to host memory; ``is_there`` is a GPU's event, ``None`` where it is there."""

    kv_L2THD: Tensor
    is_there: Any = None

    def wait(self) -> Tensor:
        """The KV when all of it has come. Any thread may wait."""
        if self.is_there is not None:
            self.is_there.synchronize()
        return self.kv_L2THD


class PagedCache:
    """Reads and writes KV of token ranges given a request's block ids."""

    def __init__(self, layers: Sequence[PagedLayer], block_tokens: int) -> None:
        shapes = {(x.num_kv_heads, x.head_dim, x.kv_cache_BHNC.dtype) for x in layers}
        if len(shapes) != 1:
            raise UnsupportedModelError(
                "the model's attention layers differ in KV heads, head size or dtype, which kv_agent does "
                "not store; start without kv_agent"
            )
        dtype = layers[0].kv_cache_BHNC.dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"kv_agent does not store quantised KV caches, this one holds {dtype}; start vLLM with "
                "--kv-cache-dtype auto, or without kv_agent"
            )
        self._layers = tuple(layers)
        self.block_tokens = block_tokens
        self.device = layers[0].kv_cache_BHNC.device
        self.dtype = dtype
        self._shape_PHD = (block_tokens, layers[0].num_kv_heads, layers[0].head_dim)
        self._layouts = tuple(self._measure(layer, self._shape_PHD) for layer in layers)
        self._copier = self._checked_copier()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_heads(self) -> int:
        """KV heads of a layer."""
        return self._shape_PHD[1]

    @property
    def head_dim(self) -> int:
        return self._shape_PHD[2]

    @property
    def has_streams(self) -> bool:
        """Whether its device copies beside what it computes."""
        return self.device.type != "cpu"

    @property
    def copier(self) -> BlockCopier | None:
        """Writes KV from any thread and as the backend does, bit for bit; ``None`` where nothing here can."""
        return self._copier

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token over all layers."""
        layer = self._layers[0]
        return 2 * self.num_layers * layer.num_kv_heads * layer.head_dim * layer.kv_cache_BHNC.element_size()

    def fits(self, kv_L2THD: Tensor) -> bool:
        """Whether this is KV of as many layers and heads as here, in the same dtype."""
        layer = self._layers[0]
        L, two, _, H, D = kv_L2THD.shape
        wanted = (self.num_layers, 2, layer.num_kv_heads, layer.head_dim)
        return (L, two, H, D) == wanted and kv_L2THD.dtype == layer.kv_cache_BHNC.dtype

    def read(
        self, block_ids: Sequence[int], start: int, end: int, layers: Sequence[int] | None = None
    ) -> Tensor:
        """What :meth:`begin_reading` reads, when it is there."""
        return self.begin_reading(block_ids, start, end, layers).wait()

    def begin_reading(
        self, block_ids: Sequence[int], start: int, end: int, layers: Sequence[int] | None = None
    ) -> Reading:
        """KV of positions ``[start, end)`` -> host tensor ``[L, 2, T, H, D]``, keys as in the cache.

        ``layers`` picks some layers, in that order; all of them by default. On a GPU the model's stream does
        it, before all that it is asked for later, so the blocks can be given back at once.
        """
        if self._copier is not None and layers is None:
            kv_L2THD = torch.empty((self.num_layers, 2, end - start, *self._shape_PHD[1:]), dtype=self.dtype)
            self._copier.gather(Piece(kv_L2THD, start), block_ids).run()
            return Reading(kv_L2THD=kv_L2THD)
        blocks_T, offsets_T = self._slots(block_ids, start, end)
        chosen = range(self.num_layers) if layers is None else layers
        shape = (len(chosen), 2, end - start, *self._shape_PHD[1:])
        # A GPU copies into pinned memory without a detour; layer by layer it needs little memory itself.
        kv_l2THD = torch.empty(shape, dtype=self.dtype, pin_memory=self.has_streams)
        for out_2THD, i in zip(kv_l2THD, chosen, strict=True):
            kv_2THD = read_slots(self._layers[i].kv_cache_BHNC, self._layouts[i], blocks_T, offsets_T)
            out_2THD.copy_(kv_2THD, non_blocking=True)
        if not self.has_streams:
            return Reading(kv_L2THD=kv_l2THD)
        device: Any = torch.get_device_module(self.device)
        is_there = device.Event()
        is_there.record(device.current_stream())
        return Reading(kv_L2THD=kv_l2THD, is_there=is_there)

    def write(
        self, kv_l2THD: Tensor, block_ids: Sequence[int], start: int, layers: slice = slice(None)
    ) -> None:
        """Put KV of these ``layers``, by default all, at positions ``[start, start + T)``.

        The attention backend's own writer does it.
        """
        blocks_T, offsets_T = self._slots(block_ids, start, start + kv_l2THD.shape[2])
        slots_T = blocks_T * self.block_tokens + offsets_T
        kv_l2THD = kv_l2THD.to(self.device, non_blocking=True)
        for layer, kv_2THD in zip(self._layers[layers], kv_l2THD, strict=True):
            layer.write(kv_2THD[0].contiguous(), kv_2THD[1].contiguous(), slots_T)

    def puts_alike(self, put: Put) -> bool:
        """Whether ``put`` leaves the null block as the backends' own writers do."""
        P, H, D = self._shape_PHD
        generator = torch.Generator().manual_seed(1)
        kv_L2PHD = torch.randn((self.num_layers, 2, P, H, D), generator=generator).to(self.dtype)
        blocks = [layer.kv_cache_BHNC[NULL_BLOCK] for layer in self._layers]
        saved = [block.clone() for block in blocks]
        try:
            self.write(kv_L2PHD, [NULL_BLOCK], 0)
            expected = [block.clone() for block in blocks]
            for block, before in zip(blocks, saved, strict=True):
                block.copy_(before)
            for start, end in ((0, 1), (1, P)):  # a part of a block is not all of it
                put(kv_L2PHD[:, :, start:end], [NULL_BLOCK], start)
            pairs = zip(blocks, expected, strict=True)
            return all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)
        finally:
            for block, before in zip(blocks, saved, strict=True):
                block.copy_(before)

    def _slots(self, block_ids: Sequence[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        positions_T = torch.arange(start, end, device=self.device)
        table = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        return table[positions_T // self.block_tokens], positions_T % self.block_tokens

    def _checked_copier(self) -> BlockCopier | None:
        caches = [layer.kv_cache_BHNC for layer in self._layers]
        halves = {layout.strided for layout in self._layouts}
        strided = halves.pop()
        is_one = not halves and len({(x.shape, x.stride(0)) for x in caches}) == 1
        if strided is None or not is_one or self.device.type != "cpu":
            return None
        copier = BlockCopier(
            caches_L=caches,
            block_items=caches[0].stride(0),
            shape_PHD=self._shape_PHD,
            key=strided[0],
            value=strided[1],
        )
        return copier if attempt(partial(self._copies_alike, copier), False) else None

    def _copies_alike(self, copier: BlockCopier) -> bool:
        """Whether it writes as the backends do, and reads what it wrote."""
        are_read_alike: list[bool] = []

        def put(kv_L2THD: Tensor, block_ids: Sequence[int], start: int) -> None:
            copier.scatter([Piece(kv_L2THD, start)], block_ids).run()
            read_L2THD = torch.empty(kv_L2THD.shape, dtype=kv_L2THD.dtype)
            copier.gather(Piece(read_L2THD, start), block_ids).run()
            are_read_alike.append(torch.equal(_bits(read_L2THD), _bits(kv_L2THD)))

        return self.puts_alike(put) and all(are_read_alike)

    def _measure(self, layer: PagedLayer, shape_PHD: tuple[int, int, int]) -> BlockLayout:
        layout = measure_layout(
            layer.kv_cache_BHNC, layer.write, scratch_block=NULL_BLOCK, shape_PHD=shape_PHD
        )
        _check_layout(layer, layout, shape_PHD)
        return layout


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _check_layout(layer: PagedLayer, layout: BlockLayout, shape_PHD: tuple[int, int, int]) -> None:
    """Write random KV to the null block and read it back: what the layout says must be bit-exact."""
    cache = layer.kv_cache_BHNC
    saved = cache[NULL_BLOCK].clone()
    generator = torch.Generator().manual_seed(0)
    kv_2PHD = torch.randn((2, *shape_PHD), generator=generator).to(cache.dtype).to(cache.device)
    offsets_T = torch.arange(shape_PHD[0], device=cache.device)
    try:
        layer.write(kv_2PHD[0], kv_2PHD[1], offsets_T + NULL_BLOCK * shape_PHD[0])
        read = read_slots(cache, layout, torch.full_like(offsets_T, NULL_BLOCK), offsets_T)
    finally:
        cache[NULL_BLOCK].copy_(saved)
    if not torch.equal(read, kv_2PHD):
        raise UnsupportedModelError(
            "the attention backend changes KV when it stores it, so kv_agent cannot restore it bit-exactly; "
            "choose another attention backend or start without kv_agent"
        )
