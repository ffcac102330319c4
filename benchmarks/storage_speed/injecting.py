"""Host to paged blocks: chunks in memory, moved to new positions and written, ours and by vLLM's own backend.

The yardstick is one ``copy_`` of the same bytes by torch. The backend's writer is called as the engine calls
it, on caches of the layout that the engine gives it; without vLLM there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.storage_speed.timing import interleaved, ratios, spread, timed
from benchmarks.storage_speed.turns import QWEN
from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into
from kv_agent.vllm_plugin.direct import DirectWriter
from kv_agent.vllm_plugin.paged_cache import PagedCache, PagedLayer
from kv_agent.vllm_plugin.staging import Staging

BLOCK_TOKENS = 128  # vLLM's default on a CPU
CHUNK_TOKENS = 128
NUM_CHUNKS = 16
THREADS = 2  # as many as cores
DELTA = 1000
ACROSS = 37  # tokens into a block, where nothing is aligned

Write = Callable[[Tensor, Tensor, Tensor], None]


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    writes, layers = _backend(NUM_CHUNKS + 2)
    cache = PagedCache(layers, BLOCK_TOKENS)
    half = QWEN.head_dim // 2
    scheme = RotaryScheme(
        inv_freq=tuple(1e6 ** (-i / half) for i in range(half)), rotary_dim=2 * half, neox=True
    )
    generator = torch.Generator().manual_seed(0)
    shape = (QWEN.layers, 2, CHUNK_TOKENS * NUM_CHUNKS, QWEN.heads, QWEN.head_dim)
    whole = torch.randn(shape, generator=generator).bfloat16()
    chunks = [chunk.contiguous() for chunk in torch.split(whole, CHUNK_TOKENS, dim=2)]
    block_ids = list(range(1, NUM_CHUNKS + 2))
    staging = Staging(cache, scheme)
    copy, buffer = torch.empty_like(whole), torch.empty_like(chunks[0])
    slots = torch.arange(BLOCK_TOKENS, BLOCK_TOKENS + shape[2])

    def pieces(numbers: Iterable[int], delta: int, begin: int = 0) -> list[Piece]:
        return [Piece(kv_L2THD=chunks[one], start=begin + one * CHUNK_TOKENS, delta=delta) for one in numbers]

    def inject(delta: int) -> None:
        staging.write(pieces(range(NUM_CHUNKS), delta), block_ids)

    direct = DirectWriter(cache.copier, scheme) if cache.copier is not None else None
    threads = ThreadPoolExecutor(THREADS)

    def write_directly(numbers: Iterable[int], delta: int, begin: int = 0) -> None:
        assert direct is not None
        direct.into(block_ids)(pieces(numbers, delta, begin))(0, cache.num_layers)

    def side_by_side(delta: int) -> None:
        parts = [range(first, NUM_CHUNKS, THREADS) for first in range(THREADS)]
        list(threads.map(partial(write_directly, delta=delta), parts))

    def write_chunk_by_chunk() -> None:
        for chunk, slots_T in zip(chunks, torch.split(slots, CHUNK_TOKENS), strict=True):
            _write(writes, chunk, slots_T)

    def rotate(through: Callable[[Tensor, Tensor], None]) -> None:
        for chunk in chunks:
            through(buffer[:, 0], chunk[:, 0])

    def by_torch(out: Tensor, keys: Tensor) -> None:
        # The kernel takes four dims; five are for torch.
        copy_rotated_into(out[None], keys[None], DELTA, scheme)

    halves = [(copy[part], whole[part]) for part in (slice(QWEN.layers // 2), slice(QWEN.layers // 2, None))]

    def copy_half(half: tuple[Tensor, Tensor]) -> None:
        half[0].copy_(half[1])

    arms = {
        "memcpy": lambda: copy.copy_(whole),
        "memcpy_two_threads": lambda: list(threads.map(copy_half, halves)),
        "direct_moved": lambda: side_by_side(DELTA),
        "direct_in_place": lambda: side_by_side(0),
        "direct_moved_one_thread": lambda: write_directly(range(NUM_CHUNKS), DELTA),
        "direct_in_place_one_thread": lambda: write_directly(range(NUM_CHUNKS), 0),
        "direct_moved_across": lambda: write_directly(range(NUM_CHUNKS), DELTA, ACROSS),
        "moved": lambda: inject(DELTA),
        "in_place": lambda: inject(0),
        "writer_alone": lambda: _write(writes, whole, slots),
        "writer_chunk_by_chunk": write_chunk_by_chunk,
        "values_alone": lambda: [buffer[:, 1].copy_(chunk[:, 1]) for chunk in chunks],
        "rotation_alone": lambda: rotate(lambda out, keys: copy_rotated_into(out, keys, DELTA, scheme)),
        "rotation_by_torch": lambda: rotate(by_torch),
    }
    if direct is None:  # the backend keeps keys and values in no regular way on this machine
        arms = {name: work for name, work in arms.items() if not name.startswith("direct")}
    seconds = interleaved({name: timed(work) for name, work in arms.items()}, rounds)
    threads.shutdown()
    yield {
        "part": "inject",
        "case": f"{NUM_CHUNKS} chunks of {CHUNK_TOKENS} tokens, {QWEN.name}",
        "bytes": whole.nbytes,
        "rounds": rounds,
        "ms": {name: spread([one * 1e3 for one in times]) for name, times in seconds.items()},
        "of_memcpy": {
            name: ratios(seconds["memcpy"], times) for name, times in seconds.items() if name != "memcpy"
        },
        "of_writer": ratios(seconds["writer_alone"], seconds["moved"]),
    }


def _write(writes: Sequence[Write], kv_L2THD: Tensor, slots_T: Tensor) -> None:
    for write, kv_2THD in zip(writes, kv_L2THD, strict=True):
        write(kv_2THD[0], kv_2THD[1], slots_T)


def _backend(num_blocks: int) -> tuple[list[Write], list[PagedLayer]]:
    """vLLM's CPU attention backend for each layer, with a cache of its own."""
    from vllm.v1.attention.backends import cpu_attn

    backend: Any = object.__new__(cpu_attn.CPUAttentionBackendImpl)  # to be made it needs a whole engine
    backend.attn_type, backend.kv_cache_dtype = "decoder", "auto"
    isa = cpu_attn._get_attn_isa(torch.bfloat16, BLOCK_TOKENS, QWEN.head_dim)
    paged = []
    for _ in range(QWEN.layers):
        size = (num_blocks, QWEN.heads, BLOCK_TOKENS, 2 * QWEN.head_dim)
        kv_cache = torch.zeros(size, dtype=torch.bfloat16)
        layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
        paged.append(
            PagedLayer(
                kv_cache_BHNC=kv_cache,
                write=_writer(backend, layer, kv_cache),
                num_kv_heads=QWEN.heads,
                head_dim=QWEN.head_dim,
            )
        )
    return [layer.write for layer in paged], paged


def _writer(backend: Any, layer: SimpleNamespace, kv_cache: Tensor) -> Write:
    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        backend.do_kv_cache_update(layer, key_THD, value_THD, kv_cache, slots_T)

    return write
