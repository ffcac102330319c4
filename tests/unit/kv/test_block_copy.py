"""KV goes into and out of blocks as an attention backend's own writer would have it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.kv.block_copy import BlockCopier, Copying, Piece
from kv_agent.kv.block_kernels import Strided
from kv_agent.kv.rope import RotaryScheme, rotate_keys
from kv_agent.vllm_plugin.paged_cache import PagedCache
from tests.unit.vllm_plugin.backends import (
    PACKED,
    STRIDED,
    Backend,
    Sizes,
    token_rows_nhd,
    transposed_keys,
)

L, B, P = 3, 9, 4
WIDE, NARROW = Sizes(B=B, P=P, H=2, D=8), Sizes(B=B, P=P, H=1, D=5)
TALL = Sizes(B=B, P=96, H=2, D=32)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

Build = Callable[[Sizes, torch.dtype], Backend]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def random_kv(num_tokens: int, sizes: Sizes, dtype: torch.dtype, seed: int) -> Tensor:
    """NaNs of every kind included, and one token more than is used: layers have gaps between them."""
    shape = (L, 2, num_tokens + 1, sizes.H, sizes.D * torch.empty((), dtype=dtype).element_size())
    random_bits = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return random_bits.view(dtype)[:, :, 1:]


def slots_of(blocks: list[int], start: int, num_tokens: int) -> Tensor:
    return torch.tensor(
        [blocks[at // TALL.P] * TALL.P + at % TALL.P for at in range(start, start + num_tokens)]
    )


def opened(build: Build, sizes: Sizes, dtype: torch.dtype) -> tuple[list[Backend], PagedCache]:
    backends = [build(sizes, dtype) for _ in range(L)]
    return backends, PagedCache([backend.layer() for backend in backends], sizes.P)


@pytest.mark.slow  # code is made for every layout
@settings(max_examples=60, deadline=None)
@given(
    build=st.sampled_from(STRIDED),
    sizes=st.sampled_from([WIDE, NARROW]),
    dtype=st.sampled_from(DTYPES),
    blocks=st.permutations(range(1, B)),
    start=st.integers(0, 30),
    num_tokens=st.integers(1, 32),
    seed=st.integers(0, 1000),
)
def test_it_writes_what_the_backend_writes_and_reads_what_is_there(
    build: Build, sizes: Sizes, dtype: torch.dtype, blocks: list[int], start: int, num_tokens: int, seed: int
) -> None:
    num_tokens = min(num_tokens, 32 - start)
    ours, cache = opened(build, sizes, dtype)
    theirs, reference = opened(build, sizes, dtype)
    kv_L2THD = random_kv(num_tokens, sizes, dtype, seed)
    copier = cache.copier
    assert copier is not None

    copier.scatter([Piece(kv_L2THD, start)], blocks).run()
    reference.write(kv_L2THD, blocks, start)

    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(bits(one.memory), bits(other.memory))
    read_L2THD = torch.empty_like(kv_L2THD)
    copier.gather(Piece(read_L2THD, start), blocks).run()
    assert torch.equal(bits(read_L2THD), bits(kv_L2THD))
    assert torch.equal(bits(cache.read(blocks, start, start + num_tokens)), bits(kv_L2THD))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    build=st.sampled_from(STRIDED),
    lengths=st.lists(
        st.tuples(st.integers(1, 40), st.just(0) | st.integers(-100_000, 100_000)), min_size=1, max_size=6
    ),
    gap=st.integers(0, 40) | st.just(0),
    layers=st.sampled_from([(0, L), (1, 2)]),
    num_planes=st.sampled_from([5, 16]),
    seed=st.integers(0, 1000),
)
def test_many_pieces_are_turned_and_written_layer_by_layer(
    build: Build,
    lengths: list[tuple[int, int]],
    gap: int,
    layers: tuple[int, int],
    num_planes: int,
    seed: int,
) -> None:
    ours, cache = opened(build, TALL, torch.bfloat16)
    theirs, reference = opened(build, TALL, torch.bfloat16)
    inv_freq = tuple(0.7**plane for plane in range(num_planes))
    scheme = RotaryScheme(inv_freq=inv_freq, rotary_dim=2 * num_planes, neox=True)
    blocks = [5, 3, 8, 1, 2, 7, 4, 6]
    pieces, start = [], gap
    for number, (num_tokens, delta) in enumerate(lengths):
        num_tokens = min(num_tokens, len(blocks) * TALL.P - start)
        if num_tokens < 1:
            break
        shape = (L, 2, num_tokens, TALL.H, TALL.D)
        kv_L2THD = torch.randn(shape, generator=torch.Generator().manual_seed(seed + number)).bfloat16()
        pieces.append(Piece(kv_L2THD, start, delta))
        moved_L2THD = kv_L2THD.clone()
        moved_L2THD[:, 0] = rotate_keys(kv_L2THD[:, 0], delta, scheme)
        for layer in range(*layers):
            reference._layers[layer].write(*moved_L2THD[layer], slots_of(blocks, start, num_tokens))
        start += num_tokens + gap
    assert cache.copier is not None

    cache.copier.scatter(pieces, blocks, scheme).run(*layers)

    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(bits(one.memory), bits(other.memory))


@pytest.mark.parametrize(
    ("build", "sizes", "step"),
    [(token_rows_nhd, WIDE, 1), (transposed_keys, TALL, 7), (transposed_keys, TALL, 32)],
)
def test_threads_write_parts_of_one_block_side_by_side(build: Build, sizes: Sizes, step: int) -> None:
    _, cache = opened(build, sizes, torch.bfloat16)
    copier = cache.copier
    assert copier is not None
    blocks, num_tokens = list(range(sizes.B)), sizes.B * sizes.P
    kv_L2THD = random_kv(num_tokens, sizes, torch.bfloat16, seed=0)

    def write(position: int) -> None:
        part_L2THD = kv_L2THD[:, :, position : position + step]
        copier.scatter([Piece(part_L2THD, position)], blocks).run()

    for _ in range(20):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(0, num_tokens, step)))
        assert torch.equal(bits(cache.read(blocks, 0, num_tokens)), bits(kv_L2THD))


@pytest.mark.parametrize("build", PACKED, ids=lambda build: build.__name__)
def test_there_is_none_for_packed_layouts(build: Build) -> None:
    assert opened(build, WIDE, torch.bfloat16)[1].copier is None


def test_there_is_none_where_layers_differ() -> None:
    backends = [build(WIDE, torch.bfloat16) for build in STRIDED[:2]]
    assert PagedCache([backend.layer() for backend in backends], P).copier is None


def test_there_is_none_where_it_would_not_do_as_the_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: BlockCopier, pieces: list[Piece], blocks: list[int]) -> Copying:
        return scatter(self, [piece._replace(kv_L2THD=piece.kv_L2THD + 1) for piece in pieces], blocks)

    scatter = BlockCopier.scatter
    monkeypatch.setattr(BlockCopier, "scatter", wrong)
    backends, cache = opened(token_rows_nhd, WIDE, torch.float32)

    assert cache.copier is None
    before = [backend.memory.clone() for backend in backends]
    kv_L2THD = random_kv(3, WIDE, torch.float32, seed=1)
    cache.write(kv_L2THD, [4], 1)
    assert torch.equal(bits(cache.read([4], 1, 4)), bits(kv_L2THD))
    assert not torch.equal(bits(backends[0].memory), bits(before[0]))


@pytest.mark.parametrize(
    ("num_tokens", "blocks", "start"), [(5, [1], 0), (4, [1], 1), (1, [1], -1), (1, [B], 0), (1, [-1], 0)]
)
def test_what_does_not_fit_the_blocks_is_refused(num_tokens: int, blocks: list[int], start: int) -> None:
    backends, cache = opened(token_rows_nhd, WIDE, torch.bfloat16)
    before = backends[0].memory.clone()
    kv_L2THD = random_kv(num_tokens, WIDE, torch.bfloat16, seed=2)
    assert cache.copier is not None

    with pytest.raises(ValueError, match="block"):
        cache.copier.scatter([Piece(kv_L2THD, start)], blocks)

    assert torch.equal(bits(backends[0].memory), bits(before))


def test_kv_of_another_shape_or_order_is_refused() -> None:
    caches = [torch.zeros(B, P, 2, 8) for _ in range(L)]
    rows = Strided(first=0, token=16, head=8, dim=1)
    copier = BlockCopier(caches_L=caches, block_items=64, shape_PHD=(P, 2, 8), key=rows, value=rows)
    for shape in (
        (L, 2, 3, 2, 9),
        (L + 1, 2, 3, 2, 8),
        (L, 2, 3, 8, 2),
        (L, 1, 3, 2, 8),
        (L, 2, 0, 2, 8),
        (L, 2),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            copier.scatter([Piece(torch.zeros(shape), 0)], [1])
    fine_L2THD = torch.zeros(L, 2, 3, 2, 8)
    with pytest.raises(ValueError, match="contiguous"):
        copier.scatter([Piece(torch.zeros(L, 2, 2, 3, 8).transpose(2, 3), 0)], [1])
    with pytest.raises(ValueError, match="must be torch"):
        copier.scatter([Piece(fine_L2THD.half(), 0)], [1])
    scheme = RotaryScheme(inv_freq=(1.0, 0.5), rotary_dim=4, neox=True)
    for one in (None, scheme):  # float32 keys are turned by torch, before
        with pytest.raises(ValueError, match="not moved"):
            copier.scatter([Piece(fine_L2THD, 0, 1)], [1], one)
    with pytest.raises(ValueError, match="on their way into blocks"):
        copier.gather(Piece(fine_L2THD, 0, 1), [1])


def test_planes_beyond_a_head_are_refused() -> None:
    caches = [torch.zeros(B, P, 2, 8, dtype=torch.bfloat16) for _ in range(L)]
    rows = Strided(first=0, token=16, head=8, dim=1)
    copier = BlockCopier(caches_L=caches, block_items=64, shape_PHD=(P, 2, 8), key=rows, value=rows)
    scheme = RotaryScheme(inv_freq=(1.0,) * 5, rotary_dim=10, neox=True)
    with pytest.raises(ValueError, match="not moved"):
        copier.scatter([Piece(torch.zeros(L, 2, 3, 2, 8, dtype=torch.bfloat16), 0, 1)], [1], scheme)
