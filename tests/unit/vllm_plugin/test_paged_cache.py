"""Token ranges of a paged cache against the same tokens in one dense tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.vllm_plugin.paged_cache import NULL_BLOCK, PagedCache
from tests.unit.vllm_plugin.backends import (
    PACKED,
    STRIDED,
    Backend,
    Sizes,
    heads_outermost,
    interleaved_pairs,
    one_layer_of_many,
    token_rows_hnd,
    token_rows_nhd,
    transposed_keys,
)
from tests.unit.vllm_plugin.told import Told

SIZES = Sizes(B=9, P=4, H=2, D=6)
MIXED = (token_rows_nhd, interleaved_pairs, transposed_keys, one_layer_of_many, heads_outermost)


def random_kv(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers_of(*builds: Callable[[Sizes, torch.dtype], Backend], dtype: torch.dtype) -> list[Backend]:
    return [build(SIZES, dtype) for build in builds]


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    blocks=st.permutations(range(1, SIZES.B)),
    ranges=st.lists(st.tuples(st.integers(0, 31), st.integers(1, 32)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_ranges_are_written_and_read_at_any_offset_through_any_block_table(
    dtype: torch.dtype, blocks: list[int], ranges: list[tuple[int, int]], seed: int
) -> None:
    backends = layers_of(*MIXED, dtype=dtype)
    cache = PagedCache([backend.layer() for backend in backends], SIZES.P)
    total = len(blocks) * SIZES.P
    dense_L2THD = cache.read(blocks, 0, total)
    for number, (start, length) in enumerate(ranges):
        end = min(start + length, total)
        kv_L2THD = random_kv(len(MIXED), 2, end - start, SIZES.H, SIZES.D, dtype=dtype, seed=seed + number)
        cache.write(kv_L2THD, blocks, start)
        dense_L2THD[:, :, start:end] = kv_L2THD

    everything = cache.read(blocks, 0, total)
    assert torch.equal(everything.view(torch.uint8), dense_L2THD.view(torch.uint8))
    for start, length in ranges:
        end = min(start + length, total)
        part = cache.read(blocks, start, end)
        expected = dense_L2THD[:, :, start:end].contiguous()
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


class OnStreams(PagedCache):
    """In host memory, and as if a device copied beside what it computes."""

    has_streams = True


def test_reading_waits_for_the_device_only_where_it_is_told_to(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = layers_of(interleaved_pairs, interleaved_pairs, dtype=torch.bfloat16)
    layers = [backend.layer() for backend in backends]
    expected = PagedCache(layers, SIZES.P).read([3, 1], 1, 7)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **kwargs: empty(*sizes, **kwargs))

    reading = OnStreams(layers, SIZES.P).begin_reading([3, 1], 1, 7, (0, 1))
    assert told.said == ["event 1 is behind the model's work"]
    found = reading.wait()
    assert told.said[1:] == ["waited for event 1"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_blocks_may_be_overwritten_as_soon_as_reading_has_begun() -> None:
    backends = [token_rows_nhd(SIZES, torch.bfloat16, "cuda") for _ in range(3)]
    cache = PagedCache([backend.layer() for backend in backends], SIZES.P)
    expected = cache.read([3, 1, 5], 1, 11)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # so that the copies have not even begun
        busy = busy @ busy

    reading = cache.begin_reading([3, 1, 5], 1, 11)
    for backend in backends:
        backend.memory.zero_()

    assert reading.kv_L2THD.is_pinned()
    assert torch.equal(reading.wait().view(torch.uint8), expected.view(torch.uint8))


def test_position_in_a_sequence_is_the_slot_of_its_block() -> None:
    (backend,) = layers_of(token_rows_nhd, dtype=torch.float32)
    cache = PagedCache([backend.layer()], SIZES.P)
    kv_L2THD = random_kv(1, 2, 6, SIZES.H, SIZES.D, dtype=torch.float32, seed=3)
    cache.write(kv_L2THD, [7, 2, 5], 3)
    rows_BPHC = backend.memory.view(SIZES.B, SIZES.P, SIZES.H, 2 * SIZES.D)
    for index, (block, offset) in enumerate([(7, 3), (2, 0), (2, 1), (2, 2), (2, 3), (5, 0)]):
        assert torch.equal(rows_BPHC[block, offset, :, : SIZES.D], kv_L2THD[0, 0, index])
        assert torch.equal(rows_BPHC[block, offset, :, SIZES.D :], kv_L2THD[0, 1, index])


def test_writing_changes_only_its_own_slots() -> None:
    (backend,) = layers_of(token_rows_nhd, dtype=torch.float32)
    cache = PagedCache([backend.layer()], SIZES.P)
    before = backend.memory.clone().view(SIZES.B, SIZES.P, -1)
    cache.write(random_kv(1, 2, 5, SIZES.H, SIZES.D, dtype=torch.float32, seed=3), [7, 2], 2)
    after = backend.memory.view(SIZES.B, SIZES.P, -1)
    changed = {
        (block, offset)
        for block in range(SIZES.B)
        for offset in range(SIZES.P)
        if not torch.equal(before[block, offset].view(torch.uint8), after[block, offset].view(torch.uint8))
    }
    assert changed == {(7, 2), (7, 3), (2, 0), (2, 1), (2, 2)}


@pytest.mark.slow  # code is made for every layout
@pytest.mark.parametrize("build", STRIDED + PACKED, ids=lambda build: build.__name__)
def test_opening_leaves_the_memory_as_it_was(build: Callable[[Sizes, torch.dtype], Backend]) -> None:
    backend = build(SIZES, torch.bfloat16)
    before = backend.memory.clone()
    PagedCache([backend.layer()], SIZES.P)
    assert torch.equal(backend.memory.view(torch.uint8), before.view(torch.uint8))
    assert NULL_BLOCK == 0


def test_some_layers_are_read_in_the_order_asked_for() -> None:
    cache = PagedCache([backend.layer() for backend in layers_of(*MIXED, dtype=torch.bfloat16)], SIZES.P)
    everything = cache.read([3, 1], 1, 7)
    some = cache.read([3, 1], 1, 7, (4, 1))
    assert torch.equal(some.view(torch.uint8), everything[[4, 1]].view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((2, 2, 5, 2, 6), torch.float32, True),
        ((2, 2, 5, 2, 6), torch.bfloat16, False),
        ((3, 2, 5, 2, 6), torch.float32, False),
        ((2, 2, 5, 6, 2), torch.float32, False),
    ],
)
def test_kv_of_another_model_does_not_fit(shape: tuple[int, ...], dtype: torch.dtype, fits: bool) -> None:
    backends = layers_of(token_rows_nhd, token_rows_nhd, dtype=torch.float32)
    cache = PagedCache([backend.layer() for backend in backends], SIZES.P)
    assert cache.fits(torch.zeros(shape, dtype=dtype)) is fits


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    backends = layers_of(token_rows_nhd, token_rows_hnd, transposed_keys, dtype=torch.bfloat16)
    cache = PagedCache([backend.layer() for backend in backends], SIZES.P)
    assert cache.num_layers == 3
    assert cache.token_bytes == cache.read([1], 0, 1).nbytes


def as_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def as_quarters(x: Tensor) -> Tensor:
    return (x * 4).round() / 4


def without_sign(x: Tensor) -> Tensor:
    return x.abs()


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    "change", [as_bfloat16, as_quarters, without_sign], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("build", [token_rows_nhd, interleaved_pairs], ids=lambda build: build.__name__)
def test_a_backend_that_changes_values_is_refused(
    build: Callable[[Sizes, torch.dtype], Backend], change: Callable[[Tensor], Tensor], half: int
) -> None:
    good = build(SIZES, torch.float32)

    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        good.write(
            change(key_THD) if half == 0 else key_THD, change(value_THD) if half else value_THD, slots_T
        )

    changing = Backend(sizes=SIZES, memory=good.memory, cache_BHPC=good.cache_BHPC, write=write)
    before = good.memory.clone()
    with pytest.raises(UnsupportedModelError, match="changes KV when it stores it"):
        PagedCache([changing.layer()], SIZES.P)
    assert torch.equal(good.memory.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(
    ("other", "dtype"),
    [
        (Sizes(B=9, P=4, H=1, D=6), torch.float32),
        (Sizes(B=9, P=4, H=2, D=12), torch.float32),
        (Sizes(B=9, P=4, H=4, D=3), torch.float32),
        (SIZES, torch.bfloat16),
    ],
)
def test_layers_that_differ_are_refused(other: Sizes, dtype: torch.dtype) -> None:
    one, two = token_rows_nhd(SIZES, torch.float32), token_rows_nhd(other, dtype)
    with pytest.raises(UnsupportedModelError, match="differ in KV heads, head size or dtype"):
        PagedCache([one.layer(), two.layer()], SIZES.P)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantised_cache_is_refused(dtype: torch.dtype) -> None:
    layer = token_rows_nhd(SIZES, dtype).layer()
    with pytest.raises(UnsupportedModelError, match="quantised KV caches"):
        PagedCache([layer], SIZES.P)
