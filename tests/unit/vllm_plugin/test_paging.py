"""Layouts measured through fake backends of several kinds: what their writers store is read bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.vllm_plugin.paging import BlockLayout, measure_layout, read_slots
from tests.unit.vllm_plugin.backends import PACKED, STRIDED, Backend, Sizes, token_rows_nhd

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [
    Sizes(B=5, P=16, H=2, D=8),
    Sizes(B=4, P=5, H=3, D=7),
    Sizes(B=3, P=1, H=1, D=6),
    Sizes(B=3, P=32, H=3, D=48),  # 4608 elements: more than two base-64 digits
]

Build = Callable[[Sizes, torch.dtype], Backend]

every_backend = pytest.mark.parametrize("build", STRIDED + PACKED, ids=lambda build: build.__name__)


def measure(backend: Backend, scratch_block: int = 0) -> BlockLayout:
    return measure_layout(
        backend.cache_BHPC,
        backend.write,
        scratch_block=scratch_block,
        shape_PHD=(backend.sizes.P, backend.sizes.H, backend.sizes.D),
    )


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all: NaNs, infinities, subnormal numbers and negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    bits = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.P}x{s.H}x{s.D}")
def test_reading_slots_gives_what_the_backend_wrote(build: Build, dtype: torch.dtype, sizes: Sizes) -> None:
    backend = build(sizes, dtype)
    layout = measure(backend)
    generator = torch.Generator().manual_seed(7)
    slots_T = torch.randperm(sizes.B * sizes.P, generator=generator)[: max(2, sizes.B * sizes.P * 3 // 4)]
    T = slots_T.numel()
    key_THD, value_THD = random_bits(2, T, sizes.H, sizes.D, dtype=dtype)
    backend.write(key_THD, value_THD, slots_T)

    order = torch.randperm(T, generator=generator)
    read_2THD = read_slots(backend.cache_BHPC, layout, slots_T[order] // sizes.P, slots_T[order] % sizes.P)

    assert same_bits(read_2THD[0], key_THD[order])
    assert same_bits(read_2THD[1], value_THD[order])


@every_backend
@pytest.mark.parametrize("scratch_block", [0, 2])
def test_measuring_leaves_the_memory_as_it_was(build: Build, scratch_block: int) -> None:
    backend = build(Sizes(B=4, P=4, H=2, D=6), torch.float16)
    before = backend.memory.clone()
    measure(backend, scratch_block)
    assert same_bits(backend.memory, before)


@pytest.mark.parametrize("build", STRIDED, ids=lambda build: build.__name__)
def test_layouts_with_strides_are_read_through_a_view(build: Build) -> None:
    layout = measure(build(Sizes(B=3, P=4, H=2, D=6), torch.float32))
    assert layout.key_strides is not None
    assert layout.value_strides is not None


@pytest.mark.parametrize("build", PACKED, ids=lambda build: build.__name__)
def test_packed_layouts_have_no_strides(build: Build) -> None:
    layout = measure(build(Sizes(B=3, P=4, H=2, D=6), torch.float32))
    assert (layout.key_strides, layout.value_strides) == (None, None)
    assert layout.block_tokens == 4


def without_last_dim(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((key_THD[..., :-1], torch.zeros_like(key_THD[..., :1])), dim=-1), value_THD


def with_a_dim_twice(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((key_THD[..., 1:2], key_THD[..., 1:]), dim=-1), value_THD


def without_values(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return key_THD, torch.zeros_like(value_THD)


def keys_in_both_halves(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return key_THD, value_THD + key_THD


def one_head_for_all(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return key_THD[:, :1].expand_as(key_THD), value_THD


def averaged_over_heads(key_THD: Tensor, value_THD: Tensor) -> tuple[Tensor, Tensor]:
    return key_THD, value_THD.mean(dim=1, keepdim=True).expand_as(value_THD)


Spoil = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def spoiled(build: Build, spoil: Spoil, dtype: torch.dtype = torch.float32) -> Backend:
    good = build(Sizes(B=3, P=4, H=2, D=6), dtype)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        good.write(*spoil(key_THD, value_THD), slots_T)

    return Backend(sizes=good.sizes, memory=good.memory, cache_BHPC=good.cache_BHPC, write=write)


@every_backend
@pytest.mark.parametrize(
    "spoil",
    [
        without_last_dim,
        with_a_dim_twice,
        without_values,
        keys_in_both_halves,
        one_head_for_all,
        averaged_over_heads,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_writer_that_loses_or_repeats_elements_is_refused(build: Build, spoil: Spoil) -> None:
    backend = spoiled(build, spoil)
    before = backend.memory.clone()
    with pytest.raises(UnsupportedModelError, match="does not keep every KV element once"):
        measure(backend)
    assert same_bits(backend.memory, before)


def test_a_writer_that_fails_leaves_the_memory_as_it_was() -> None:
    good = token_rows_nhd(Sizes(B=3, P=4, H=2, D=6), torch.float32)
    before = good.memory.clone()

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        good.write(key_THD, value_THD, slots_T)
        raise RuntimeError("no such kernel")

    broken = Backend(sizes=good.sizes, memory=good.memory, cache_BHPC=good.cache_BHPC, write=write)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(broken)
    assert same_bits(good.memory, before)
